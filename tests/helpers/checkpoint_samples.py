"""What the tests of checkpoint files share: the golden run's weights, files that are not what they are called, shards."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dit4dit.checkpoints import checkpoint as ck
from dit4dit.errors import CheckpointError, ConfigError

GOLDEN = Path(__file__).parents[1] / "golden"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4501563\n"
PAGE = "<!DOCTYPE html>\n<html><body>Sign in</body></html>\n"
CONTENTS = {
    "pointer": (POINTER.encode(), "is a git-lfs pointer, not the file itself; run `git lfs pull` in "),
    "page": (PAGE.encode(), "is an HTML page saved under this name"),
    "empty": (b"", "is empty (0 bytes)"),
    "pickle": (pickle.dumps({"a": 1}), "truncated, or not written by torch.save?"),
    "cut zip": (b"PK\x03\x04" + bytes(100), "truncated, or not written by torch.save?"),
}


def pt(run: Path) -> Path:
    return run / "checkpoints" / "steps_10_pytorch_model.pt"


def same_tensors(a, b) -> bool:
    return set(a) == set(b) and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def libero_state() -> dict[str, torch.Tensor]:
    """The state dict of the golden LIBERO run."""
    return torch.load(pt(GOLDEN / "libero_tiny"), weights_only=True)


def check_same(opened: ck.Checkpoint, state: dict[str, torch.Tensor]) -> None:
    assert set(opened.tensors) == set(state)
    assert all(torch.equal(opened.tensors[name], value) for name, value in state.items())


def refusal(run: Path) -> str:
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        ck.open_checkpoint(run)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_shards(folder: Path, state: dict, stem: str = "model", count: int = 2) -> None:
    folder.mkdir(exist_ok=True)
    names, listed = sorted(state), {}
    for i in range(count):
        file = f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors"
        part = {name: state[name].clone() for name in names[i::count]}
        save_file(part, folder / file)
        listed |= dict.fromkeys(part, file)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))


def flip(file: Path) -> None:
    """Change one bit, and leave size and time as they were."""
    facts, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    with file.open("r+b") as stream:
        stream.write(content)
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
