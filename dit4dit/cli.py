"""The command line. A user's mistake is one line on standard error and exit code 2; anything else is a bug with a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from dit4dit.commands import bench as measuring
from dit4dit.commands import data as data_commands
from dit4dit.commands import evaluation as evaluating
from dit4dit.commands import serving as serving_commands
from dit4dit.commands.shell import (
    INTERRUPTED,
    Device,
    Dtype,
    Head,
    dtype_of,
    finish,
    head_dtype_of,
    progress,
    read_lines,
    say,
)
from dit4dit.errors import Dit4DitError, InputError, did_you_mean
from dit4dit.files.atomic import check_folder

Quantization = Literal["fp8"] | None
Images = tyro.conf.UseAppendAction[tuple[Path, ...]]


def doctor(json: Path | None = None) -> int:
    """What is installed here, which implementation of each op would run and why, and whether the models fit.

    Exit code 0 when everything needed works, 1 otherwise.

    Args:
        json: also write the findings to this file.
    """
    from dit4dit import doctor as module

    result = module.examine()
    finish(module.show(result), result, json)
    return 0 if result["healthy"] else 1


def inspect(
    checkpoint: tyro.conf.Positional[str],
    backbone: str | None = None,
    embodiment: str | None = None,
    verify: bool = False,
    json: Path | None = None,
) -> int:
    """Sizes, shapes, statistics and conventions of a checkpoint; exit code 1 where it cannot be loaded.

    Args:
        checkpoint: run folder, .pt file, folder in the own format, or hub id.
        backbone: Cosmos-Predict2.5 folder or hub id.
        embodiment: report the conventions for this robot.
        verify: first read every file and compare it with the folder's checksums.json.
        json: also write everything to this file.
    """
    from tqdm import tqdm

    from dit4dit.commands import inspect as module

    with tqdm(unit="B", unit_scale=True, desc="reading", disable=None if verify else True) as bar:

        def progress(name: str, size: int) -> None:
            bar.set_postfix_str(name)
            bar.update(size)

        result = module.inspect(
            checkpoint, backbone=backbone, embodiment=embodiment, verify=progress if verify else None
        )
    finish(module.show(result), result, json)
    return 1 if result["problems"] else 0


def predict(
    checkpoint: str,
    image: Images,
    instruction: str,
    state: Path | None = None,
    backbone: str | None = None,
    embodiment: str | None = None,
    seed: int = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    head: Head = "auto",
    head_dtype: Dtype = "auto",
    quantization: Quantization = None,
    calibration: Path | None = None,
    json: Path | None = None,
    plot: Path | None = None,
) -> int:
    """One action chunk from pictures, a state file and an instruction.

    Args:
        checkpoint: run folder, .pt file, folder in the own format, or hub id.
        image: one 8-bit RGB picture per view, in the embodiment's order; give the option once per view.
        instruction: what to do, in words.
        state: JSON object, state key -> number or list of numbers, in robot units.
        backbone: Cosmos-Predict2.5 folder or hub id.
        embodiment: robot name or statistics tag; what the checkpoint implies when not given.
        seed: of the noise; same seed and input, same bits.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto is bfloat16 on a GPU and float32 on a CPU.
        head: one_launch runs the action head as one CUDA kernel; auto does where it was measured on this chip.
        head_dtype: of the action head; auto is float32, and bfloat16 for one_launch.
        quantization: fp8 multiplies the backbone's matrices in 8-bit floats; changes the result.
        calibration: file of dit4dit calibrate, for and only for fp8.
        json: write the chunk to this file.
        plot: write a picture of the chunk to this file.
    """
    from dit4dit.commands import predict as module
    from dit4dit.policy.policy import Policy

    module.check_plot(plot)
    options: dict[str, Any] = {"embodiment": embodiment, "quantization": quantization, "calibration": calibration}
    options |= {"head": head, "head_dtype": head_dtype_of(head_dtype, head)}
    policy = Policy.from_pretrained(checkpoint, backbone, device=device, dtype=dtype_of(dtype), **options)
    result = module.predict(policy, list(image), state, instruction, seed)
    module.save(result, json, plot)
    say(module.show(result))
    return 0


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
    from dit4dit.policy.device import pick_device

    place = pick_device(device)
    if record is not None and (
        json is not None
        or backend is not None
        or engine
        or checkpoint is not None
        or dtype != "float32"
        or head != "auto"
    ):
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
        stages = parity_record.record(folder, record, backbone=backbone, seed=seed, device=place)
        say(f"wrote {folder}: {', '.join(stages)}")
        return 0
    kind = dtype_of(dtype)
    lines = module.check(
        folder,
        device=place,
        dtype=kind,
        backend=backend,
        backbone=backbone,
        checkpoint=checkpoint,
        engine=engine,
        head=head,
    )
    finish(module.show(lines), module.as_json(lines, device=place, dtype=kind), json)
    return 0 if all(line.ok for line in lines) else 1


def convert(
    source: tyro.conf.Positional[Path],
    target: tyro.conf.Positional[Path],
    backbone: Path | None = None,
) -> int:
    """Published run folder -> own format, or back, whichever the source is; bit-exact, nothing is overwritten.

    Args:
        source: published run folder (or one of its .pt files), or a folder in the own format.
        target: new folder.
        backbone: Cosmos-Predict2.5 folder (its small files go along).
    """
    from tqdm import tqdm

    from dit4dit.checkpoints import native
    from dit4dit.checkpoints.checkpoint import is_own_format
    from dit4dit.files.keys import read_json

    to_own = not is_own_format(source)
    with tqdm(unit="B", unit_scale=True, desc="writing", disable=None) as bar:

        def progress(name: str, size: int) -> None:
            bar.set_postfix_str(name)
            bar.update(size)

        if to_own:
            native.to_own(source, target, backbone, progress)
        else:
            native.to_published(source, target, backbone, progress)
    say(f"wrote {target} ({'own format' if to_own else 'published layout'})")
    if not to_own and isinstance(robot := read_json(source / "config.json").get("embodiment"), dict):
        say(f"note: the published layout has no place for a robot of one's own: {robot['robot']['name']} is not in it")
    return 0


def push(folder: tyro.conf.Positional[Path], repository: tyro.conf.Positional[str], public: bool = False) -> int:
    """Upload a folder in the own format to the Hugging Face hub; `--checkpoint REPOSITORY` pulls it back anywhere.

    Args:
        folder: folder in the own format (`dit4dit convert` makes one).
        repository: organisation/name; made when it is not there, private unless --public.
        public: make a new repository public.
    """
    from dit4dit.checkpoints import native

    say(native.push_to_hub(folder, repository, private=not public))
    return 0


def pack(
    checkpoint: str,
    instructions: Path,
    out: Path,
    backbone: str | None = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> int:
    """Precompute prompt packs, so that a robot runs without a text encoder: from_pretrained(packs=OUT, text_encoder=False).

    Args:
        checkpoint: run folder, .pt file, folder in the own format, or hub id.
        instructions: text file, one instruction a line.
        out: folder for the packs; those already there are kept.
        backbone: Cosmos-Predict2.5 folder or hub id.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto is bfloat16 on a GPU and float32 on a CPU; the robot must load the policy with the same.
    """
    from tqdm import tqdm

    from dit4dit.policy.policy import Policy

    lines = read_lines(instructions)
    check_folder("--out", out)
    policy = Policy.from_pretrained(checkpoint, backbone, device=device, dtype=dtype_of(dtype), packs=out)
    for line in tqdm(lines, desc="packs", disable=None):
        policy.prepare(line).result()
        assert policy.packs is not None
        if not policy.packs.path(line).is_file():
            raise InputError(f"--out {out}: the pack of {line!r:.60} could not be written; is the disk full?")
    say(f"{len(lines)} packs in {out}")
    return 0


def calibrate(
    checkpoint: str,
    out: Path,
    examples: Path | None = None,
    image: Images = (),
    state: Path | None = None,
    instruction: str | None = None,
    backbone: str | None = None,
    embodiment: str | None = None,
    seed: int = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Path | None = None,
) -> int:
    """The largest activations of a checkpoint, which fp8 needs, and the measured error of fp8 on the examples.

    Args:
        checkpoint: run folder, .pt file, folder in the own format, or hub id.
        out: file for the calibration.
        examples: JSON lines file, each line {"images": [one per view], "state": object or file, "instruction": words}.
        image: of a single example: one 8-bit RGB picture per view, in the embodiment's order.
        state: of a single example: JSON object, state key -> number or list of numbers, in robot units.
        instruction: of a single example: what to do, in words.
        backbone: Cosmos-Predict2.5 folder or hub id.
        embodiment: robot name or statistics tag; what the checkpoint implies when not given.
        seed: of the noise; example i takes chunk i of it.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto is bfloat16 on a GPU and float32 on a CPU; the policy must be loaded with the same.
        json: write the errors to this file.
    """
    from dit4dit.commands import calibrate as module
    from dit4dit.policy.policy import Policy

    found = module.choose_examples(examples, list(image), state, instruction)
    policy = Policy.from_pretrained(checkpoint, backbone, device=device, dtype=dtype_of(dtype), embodiment=embodiment)
    calibration, errors = module.calibrate(policy, found, seed)
    calibration.save(out)
    finish(f"{module.show(calibration, errors)}\nwrote {out}", {"samples": calibration.samples, **errors}, json)
    return 0


def train() -> int:
    """Train from a recipe or a YAML file; `dit4dit train --help`."""
    raise AssertionError("main() hands train its words: --a.b.c value is any key of a configuration")


def demo(
    out: Path = Path("demo"),
    episodes: int = 50,
    seed: int = 1_000_000,
    device: Device = "auto",
    checkpoint: Path | None = None,
) -> int:
    """The policy that ships with the package drives the built-in tabletop world: success rate, latencies, a page with videos.

    Args:
        out: folder for the results; a run that is there already goes on.
        episodes: how many layouts.
        seed: of the first layout and its noise, the next ones follow; from 1000000 on no layout was trained on.
        device: auto, cpu, cuda or cuda:N.
        checkpoint: another policy for this world.
    """
    from dit4dit.commands import demo as module

    check_folder("--out", out)
    result = module.demo(out, episodes=episodes, seed=seed, device=device, bar=progress, checkpoint=checkpoint)
    say(module.show(result, out))
    return 0


def demo_train(
    out: Path = Path("demo-train"),
    seed: int = 0,
    demonstrations: int = 5400,
    steps: int | None = None,
    episodes: int = 100,
    processes: int = 2,
) -> int:
    """Train a policy for the built-in world from nothing but its VAE, and measure it before and after.

    Args:
        out: new folder for data, run, episodes and report.
        seed: of the weights, the order of samples, and which layouts are demonstrated.
        demonstrations: episodes that the scripted expert records.
        steps: of training; the recipe's where not given.
        episodes: of each evaluation, on layouts that are never demonstrated.
        processes: of one thread each.
    """
    from dit4dit.demo import train as module

    check_folder("--out", out)
    settings = module.Settings(seed, demonstrations, steps, episodes, processes)
    say(module.show(module.demo_train(out, settings, bar=progress), out))
    return 0


COMMANDS: dict[str, Callable[..., int]] = {
    "doctor": doctor,
    "inspect": inspect,
    "predict": predict,
    "parity": parity,
    "convert": convert,
    "push": push,
    "pack": pack,
    "calibrate": calibrate,
    "stats": data_commands.stats,
    "train": train,
    "serve": serving_commands.serve,
    "demo": demo,
    "demo-train": demo_train,
    "tune": measuring.tune,
}
BENCHMARKS: dict[str, Callable[..., int]] = {**measuring.BENCHMARKS, "loader": data_commands.bench_loader}
DATA: dict[str, Callable[..., int]] = {"check": data_commands.data_check}
GROUPS = {"bench": BENCHMARKS, "data": DATA, "eval": evaluating.EVALUATIONS}


def bench() -> int:
    """Benchmarks: flops, latency, profile, ops, options, training, rollout and loader; `dit4dit bench latency --help`."""
    raise AssertionError("main() sends bench to its own subcommands")


def data() -> int:
    """Data sets: check; `dit4dit data check --help`."""
    raise AssertionError("main() sends data to its own subcommands")


def evaluate() -> int:
    """Evaluation: libero, gr1, tabletop, openloop, setup, report, compare, merge, episodes; `dit4dit eval libero --help`."""
    raise AssertionError("main() sends eval to its own subcommands")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `dit4dit` command; exits with the command's code."""
    # Before torch is imported: threads that wait by spinning make a chunk on a CPU fifty times slower as soon as another
    # process wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    words = list(sys.argv[1:] if arguments is None else arguments)
    commands, program = {**COMMANDS, "data": data, "bench": bench, "eval": evaluate}, "dit4dit"
    if words and words[0] in GROUPS:
        commands, program, words = dict(GROUPS[words[0]]), f"dit4dit {words[0]}", words[1:]
    try:
        if words[:1] == ["train"] and program == "dit4dit":
            from dit4dit.commands import train as module

            program = "dit4dit train"
            sys.exit(module.main(words[1:], say))
        if words and not words[0].startswith("-") and words[0] not in commands:
            known = list(commands)
            raise InputError(
                f"{program} {words[0]}: no such command{did_you_mean(words[0], known)}; known: {', '.join(known)}"
            )
        code = tyro.extras.subcommand_cli_from_dict(
            commands, prog=program, args=words or ["--help"], description="DiT4DiT: run, check and convert the policy."
        )
    except Dit4DitError as error:
        sys.stderr.write(f"{program}: error: {error}\n")
        code = 2
    except BrokenPipeError:
        code = 0
    except KeyboardInterrupt:
        sys.stderr.write(f"{program}: interrupted\n")
        code = INTERRUPTED
    sys.exit(code)
