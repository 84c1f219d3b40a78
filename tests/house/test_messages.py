"""Messages quote what others gave in bounded work: `errors.shown`, `listed` and `said` cut first and format then."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "dit4dit"
ALONE = {"serving/client.py", "evaluation/sim_worker.py"}
"""One file each, for machines without the package: they cannot import `errors`."""
DOORS = ("serving/protocol.py", "serving/wire.py", "serving/backend.py", "policy/published_api.py", "policy/prompts.py")
"""Where strangers' messages come in: `!r` is only for names of our own."""
OWN = {"view", "key.name"}


def quoted(source: str) -> Iterator[tuple[int, str, int, str]]:
    """Line, expression, conversion and format of every value in an f-string."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FormattedValue):
            form = "" if node.format_spec is None else ast.unparse(node.format_spec)[2:-1]
            yield node.lineno, ast.unparse(node.value), node.conversion, form


def formats_first(source: str) -> list[str]:
    """What is made whole before it is cut or looked at: {x!r:.60}, {x!s:.60}, repr(x)[:60], str(x)[:60], did_you_mean(str(x))."""
    found = [
        f"{line}: {{{value}!{chr(how)}:{form}}}"
        for line, value, how, form in quoted(source)
        if how > 0 and form[:1] == "."
    ]
    for node in ast.walk(ast.parse(source)):
        whole = None
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice) and node.slice.lower is None:
            whole = node.value
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "did_you_mean":
            whole = node.args[0]
        # an error's words are there already
        if (
            isinstance(whole, ast.Call)
            and ast.unparse(whole.func) in ("repr", "str")
            and ast.unparse(whole) != "str(error)"
        ):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def test_the_rule_finds_what_it_looks_for() -> None:
    bad = 'f"{a!r:.40} {b!s:.{n}} {c!a:.3}{did_you_mean(str(d), e)}"; repr(a)[:40]; str(a)[:9]'
    assert len(formats_first(bad)) == 6
    assert (
        formats_first('f"{a:.40} {shown(b)} {c!r} {d:.3f} {e!r:>9}{did_you_mean(f, g)}"; repr(a[:40]); repr(a)[1:]')
        == []
    )


def test_nothing_is_formatted_first_and_cut_later() -> None:
    found = {}
    for file in sorted(ROOT.rglob("*.py")):
        place = file.relative_to(ROOT).as_posix()
        if place not in ALONE and (bad := formats_first(file.read_text())):
            found[place] = bad
    assert not found, "use errors.shown(value), listed(names) or said(error)"


@pytest.mark.parametrize("place", DOORS)
def test_what_strangers_sent_is_shown(place: str) -> None:
    source = (ROOT / place).read_text()
    bare = [f"{line}: {{{value}!r}}" for line, value, how, _ in quoted(source) if how == ord("r") and value not in OWN]
    assert bare == [], f"dit4dit/{place}: use errors.shown(value)"
