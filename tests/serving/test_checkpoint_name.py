"""Clients can tell two checkpoints of our own trainings apart by what `dit4dit serve` says of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from training_worker import small_config

from dit4dit.checkpoints.summary import checkpoint_name
from dit4dit.cli import main
from dit4dit.commands import serving
from dit4dit.training import checkpoint
from dit4dit.training.loop import train
from dit4dit.training.random_data import RandomData


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Policies of steps 1 and 2 of a run, and of step 1 of a run of the same name with another seed."""
    out = {}
    for seed, steps in ((0, 2), (1, 1)):
        run = tmp_path_factory.mktemp(f"seed{seed}") / "libero"
        config = small_config(run)
        config = replace(config, run=replace(config.run, seed=seed, steps=steps, save_every=1, keep=2))
        assert train(config, RandomData(config.model, "libero")) == 0
        out |= {f"{seed}.{step}": folder / "policy" for step, folder in checkpoint.all_steps(run).items()}
    return out


def metadata(words: list[object], monkeypatch: pytest.MonkeyPatch) -> dict:
    """What `dit4dit serve` would say to a client."""
    seen = []
    monkeypatch.setattr(serving, "_run", lambda server, *_: seen.append(server._backend.metadata))
    with pytest.raises(SystemExit) as end:
        main(["serve", "--device", "cpu", "--port", "0", "--checkpoint", *map(str, words)])
    assert end.value.code == 0
    return dict(seen[0])


def test_two_checkpoints_of_ours_are_told_apart(policies: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for which, folder in policies.items():
        seen = metadata([folder], monkeypatch)
        found[which] = (seen["checkpoint"], seen["checkpoint_hash"])
    # another step has another name; another run of the same name has another hash; all differ in what they hold
    assert {which: name for which, (name, _) in found.items()} == {
        "0.1": "libero/step_00000001",
        "0.2": "libero/step_00000002",
        "1.1": "libero/step_00000001",
    }
    assert len({hashed for _, hashed in found.values()}) == 3
    # from inside the folder too, where the path says nothing
    monkeypatch.chdir(policies["0.2"])
    seen = metadata(["."], monkeypatch)
    assert (seen["checkpoint"], seen["checkpoint_hash"]) == found["0.2"]


def test_names(tmp_path: Path) -> None:
    run = tmp_path / "my_run"
    (run / "checkpoints" / "step_00000010" / "policy").mkdir(parents=True)
    (run / "policy").mkdir()
    (run / "checkpoints" / "steps_5_pytorch_model.pt").touch()
    (tmp_path / "link").symlink_to(run / "checkpoints" / "step_00000010" / "policy")
    assert checkpoint_name(tmp_path / "link") == "my_run/step_00000010"
    assert checkpoint_name(run / "checkpoints" / "step_00000010") == "my_run/step_00000010"
    assert checkpoint_name(run / "checkpoints" / "steps_5_pytorch_model.pt") == "my_run/steps_5_pytorch_model.pt"
    assert checkpoint_name(run) == "my_run"
    assert checkpoint_name(run / "policy") == "policy"
    assert checkpoint_name("organisation/model") == "organisation/model"
