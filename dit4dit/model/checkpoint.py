"""Where weights and configurations come from: published run folders, Cosmos folders, the package's own format, the hub.

Opening a checkpoint reads small files and maps the large ones; tensors are read when a part is built from them. All
formats give their tensors under the published names, so that one table says where each part finds its own.
"""

from __future__ import annotations

import functools
import json
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit4dit.config import ModelConfig
from dit4dit.errors import CheckpointError
from dit4dit.model import published
from dit4dit.model.keys import read_json
from dit4dit.stats import read_statistics

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1
HUB_BACKBONE = "nvidia/Cosmos-Predict2.5-2B"
HUB_REVISION = "diffusers/base/post-trained"
SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*/*.json", "*/*.jinja", "*/*.txt"]

EXTRACTOR = "backbone_interface.extractor."
TEXT, TRANSFORMER, VAE, HEAD = (
    EXTRACTOR + "text_encoder.",
    EXTRACTOR + "transformer.",
    EXTRACTOR + "vae.",
    "action_model.",
)
FROZEN = {"text_encoder": TEXT, "vae": VAE}
"""Parts that no recipe trains: kept in folders of their own, so that a fine-tuned head does not carry 16 GB of text."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        path: what was opened.
        layout: "published" or "dit4dit" (the package's own).
        model: sizes of everything.
        tensors: all weights that were found, under the published names, mapped from disk and read on access.
        statistics: raw normalisation statistics, keyed by embodiment tag.
        embodiment: the embodiment's name, where the checkpoint says or implies one; a robot of the user's own as
            `dit4dit.data.robots.described` has it.
        tokenizer: folder with the tokenizer's files.
        ignored: keys of a published config.yaml that nothing reads.
    """

    path: Path
    layout: str
    model: ModelConfig
    tensors: Mapping[str, Tensor]
    statistics: Mapping[str, Any]
    embodiment: str | Mapping[str, Any] | None
    tokenizer: Path
    ignored: tuple[str, ...] = ()


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


@dataclass(frozen=True)
class Joined(Mapping[str, "Tensor"]):
    """Several mappings as one; the first that has a name gives it."""

    parts: tuple[Mapping[str, Tensor], ...]

    def __getitem__(self, name: str) -> Tensor:
        for part in self.parts:
            if name in part:
                return part[name]
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(name for part in self.parts for name in part))

    def __len__(self) -> int:
        return len(set().union(*self.parts))


def open_checkpoint(path: str | Path, backbone: str | Path | None = None) -> Checkpoint:
    """Open a published run folder (or one of its .pt files), a folder in the own format, or a hub repository id.

    Args:
        path: run folder, .pt file, own-format folder, or "organisation/name" on the hub.
        backbone: Cosmos-Predict2.5 folder or hub id; without it DIT4DIT_BACKBONE, then a `cosmos` folder inside the
            run, then the released model on the hub.

    Raises:
        CheckpointError: something is missing, truncated, or not a checkpoint. ConfigError: its configuration is wrong.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        folder = _from_hub(str(path))
    return _open_own(folder, backbone) if is_own_format(folder) else _open_published(folder, backbone)


def is_own_format(folder: Path) -> bool:
    """Whether `folder` holds the package's own format; a stray config.json in a published run does not make it so."""
    config = folder / "config.json"
    if not config.is_file():
        return False
    return not (folder / "config.yaml").is_file() or read_json(config).get("format") == "dit4dit"


def _from_hub(name: str) -> Path:
    local = not is_hub_id(name) or name.endswith((".pt", ".pth")) or Path(name).parent.is_dir()
    if local:
        raise CheckpointError(f"checkpoint {name}: no such file or folder; give a run folder, a .pt file or a hub id")
    return _download(name, None, None, "give a run folder or a .pt file that exists")


def _download(name: str, revision: str | None, patterns: list[str] | None, hint: str) -> Path:
    """A hub repository's files in the local cache; CheckpointError with `hint` when they cannot be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"hub {name}: could not be downloaded ({first}); {hint}") from None


def find_backbone(backbone: str | Path | None, run: Path | None, *, weights: bool) -> Path:
    """The Cosmos folder to use; a hub id is downloaded (only its small files unless `weights`)."""
    chosen = backbone or os.environ.get("DIT4DIT_BACKBONE")
    if not chosen and run is not None and (run / "cosmos" / "model_index.json").is_file():
        return run / "cosmos"
    if chosen and Path(chosen).expanduser().exists():
        return Path(chosen).expanduser()
    patterns = None if weights else SMALL_FILES
    hint = "give a Cosmos-Predict2.5 folder with --backbone or DIT4DIT_BACKBONE"
    if not chosen:
        return _download(HUB_BACKBONE, HUB_REVISION, patterns, hint)
    if not is_hub_id(str(chosen)):
        raise CheckpointError(
            f"backbone {chosen}: no such folder; give a Cosmos-Predict2.5 folder or its hub id with --backbone"
        )
    return _download(str(chosen), HUB_REVISION if str(chosen) == HUB_BACKBONE else None, patterns, hint)


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a hub repository's, organisation/name."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def _open_published(path: Path, backbone: str | Path | None) -> Checkpoint:
    run, file = _published_files(path)
    cosmos = find_backbone(backbone, run, weights=False)
    config = published.read_run(run / "config.yaml", cosmos)
    statistics = read_statistics(run / "dataset_statistics.json")
    tensors = load_pt(file)
    if not any(name.startswith((TRANSFORMER, HEAD)) for name in tensors):
        raise CheckpointError(
            f"{file}: expected tensors under {TRANSFORMER} or {HEAD}, found {next(iter(tensors), 'none')!r}; "
            "this is not a DiT4DiT checkpoint"
        )
    embodiment = published.MIXTURES.get(config.data_mix or "")
    if embodiment is None and len(statistics) == 1:
        embodiment = published.TAGS.get(next(iter(statistics)))
    return Checkpoint(
        path=file,
        layout="published",
        model=config.model,
        tensors=tensors,
        statistics=statistics,
        embodiment=embodiment,
        tokenizer=cosmos / "tokenizer",
        ignored=config.ignored,
    )


def _published_files(path: Path) -> tuple[Path, Path]:
    """(run folder, .pt file) for a run folder, its checkpoints folder, or one .pt file; the highest step wins."""
    if path.is_file():
        for run in path.parents[:2]:
            if (run / "config.yaml").is_file():
                return run, path
        raise CheckpointError(f"{path}: no config.yaml beside it or one folder up; keep the run folder whole")
    run = path.parent if path.name in ("checkpoints", "final_model") else path
    if not (run / "config.yaml").is_file():
        raise CheckpointError(
            f"{run}: neither config.yaml (published run) nor config.json (own format); give a run folder"
        )
    steps = {
        int(match[1]): file
        for file in (run / "checkpoints").glob("steps_*_pytorch_model.pt")
        if (match := re.fullmatch(r"steps_(\d+)_pytorch_model\.pt", file.name))
    }
    final = run / "final_model" / "pytorch_model.pt"
    if steps:
        return run, steps[max(steps)]
    if final.is_file():
        return run, final
    raise CheckpointError(f"{run}: no checkpoints/steps_N_pytorch_model.pt and no final_model/pytorch_model.pt")


def load_pt(file: Path) -> dict[str, Tensor]:
    """A state dict, memory-mapped, read with `weights_only=True`."""
    import torch

    try:
        data = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be opened ({error.strerror}); check its permissions") from None
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(
            f"{file}: not readable as a PyTorch checkpoint ({file.stat().st_size} bytes; {reason}); "
            "truncated, or not written by torch.save? copy it again"
        ) from None
    if not isinstance(data, dict) or not all(isinstance(value, torch.Tensor) for value in data.values()):
        raise CheckpointError(f"{file}: expected a flat state dict of tensors, got {type(data).__name__}")
    return data


def safetensor_files(folder: Path, prefix: str) -> SafetensorFiles:
    """All tensors of a folder's safetensors files (with or without an index), names prefixed.

    Raises:
        CheckpointError: there are none, a shard is missing, or a file is truncated.
    """
    from safetensors import SafetensorError, safe_open

    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        names = read_json(indexes[0]).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise CheckpointError(f"{indexes[0]}: expected a weight_map, tensor -> file; copy the file again")
        shards = [folder / name for name in sorted(set(names.values()))]
    else:
        shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise CheckpointError(f"{folder}: no .safetensors files; the folder has no weights, download them too")
    index = {}
    for shard in shards:
        try:
            with safe_open(shard, framework="pt") as file:
                index.update({prefix + name: shard for name in file.keys()})  # noqa: SIM118 (not a mapping)
        except (SafetensorError, FileNotFoundError) as error:
            raise CheckpointError(f"{shard}: missing or not readable ({error}); copy it again") from None
    return SafetensorFiles(prefix, index)


def cosmos_tensors(
    folder: Path, parts: tuple[str, ...] = ("text_encoder", "vae", "transformer")
) -> Mapping[str, Tensor]:
    """Weights of a Cosmos folder's parts, under the published names."""
    return Joined(tuple(safetensor_files(folder / part, f"{EXTRACTOR}{part}.") for part in parts))


def _open_own(folder: Path, backbone: str | Path | None) -> Checkpoint:
    data = read_json(folder / "config.json")
    where = str(folder / "config.json")
    version = data.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{where}: expected format_version {FORMAT_VERSION}, got {version!r}; update dit4dit")
    if not isinstance(data.get("model"), dict):
        raise CheckpointError(f"{where}: expected the model's sizes under 'model', got {data.get('model')!r:.40}")
    model = ModelConfig.from_dict(data["model"], f"{where}: model")
    robot = data.get("embodiment")
    if not isinstance(robot, (str, dict, type(None))):
        raise CheckpointError(f"{where}: embodiment: expected a robot's name or description, got {robot!r:.40}")
    parts: list[Mapping[str, Tensor]] = [safetensor_files(folder, "")]
    absent = tuple(part for part in FROZEN if not (folder / part).is_dir())
    for part in FROZEN:
        if part not in absent:
            parts.append(safetensor_files(folder / part, ""))
    tokenizer = folder / "tokenizer"
    if absent or not tokenizer.is_dir():
        cosmos = find_backbone(backbone, None, weights=True)
        tokenizer = tokenizer if tokenizer.is_dir() else cosmos / "tokenizer"
        if absent:
            parts.append(cosmos_tensors(cosmos, absent))
    return Checkpoint(
        path=folder,
        layout="dit4dit",
        model=model,
        tensors=Joined(tuple(parts)),
        statistics=read_statistics(folder / "statistics.json"),
        embodiment=robot,
        tokenizer=tokenizer,
    )
