"""The command line. A user's mistake is one line on standard error and exit code 2; anything else is a bug with a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import tyro

from dit4dit.commands import bench as measuring
from dit4dit.commands import control as controlling
from dit4dit.commands import data as data_commands
from dit4dit.commands import evaluation as evaluating
from dit4dit.commands import serving as serving_commands
from dit4dit.commands.check_parity import parity
from dit4dit.commands.demo import demo, demo_train
from dit4dit.commands.loading import PolicyToLoad
from dit4dit.commands.shell import (
    INTERRUPTED,
    Dtype,
    Head,
    check_outputs,
    check_seed,
    finish,
    head_dtype_of,
    read_lines,
    say,
)
from dit4dit.commands.tune import tune
from dit4dit.errors import Dit4DitError, InputError, did_you_mean, shown
from dit4dit.files.atomic import check_folder
from dit4dit.progress import bar, waiting

Quantization = Literal["fp8"] | None
Images = tyro.conf.UseAppendAction[tuple[Path, ...]]


def doctor(json: Path | None = None) -> int:
    """What is installed here, which implementation of each op would run and why, and whether the models fit.

    Exit code 0 when everything needed works, 1 otherwise.

    Args:
        json: also write the findings to this file.
    """
    from dit4dit import doctor as module

    check_outputs(json=json)
    with waiting("looking"):
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
        checkpoint: run folder, .pt file, folder in the native format, or hub id.
        backbone: Cosmos-Predict2.5 folder or hub id.
        embodiment: report the conventions for this robot.
        verify: first read every file and compare it with the folder's checksums.json.
        json: also write everything to this file.
    """
    from dit4dit.commands import inspect as module

    check_outputs(json=json)
    with bar("reading", unit="B", unit_scale=True, active=verify) as counted:

        def progress(name: str, size: int) -> None:
            counted.say(name)
            counted.update(size)

        result = module.inspect(
            checkpoint, backbone=backbone, embodiment=embodiment, verify=progress if verify else None
        )
    finish(module.show(result), result, json)
    return 1 if result["problems"] else 0


def predict(
    policy: PolicyToLoad,
    image: Images,
    instruction: str,
    state: Path | None = None,
    seed: int = 0,
    head: Head = "auto",
    head_dtype: Dtype = "auto",
    quantization: Quantization = None,
    calibration: Path | None = None,
    json: Path | None = None,
    plot: Path | None = None,
) -> int:
    """One action chunk from pictures, a state file and an instruction.

    Args:
        policy: the policy.
        image: one 8-bit RGB picture per view, in the embodiment's order; give the option once per view.
        instruction: what to do, in words.
        state: JSON object, state key -> number or list of numbers, in robot units.
        seed: of the noise; same seed and input, same bits.
        head: one_launch runs the action head as one CUDA kernel; auto does where dit4dit tune found it the faster one.
        head_dtype: of the action head; auto is the model's dtype, and bfloat16 for one_launch.
        quantization: fp8 multiplies the backbone's matrices in 8-bit floats; changes the result.
        calibration: file of dit4dit calibrate, for and only for fp8.
        json: write the chunk to this file.
        plot: write a picture of the chunk to this file.
    """
    from dit4dit.commands import predict as module

    module.check_plot(plot)
    check_outputs(json=json, plot=plot)
    check_seed(seed, bits=64)
    if not instruction.strip():
        raise InputError(f"--instruction: expected what to do, in words, got {instruction!r}")
    seen = module.read(list(image), state)
    module.check_views(policy.robot(), len(image))
    kind = head_dtype_of(head_dtype, head, None)
    loaded = policy.load(head=head, head_dtype=kind, quantization=quantization, calibration=calibration)
    result = module.predict(loaded, seen, instruction, seed)
    module.save(result, json, plot)
    say(module.show(result))
    return 0


def convert(
    source: tyro.conf.Positional[Path],
    target: tyro.conf.Positional[Path],
    backbone: Path | None = None,
) -> int:
    """Published run folder -> native format, or back, whichever the source is; bit-exact, nothing is overwritten.

    Args:
        source: published run folder (or one of its .pt files), or a folder in the native format.
        target: new folder.
        backbone: Cosmos-Predict2.5 folder (its small files go along).
    """
    from dit4dit.checkpoints import native
    from dit4dit.checkpoints.checkpoint import is_own_format
    from dit4dit.files.keys import read_json

    to_own = not is_own_format(source)
    with bar("writing", unit="B", unit_scale=True) as counted, counted.ticking():

        def progress(name: str, size: int) -> None:
            counted.say(name)
            counted.update(size)

        if to_own:
            native.to_own(source, target, backbone, progress)
        else:
            native.to_published(source, target, backbone, progress)
    say(f"wrote {target} ({'native format' if to_own else 'published layout'})")
    if not to_own and isinstance(robot := read_json(source / "config.json").get("embodiment"), dict):
        say(f"note: the published layout has no place for a robot of one's own: {robot['robot']['name']} is not in it")
    return 0


def push(folder: tyro.conf.Positional[Path], repository: tyro.conf.Positional[str], public: bool = False) -> int:
    """Upload a folder in the native format to the Hugging Face hub; `--checkpoint REPOSITORY` pulls it back anywhere.

    Args:
        folder: folder in the native format (`dit4dit convert` makes one).
        repository: organisation/name; made when it is not there, private unless --public.
        public: make a new repository public.
    """
    from dit4dit.checkpoints import native

    say(native.push_to_hub(folder, repository, private=not public))
    return 0


