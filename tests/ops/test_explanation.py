"""What explain says of what was measured; verdicts go before the shipped table."""

from __future__ import annotations

from pathlib import Path

import pytest
from verdict_files import CALL, CPU, DEFAULT, OTHER, put, ran, verdict

from dit4dit import ops
from dit4dit.ops import dispatch, verdicts
from dit4dit.ops.dispatch import Implementation
from dit4dit.ops.explanation import measured, survey


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this CPU's verdicts, which is not there yet."""
    monkeypatch.setenv("DIT4DIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(verdicts, "_said", set())
    return verdicts.folder(CPU)


def test_explain_shows_what_was_measured_or_that_nothing_was(cache: Path) -> None:
    (found,) = ops.explain("preprocess")
    assert (found.measured, found.note) == ((), "not yet measured here: run dit4dit tune")
    (found,) = ops.explain("philox_normal")
    assert found.note is None, "one implementation can run here"
    verdicts.write(verdict(), cache)
    (cache / "linear-0.json").write_text("{}")
    (found,) = ops.explain("preprocess")
    (row,) = found.measured
    assert found.note is None
    assert (row.call, row.chosen, row.runner_up) == (CALL, OTHER, DEFAULT)
    assert (row.ms, row.made, row.shipped) == ({OTHER: 1.0, DEFAULT: 2.0}, "2026-01-01", None)
    (found,) = ops.explain("linear")
    assert found.measured == ()


def test_implementations_of_ones_own_are_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    known = dispatch.find("philox_normal").implementations
    monkeypatch.setitem(known, "mine", Implementation("mine", lambda *_: None, lambda *_: None, measured_only=True))
    assert ops.explain("philox_normal")[0].note == verdicts.NOT_YET


def test_verdicts_go_before_the_shipped_table(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {
        f"preprocess: {CALL}": {"chosen": OTHER, "ms": {OTHER: 0.5}},
        "linear: x": {"chosen": "torch", "ms": {}},
    }
    monkeypatch.setattr(verdicts, "shipped_for", lambda device: {"source": "a.json", "calls": rows})
    assert ran() == OTHER
    (found,) = ops.explain("preprocess")
    assert (found.measured[0].shipped, found.measured[0].runner_up, found.note) == ("a.json", None, verdicts.NOT_YET)
    verdicts.write(verdict(chosen=DEFAULT), cache)
    assert ran() == DEFAULT
    assert {
        op: [row.shipped for row in found] for op, found in measured(CPU, survey(CPU, dispatch.files())).items()
    } == {
        "preprocess": [None],
        "linear": ["a.json"],
    }
    put(cache, "broken")
    assert ran() == OTHER, "the table is what is left"
