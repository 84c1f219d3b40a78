"""The benchmark compares equals, and its model has the released models' proportions."""

from __future__ import annotations

import json

import pytest
from dit4dit.benchmarks import training

from dit4dit.cli import main


@pytest.mark.slow
def test_shares_and_agreement(tmp_path, capsys) -> None:
    file = tmp_path / "result.json"
    with pytest.raises(SystemExit) as end:
        main(["bench", "training", "--steps", "1", "--batch-size", "1", "--json", str(file)])
    assert end.value.code == 0
    assert "the text encoder is 30." in capsys.readouterr().out
    result = json.loads(file.read_text())
    assert result["text_share_of_published"] == pytest.approx(0.30, abs=0.01)
    work = result["gflop_per_sample"]
    assert work["published"] / work["ours"] > 1.6
    assert work["published"] / work["ours, cached latents"] > 2.0
    assert set(result["samples_per_s"]) == set(result["losses"]) == set(work)
    assert set(result["ratio"]) == set(work) - {"published"}


@pytest.mark.slow
def test_nothing_is_timed_that_disagrees(monkeypatch) -> None:
    monkeypatch.setattr(training.Published, "embed", lambda self, tokens: self.model.embed(tokens + 1))
    with pytest.raises(AssertionError, match="nothing is timed"):
        training.measure(steps=1, batch_size=1, seed=0)
