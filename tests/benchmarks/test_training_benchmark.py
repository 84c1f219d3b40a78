"""The benchmark compares equals, and its model has the released models' proportions."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from dit4dit.benchmarks import training
from dit4dit.benchmarks.recording import TERMINATED, Recording

from dit4dit.cli import main
from dit4dit.progress import bar


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
        training.measure(steps=1, batch_size=1, seed=0, record=Recording(None))


def test_an_end_between_steps_leaves_the_steps_before(tmp_path) -> None:
    """A third step that is stopped: two are in the file, one of them counted, with their rates."""
    weight = torch.nn.Parameter(torch.ones(3))
    calls = []

    def loss():
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return weight.square().sum()

    path = tmp_path / "result.json"
    optimizer = torch.optim.SGD([weight], 0.1)
    recording = Recording(path)
    recording.result["batch_size"] = 2
    with pytest.raises(SystemExit) as end, recording as record, bar("steps", 5) as shown:
        training.alternate({"published": loss, "ours": loss}, optimizer, 4, record, shown)
    assert end.value.code == TERMINATED
    data = json.loads(path.read_text())
    assert [len(times) for times in data["seconds"].values()] == [2, 1]
    assert data["samples_per_s"]["published"] == pytest.approx(2 / data["seconds"]["published"][0])
    assert data["ratio"].keys() == {"ours"}
    assert (data["cut"]["by"], data["cut"]["left"]) == ("SIGTERM", ["step 2", "step 3", "step 4"])


@pytest.mark.slow
def test_no_time_says_which_steps_were_left(tmp_path, capsys) -> None:
    file = tmp_path / "result.json"
    with pytest.raises(SystemExit) as end:
        main(["bench", "training", "--steps", "1", "--batch-size", "1", "--seconds", "0.1", "--json", str(file)])
    assert end.value.code == 0
    data = json.loads(file.read_text())
    assert (data["cut"]["by"], data["cut"]["left"]) == ("seconds", ["step 0", "step 1"])
    assert data["samples_per_s"] == {}
    assert data["losses"]
