"""What all commands share where they meet the shell: types of arguments, and the end that prints and writes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

Device = str
Dtype = Literal["auto", "float32", "bfloat16"]


def dtype_of(name: str) -> Any:
    """The torch dtype of this name; None for "auto"."""
    import torch

    return None if name == "auto" else getattr(torch, name)


def say(text: str) -> None:
    sys.stdout.write(text + "\n")


def finish(text: str, data: Any, json_file: Path | None) -> None:
    """Write `data` as JSON where a file is asked for, then print."""
    from dit4dit.commands.report import write_json

    if json_file is not None:
        write_json(json_file, data)
    say(text)
