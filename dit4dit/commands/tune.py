"""`dit4dit tune`: which implementation of each op call is right and the fastest here, or with --tiles, which block sizes are."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dit4dit.commands.shell import Device, Dtype, at_least, check_outputs, check_seed, dtype_of, dtype_on, say
from dit4dit.errors import InputError, said, shown

Texts = tyro.conf.UseAppendAction[tuple[str, ...]]


@dataclass(frozen=True)
class Model:
    """The model whose op calls are measured; give what its policy will be loaded with."""

    preset: str | None = None
    """libero, robocasa_gr1, unitree_g1, mid, tiny or tabletop; or give a checkpoint."""
    checkpoint: str | None = None
    """Run folder, .pt file, folder in the native format, or hub id; its small files are read, no weights."""
    backbone: str | None = None
    """Of the checkpoint: Cosmos-Predict2.5 folder or hub id."""
    embodiment: str | None = None
    """Of the checkpoint: robot name or statistics tag; what it implies when not given."""
    dtype: Dtype = "auto"
    """auto is bfloat16 on a GPU and float32 on a CPU."""
    head_dtype: Dtype = "auto"
    """Of the action head; auto is dtype. With bfloat16 on a GPU, the head in one launch is a candidate too."""
    quantization: Literal["fp8"] | None = None
    """The calls of a policy in fp8."""
    steps: int | None = None
    """Euler steps; the model's own number when not given."""
    image: Texts = ()
    """VIEW=HEIGHTxWIDTH of the robot's camera images, once per view; the model's own size is always measured too."""
    plugin: Texts = ()
    """Module that registers implementations of your own (dit4dit.ops.register); may be given several times."""
    report: Path | None = None
    """Write a page with all candidates, times and reasons into this folder, or to this file if it ends in .html."""


@dataclass(frozen=True)
class TileSearch:
    """The search for block sizes of the Triton kernels, which happens with --tiles alone."""

    tiles: float | None = None
    """Instead of the above: search block sizes for about so many seconds and write a table that DIT4DIT_TILES can name."""
    out: Path = Path("tiles.json")
    """With --tiles: the table. What it holds already of other ops and GPUs stays; it is written after each row."""
    whole: bool = False
    """With --tiles: write the package's table with the new columns instead, to replace dit4dit/ops/tiles.json."""
    samples: int = 30
    """With --tiles: timed calls of each tile."""


# their fields are options of the command itself: --preset, --tiles
Tuned = Annotated[Model, tyro.conf.arg(name="")]
Searched = Annotated[TileSearch, tyro.conf.arg(name="")]


def tune(
    model: Tuned,
    search: Searched,
    device: Device = "auto",
    batch: tuple[int, ...] = (),
    ops: tuple[str, ...] = (),
    seconds: float | None = None,
    seed: int = 0,
    json: Path | None = None,
) -> int:
    """Find the fastest right implementation of each op call of a model on this machine; policies loaded later use them.

    On Hopper and later, last, whether each plan is faster with programmatic launches, by its whole step on random weights.
    Candidates are tried in child processes: one that crashes, hangs, or is further from the reference than PyTorch allows is
    never chosen. It took 6 s for the demo's policy on two CPU cores, 53 s for robocasa_gr1 in float32 on one; no GPU has run it
    yet. Exit code 1 where a call has no right implementation at all.

    Args:
        model: the model.
        search: the search for block sizes.
        device: auto, cpu, cuda or cuda:N.
        batch: requests in one pass, all numbers that will be asked for; 1 when not given, 1 and 16 with --tiles.
        ops: some of the ops; all, and the launches, when not given.
        seconds: end after about this long; calls that were not reached keep what they have.
        seed: of the tensors.
        json: also write all that is found to this file, as it comes; with --tiles every timing goes there, and when it is not
            given to OUT with the ending .timings.json.
    """
    at_least(1, batch=min(batch, default=1), samples=search.samples)
    check_seed(seed)
    check_outputs(json=json)
    if search.tiles is not None:
        for name in _given(model):
            raise InputError(
                f"--{name} and --tiles: expected one of them; search block sizes first, then tune with DIT4DIT_TILES set"
            )
        if seconds is not None:
            raise InputError("--seconds and --tiles: expected one of them; --tiles says for how long it searches")
        return _search_tiles(search, device, batch or (1, 16), ops, seed, json)
    for name in _given(search):
        raise InputError(f"--{name}: is for the search for block sizes; give --tiles SECONDS too, or leave it out")
    return _tune(model, device, batch or (1,), ops, seconds, seed, json)


def _given(options: Any) -> list[str]:
    """The options that differ from their defaults, as they are typed."""
    return [f.name.replace("_", "-") for f in fields(options) if getattr(options, f.name) != f.default]


