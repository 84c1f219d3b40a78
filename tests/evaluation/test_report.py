"""The report: its numbers, and the page as a browser shows it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from eval_standin import StandIn, make_plan, play

from dit4dit.cli import main
from dit4dit.control.execution import Execution
from dit4dit.errors import DataError, InputError
from dit4dit.evaluation import published, report, statistics
from dit4dit.evaluation.charts import Bar, bars, histogram
from dit4dit.evaluation.runs import Run

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROBE = """<script>
const box = e => { const r = e.getBoundingClientRect(); return [r.width, r.height]; };
const all = (selector, read) => [...document.querySelectorAll(selector)].map(read);
const told = () => {
  document.body.setAttribute("data-seen", JSON.stringify({
    tables: Object.fromEntries(all("table", t => [t.id, [...t.rows].map(r => [...r.cells].map(c => c.innerText))])),
    tableBoxes: all("table", box), bars: all("svg.bars rect.bar", box), intervals: all("svg.bars path.interval", box),
    published: all("svg.bars line.published", e => e.getBoundingClientRect().x), bins: all("svg.histogram rect.bin", box),
    videos: all("video", v => [v.videoWidth, v.videoHeight]), figures: all("figure", f => f.className),
    errors: all("details summary", e => e.innerText), wide: document.documentElement.scrollWidth,
  }));
};
const waiting = all("video", v => v.readyState >= 1 ? 0 : new Promise(done => { v.onloadedmetadata = done; v.onerror = done; }));
Promise.all(waiting).then(told);
</script>"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of the same episodes: one with an error and all videos, one with videos of failures only."""
    root = tmp_path_factory.mktemp("report")
    plan = make_plan(9, goal=0.3, trouble="raise", tasks=3)
    play(root / "easy", plan, videos="all", workers=2)
    play(root / "hard", make_plan(9, goal=1.0, tasks=3), videos="failures", execution=Execution(execute=3))
    return [root / "easy", root / "hard"]


def seen_in_browser(page: Path) -> dict[str, Any]:
    """What a script in the page sees once the page is laid out and the videos are loaded."""
    if BROWSER is None:
        pytest.skip("no chromium here: apt-get install chromium")
    probed = page.with_name("probed.html")
    probed.write_text(page.read_text().replace("</body>", PROBE + "</body>"))
    words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000", "--timeout=60000"]
    # a profile of its own, where another browser may run, and nothing that looks for a network
    words += [f"--user-data-dir={page.with_name('profile')}", "--no-first-run", "--disable-background-networking"]
    words += ["--disable-component-update", "--disable-sync"]
    dumped = subprocess.run(
        [*words, "--virtual-time-budget=20000", "--dump-dom", probed.as_uri()],
        capture_output=True,
        text=True,
        timeout=240,
    )
    found = re.search(r'data-seen="([^"]*)"', dumped.stdout)
    assert found, dumped.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


def test_the_page_as_a_browser_shows_it(runs: list[Path], tmp_path: Path) -> None:
    data = report.write(runs, tmp_path)
    seen = seen_in_browser(tmp_path / "report.html")
    rows = {row[0]: row for row in seen["tables"]["results"]}
    assert list(rows) == ["", "suite", "suite / task 0", "suite / task 1", "suite / task 2"]
    for info, column in zip(data["runs"], (1, 5), strict=True):
        for result in info["results"][1:]:
            cells = rows[f"suite / {result['task']}" if result["task"] else "suite"][column : column + 4]
            low, high = result["interval"]
            shown = [
                f"{result['percent']:.1f} %",
                f"{low:.1f} to {high:.1f}",
                f"{result['successes']} of {result['episodes']}",
            ]
            assert cells == [*shown, str(result["errors"] or "")]
    assert seen["tables"]["comparisons"][1][:5] == ["easy", "hard", "all", "8", str(data["comparisons"][0]["both"])]
    assert [row[1] for row in seen["tables"]["latency"][1:]] == ["easy", "hard"] * 3
    assert all(width > 100 and height > 30 for width, height in seen["tableBoxes"])
    assert seen["wide"] <= 1400

    percents = [[r["percent"] for r in info["results"][1:]] for info in data["runs"]]
    widths = [width for width, _ in seen["bars"]]
    wanted = [p for pair in zip(*percents, strict=True) for p in pair]
    assert len(widths) == len(seen["intervals"]) == len(wanted) == 8
    assert [w / max(widths) for w in widths] == pytest.approx([p / max(wanted) for p in wanted], abs=0.01)
    spans = [width for width, _ in seen["intervals"]]
    ends = [[r["interval"] for r in info["results"][1:]] for info in data["runs"]]
    assert spans == pytest.approx([(b - a) / 100 * 450 for pair in zip(*ends, strict=True) for a, b in pair], abs=2)
    assert len(seen["bins"]) > 4
    assert all(width > 5 and height > 0 for width, height in seen["bins"])

    assert seen["videos"] == [[272, 272]] * len(seen["videos"])
    assert len(seen["videos"]) == len(list(runs[0].glob("videos/*.mp4"))) + len(list(runs[1].glob("videos/*.mp4")))
    order = ["failure", "error", "success"]
    assert seen["figures"] == sorted(seen["figures"], key=order.index)
    assert set(seen["figures"]) == set(order)
    assert len(seen["errors"]) == 1
    assert "ZeroDivisionError: the world is flat" in seen["errors"][0]


