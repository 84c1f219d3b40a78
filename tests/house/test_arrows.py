"""The order of the rooms: a room imports only from rooms before it, and no file of a room imports in a circle.

Every import counts: at the top of a file, inside a function, under TYPE_CHECKING, by a string. A name that a package's __init__
passes on, at once or lazily, is imported from its home.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from rooms import ORDER, ROOT

CLI = {"cli", "commands", "doctor", "__main__"}
FLOOR = {room: floor for floor, rooms in enumerate(ORDER) for room in rooms}
BY_NAME = ("import_module", "__import__", "run_module", "find_spec")
"""Functions that import what a string names."""


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
    """The modules that a module imports, as `modules` names them; "" for the package itself."""
    where = modules[name]
    for node in ast.walk(ast.parse(where.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top, _, inner = alias.name.partition(".")
                if top == "dit4dit":
                    assert inner or not alias.asname, (
                        f"{where}:{node.lineno}: another name for dit4dit hides what is used"
                    )
                    yield inner
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{where}:{node.lineno}: imports are absolute"
            top, _, inner = (node.module or "").partition(".")
            if top == "dit4dit":
                yield from (home(modules, inner, alias.name) for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dit4dit":
            yield home(modules, "", node.attr)  # dit4dit.Policy after `import dit4dit`
        elif isinstance(node, ast.Call) and node.args and ast.unparse(node.func).rpartition(".")[2] in BY_NAME:
            # up to the first {} of an f-string: its folder
            text = re.match(r"f?['\"]dit4dit\.([\w.]*)", ast.unparse(node.args[0]))
            if text:
                yield text[1].rstrip(".")


def home(modules: dict[str, Path], module: str, symbol: str) -> str:
    """The module that `from dit4dit.module import symbol` takes it from."""
    submodule = f"{module}.{symbol}".lstrip(".")
    if submodule in modules:
        return submodule
    path = modules.get(module)
    if path is not None and path.name == "__init__.py":
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    if symbol == (alias.asname or alias.name) and node.module.startswith("dit4dit"):
                        return home(modules, node.module.partition(".")[2], alias.name)
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


def test_what_is_logged_names_its_room() -> None:
    """So that `logging.getLogger("dit4dit.policy")` has all of it, wherever in the room a file lies."""
    for name, path in modules().items():
        for text in re.findall(r"getLogger\((.*?)\)", path.read_text()):
            if text != '"DeepSpeed"':
                assert re.match(rf'"dit4dit\.{room(name)}[".]', text) or room(name) == "cli", (name, text)


@pytest.mark.parametrize(
    "code,found",
    [
        ("import dit4dit.one", {"one"}),
        ("import dit4dit.one as other", {"one"}),
        ("from dit4dit import one as other, two", {"one", "two"}),
        ("try:\n    from dit4dit.one import x\nexcept ImportError:\n    from dit4dit.two import x", {"one", "two"}),
        ("if TYPE_CHECKING:\n    from dit4dit.one import x", {"one"}),
        ("class C:\n    from dit4dit.one import x", {"one"}),
        ("def f():\n    def g():\n        from dit4dit.one import x", {"one"}),
        ("from dit4dit.a import Passed", {"a.b"}),
        ("from dit4dit import Lazy", {"a.b"}),
        ("import dit4dit\ndit4dit.Lazy", {"", "a.b"}),
        ("import dit4dit.one\ndit4dit.two.x", {"one", "two"}),
        ("importlib.import_module('dit4dit.one')", {"one"}),
        ("import_module(f'dit4dit.a.{name}')", {"a"}),
        ("__import__('dit4dit.one')", {"one"}),
        ("runpy.run_module('dit4dit.one')", {"one"}),
        ("'dit4dit.one, in a text'", set()),
    ],
)
def test_the_reader_of_imports_sees_them_all(code: str, found: set[str], tmp_path: Path) -> None:
    """Were it blind to one kind, the tests above could not fail."""
    top, package, file = tmp_path / "__init__.py", tmp_path / "a" / "__init__.py", tmp_path / "file.py"
    package.parent.mkdir()
    top.write_text("if TYPE_CHECKING:\n    from dit4dit.a import Passed as Lazy\n")
    package.write_text("from dit4dit.a.b import Passed\n")
    file.write_text(code)
    known = {"": top, "one": file, "two": file, "a": package, "a.b": file, "file": file}
    assert set(imports(known, "file")) == found


@pytest.mark.parametrize("code", ["from . import one", "from .one import x", "import dit4dit as d"])
def test_imports_that_hide_where_they_lead(code: str, tmp_path: Path) -> None:
    file = tmp_path / "file.py"
    file.write_text(code)
    with pytest.raises(AssertionError, match=r"file.py:1: "):
        set(imports({"file": file}, "file"))


def test_circles_are_found() -> None:
    assert circles({("a", "b"), ("b", "c"), ("c", "a"), ("c", "d"), ("e", "e")}) == {frozenset("abc")}
