"""What was found, as text, as a page, and as the table that ships."""

from __future__ import annotations

import json
import re
import runpy
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from dit4dit.benchmarks import tuning_report
from dit4dit.benchmarks.tuning_report import brief, hopeless, refusals, show, step_ms
from tuning_results import CALLS, call, result


def test_the_table() -> None:
    text = show(result())
    assert text.startswith(
        "preset tiny, float32, head float32, batch 1 2; A <CPU>\n4 distinct op calls: 1 linear, 2 adaln"
    )
    lines = text.splitlines()
    (linear,) = [line for line in lines if line.startswith("linear ")]
    assert re.fullmatch(r"linear +f32 1x17x64 64x64 +54 +torch +onednn +torch +0\.2500 +0\.5000 +2\.00", linear)
    first, second = [line for line in lines if line.startswith("adaln ")]
    assert first.endswith("kept")
    assert " 3 " in first
    assert "f32 2x3x4x64 bf16 " in second
    assert " - " in second, "not in the first request's step"
    assert max(map(len, lines)) <= tuning_report.WIDTH
    reasons = [line for line in lines if "x is on cpu" in line]
    assert reasons == ["  adaln triton (2 calls), adaln cuda: x is on cpu <&>"], "each reason once"
    assert "  action_ode cuda: crashed: signal 11" in lines
    assert "as often as a step makes them: 27.375 ms by the defaults, 13.875 ms as chosen" in text
    assert "nothing is right" not in text


def test_a_call_without_a_right_implementation() -> None:
    lost = call("linear", "float32[3]", 1, {}, {"torch": "differs between two runs"})
    found = result([*CALLS, lost])
    assert hopeless(found["calls"]) == [lost]
    assert hopeless(CALLS) == []
    assert step_ms(found["calls"]) is None
    text = show(found)
    assert "linear: float32[3]: nothing is right" in text
    assert "by the defaults" not in text
    assert "nothing is right" in tuning_report.page(found)


@pytest.mark.parametrize("calls", [[], None])
def test_of_a_run_that_was_cut_at_once(calls: list | None) -> None:
    left = ["linear: float32[1], None", "linear: float32[2], None", "adaln: float32[1x2], None"]
    found = result([], cut={"by": "seconds", "during": "calls", "left": left})
    if calls is None:
        del found["calls"]
    said = "Cut short by --seconds; calls left out, which keep what they have: 2 linear, 1 adaln"
    assert show(found).splitlines()[2:] == ["", said]
    assert f"<b>{said}</b>" in tuning_report.page(found)
    assert tuning_report.how_to_use(found).startswith("no verdicts were written: policies run what earlier ones name")


def test_a_call_in_few_letters() -> None:
    assert brief("bfloat16[1x2] strides 9x1, None, 'none', bfloat16[2], float, uint8[3], int64[2], bfloat16", 99) == (
        "bf16 1x2 strided 'none' 2 u8 3 i64 2 bf16"
    )
    assert brief("(float32[1x2], None), (2, 3), None, True", 99) == "(f32 1x2) (2 3)"
    assert brief("float32[123x456]", 10) == "f32 123..."


def test_refusals_are_counted() -> None:
    assert list(refusals(CALLS)) == ["x is on cpu <&>", "crashed: signal 11"]


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def test_the_page(tmp_path: Path) -> None:
    path = tuning_report.write(tmp_path / "new" / "a.html", result())
    assert path == tmp_path / "new" / "a.html"
    assert [p.name for p in path.parent.iterdir()] == ["a.html"]
    page = Page(path.read_text())
    assert not page.open
    assert not [tag for tag, attributes in page.tags if {"src", "href"} & set(attributes)], "it holds all that it shows"
    for one in CALLS:
        assert one["call"] in page.text
        assert one["why"] in page.text
        for name, reason in one["refused"].items():
            assert f"{name}: {reason}" in page.text
    assert "0.2500 ms (chosen)" in page.text
    assert "0.5000 ms (default, runner-up)" in page.text
    assert "A <CPU>" in page.text
    assert "/cache/verdicts/a-cpu" in page.text
    bars = [attributes["style"] for _, attributes in page.tags if attributes.get("class") == "bar"]
    widths = [re.match(r"width:([\d.]+)%", str(style)) for style in bars]
    assert [width and width[1] for width in widths] == ["50.0", "100.0", "100.0", "100.0", "100.0"]
    folder = tuning_report.write(tmp_path / "folder", result())
    assert folder == tmp_path / "folder" / "report.html"
    assert folder.read_text() == path.read_text()


def test_the_page_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    source, page = tmp_path / "r.json", tmp_path / "p.html"
    source.write_text(json.dumps(result()))
    monkeypatch.setattr(sys, "argv", ["tuning_report", str(source), str(page)])
    monkeypatch.delitem(sys.modules, "dit4dit.benchmarks.tuning_report")
    runpy.run_module("dit4dit.benchmarks.tuning_report", run_name="__main__")
    assert capsys.readouterr().out.strip() == str(page)
    assert page.read_text() == tuning_report.page(result())
