"""The order of the rooms: a room imports only from rooms before it, and no file of a room imports in a circle.

Every import counts: at the top of a file, inside a function, under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from rooms import ORDER, ROOT

CLI = {"cli", "commands", "doctor", "__main__"}
FLOOR = {room: floor for floor, rooms in enumerate(ORDER) for room in rooms}
VIOLATIONS: set[str] = set()
"""Imports against the order that are still there, as "from -> to"; the list only shrinks."""


def modules() -> dict[str, Path]:
    """Every module of the package, and of the two folders that are installed inside it, without the leading "dit4dit."."""
    found = {}
    for folder in ("dit4dit", "kernels", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts[1:] if folder == "dit4dit" else parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room(module: str) -> str:
    top = module.partition(".")[0]
    return "cli" if top in CLI else top


def imports(modules: dict[str, Path], name: str) -> Iterator[str]:
    """The modules that a module imports; a name that a package's __init__ passes on counts as its home."""
    for node in ast.walk(ast.parse(modules[name].read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name.partition(".")[2] for a in node.names if a.name.partition(".")[0] == "dit4dit")
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{modules[name]}:{node.lineno}: imports are absolute"
            top, _, inner = (node.module or "").partition(".")
            if top == "dit4dit":
                for alias in node.names:
                    submodule = f"{inner}.{alias.name}".lstrip(".")
                    yield submodule if submodule in modules else home(modules, inner, alias.name)


def home(modules: dict[str, Path], module: str, symbol: str) -> str:
    path = modules.get(module)
    if path is not None and path.name == "__init__.py" and module:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and symbol in [a.asname or a.name for a in node.names]:
                return (node.module or "").partition(".")[2]
    return module


def arrows() -> set[tuple[str, str]]:
    """(from, to) of every import inside the package; `dit4dit` itself, whose __init__ is lazy, belongs to no room."""
    known = modules()
    return {(a, b) for a in known for b in imports(known, a) if a and b and b != "_C" and a != b}


def circles(edges: set[tuple[str, str]]) -> set[frozenset[str]]:
    """Files that reach each other."""
    to: dict[str, set[str]] = defaultdict(set)
    for a, b in edges:
        to[a].add(b)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        ahead = [start]
        while ahead:
            new = to[ahead.pop()] - seen
            seen |= new
            ahead += new
        return seen

    far = {a: reached(a) for a in list(to)}
    rings = {frozenset({a} | {b for b in far[a] if a in far.get(b, ())}) for a in far if a in far[a]}
    return {ring for ring in rings if len(ring) > 1}


def test_every_file_lies_in_a_room() -> None:
    assert {room(module) for module in modules() if module} == set(FLOOR)


def test_arrows_point_one_way() -> None:
    wrong = [f"{a} -> {b}" for a, b in sorted(arrows()) if room(a) != room(b) and FLOOR[room(b)] >= FLOOR[room(a)]]
    assert not wrong, "a room imports only from rooms before it: CONTRIBUTING.md, The house"


def test_no_circle_of_files() -> None:
    assert not circles({(a, b) for a, b in arrows() if room(a) == room(b)})


def test_the_reader_of_imports_sees_them_all(tmp_path: Path) -> None:
    """Were it blind to one kind, the tests above could not fail."""
    package, file = tmp_path / "__init__.py", tmp_path / "file.py"
    package.write_text("from dit4dit.a.b import Passed\n")
    file.write_text(
        "import dit4dit.one\nfrom dit4dit import two\nfrom dit4dit.a import Passed\n"
        "if TYPE_CHECKING:\n    from dit4dit.three import x\n"
        "def f():\n    def g():\n        from dit4dit.four import y\n"
    )
    known = {"one": file, "two": file, "a": package, "a.b": file, "three": file, "four": file, "file": file}
    assert set(imports(known, "file")) == {"one", "two", "a.b", "three", "four"}
    assert circles({("a", "b"), ("b", "c"), ("c", "a"), ("c", "d"), ("e", "e")}) == {frozenset("abc")}
