"""Checkpoints of a run: everything that is needed to go on exactly, all or nothing, checked before it is believed.

checkpoints/step_00005000/
    manifest.json            size and SHA-256 of every other file
    policy/                  a folder in the native format, which `Policy.from_pretrained` takes as it is
    state/                   optimiser, and live weights where the policy's are averaged or merged; whole tensors, so that
                             another number of processes can read them
    progress.json            step, position, scaler
    rng.safetensors          states of every rank's generators

A checkpoint is written beside its place, synced, and renamed. A process that dies while it writes leaves a folder whose name
begins with a dot, which the next start removes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit4dit.checkpoints import checksums, native
from dit4dit.checkpoints.checkpoint import FROZEN
from dit4dit.checkpoints.tensor_files import safetensor_files
from dit4dit.config import ModelConfig, build
from dit4dit.errors import CheckpointError
from dit4dit.files.atomic import temp_name
from dit4dit.files.folders import visible
from dit4dit.files.keys import read_json

SHARED_PARTS = "frozen"
"""Folder of a run with the frozen parts that its checkpoints link to."""
LOCK = ".lock"
"""File of a run that the process which writes into its folder holds."""
MANIFEST, PROGRESS, RNG, STATE, POLICY = "manifest.json", "progress.json", "rng.safetensors", "state", "policy"


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        step: steps done. seed, global_batch: what its positions and draws follow from.
        data: the data's fingerprint. prompts: the prompt cache's key.
        scale, growth: state of float16's loss scaler, None without one.
    """

    step: int
    seed: int
    global_batch: int
    data: str
    prompts: str
    scale: float | None = None
    growth: int | None = None


@dataclass(frozen=True, eq=False)
class Inference:
    """What the policy part holds: weights under published names, and everything around them."""

    model: ModelConfig
    embodiment: str | Mapping[str, Any] | None
    weights: Mapping[str, Tensor]
    statistics: Mapping[str, Any]
    tokenizer: Any
    frozen: Path | None
    """Folder with text_encoder/ and vae/ to link to; None leaves them to the backbone."""


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def write(
    run: Path, progress: Progress, inference: Inference, state: Mapping[str, Tensor], rng: Mapping[str, Tensor]
) -> Path:
    """Write a checkpoint; returns its folder. Called by the first process alone.

    Raises:
        CheckpointError: it could not be written; nothing of it stays, older ones are untouched.
    """
    from safetensors.torch import save_file

    target = folder_of(run, progress.step)
    if target.exists():
        discard(target)
    newest = latest(run)
    rest = (
        f"the newest one is {newest}; free space and go on with --resume" if newest else "there is none yet; free space"
    )
    with native.new_folder(target, rest) as partial:
        # the frozen parts that are linked are hashed once a run, when they are written
        linked = {} if inference.frozen is None else checksums.carried(inference.frozen)
        _write_policy(partial / POLICY, inference)
        checksums.write(partial / POLICY, linked)
        native.write_shards(partial / STATE, state)
        save_file(dict(rng), partial / RNG)
        native.write_json(partial / PROGRESS, asdict(progress))
        native.write_json(partial / MANIFEST, checksums.entries(partial, linked))
    return target


def _write_policy(folder: Path, inference: Inference) -> None:
    folder.mkdir()
    native.write_folder(folder, model=inference.model, embodiment=inference.embodiment, tensors=inference.weights)
    native.write_json(folder / "statistics.json", inference.statistics)
    inference.tokenizer.save_pretrained(folder / "tokenizer")
    for part in FROZEN:
        if inference.frozen is not None:
            (folder / part).mkdir()
            for file in visible(inference.frozen / part):
                os.link(file, folder / part / file.name)


def verify(folder: Path) -> None:
    """CheckpointError unless every file of the manifest is there, whole and unchanged."""
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(
            f"{folder / MANIFEST}: no such file; not a whole training checkpoint, give another folder checkpoints/step_N"
        )
    frozen = folder.absolute().parents[1] / SHARED_PARTS
    checksums.verify(
        folder / MANIFEST,
        "the checkpoint is damaged, resume an older one with --resume FOLDER",
        shared=f"remove that file's folder and {frozen}, and --resume writes it again",
    )


def verify_frozen(run: Path) -> None:
    """CheckpointError unless the frozen parts that the next checkpoints will link to, if any, are what was written."""
    frozen = run / SHARED_PARTS
    if not frozen.is_dir():
        return
    rest = f"remove {frozen}, and --resume writes it again"
    for part in FROZEN:
        if not (frozen / part).is_dir():
            raise CheckpointError(f"{frozen / part}: missing; {rest}")
    if (frozen / checksums.FILE).is_file():
        # what the checkpoint that was just verified links to is not read again
        checksums.verify(frozen / checksums.FILE, rest, shared=rest, reread=False)


