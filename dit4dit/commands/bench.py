"""The commands that measure, `dit4dit bench ...`, one function each; what they run is `dit4dit.benchmarks`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import tyro

from dit4dit.commands.shell import (
    Device,
    Dtype,
    Head,
    at_least,
    check_outputs,
    check_seed,
    dtype_of,
    dtype_on,
    head_dtype_of,
    say,
)
from dit4dit.errors import InputError
from dit4dit.progress import bar

Texts = tyro.conf.UseAppendAction[tuple[str, ...]]


def flops(preset: str = "robocasa_gr1", json: Path | None = None) -> int:
    """GFLOP per stage of one chunk, counted over the real modules: the published schedule, and what this package runs.

    Args:
        preset: libero, robocasa_gr1, unitree_g1, mid, tiny or tabletop.
        json: also write the counts to this file.
    """
    from dit4dit.benchmarks import flops as module  # type: ignore[import-not-found, unused-ignore]
    from dit4dit.benchmarks.recording import Recording
    from dit4dit.presets import preset as find
    from dit4dit.tables import table

    schedules, counts = module.schedules(find(preset)), dict[str, dict[str, float]]()
    with bar("counting", len(schedules)) as shown, shown.ticking(), Recording(json) as record:
        record.result["preset"] = preset
        for name, count in record.each(schedules.items(), "schedules", name=lambda item: item[0]):
            shown.say(name)
            record.result[name] = counts[name] = count()
            shown.update()
    rows = [[stage, *(f"{counts[s][stage]:,.2f}" for s in counts)] for stage in (*module.STAGES, "total")]
    say(table(["GFLOP", *counts], rows, right=range(1, 1 + len(counts))))
    return 0


def latency(
    preset: str = "mid",
    device: Device = "auto",
    dtype: Dtype = "auto",
    chunks: int = 5,
    baseline: bool = False,
    text: bool = True,
    head: Head = "auto",
    head_dtype: Dtype = "auto",
    quantization: Literal["fp8"] | None = None,
    engine_chunks: int = 0,
    at_hz: float | None = None,
    seconds: float | None = None,
    roofline: bool = True,
    tune: Literal["cached", "off"] = "cached",
    programmatic_launch: Literal["cached", "on", "off"] = "cached",
    seed: int = 0,
    json: Path | None = None,
    report: Path | None = None,
) -> int:
    """Latency of one chunk on random weights of true sizes: the engine and, beside it, the published schedule.

    The JSON file is written after each half second of samples and when the command is told to stop; "cut" in it says what it
    lacks.

    Args:
        preset: libero, robocasa_gr1, unitree_g1, mid, tiny or tabletop.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto is bfloat16 on a GPU and float32 on a CPU.
        chunks: timed chunks of each contender, in turns, for the ratio and the stages; 0 with --engine-chunks leaves them out.
        baseline: also time the published schedule, alternating, and report the ratio.
        text: the baseline encodes its instruction in each chunk, as published; --no-text leaves that out.
        head: how the engine runs the action head; one_launch is one CUDA kernel, auto takes it where dit4dit tune
            found it to be the faster one, with --head-dtype bfloat16.
        head_dtype: of the action head, on both sides; auto is dtype, and bfloat16 for one_launch. The published
            code runs the head in float32.
        quantization: fp8 in the engine, calibrated on the inputs that are timed; its errors are reported.
        engine_chunks: before that, so many chunks of the engine alone, for its percentiles.
        at_hz: as many chunks again, each begun at a control step of a robot at this rate, with the GPU's clocks.
        seconds: how long all samples together may take; the counts are then the most. Set-up comes on top.
        roofline: last, count the operations and measure the device's own rates, which takes some seconds.
        tune: cached runs each kernel that dit4dit tune found to be the fastest on this machine, off the defaults.
        programmatic_launch: on Hopper and later, on launches the engine's kernels while the ones before them still run; cached
            where dit4dit tune found that faster on this machine.
        seed: of weights and inputs.
        json: also write every number to this file.
        report: write an HTML report and its images into this folder, or as one page to this file if it ends in .html.
    """
    from dit4dit.benchmarks import latency as module
    from dit4dit.benchmarks import latency_report
    from dit4dit.benchmarks.recording import Recording
    from dit4dit.policy.device import pick_device
    from dit4dit.presets import preset as find

    at_least(0 if engine_chunks > 0 else 1, chunks=chunks)
    at_least(0, engine_chunks=engine_chunks)
    check_seed(seed)
    if at_hz is not None and not 0 < at_hz < float("inf"):
        raise InputError(f"--at-hz: expected a number above 0, got {at_hz}")
    place, chosen = pick_device(device), find(preset)
    if report is not None:
        latency_report.check(report)
    model_dtype = dtype_on(place, dtype)
    kind = head_dtype_of(head_dtype, head, model_dtype)
    wanted = module.Wanted(
        chunks,
        baseline,
        text,
        seed,
        head,
        kind,
        quantization,
        engine_chunks,
        at_hz,
        seconds,
        roofline,
        tune,
        programmatic_launch,
    )
    with Recording(json, seconds) as record:
        module.measure(chosen, preset, wanted, device=place, dtype=model_dtype, record=record)
    say(module.show(record.result))
    if report is not None:
        say(f"wrote {latency_report.write(report, record.result)}")
    return 0


def budget(
    preset: str = "robocasa_gr1",
    head: Head = "auto",
    head_dtype: Dtype = "auto",
    gpu: str = "auto",
    batch: int = 1,
    measured: Path | None = None,
    json: Path | None = None,
    report: Path | None = None,
) -> int:
    """Every launch of one chunk on a GPU, counted and predicted, on any machine; no weights and no GPU are needed.

    Two totals: as a plan chooses there today, and as if each call had the implementation with the smallest prediction. Below them
    the constants that are guesses, and the microseconds that hang on them; where the head runs in one launch, its own table: what
    its parts and matrices are predicted to take. A stage beside another one costs what it takes longer, as if each had the whole
    GPU; launches count kernels, copies and memsets.

    Args:
        preset: libero, robocasa_gr1, unitree_g1, mid, tiny or tabletop.
        head: library, one_launch or auto, as in bench latency.
        head_dtype: of the action head; auto is bfloat16, as of the rest of the model.
        gpu: h200, h100, or a JSON file with the constants of another (benchmarks/gpus.json shows the form); auto is the one
            that is here, h200 where there is none.
        batch: requests in one pass.
        measured: show the times of this result of bench profile, of bench latency or of the GPU suite beside the predictions.
        json: also write every launch to this file.
        report: write a page with a bar for each stage into this folder, or to this file if it ends in .html.
    """
    from dit4dit.benchmarks import budget as module
    from dit4dit.benchmarks import budget_gpu, budget_measured, budget_report, latency_report
    from dit4dit.files.json_files import write_json

    at_least(1, batch=batch)
    check_outputs(json=json)
    if report is not None:
        latency_report.check_place(report)
    kind = head_dtype_of(head_dtype, head, dtype_of("bfloat16"))
    wanted = module.Wanted(preset, head, kind, budget_gpu.read(gpu), batch)
    beside = None
    if measured is not None:
        if batch != 1:
            raise InputError(f"--measured: results are of one request, got --batch {batch}; leave one of them out")
        beside = budget_measured.read(measured, preset, head, str(kind).removeprefix("torch."), wanted.gpu.name)
    with bar("budget", 1) as shown, shown.ticking():
        result = module.measure(wanted)
    result["measured"] = beside
    say(module.show(result))
    if json is not None:
        write_json(json, result)
    if report is not None:
        say(f"wrote {budget_report.write(report, result)}")
    return 0


def profile(
    preset: str = "robocasa_gr1",
    device: Device = "auto",
    dtype: Dtype = "auto",
    head: Head = "auto",
    head_dtype: Dtype = "auto",
    quantization: Literal["fp8"] | None = None,
    seed: int = 0,
    seconds: float | None = None,
    json: Path | None = None,
) -> int:
    """Kernels of one engine step, stage by stage: names, counts and times, beside the time of the step as it is replayed.

    Args:
        preset: libero, robocasa_gr1, unitree_g1, mid, tiny or tabletop.
        device: auto, cpu, cuda or cuda:N; on a CPU operators take the kernels' place.
        dtype: auto is bfloat16 on a GPU and float32 on a CPU.
        head: library, one_launch or auto, as in bench latency.
        head_dtype: of the action head; auto is dtype, and bfloat16 for one_launch.
        quantization: fp8 in the engine, calibrated on the inputs that are profiled.
        seed: of weights and inputs.
        seconds: end after about this long; stages that were not reached are named in the result.
        json: write whole names and all numbers to this file, as they come.
    """
    from dit4dit.benchmarks import profiling as module
    from dit4dit.benchmarks.recording import Recording, left_out
    from dit4dit.policy.device import pick_device
    from dit4dit.presets import preset as find

    check_seed(seed)
    place, chosen = pick_device(device), find(preset)
    kind = dtype_on(place, dtype)
    measure = partial(
        module.measure, head=head, head_dtype=head_dtype_of(head_dtype, head, kind), quantization=quantization
    )
    with Recording(json, seconds) as record:
        measure(chosen, preset, device=place, dtype=kind, seed=seed, record=record)
    say(module.show(record.result) + left_out(record.result))
    return 0


def ops(
    ops: tuple[str, ...] = (),
    device: Device = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    sizes: Literal["auto", "gr1", "all"] = "auto",
    batch: int = 1,
    samples: int | None = None,
    compile: bool = True,
    isolate: bool = False,
    seconds: float | None = None,
    seed: int = 0,
    json: Path | None = None,
) -> int:
    """Time single ops: PyTorch eager, torch.compile, and every implementation that fits, at the released models' sizes.

    Nothing is timed before it agrees with the reference on the very tensors; exit code 1 where something does not, or fails;
    3 where the GPU was lost and what is left needs a new process.

    Args:
        ops: some of the ops, in this order; all when not given.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto is bfloat16 on a GPU and float32 on a CPU.
        sizes: calls of every released model, or of RoboCasa-GR1 alone; auto is all on a GPU and gr1 on a CPU.
        batch: requests at a time.
        samples: timed calls each; 200 on a GPU and 10 on a CPU when not given.
        compile: time torch.compile of the reference too.
        isolate: each op in a process of its own, so that one that dies or hangs costs its own rows alone.
        seconds: end after about this long; with --isolate shared out among the ops.
        seed: of the tensors.
        json: also write every number to this file, as they come.
    """
    from dit4dit import ops as all_ops
    from dit4dit.benchmarks import isolation, op_bench
    from dit4dit.policy.device import pick_device

    at_least(1, batch=batch, samples=samples)
    check_seed(seed)
    check_outputs(json=json)
    for op in ops:
        all_ops.implementations(op)  # BackendError: no such op
    place = pick_device(device)
    gpu = place.type == "cuda"
    names = ops or all_ops.names()
    if isolate:
        words = ["--device", str(place), "--dtype", dtype, "--sizes", sizes, "--batch", str(batch), "--seed", str(seed)]
        words += [] if compile else ["--no-compile"]
        words += [] if samples is None else ["--samples", str(samples)]
        return int(isolation.command(names, words, json, seconds))
    measure = partial(op_bench.command, device=str(place), dtype=dtype_on(place, dtype), batch=batch, seed=seed)
    gr1_only, samples = sizes == "gr1" or (sizes == "auto" and not gpu), samples or (200 if gpu else 10)
    return int(measure(names, json, seconds, samples=samples, gr1_only=gr1_only, compiling=compile))


def options(
    preset: Texts = (),
    checkpoint: Texts = (),
    backbone: str | None = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seeds: int = 8,
    seed: int = 0,
    seconds: float | None = None,
    json: Path | None = None,
) -> int:
    """Error of every option that changes numbers, against the exact engine with the same noise.

    A preset has random weights; of a trained model only its checkpoint tells. Exit code 1 where an option or a subject failed.

    Args:
        preset: libero, robocasa_gr1, unitree_g1, mid, tiny or tabletop; may be given several times.
        checkpoint: run folder, .pt file, folder in the native format, or hub id; may be given several times.
        backbone: Cosmos-Predict2.5 folder or hub id, for the checkpoints.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto is bfloat16 on a GPU and float32 on a CPU.
        seeds: requests, each with a picture, a state and noise of its own.
        seed: of the first request, and of a preset's weights.
        seconds: end after about this long; options that were not reached are named in the result.
        json: also write every number to this file, as they come.
    """
    from dit4dit.benchmarks import options as module
    from dit4dit.benchmarks.recording import Recording, left_out
    from dit4dit.policy.device import pick_device
    from dit4dit.presets import preset as find

    if not preset and not checkpoint:
        raise InputError("bench options: give --preset or --checkpoint")
    at_least(1, seeds=seeds)
    check_seed(seed)
    place = pick_device(device)
    of_preset = partial(module.of_preset, seed=seed, device=place, dtype=dtype_on(place, dtype))
    of_checkpoint = partial(module.of_checkpoint, device=place, dtype=dtype_on(place, dtype))
    subjects = {f"preset {name}": partial(of_preset, name, find(name)) for name in preset}
    subjects |= {f"checkpoint {path}": partial(of_checkpoint, path, backbone) for path in checkpoint}
    with Recording(json, seconds) as record:
        module.measure(subjects, module.OPTIONS, seeds=seeds, seed=seed, record=record)
    results = record.result["subjects"]
    say("\n\n".join(module.show(result) for result in results) + left_out(record.result))
    return 1 if module.failed(results) else 0


def training(
    steps: int = 7, batch_size: int = 4, seed: int = 0, seconds: float | None = None, json: Path | None = None
) -> int:
    """Samples per second of a training step on this CPU against the published schedule, with and without cached latents.

    Args:
        steps: timed steps of each schedule, in alternation.
        batch_size: samples of a step.
        seed: of weights, data and draws.
        seconds: end after about this long, with the steps that were timed.
        json: also write every number to this file, as they come.
    """
    from dit4dit.benchmarks import training as module  # type: ignore[import-not-found, unused-ignore]
    from dit4dit.benchmarks.recording import Recording, left_out

    at_least(1, steps=steps, batch_size=batch_size)
    check_seed(seed)
    with Recording(json, seconds) as record:
        module.measure(steps=steps, batch_size=batch_size, seed=seed, record=record)
    say(module.show(record.result) + left_out(record.result))
    return 0


def rollout(
    checkpoint: Path | None = None,
    workers: tuple[int, ...] = (2, 4),
    batch: int = 4,
    episodes: int = 4,
    rounds: int = 3,
    device: Device = "auto",
    seconds: float | None = None,
    json: Path | None = None,
) -> int:
    """Episodes per second of several simulators against one, on the tabletop world with one policy and the same padded batch.

    Nothing is timed unless every number of workers gives the same episodes. Exit code 1 where a rate is below 0.75 x
    min(workers, cores) of one worker's.

    Args:
        checkpoint: a tabletop policy; the package's own when not given.
        workers: numbers of simulators.
        batch: rows of each pass.
        episodes: of each worker in each round, after its first, where there are most; fewer workers play the same ones.
        rounds: in which the numbers of workers take turns.
        device: auto, cpu, cuda or cuda:N.
        seconds: end after about this long, with the rounds that were played.
        json: also write every number to this file, as they come.
    """
    from dit4dit.benchmarks import rollout as module  # type: ignore[import-not-found, unused-ignore]
    from dit4dit.benchmarks.recording import Recording, left_out
    from dit4dit.envs import tabletop_policy_dir
    from dit4dit.policy.policy import Policy
    from dit4dit.tables import table

    at_least(1, workers=min(workers, default=0), batch=batch, episodes=episodes, rounds=rounds)
    checkpoint = checkpoint or tabletop_policy_dir()
    total = rounds * len({1, *workers}) * max(1, *workers) * (episodes + 1)
    with bar("rollout", total, unit="episode", mininterval=0.5) as shown, Recording(json, seconds) as record:
        shown.say("loading the policy")
        policy = Policy.from_pretrained(checkpoint, device=device)
        shown.say("comparing, then timing")
        measure = partial(module.measure, record=record, on_episode=shown.update)
        measure(policy, checkpoint, workers=workers, batch=batch, episodes=episodes, rounds=rounds)
    result = record.result
    header = ["workers", "episodes/s", "times one", "of min(workers, cores)"]
    slow = [str(run["workers"]) for run in result["runs"] if run["efficiency"] < module.ENOUGH]
    say(table(header, module.rows(result), right=range(4)) + left_out(result))
    if slow:
        say(f"below {module.ENOUGH:.0%} of min(workers, cores), so exit code 1: {', '.join(slow)} workers")
    return 1 if slow else 0


BENCHMARKS: dict[str, Callable[..., int]] = {
    "flops": flops,
    "latency": latency,
    "budget": budget,
    "profile": profile,
    "ops": ops,
    "options": options,
    "training": training,
    "rollout": rollout,
}
