"""`.pt` files as other tools leave them: what is loaded, and said; what is refused, and what to do then."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch
from checkpoint_samples import CONTENTS, check_same, libero_state, pt, refusal
from safetensors.torch import save_file

from dit4dit.checkpoints import checkpoint as ck
from dit4dit.checkpoints import tensor_files
from dit4dit.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return libero_state()


@pytest.fixture(autouse=True)
def _say_again() -> None:
    tensor_files.say_once.cache_clear()


def prefixed(state: dict, *prefixes: str) -> dict:
    return {"".join(prefixes) + name: value for name, value in state.items()}


READABLE = {
    "DataParallel": (lambda s: prefixed(s, "module."), "without a prefix: 'module."),
    "torch.compile": (lambda s: prefixed(s, "_orig_mod."), "without a prefix: '_orig_mod."),
    "both": (lambda s: prefixed(s, "module.", "_orig_mod."), "without a prefix: 'module._orig_mod."),
    "both, the other way": (lambda s: prefixed(s, "_orig_mod.", "module."), "'_orig_mod.module."),
    "a compiled part": (
        lambda s: {n.replace("action_model.", "action_model._orig_mod."): t for n, t in s.items()},
        "'action_model._orig_mod.",
    ),
    "state_dict": (lambda s: {"state_dict": s, "epoch": 3}, "below 'state_dict' are used; left out: epoch"),
    "model": (lambda s: {"model": s, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}, "left out: optimizer"),
    "module": (lambda s: {"module": prefixed(s, "module.")}, "below 'module' are used"),
    "a counter beside": (lambda s: {**s, "step": 10}, "at the top level are used; left out: step"),
}


@pytest.mark.parametrize("name", READABLE)
def test_what_trainers_put_around_a_state_dict(name: str, libero_run: Path, state, caplog) -> None:
    wrap, said = READABLE[name]
    torch.save(wrap(state), pt(libero_run))
    check_same(ck.open_checkpoint(libero_run), state)
    assert said in caplog.text
    before = len(caplog.records)
    ck.open_checkpoint(libero_run)
    assert len(caplog.records) == before, "it is said once"


def test_a_plain_file_says_nothing(libero_run: Path, state, caplog, monkeypatch) -> None:
    """And is mapped: 25 GB are not read to open it."""
    load, options = torch.load, []
    monkeypatch.setattr(torch, "load", lambda file, **given: options.append(given) or load(file, **given))
    check_same(ck.open_checkpoint(libero_run), state)
    assert options == [{"map_location": "cpu", "weights_only": True, "mmap": True}]
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


def test_the_old_format_of_torch(libero_run: Path, state, caplog) -> None:
    torch.save(state, pt(libero_run), _use_new_zipfile_serialization=False)
    check_same(ck.open_checkpoint(libero_run), state)
    assert "PyTorch's old format" in caplog.text
    whole = pt(libero_run).read_bytes()
    pt(libero_run).write_bytes(whole[: len(whole) // 2])
    assert "truncated, or not written by torch.save? copy it again" in refusal(libero_run)


class Trap:
    def __reduce__(self):
        return os.system, ("touch trap",)


def ambiguous(state: dict) -> dict:
    return {"model": state, "ema": {name: value + 1 for name, value in state.items()}, "optimizer": {}}


REFUSED = {
    "moving average beside": (ambiguous, "holds 2 sets of weights, under 'model' and 'ema'"),
    "moments alone": (
        lambda s: {"exp_avg": s},
        "tensors under our names only below 'exp_avg', expected at the top level",
    ),
    "flat and below": (lambda s: {**s, "state_dict": s}, "2 sets of weights, under the top level and 'state_dict'"),
    "two levels": (lambda s: {"state_dict": {"model": s}}, "expected a flat state dict of tensors"),
    "another word in front": (
        lambda s: {"state_dict": prefixed(s, "net.")},
        "with the keys state_dict, whose first tensor is 'net.backbone_interface.",
    ),
    "half of the names": (
        lambda s: {("" if i % 2 else "module.") + n: t for i, (n, t) in enumerate(s.items())},
        None,  # opens; `build` misses the other half
    ),
    "twice under two names": (
        lambda s: (
            {"module." + n: t for n, t in s.items()}
            | {"module._orig_mod." + n: t for n, t in s.items()}
            | {"module.action_model._orig_mod.position_embedding.weight": s["action_model.position_embedding.weight"]}
        ),
        "are the same tensor; keep one of them",
    ),
    "nothing of ours": (lambda s: {"conv.weight": torch.zeros(1)}, "this is not a DiT4DiT checkpoint"),
    "a list": (lambda s: list(s.values()), "expected a flat state dict of tensors, got list"),
    "code": (lambda s: {**s, "x": Trap()}, "could run code); save the state dict alone where it came from"),
    "settings of a trainer": (lambda s: {"model": s, "args": Path("x")}, "it holds objects of pathlib.PosixPath"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_in_a_pt_file(name: str, libero_run: Path, state, monkeypatch) -> None:
    monkeypatch.chdir(libero_run)
    make, wanted = REFUSED[name]
    torch.save(make(state), pt(libero_run))
    if wanted is None:
        opened = ck.open_checkpoint(libero_run)
        assert set(opened.tensors) == set(make(state)), "a prefix of some names is no prefix"
        return
    assert wanted in refusal(libero_run)
    assert not (libero_run / "trap").exists()


@pytest.mark.parametrize("name", CONTENTS)
def test_what_is_not_weights_at_all(name: str, libero_run: Path) -> None:
    content, wanted = CONTENTS[name]
    pt(libero_run).write_bytes(content)
    said = refusal(libero_run)
    assert wanted in said
    assert str(pt(libero_run)) in said


@pytest.mark.parametrize(
    "file", ["config.yaml", "dataset_statistics.json", "cosmos/vae/config.json", "cosmos/tokenizer/tokenizer.json"]
)
def test_small_files_that_are_not_what_they_are_called(file: str, libero_run: Path) -> None:
    from dit4dit.policy.prompts import load_tokenizer

    for name in ("pointer", "page", "empty"):
        (libero_run / file).write_bytes(CONTENTS[name][0])
        with pytest.raises((CheckpointError, ConfigError)) as caught:
            load_tokenizer(ck.open_checkpoint(libero_run).tokenizer)
        assert str(libero_run / file) in str(caught.value)
        assert CONTENTS[name][1] in str(caught.value)
    (libero_run / file).unlink()
    missing = r"no such file; |none of tokenizer\.json|neither config\.yaml"
    with pytest.raises((CheckpointError, ConfigError), match=missing) as caught:
        load_tokenizer(ck.open_checkpoint(libero_run).tokenizer)
    assert "not valid JSON" not in str(caught.value)


def test_a_safetensors_file_under_the_wrong_name(libero_run: Path, state) -> None:
    save_file({n: t.clone() for n, t in state.items()}, pt(libero_run))
    assert "it is a safetensors file); rename it to steps_10_pytorch_model.safetensors" in refusal(libero_run)