def test_the_numbers_are_the_runs_numbers(runs: list[Path], tmp_path: Path) -> None:
    written = report.write(runs, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(written))
    easy, hard = (Run.open(folder) for folder in runs)
    info = written["runs"][0]
    assert (info["finished"], info["errors"], info["missing"]) == (8, 1, 0)
    whole = info["results"][0]
    rate = statistics.wilson(sum(easy.outcomes.values()), 8)
    assert (whole["percent"], whole["interval"]) == (100 * rate.value, [100 * rate.low, 100 * rate.high])
    assert sum(r["episodes"] for r in info["results"] if r["task"]) == 8
    shared = [key for key in easy.outcomes if key in hard.outcomes]
    assert len(shared) == 8
    found = written["comparisons"][0]
    assert found["only_first"] == sum(easy.outcomes[k] and not hard.outcomes[k] for k in shared)
    assert found["difference"] < 0
    assert info["chunk_ms"]["count"] == sum(r["chunks"] for r in easy.records)
    page = (tmp_path / "report.html").read_text()
    assert "http" not in re.sub(r"http://www.w3.org/2000/svg", "", page)
    # what is not set is a dash, not Python's or JSON's word for it
    assert "ensemble -, " in page
    assert re.findall(r"\b(?:None|null|nan|NaN|undefined)\b", page) == []


def test_episodes_of_other_seeds_are_not_paired(runs: list[Path], tmp_path: Path) -> None:
    plan = make_plan(9, tasks=3)
    play(tmp_path / "other", replace(plan, episodes=tuple(replace(e, seed=e.seed + 50) for e in plan.episodes)))
    assert report.write([runs[0], tmp_path / "other"], tmp_path)["comparisons"] == []
    assert "no finished episode in common" in (tmp_path / "report.html").read_text()


def test_runs_of_other_worlds_are_told_to_be(runs: list[Path], tmp_path: Path) -> None:
    (found,) = report.write(runs, tmp_path)["comparisons"]
    assert found["other_worlds"]["plan.options.goal"] == (0.3, 1.0)
    assert (
        "Not the same episodes: plan.options.goal is 0.3 in easy, 1.0 in hard" in (tmp_path / "report.html").read_text()
    )


def test_published_results_stand_beside_the_same_suites(tmp_path: Path) -> None:
    plan = make_plan(8, tasks=4, goal=0.3)
    suites = list(published.LIBERO)
    named = tuple(replace(e, suite=suites[i % 4], task="0") for i, e in enumerate(plan.episodes))
    play(tmp_path / "all", replace(plan, name="libero", episodes=named))
    rows = report.write([tmp_path / "all"], tmp_path)["runs"][0]["results"]
    assert {r["suite"]: r["published"] for r in rows if r["task"] is None} == {**published.LIBERO, None: 98.6}
    some = tuple(replace(e, suite="libero_10") for e in named[:1])
    play(tmp_path / "some", replace(plan, name="libero", episodes=some))
    rows = report.write([tmp_path / "some"], tmp_path / "b")["runs"][0]["results"]
    assert [r["published"] for r in rows] == [None, 96.6, None]
    play(tmp_path / "gr1", replace(plan, name="gr1", episodes=tuple(replace(e, suite="gr1") for e in plan.episodes)))
    rows = report.write([tmp_path / "gr1"], tmp_path / "c")["runs"][0]["results"]
    assert rows[0]["published"] == pytest.approx(56.86)
    ends = [r["success_at_chunk_ends"] for r in Run.open(tmp_path / "gr1").records]
    assert rows[0]["published_count"] == sum(ends)
    assert "as the published runner counts" in (tmp_path / "c/report.html").read_text()
    assert 'class="published"' in (tmp_path / "c/report.html").read_text()


def test_words_of_others_are_words_in_the_page(tmp_path: Path) -> None:
    plan = make_plan(1, trouble="raise")
    named = (replace(plan.episodes[0], task="<script>alert(1)</script>"),)
    play(tmp_path / "run", replace(plan, episodes=named), policy=StandIn())
    report.write([tmp_path / "run"], tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_runs_are_told_apart_by_as_much_of_their_paths_as_it_takes(tmp_path: Path) -> None:
    assert report.run_names([tmp_path / "a/run", tmp_path / "b/run"]) == ["a/run", "b/run"]
    assert report.run_names([tmp_path / "a/run"]) == ["run"]
    with pytest.raises(InputError, match="given twice"):
        report.run_names([tmp_path / "a", tmp_path / "b/../a"])


def test_drawings_keep_to_their_scale() -> None:
    drawn = bars({"one": [Bar(0, 0.5, 0.25, 0.75)]}, {"one": 1.0})
    assert 'width="225.00"' in drawn
    assert "M362.50 " in drawn
    assert "H587.50" in drawn
    assert 'x1="700.00"' in drawn
    assert histogram([(0, [1.0] * 99 + [1000.0])], "ms").count("<rect") == 2


def test_command(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def command(*words: Path | str) -> int:
        with pytest.raises(SystemExit) as end:
            main(["eval", "report", *map(str, words)])
        return int(end.value.code or 0)

    assert command(*runs, "--out", tmp_path / "page") == 0
    shown = capsys.readouterr().out
    assert "easy" in shown
    assert str(tmp_path / "page/report.html") in shown
    assert command(tmp_path) == 2
    assert "no run.json" in capsys.readouterr().err
    assert command(tmp_path / "nothing") == 2
    assert not (tmp_path / "nothing").exists()
    assert command() == 2
    with pytest.raises(DataError, match=r"no run\.json"):
        report.write([tmp_path], tmp_path)