@dataclass(frozen=True, eq=False)
class Saved:
    """An opened, verified checkpoint; tensors are mapped from disk."""

    folder: Path
    progress: Progress
    weights: Mapping[str, Tensor]
    """Live weights of backbone and head under the names of `optim.named_parameters`."""
    average: Mapping[str, Tensor]
    """Averaged weights, empty without one."""
    moments: Mapping[str, Tensor]
    """"exp_avg.<name>", "exp_avg_sq.<name>", "step.<name>"."""
    rng: Mapping[str, Tensor]


def read(folder: Path) -> Saved:
    """Open and verify; CheckpointError names the file that is missing or damaged."""
    from safetensors.torch import load_file

    verify(folder)
    verify_frozen(folder.absolute().parents[1])
    progress = build(Progress, read_json(folder / PROGRESS), str(folder / PROGRESS))
    state = safetensor_files(folder / STATE, "")
    live = {n.removeprefix("weights."): state[n] for n in state if n.startswith("weights.")}
    policy = safetensor_files(folder / POLICY, "")
    return Saved(
        folder=folder,
        progress=progress,
        weights=live or {n: policy[n] for n in policy},
        average={n.removeprefix("average."): state[n] for n in state if n.startswith("average.")},
        moments={n: state[n] for n in state if n.startswith(("exp_avg.", "exp_avg_sq.", "step."))},
        rng=load_file(folder / RNG),
    )


def all_steps(run: Path) -> dict[int, Path]:
    """Step -> folder of every checkpoint of a run, oldest first."""
    found = {}
    for folder in sorted((run / "checkpoints").glob("step_*")):
        if is_step(folder):
            found[step_of(folder)] = folder
    return found


def is_step(folder: Path) -> bool:
    """Whether it has a checkpoint's name: not one that was set aside, or is half removed."""
    return re.fullmatch(r"step_\d+", folder.name) is not None


def step_of(folder: Path) -> int:
    """How many steps a checkpoint's run had done, of a folder that `is_step`."""
    return int(folder.name.removeprefix("step_"))


def latest(run: Path) -> Path | None:
    """The newest checkpoint of a run."""
    return next(reversed(all_steps(run).values()), None)


@contextlib.contextmanager
def one_writer(run: Path) -> Iterator[None]:
    """Hold the run's folder for this process: another that starts there would remove what this one is writing.

    The operating system gives it back when the process ends, however it ends; its data loaders do not hold it. Where a file
    system has no locks, nothing is held.

    Raises:
        CheckpointError: another process has it.
    """
    with (run / LOCK).open("ab") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise CheckpointError(
                    f"{run}: another process trains there; wait for its end, or choose another folder with --run.out"
                ) from None
        yield


def sweep(run: Path) -> None:
    """Remove what a process that died while writing or removing left behind."""
    for rest in [*(run / "checkpoints").glob(".*"), *run.glob(f".{SHARED_PARTS}.*")]:
        shutil.rmtree(rest)


def set_aside(run: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step`, where a run goes on from an older one, so that none is taken for its newest.

    Returns their new folders, "abandoned_step_N"; one of an earlier time gives way.
    """
    moved = []
    for number, folder in all_steps(run).items():
        if number > step:
            moved.append(folder.with_name(f"abandoned_{folder.name}"))
            if moved[-1].exists():
                discard(moved[-1])
            folder.rename(moved[-1])
    return moved


def rotate(run: Path, keep: int) -> None:
    """Remove all checkpoints but the newest `keep`."""
    for folder in list(all_steps(run).values())[:-keep]:
        discard(folder)


def discard(folder: Path) -> None:
    """Remove a checkpoint so that no half of it is ever under its name."""
    hidden = temp_name(folder)
    folder.rename(hidden)
    shutil.rmtree(hidden)


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """This process's generators: Python's, NumPy's, torch's, and the device's."""
    _, python, gauss = random.getstate()
    _, words, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 (libraries use the global one)
    out = {
        "python": torch.tensor(python, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(np.asarray(words, dtype=np.uint32).astype(np.int64)),
        "numpy_rest": torch.tensor([float(position), float(has_gauss), cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    return out | ({"device": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_rng_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """The inverse of `rng_state`."""
    gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss[0] if gauss else None))
    position, has_gauss, cached = state["numpy_rest"].tolist()
    words = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", words, int(position), int(has_gauss), cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "device" in state:
        torch.cuda.set_rng_state(state["device"], device)
