"""The options' errors: against whom they are measured, on what, and how they are written down."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dit4dit.benchmarks import options, recording
from dit4dit.benchmarks.recording import Recording

from dit4dit.cli import main
from dit4dit.presets import preset

CPU = torch.device("cpu")


def run(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as end:
        main(["bench", "options", "--device", "cpu", *map(str, words)])
    return int(end.value.code or 0)


@pytest.fixture(scope="module")
def tiny() -> options.Subject:
    return options.of_preset("tiny", preset("tiny"), device=CPU, dtype=torch.float32, seed=0)


@pytest.mark.slow
def test_command_measures_every_option_of_presets_and_checkpoints(small_libero: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "options.json"
    assert run("--preset", "tiny", "--checkpoint", small_libero, "--seeds", "2", "--json", out) == 0
    first, second = json.loads(out.read_text())["subjects"]
    assert (first["subject"], first["weights"]) == ("preset tiny", "random")
    assert (second["subject"], second["weights"]) == (f"checkpoint {small_libero}", "the checkpoint's")
    changes_features = {'posterior="mean"', "quantization=fp8", "dtype=bfloat16", "dtype=bfloat16, head_dtype=float32"}
    changes_features.add("head_dtype=bfloat16")  # which the head is given them in
    for result in (first, second):
        rows = {row["option"]: row for row in result["options"]}
        assert list(rows) == [option.name for option in options.OPTIONS]
        assert result["steps"] == 4
        assert rows["steps=4"]["actions"]["max"] == 0  # the exact engine under another name
        for name, row in rows.items():
            assert len(row["actions"]["per_seed"]) == 2
            assert row["actions"]["max"] == max(row["actions"]["per_seed"])
            assert (row["features"] is not None) == (name in changes_features)
            if name != "steps=4":
                assert 0 < row["actions"]["mean"] <= row["actions"]["max"]
        assert rows["head_dtype=bfloat16"]["arguments"] == {"head_dtype": "bfloat16"}
        assert rows["head_dtype=bfloat16"]["actions"]["max"] < 0.1
        assert result["machine"]["torch"] == torch.__version__
    assert all(row["robot_units"] is None for row in first["options"])
    names = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
    assert tuple(second["options"][1]["robot_units"]) == names
    shown = capsys.readouterr().out
    assert "weights random: of a trained model this says little" in shown
    assert "unchanged" in shown


def test_robot_units_are_those_of_the_statistics(gr1_policy) -> None:
    codec = gr1_policy.codec
    width = gr1_policy.config.head.action_dim
    exact = [(torch.zeros(1), torch.zeros(1, 4, width)), (torch.zeros(1), torch.zeros(1, 4, width))]
    moved = [(f, x.clone()) for f, x in exact]
    moved[1][1][0, 2, 5] = 0.5
    want = codec.action.inverse(moved[1][1].numpy()) - codec.action.inverse(exact[1][1].numpy())
    found = options.in_robot_units(codec, exact, moved)
    name = codec.embodiment.action_names[5]
    assert found[name] == pytest.approx(abs(want[0, 2, 5]))
    assert found[name] > 0
    assert all(value == 0 for other, value in found.items() if other != name)


def test_the_error_is_relative_in_the_2_norm(tiny: options.Subject) -> None:
    want = [(torch.ones(1, 2, 2), torch.tensor([[[3.0, 4.0]]])), (torch.ones(1, 2, 2), torch.tensor([[[0.0, 2.0]]]))]
    got = [(torch.ones(1, 2, 2), torch.tensor([[[3.0, 5.0]]])), (torch.ones(1, 2, 2), torch.tensor([[[0.0, 3.0]]]))]
    row = options.errors(tiny, options.Option("x"), want, got)
    assert row["actions"] == {"mean": pytest.approx(0.35), "max": 0.5, "per_seed": [pytest.approx(0.2), 0.5]}
    assert row["features"] is None


def test_requests_differ_from_each_other_and_repeat(tiny: options.Subject) -> None:
    first, again = (list(options.requests(tiny, 3, seed=5)) for _ in range(2))
    (later,) = options.requests(tiny, 1, seed=6)
    for name in ("frame", "state", "posterior", "latent", "action"):
        a, b, c = (getattr(one, name) for one in first)
        assert not torch.equal(a, b)
        assert not torch.equal(b, c)
        assert torch.equal(b, getattr(later, name))
        assert torch.equal(b, getattr(again[1], name))
    assert first[0].frame.abs().max() <= 1
    assert torch.equal(first[0].embeds, first[1].embeds)


def test_a_checkpoint_sees_no_state_where_it_is_padded(gr1_policy) -> None:
    config, robot = gr1_policy.config, gr1_policy.embodiment
    subject = options.Subject("", "", config, 1, None, torch.zeros(1), gr1_policy.codec)  # type: ignore[arg-type]
    (one,) = options.requests(subject, 1, seed=0)
    used = robot.encoded_state_dim
    assert used < one.state.shape[-1]
    assert one.state[..., :used].abs().min() > 0
    assert one.state[..., used:].abs().max() == 0


def test_the_tabletop_looks_at_its_own_world() -> None:
    subject = options.of_preset("tabletop", preset("tabletop"), device=CPU, dtype=torch.float32, seed=0)
    (one,) = options.requests(subject, 1, seed=3)
    picture = options.tabletop_picture(3)
    assert np.allclose(one.frame[0].permute(1, 2, 0).numpy(), picture / 127.5 - 1, atol=1e-6)
    assert "trained VAE" in subject.weights


def measured(subjects: dict, chosen, path: Path | None = None, seconds: float | None = None) -> dict:
    with Recording(path, seconds) as record:
        options.measure(subjects, chosen, seeds=1, seed=0, record=record)
    return record.result


def test_nothing_is_compared_with_an_engine_that_does_not_repeat(
    tiny: options.Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options.Engine, "check_folding", lambda self: None)
    monkeypatch.setattr(options.Engine, "actions", lambda self, features, state, noise: torch.rand_like(noise))
    (found,) = measured({"preset tiny": lambda: tiny}, options.OPTIONS[:2])["subjects"]
    assert "nothing is compared" in found["failed"]
    assert found["options"] == []
    assert options.failed([found])
    assert "nothing is compared" in options.show(found)


def test_an_option_that_raises_costs_its_own_row(tiny: options.Subject, tmp_path: Path) -> None:
    wrong = options.Option("odd", {"steps": 3})
    path = tmp_path / "options.json"
    result = measured({"preset tiny": lambda: tiny}, [wrong, options.Option("steps=4", {"steps": 4})], path)
    assert result["complete"]
    (found,) = json.loads(path.read_text())["subjects"]
    first, second = found["options"]
    assert first["failed"].startswith("ConfigError: engine steps: expected one of")
    assert second["actions"]["max"] == 0
    assert options.failed([found])
    assert "ConfigError" in options.show(found)


def test_the_end_of_the_time_leaves_what_was_measured(
    tiny: options.Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real, now = tmp_path / "options.json", options.Exact.row, [0.0]

    def slow(self, option):
        now[0] += 5
        return real(self, option)

    monkeypatch.setattr(options.Exact, "row", slow)
    monkeypatch.setattr(recording, "time", SimpleNamespace(monotonic=lambda: now[0]))
    chosen = [options.Option("steps=1", {"steps": 1}), options.Option("steps=2", {"steps": 2})]
    measured({"preset tiny": lambda: tiny, "preset b": lambda: tiny}, chosen, path, 4.5)
    data = json.loads(path.read_text())
    assert (data["complete"], data["cut"]["by"]) == (False, "seconds")
    assert data["cut"]["left"] == ["preset tiny: steps=2", "preset b: steps=1", "preset b: steps=2"]
    assert [row["option"] for row in data["subjects"][0]["options"]] == ["steps=1"]


def test_mistakes(capsys) -> None:
    assert run() == 2
    assert "give --preset or --checkpoint" in capsys.readouterr().err
    assert run("--preset", "tiny", "--seeds", "0") == 2
    assert "--seeds: expected at least 1" in capsys.readouterr().err
    assert run("--preset", "tinny") == 2
    assert "did you mean 'tiny'" in capsys.readouterr().err
