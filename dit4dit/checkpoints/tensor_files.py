"""Weights in safetensors files: which files of a folder hold them, each tensor in one file alone, read on access."""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit4dit.errors import CheckpointError, shown
from dit4dit.files.folders import fault, inside, visible
from dit4dit.files.keys import read_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

log = logging.getLogger("dit4dit.checkpoints")

SUFFIX = ".safetensors"
INDEX = re.compile(r"\.safetensors\.index(\.\w+)?\.json$", re.IGNORECASE)
VARIANT = re.compile(r"\.(fp16|bf16|fp32|non_ema)(?=[.-])", re.IGNORECASE)
"""diffusers' and transformers' other versions of the same weights: model.fp16.safetensors, model.safetensors.index.fp16.json."""
SHARD = re.compile(r"-(\d{5})-of-(\d{5})")
SHARED = "text_encoder", "vae"
"""Folders of frozen parts, whose files the checkpoints of a run share by hard links."""


@functools.lru_cache(maxsize=1024)
def say_once(message: str) -> None:
    """Warn of what is unusual about a file; a checkpoint is opened several times in a run and says it once."""
    log.warning("%s", message)


@dataclass(frozen=True)
class SafetensorFiles(Mapping[str, "Tensor"]):
    """Tensors of several safetensors files under a common prefix, each mapped from disk on access."""

    prefix: str
    index: dict[str, Path]
    """Full name -> file."""

    def __getitem__(self, name: str) -> Tensor:
        return _map_tensor(self.index[name], name.removeprefix(self.prefix))

    def __iter__(self) -> Iterator[str]:
        return iter(self.index)

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True)
class Renamed(Mapping[str, "Tensor"]):
    """The tensors of `source` under other names."""

    source: Mapping[str, Tensor]
    names: dict[str, str]
    """Name -> name in `source`."""

    def __getitem__(self, name: str) -> Tensor:
        return self.source[self.names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Joined(Mapping[str, "Tensor"]):
    """Several mappings without a common name as one."""

    parts: tuple[Mapping[str, Tensor], ...]

    def __getitem__(self, name: str) -> Tensor:
        for part in self.parts:
            if name in part:
                return part[name]
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (name for part in self.parts for name in part)

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)


def renamed(source: Mapping[str, Tensor], rename: Callable[[str], str], where: Path) -> Mapping[str, Tensor]:
    """`source` with every name passed through `rename`; CheckpointError where two tensors come to one name."""
    names: dict[str, str] = {}
    for name in source:
        if (other := names.setdefault(rename(name), name)) != name:
            raise CheckpointError(
                f"{where}: {shown(other, 200)} and {shown(name, 200)} are the same tensor, {rename(name)!r}; remove one"
            )
    return source if all(new == old for new, old in names.items()) else Renamed(source, names)


@functools.lru_cache(maxsize=256)
def _safetensors_header(file: Path, stamp: tuple[int, int]) -> tuple[dict[str, Any], int]:
    """(entry per tensor, offset of the first data byte): 8 bytes of length, then that much JSON.

    `stamp` is the file's time and size, so that a replaced file is read anew.
    """
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return json.loads(stream.read(length)), 8 + length


def _map_tensor(file: Path, name: str) -> Tensor:
    """One tensor whose storage is exactly its own bytes of the file, so that it can be saved again without a copy.

    (safetensors' own reader gives views of one storage as large as the file.)
    """
    import numpy as np
    import torch
    from safetensors.torch import _getdtype

    facts = file.stat()
    header, start = _safetensors_header(file, (facts.st_mtime_ns, facts.st_size))
    entry = header[name]
    dtype: torch.dtype = _getdtype(entry["dtype"])
    begin, end = entry["data_offsets"]
    if begin == end:
        return torch.empty(entry["shape"], dtype=dtype)
    data = np.memmap(file, dtype=np.uint8, mode="c", offset=start + begin, shape=(end - begin,))
    return torch.from_numpy(data).view(dtype).reshape(entry["shape"])


def tensor_names(file: Path) -> list[str]:
    """The names in one safetensors file.

    Raises:
        CheckpointError: it is missing, truncated, or something else.
    """
    from safetensors import SafetensorError, safe_open

    if reason := fault(file):
        raise CheckpointError(f"{file}: {reason}{shared_by_links(file)}")
    if file.is_dir():
        raise CheckpointError(f"{file}: is a folder; expected a file of weights, copy it again")
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        rest = shared_by_links(file) or "; copy it again"
        raise CheckpointError(f"{file}: missing or not readable ({error}){rest}") from None


def shared_by_links(file: Path, rest: str | None = None) -> str:
    """What to do where a frozen part is damaged that several checkpoints of a run share; empty where it is nobody else's.

    rest: what to do about it, where that is not to load a policy.
    """
    if file.parent.name not in SHARED or not file.is_file() or file.stat().st_nlink < 2:
        return ""
    rest = rest or (
        f"remove {file.parent} and load with --backbone FOLDER (Cosmos-Predict2.5); for a run that goes on remove its folder "
        "frozen too, and --resume writes it again"
    )
    return f"; all {file.stat().st_nlink} checkpoints and folders of the run that link to this file share the damage: {rest}"