def pack(policy: PolicyToLoad, instructions: Path, out: Path) -> int:
    """Precompute prompt packs, so that a robot runs without a text encoder: from_pretrained(packs=OUT, text_encoder=False).

    Args:
        policy: the policy; the robot must load it with the same dtype.
        instructions: text file, one instruction a line.
        out: folder for the packs; those already there are kept.
    """
    lines = read_lines(instructions)
    check_folder("--out", out)
    loaded = policy.load(packs=out)
    with bar("packs", len(lines)) as counted:
        for line in lines:
            loaded.prepare(line).result()
            assert loaded.packs is not None
            if not loaded.packs.path(line).is_file():
                raise InputError(f"--out {out}: the pack of {shown(line)} could not be written; is the disk full?")
            counted.update()
    say(f"{len(lines)} packs in {out}")
    return 0


def calibrate(
    policy: PolicyToLoad,
    out: Path,
    examples: Path | None = None,
    image: Images = (),
    state: Path | None = None,
    instruction: str | None = None,
    seed: int = 0,
    json: Path | None = None,
) -> int:
    """The largest activations of a checkpoint, which fp8 needs, and the measured error of fp8 on the examples.

    Args:
        policy: the policy; it must be loaded with the same dtype when the calibration is used.
        out: file for the calibration.
        examples: JSON lines file, each line {"images": [one per view], "state": object or file, "instruction": words}.
        image: of a single example: one 8-bit RGB picture per view, in the embodiment's order.
        state: of a single example: JSON object, state key -> number or list of numbers, in robot units.
        instruction: of a single example: what to do, in words.
        seed: of the noise; example i takes chunk i of it.
        json: write the errors to this file.
    """
    from dit4dit.commands import calibrate as module

    check_seed(seed, bits=64)
    found = module.choose_examples(examples, list(image), state, instruction)
    check_outputs(out=out, json=json)
    module.check_fit(found, policy.robot())
    loaded = policy.load()
    with waiting(f"calibrating on {len(found)} examples"):
        calibration, errors = module.calibrate(loaded, found, seed)
    calibration.save(out)
    finish(f"{module.show(calibration, errors)}\nwrote {out}", {"samples": calibration.samples, **errors}, json)
    return 0


def train(*words: str) -> int:
    """Train from a recipe or a YAML file; `dit4dit train --help`."""
    from dit4dit.commands import train as module

    return answer("dit4dit train", lambda: module.main(words))


def data(*words: str) -> int:
    """Data sets: check; `dit4dit data check --help`."""
    return run("dit4dit data", DATA, words)


def bench(*words: str) -> int:
    """Benchmarks: flops, latency, profile, ops, options, training, rollout, loader and stream; `dit4dit bench latency --help`."""
    return run("dit4dit bench", BENCHMARKS, words)


def control(*words: str) -> int:
    """A running robot's action stream: watch; `dit4dit control watch --help`."""
    return run("dit4dit control", controlling.CONTROL, words)


def evaluate(*words: str) -> int:
    """Evaluation: libero, gr1, tabletop, openloop, setup, report, compare, merge, episodes; `dit4dit eval libero --help`."""
    return run("dit4dit eval", evaluating.EVALUATIONS, words)


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
    "tune": tune,
    "data": data,
    "bench": bench,
    "eval": evaluate,
    "control": control,
}
BENCHMARKS: dict[str, Callable[..., int]] = {
    **measuring.BENCHMARKS,
    "loader": data_commands.bench_loader,
    "stream": controlling.bench_stream,
}
DATA: dict[str, Callable[..., int]] = {"check": data_commands.data_check}
PARSE_THEMSELVES = (train, data, bench, evaluate, control)
"""Commands that take their words as they are: each has subcommands, or options that only a configuration knows."""


def run(program: str, commands: dict[str, Callable[..., int]], words: Sequence[str]) -> int:
    """Run the command that the first word names, by tyro on the rest; returns its exit code."""
    name, rest = (words[0], words[1:]) if words else ("--help", ())
    if commands.get(name) in PARSE_THEMSELVES:
        return commands[name](*rest)

    def parsed() -> int:
        if not name.startswith("-") and name not in commands:
            raise InputError(
                f"{program} {name}: no such command{did_you_mean(name, list(commands))}; known: {', '.join(commands)}"
            )
        return tyro.extras.subcommand_cli_from_dict(
            commands, prog=program, args=[name, *rest], description="DiT4DiT: run, check and convert the policy."
        )

    return answer(program, parsed)


def answer(program: str, command: Callable[[], int]) -> int:
    """The exit code of a command; a user's mistake and Ctrl-C are one line on standard error."""
    try:
        return command()
    except Dit4DitError as error:
        sys.stderr.write(f"{program}: error: {error}\n")
        return 2
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        sys.stderr.write(f"{program}: interrupted\n")
        return INTERRUPTED


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `dit4dit` command; exits with the command's code."""
    # Before torch is imported: threads that wait by spinning make a chunk on a CPU fifty times slower as soon as another
    # process wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(run("dit4dit", COMMANDS, sys.argv[1:] if arguments is None else arguments))
