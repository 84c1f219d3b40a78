"""`dit4dit parity`: this machine's results against a golden folder's, or a new golden folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from dit4dit.commands.shell import Device, Head, check_outputs, check_seed, dtype_of, finish, head_dtype_of, say
from dit4dit.errors import InputError
from dit4dit.progress import waiting


def parity(
    folder: tyro.conf.Positional[Path],
    record: Path | None = None,
    checkpoint: Path | None = None,
    backbone: Path | None = None,
    device: Device = "auto",
    dtype: Literal["float32", "bfloat16"] = "float32",
    backend: str | None = None,
    engine: bool = False,
    head: Head = "auto",
    seed: int = 0,
    json: Path | None = None,
) -> int:
    """Compare this machine's results with a golden folder's, stage by stage; exit code 1 on any breach.

    Args:
        folder: golden folder; with --record, a new folder to write.
        record: write such a folder from this checkpoint instead of comparing.
        checkpoint: use this checkpoint instead of the one that the folder holds or names.
        backbone: Cosmos-Predict2.5 folder.
        device: auto, cpu, cuda or cuda:N.
        dtype: of the model; the limits of float32 are the promise.
        backend: run every op with this implementation.
        engine: run the engine instead of the plain model (inference stages only).
        head: how the engine runs the action head; one_launch needs --engine, and runs it in bfloat16: --dtype bfloat16.
        seed: of a recorded folder's inputs and noise.
        json: also write the table to this file.
    """
    from dit4dit.evaluation import parity as module
    from dit4dit.evaluation import parity_record
    from dit4dit.ops import use_backend
    from dit4dit.policy.device import pick_device

    check_outputs(json=json)
    check_seed(seed)
    place = pick_device(device)
    plain = (json, backend, engine, checkpoint, dtype, head) == (None, None, False, None, "float32", "auto")
    if record is not None and not plain:
        raise InputError(
            "--record writes float32 results of the plain model: leave out --json, --backend, --engine, --checkpoint, "
            "--dtype and --head"
        )
    if head != "auto" and not engine:
        raise InputError(f"--head {head}: it is an option of the engine; add --engine")
    if head == "one_launch" and dtype != "bfloat16":
        raise InputError(
            f"--head one_launch: the kernel runs in bfloat16, and the limits are those of {dtype}; add --dtype bfloat16"
        )
    if record is not None:
        with waiting("recording"):
            stages = parity_record.record(folder, record, backbone=backbone, seed=seed, device=place)
        say(f"wrote {folder}: {', '.join(stages)}")
        return 0
    kind = dtype_of(dtype)
    with use_backend(backend):  # BackendError where no op has it
        pass
    with waiting("parity"):
        lines = module.check(
            folder,
            device=place,
            dtype=kind,
            backend=backend,
            backbone=backbone,
            checkpoint=checkpoint,
            engine=engine,
            head=head,
            head_dtype=head_dtype_of("auto", head, dtype_of("float32")),  # as published
        )
    finish(module.show(lines), module.as_json(lines, device=place, dtype=kind), json)
    return 0 if all(line.ok for line in lines) else 1