def safetensor_file(file: Path, prefix: str = "") -> SafetensorFiles:
    """All tensors of one safetensors file, names prefixed."""
    return SafetensorFiles(prefix, {prefix + name: file for name in tensor_names(file)})


def safetensor_files(folder: Path, prefix: str) -> SafetensorFiles:
    """All tensors of a folder's safetensors files (with or without an index), names prefixed.

    Where diffusers' variants lie beside the plain files, the plain ones are used; one variant alone is used too.

    Raises:
        CheckpointError: there are none, a shard is missing, a file is damaged, or two files hold the same tensor.
    """
    indexes, files = _choose_variant(folder)
    if not files and not indexes:
        raise CheckpointError(f"{folder}: {_why_none(folder)}")
    if len(indexes) > 1:
        names = " and ".join(index.name for index in indexes)
        raise CheckpointError(f"{folder}: {names} both list the weights; remove one with its files")
    if not indexes:
        _check_count(files)
        return SafetensorFiles(prefix, _gather(files, prefix))
    listed = _weight_map(indexes[0])
    index = _gather(sorted(set(listed.values())), prefix)
    for name, shard in listed.items():
        if index.get(prefix + name) != shard:
            raise CheckpointError(
                f"{shard}: has no tensor {shown(name, 200)}, which {indexes[0].name} says; copy both again"
            )
    others = [file for file in files if file not in set(listed.values())]
    _gather(others, prefix, index)
    if others:
        names = ", ".join(file.name for file in others)
        say_once(f"{folder}: not read, because {indexes[0].name} does not name them: {names}")
    return SafetensorFiles(prefix, index)


def _choose_variant(folder: Path) -> tuple[list[Path], list[Path]]:
    """(indexes, files) of the plain weights, or of the only variant that there is."""
    found: dict[str, tuple[list[Path], list[Path]]] = {}
    for file in visible(folder):
        is_index, is_file = INDEX.search(file.name), file.name.lower().endswith(SUFFIX)
        if is_index or is_file:
            match = VARIANT.search(file.name)
            kind = found.setdefault(match[1].lower() if match else "", ([], []))
            kind[0 if is_index else 1].append(file)
    if "" in found or not found:
        return found.get("", ([], []))
    if len(found) > 1:
        raise CheckpointError(
            f"{folder}: holds the variants {' and '.join(sorted(found))} and no plain weights; keep one of them"
        )
    say_once(f"{folder}: holds the variant {next(iter(found))} alone, which is used")
    return next(iter(found.values()))


def _why_none(folder: Path) -> str:
    """What to say of a folder without weights."""
    names = [file.name for file in visible(folder)]
    started = [*folder.glob("*.incomplete"), *folder.glob(".cache/huggingface/download/**/*.incomplete")]
    if started:
        return f"no .safetensors files, and {started[0].name} is a download that did not end; start it again"
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        return "no .safetensors files, only weights in another format; download the .safetensors files too"
    return "no .safetensors files; the folder has no weights, download them too"


def _weight_map(index: Path) -> dict[str, Path]:
    """Tensor -> file of an index, each file inside the index's folder."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{index}: expected a weight_map, tensor -> file; copy the file again")
    return {tensor: inside(index, name) for tensor, name in names.items()}


def _check_count(files: list[Path]) -> None:
    """CheckpointError where files without an index say by their names that there are more of them."""
    for file in files:
        if match := SHARD.search(file.name):
            for number in range(1, int(match[2]) + 1):
                name = f"{file.name[: match.start(1)]}{number:05d}{file.name[match.end(1) :]}"
                if file.with_name(name) not in files:
                    raise CheckpointError(f"{file.with_name(name)}: missing; copy it again")


def _gather(files: list[Path], prefix: str, known: Mapping[str, Path] | None = None) -> dict[str, Path]:
    """Name -> file; CheckpointError where two files, or one and `known`, have the same tensor."""
    index: dict[str, Path] = {}
    for file in files:
        for name in tensor_names(file):
            other = (known or {}).get(prefix + name) or index.get(prefix + name)
            if other is not None:
                raise CheckpointError(
                    f"{file.parent}: {other.name} and {file.name} both hold the tensor {shown(name, 200)}; keep the "
                    "one that is "
                    "meant and remove the other"
                )
            index[prefix + name] = file
    return index


def joined(parts: list[SafetensorFiles], *rest: Mapping[str, Tensor]) -> Joined:
    """Several mappings as one; CheckpointError where two files hold the same tensor."""
    index: dict[str, Path] = {}
    for part in parts:
        for name, file in part.index.items():
            if index.setdefault(name, file) != file:
                raise CheckpointError(
                    f"{index[name]} and {file} both hold the tensor {shown(name, 200)}; keep the one that is meant "
                    "and remove the "
                    "other"
                )
    return Joined((*parts, *rest))
