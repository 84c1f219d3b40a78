"""`dit4dit inspect`: what is in a checkpoint, and the conventions a robot must keep to use it."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from dit4dit.checkpoints import checksums
from dit4dit.checkpoints.checkpoint import open_checkpoint
from dit4dit.checkpoints.summary import summarise, verify_files
from dit4dit.errors import ConfigError
from dit4dit.policy.prompts import load_tokenizer
from dit4dit.robots import EMBODIMENTS
from dit4dit.tables import table


def inspect(
    path: str | Path, *, backbone: str | Path | None, embodiment: str | None, verify: checksums.Progress | None = None
) -> dict[str, Any]:
    """The checkpoint's summary; `problems` says why `Policy.from_pretrained` would refuse it.

    With `verify`, which is called with names and bytes, every file that checksums.json lists is read first; `checksums` says how
    many there are (None: there is no such list).

    Raises:
        CheckpointError: it cannot be opened, or with `verify` a file is not what was written.
    """
    verified = {} if verify is None else {"checksums": verify_files(path, verify)}
    checkpoint = open_checkpoint(path, backbone)
    result = summarise(checkpoint, embodiment) | verified
    try:
        load_tokenizer(checkpoint.tokenizer)
    except ConfigError as error:
        result["problems"].append(str(error))
    return result


def show(result: dict[str, Any]) -> str:
    """What the command prints."""
    rows = [
        [
            p["part"],
            p["tensors"],
            f"{p['parameters']:,}",
            f"{p['bytes'] / 2**20:,.1f}",
            ", ".join(p["dtypes"]) or "absent",
        ]
        for p in result["parts"]
    ]
    blocks = [
        f"{result['path']}  ({result['layout']} layout)",
        table(["part", "tensors", "parameters", "MiB", "dtype"], rows, right=(1, 2, 3)),
    ]
    if result["conventions"] is None:
        blocks.append(result["note"])
    else:
        shapes = ", ".join(f"{name} {shape}" for name, shape in result["shapes"].items() if shape)
        blocks.append(f"embodiment: {result['embodiment']}\nshapes: {shapes}")
        blocks.append(table(["convention", ""], list(result["conventions"].items())))
    blocks += [_show_statistics(tag, entry, result["embodiment"]) for tag, entry in result["statistics"].items()]
    if "checksums" in result:
        count = result["checksums"]
        none = f"there is no {checksums.FILE}, so no file was checked; `dit4dit convert` and training write one"
        blocks.append(none if count is None else f"{count} files are what {checksums.FILE} says")
    if result["ignored_keys"]:
        keys = f"config.yaml keys that inference does not read: {', '.join(result['ignored_keys'])}"
        blocks.append(textwrap.fill(keys, 120, break_long_words=False, break_on_hyphens=False))
    blocks += [f"cannot be loaded: {problem}" for problem in result["problems"]]
    return "\n\n".join(blocks)


def _show_statistics(tag: str, entry: dict[str, Any], robot: str | None) -> str:
    names = list(EMBODIMENTS[robot].action_names) if robot in EMBODIMENTS else []
    rows = []
    for kind in ("state", "action"):
        for i, r in enumerate(entry[kind] or []):
            name = names[i] if kind == "action" and len(names) == len(entry[kind]) else str(i)
            numbers = [f"{r[key]:+.4g}" for key in ("min", "max", "mean", "std")]
            rows.append([f"{kind} {name}", *numbers, "" if r["scaled"] else "passed through"])
    return f"statistics {tag!r}\n" + table(["dimension", "min", "max", "mean", "std", ""], rows, right=(1, 2, 3, 4))
