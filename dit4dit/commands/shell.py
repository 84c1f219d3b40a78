"""What all commands share where they meet the shell: types of arguments, and the end that prints and writes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from dit4dit.errors import InputError
from dit4dit.progress import bar

Device = str
Dtype = Literal["auto", "float32", "bfloat16"]
Head = Literal["auto", "library", "one_launch"]
INTERRUPTED = 130
"""Exit code after Ctrl-C."""


def dtype_of(name: str) -> Any:
    """The torch dtype of this name; None for "auto"."""
    import torch

    return None if name == "auto" else getattr(torch, name)


def head_dtype_of(name: str, head: str, dtype: Any) -> Any:
    """The torch dtype of the action head; "auto" is `dtype`, the model's, and bfloat16 for the kernel, which takes no other."""
    return dtype_of(name) or (dtype_of("bfloat16") if head == "one_launch" else dtype)


def dtype_on(device: Any, name: str) -> Any:
    """The torch dtype of this name; "auto" is bfloat16 on a GPU and float32 on a CPU."""
    return dtype_of(name) or dtype_of("bfloat16" if device.type == "cuda" else "float32")


def at_least(least: int, **options: int | None) -> None:
    """InputError where one of these options is given and is below `least`."""
    for name, value in options.items():
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')}: expected at least {least}, got {value}")


def check_seed(seed: int, bits: int = 63) -> None:
    """InputError unless NumPy and torch both take it, and the seeds of the requests after it. bits: 64 for noise alone."""
    if not 0 <= seed < 2**bits:
        raise InputError(f"--seed: expected an integer in 0..2^{bits}-1, got {seed}")


def check_outputs(**files: Path | None) -> None:
    """InputError where one of these files, options that are given, cannot be written: before anything long begins."""
    from dit4dit.files.atomic import check_file

    for name, file in files.items():
        if file is not None:
            check_file(f"--{name}", file)


def check_inputs(**files: Path | None) -> None:
    """InputError where one of these files, options that are given, is not there."""
    for name, file in files.items():
        if file is not None and not file.is_file():
            what = "is a folder; give a file" if file.is_dir() else "no such file; give another"
            raise InputError(f"--{name} {file}: {what}")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")


@contextlib.contextmanager
def progress(what: str, count: int) -> Iterator[Callable[[int], object]]:
    """A bar on standard error; gives what is to be told of each one done."""
    with bar(what, count) as shown:
        yield shown.update


def read_lines(file: Path) -> list[str]:
    """Instructions of a text file, one a line, each once; InputError where there are none."""
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "no such file"
        raise InputError(f"{file}: {what}; expected a file with one instruction a line")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    lines = list(dict.fromkeys(line.strip() for line in text.split("\n") if line.strip()))
    if not lines:
        raise InputError(f"{file}: empty; expected one instruction a line")
    return lines


def finish(text: str, data: Any, json_file: Path | None) -> None:
    """Write `data` as JSON where a file is asked for, then print."""
    from dit4dit.files.json_files import write_json

    if json_file is not None:
        write_json(json_file, data)
    say(text)