def _tune(
    model: Model,
    device: str,
    batch: Sequence[int],
    ops: Sequence[str],
    seconds: float | None,
    seed: int,
    json: Path | None,
) -> int:
    _check(model)
    from dit4dit.benchmarks import latency_report, programmatic, tuning, tuning_calls, tuning_report
    from dit4dit.benchmarks.recording import Recording
    from dit4dit.policy.device import pick_device

    place = pick_device(device)
    if model.report is not None:
        latency_report.check_place(model.report)
    for name in model.plugin:
        load_plugin(name)
    if model.checkpoint is None:
        subject = tuning_calls.of_preset(model.preset)
    else:
        subject = tuning_calls.of_checkpoint(model.checkpoint, model.backbone, model.embodiment)
    wanted = tuning_calls.requests(subject, batch, tuning_calls.read_images(model.image, subject.robot))
    dtype = dtype_on(place, model.dtype)
    head_dtype = dtype_of(model.head_dtype) or dtype
    todo = tuning_calls.todo(
        subject,
        wanted,
        place,
        dtype=dtype,
        head_dtype=head_dtype,
        fp8=model.quantization == "fp8",
        steps=model.steps,
        only=ops,
    )
    with Recording(json, seconds) as record:
        record.result |= {
            "subject": subject.name,
            "dtype": str(dtype).removeprefix("torch."),
            "head_dtype": str(head_dtype).removeprefix("torch."),
            "quantization": model.quantization,
            "steps": model.steps,
            "batch": list(batch),
            "images": list(model.image),
            "distinct": tuning_calls.counts(todo),
        }
        _compile(todo, place, record)
        tuning.tune(todo, place, record=record, plugins=model.plugin, seed=seed)
        if not ops and programmatic.applies(place):
            programmatic.tune(
                subject,
                wanted,
                place,
                record=record,
                dtype=dtype,
                head_dtype=head_dtype,
                fp8=model.quantization == "fp8",
                steps=model.steps,
                seed=seed,
            )
    result = record.result
    say(tuning_report.show(result))
    if model.report is not None:
        say(f"wrote {tuning_report.write(model.report, result)}")
    say(tuning_report.how_to_use(result))
    return 1 if tuning_report.hopeless(result["calls"]) else 0


def _compile(todo: Sequence[Any], device: Any, record: Any) -> None:
    """On a GPU: the Triton kernels of these calls, on all cores at once, so that no trial waits for one."""
    from dit4dit.ops import launch

    if device.type != "cuda" or launch.interpreting():
        return
    from dit4dit.benchmarks.compile_ahead import compile_ahead

    record.during("compiling kernels", [one.op for one in todo])
    compiled = compile_ahead([(one.op, one.args) for one in todo], launch.architecture(device))
    record.result["compiled"] = compiled.data()


def _check(model: Model) -> None:
    """InputError where the options do not say one model."""
    if (model.preset is None) == (model.checkpoint is None):
        got = "neither" if model.preset is None else "both"
        raise InputError(
            f"tune: expected --preset or --checkpoint, got {got}; give one of them (block sizes of the Triton kernels "
            "alone are searched with --tiles SECONDS)"
        )
    for name in ("backbone", "embodiment"):
        if model.preset is not None and getattr(model, name) is not None:
            raise InputError(f"--{name}: is of a checkpoint, and --preset is given; leave it out")


def load_plugin(name: str) -> None:
    """Import a module that registers implementations. InputError: it cannot be imported, or registers none."""
    from dit4dit.ops import dispatch

    def registered() -> int:
        return sum(
            dispatch.foreign(implementation) is not None
            for op in dispatch.names()
            for implementation in dispatch.find(op).implementations.values()
        )

    before, known = registered(), name in sys.modules
    try:
        importlib.import_module(name)
    except (Exception, SystemExit) as error:  # what a module of others raises has no common base
        raise InputError(
            f"--plugin {shown(name)}: cannot be imported ({type(error).__name__}: {said(error)}); give a module that Python "
            "finds (PYTHONPATH=FOLDER) and imports"
        ) from error
    if registered() == (0 if known else before):  # what was imported before has registered before
        raise InputError(f"--plugin {name}: registers no implementation; call dit4dit.ops.register in it")


def _search_tiles(
    search: TileSearch,
    device: str,
    batch: Sequence[int],
    ops: Sequence[str],
    seed: int,
    json: Path | None,
) -> int:
    import torch

    from dit4dit.benchmarks import tiles_search as module
    from dit4dit.benchmarks.recording import Recording
    from dit4dit.ops import launch
    from dit4dit.policy.device import pick_device

    seconds = search.tiles
    if seconds is None or not 0 < seconds < float("inf"):
        raise InputError(f"--tiles: expected seconds above 0, got {seconds}")
    place, out = pick_device(device), search.out
    names = module.check(ops, place)
    files = module.Files(out, json or out.with_suffix(".timings.json"), search.whole)
    files.check()
    found = module.on_gpu(names, place, batch, seed)
    measure = partial(module.measured, samples=search.samples)
    with Recording(files.timings, seconds) as record, torch.no_grad():
        result = module.search_tiles(launch.architecture(place), found, measure, record=record, write=files.write)
    files.write(result)
    use = "replace dit4dit/ops/tiles.json with it" if search.whole else f"export DIT4DIT_TILES={out.resolve()}"
    say(f"{module.show(result)}\nwrote {out} and {files.timings}; to use it: {use}")
    return 0
