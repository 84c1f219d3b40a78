"""Where weights and configurations come from: published run folders, Cosmos folders, the native format, the hub.

Opening a checkpoint reads small files and maps the large ones; tensors are read when a part is built from them. All
formats give their tensors under the published names, so that one table says where each part finds its own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit4dit.checkpoints import published, state_dict
from dit4dit.checkpoints.tensor_files import (
    INDEX,
    SHARD,
    SHARED,
    SUFFIX,
    Joined,
    Renamed,
    joined,
    renamed,
    safetensor_file,
    safetensor_files,
    say_once,
)
from dit4dit.config import ModelConfig
from dit4dit.errors import CheckpointError, shown
from dit4dit.files.folders import fault, no_folder, visible
from dit4dit.files.keys import read_json
from dit4dit.robots.statistics import read_statistics

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1
HUB_BACKBONE = "nvidia/Cosmos-Predict2.5-2B"
HUB_REVISION = "diffusers/base/post-trained"
ENDINGS = (".pt", ".pth", ".bin", SUFFIX)
ONE_FILE = "save them again as safetensors, or all in one .pt file: torch.save(state_dict, FILE)"
SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*/*.json", "*/*.jinja", "*/*.txt"]

EXTRACTOR = "backbone_interface.extractor."
TEXT, TRANSFORMER, VAE, HEAD = (
    EXTRACTOR + "text_encoder.",
    EXTRACTOR + "transformer.",
    EXTRACTOR + "vae.",
    "action_model.",
)
KNOWN = (TRANSFORMER, HEAD)
"""Beginnings of names by which weights are recognised as a DiT4DiT model's."""
EMBEDDING, OUTPUT = f"{TEXT}model.language_model.embed_tokens.weight", f"{TEXT}lm_head.weight"
FROZEN = dict(zip(SHARED, (TEXT, VAE), strict=True))
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
            `dit4dit.robots.descriptions.described` has it.
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


def open_checkpoint(path: str | Path, backbone: str | Path | None = None) -> Checkpoint:
    """Open a published run folder (or one of its .pt files), a folder in the native format, or a hub repository id.

    Args:
        path: run folder, .pt file, own-format folder, or "organisation/name" on the hub.
        backbone: Cosmos-Predict2.5 folder or hub id; without it DIT4DIT_BACKBONE, then a `cosmos` folder inside the
            run, then the released model on the hub.

    Raises:
        CheckpointError: something is missing, truncated, or not a checkpoint. ConfigError: its configuration is wrong.
    """
    if backbone is not None and backbone != "":
        _as_path("backbone", backbone)
    folder = local_folder(path)
    try:
        return _open_own(folder, backbone) if is_own_format(folder) else _open_published(folder, backbone)
    except OSError as error:  # each file says itself what is wrong with it; a folder on the way may be closed too
        raise CheckpointError(
            f"checkpoint {folder}: {error.filename or folder}: cannot be read ({error.strerror}); check its permissions"
        ) from None


def local_folder(path: str | Path) -> Path:
    """Where a checkpoint lies on this machine; a hub id is downloaded."""
    folder = _as_path("checkpoint", path)
    if folder is not None:
        return folder
    return _from_hub(os.fspath(path))


def _as_path(what: str, name: object) -> Path | None:
    """The file or folder of a name that a user gave, None where there is none; CheckpointError where there can be none."""
    if not isinstance(name, (str, os.PathLike)) or isinstance(os.fspath(name), bytes):
        raise CheckpointError(f"{what}: expected a path or a hub id, got {type(name).__name__}")
    where = f"{what} {shown(os.fspath(name), 200)}"
    if not os.fspath(name):
        raise CheckpointError(f"{where}: expected a path or a hub id, got none")
    try:
        path = Path(name).expanduser()
        there = path.exists()
        target = os.readlink(path) if not there and path.is_symlink() else None
    except (ValueError, RuntimeError):  # an embedded NUL, a surrogate, a home of nobody's
        raise CheckpointError(f"{where}: is no name that a file can have; give a path or a hub id") from None
    except OSError as error:
        raise CheckpointError(
            f"{where}: cannot be looked at ({error.strerror}); check the name and its permissions"
        ) from None
    if target is not None:
        raise CheckpointError(f"{where}: is a link to {target}, which is not there; give what it should lead to")
    return path if there else None


def is_own_format(folder: Path) -> bool:
    """Whether `folder` holds the native format; a stray config.json in a published run does not make it so."""
    config = folder / "config.json"
    if not config.is_file():
        return False
    return not (folder / "config.yaml").is_file() or read_json(config).get("format") == "dit4dit"


def _from_hub(name: str) -> Path:
    local = not is_hub_id(name) or name.lower().endswith(ENDINGS) or Path(name).parent.is_dir()
    if local:
        raise CheckpointError(
            f"checkpoint {shown(name, 200)}: no such file or folder; give a run folder, a .pt file or a hub id"
        )
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


def backbone_name(backbone: str | Path | None, run: Path | None) -> str:
    """The Cosmos folder or hub id that is meant: the given one, DIT4DIT_BACKBONE, the run's own, the released one."""
    chosen = backbone or os.environ.get("DIT4DIT_BACKBONE")
    if not chosen and run is not None and (run / "cosmos" / "model_index.json").is_file():
        return str(run / "cosmos")
    return str(chosen or HUB_BACKBONE)


def find_backbone(backbone: str | Path | None, run: Path | None, *, weights: bool) -> Path:
    """The Cosmos folder to use; a hub id is downloaded (only its small files unless `weights`)."""
    chosen = backbone_name(backbone, run)
    if found := _as_path("backbone", chosen):
        return found
    patterns = None if weights else SMALL_FILES
    hint = "give a Cosmos-Predict2.5 folder with --backbone or DIT4DIT_BACKBONE"
    if not is_hub_id(str(chosen)):
        raise CheckpointError(
            f"backbone {chosen}: no such folder; give a Cosmos-Predict2.5 folder or its hub id with --backbone"
        )
    return _download(chosen, HUB_REVISION if chosen == HUB_BACKBONE else None, patterns, hint)


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a hub repository's, organisation/name."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def _open_published(path: Path, backbone: str | Path | None) -> Checkpoint:
    run, file = published_files(path)
    cosmos = find_backbone(backbone, run, weights=False)
    config = published.read_run(run / "config.yaml", cosmos)
    statistics = read_statistics(run / "dataset_statistics.json")
    tensors = renamed(_published_tensors(file), text_name, file)
    if not any(name.startswith(KNOWN) for name in tensors):
        raise CheckpointError(
            f"{file}: expected tensors under {TRANSFORMER} or {HEAD}, found {shown(next(iter(tensors), 'none'), 200)}; "
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


def _published_tensors(file: Path) -> Mapping[str, Tensor]:
    """The weights of a published run: a .pt file, a safetensors file, or a folder with several of them."""
    if file.is_file() and SHARD.search(file.name):
        rest = f"give the folder {file.parent}" if _is_safetensors(file) else ONE_FILE
        raise CheckpointError(f"{file}: one of several files of weights; {rest}")
    if file.is_file() and not _is_safetensors(file):
        return load_pt(file)
    found = safetensor_files(file, "") if file.is_dir() else safetensor_file(file)
    plain = state_dict.plain_names(found, file)
    if all(new == old for new, old in plain.items()):
        return found
    say_once(
        f"{file}: names are read without what was put in front of the published ones, as in {shown(next(iter(found)), 200)}"
    )
    return Renamed(found, plain)


def load_pt(file: Path) -> dict[str, Tensor]:
    """The state dict in a .pt file (`state_dict.read`)."""
    return state_dict.read(file, KNOWN)


def published_files(path: Path) -> tuple[Path, Path]:
    """(run folder, file or folder with its weights) for a run folder, its checkpoints or final_model folder, or one file."""
    if path.is_file():
        if state_dict.is_zero_shard(path):
            raise state_dict.zero_error(path.parent)
        for run in path.parents[:2]:
            if (run / "config.yaml").is_file():
                return run, path
        if (path.parent / "config.json").is_file():
            raise CheckpointError(f"{path}: one file of a folder in the native format; give the folder {path.parent}")
        raise CheckpointError(f"{path}: no config.yaml beside it or one folder up; keep the run folder whole")
    run = path.parent if path.name in ("checkpoints", "final_model") else path
    if not (run / "config.yaml").is_file():
        for name in ("config.json", "config.yaml"):
            _expect_file(run / name)
        if shards := state_dict.zero_folder(path):
            raise state_dict.zero_error(shards)
        hint = f"; give {run / 'policy'}" if (run / "policy" / "config.json").is_file() else "; give a run folder"
        raise CheckpointError(f"{run}: neither config.yaml (published run) nor config.json (native format){hint}")
    found = _final([path]) if path.name == "final_model" else _steps(run) or _final([run / "final_model", run])
    if not found:
        if shards := state_dict.zero_folder(run / "checkpoints") or state_dict.zero_folder(run):
            raise state_dict.zero_error(shards)
        pieces = [f for folder in (run / "final_model", run) for f in visible(folder, ".bin") if SHARD.search(f.name)]
        if pieces:
            raise CheckpointError(f"{pieces[0]}: one of several files of weights; {ONE_FILE}")
        ours = [f for f in visible(run / "checkpoints") if (f / "policy" / "config.json").is_file()]
        hint = f"; it is a run of dit4dit train, give {ours[-1] / 'policy'}" if ours else ""
        raise CheckpointError(
            f"{run}: no checkpoints/steps_N_pytorch_model.pt and no final_model/pytorch_model.pt{hint}"
        )
    if len(found) > 1:
        rest = ", ".join(file.name for file in found[1:])
        say_once(f"{found[0]} is read, not what lies beside it: {rest}; name one in full to choose it")
    return run, found[0]


FINAL = re.compile(r"pytorch_model\.(pt|pth|bin|safetensors)|model\.safetensors", re.IGNORECASE)
STEP = re.compile(r"steps_(\d+)_(pytorch_)?model\.(pt|pth|safetensors)", re.IGNORECASE)


def _steps(run: Path) -> list[Path]:
    """The weight files of the highest step, the published kind (.pt) first."""
    steps: dict[int, list[Path]] = {}
    for file in visible(run / "checkpoints"):
        if match := STEP.fullmatch(file.name):
            steps.setdefault(int(match[1]), []).append(file)
    return sorted(steps[max(steps)], key=_is_safetensors) if steps else []


def _expect_file(file: Path) -> None:
    """CheckpointError where something other than a file has its name."""
    if reason := fault(file):
        raise CheckpointError(f"{file}: {reason}")
    if file.is_dir():
        raise CheckpointError(f"{file}: is a folder; expected a file, copy it again")


def _expect_folder(folder: Path) -> None:
    """CheckpointError where something other than a folder has its name."""
    if reason := no_folder(folder):
        raise CheckpointError(f"{folder}: {reason}; expected a folder, copy it again")


def _final(folders: list[Path]) -> list[Path]:
    """The weights of the first folder that has some under the usual names: a .pt file, safetensors, the folder of shards."""
    for folder in folders:
        files = [file for file in visible(folder) if FINAL.fullmatch(file.name)]
        files.sort(key=_is_safetensors)
        if any(INDEX.search(file.name) for file in visible(folder)):
            files.append(folder)
        if files:
            return files
    return []


def _is_safetensors(file: Path) -> bool:
    return file.name.lower().endswith(SUFFIX)


def text_name(name: str) -> str:
    """The published name of a tensor; of the text encoder's those that transformers writes to disk are others.

    The module has `model.language_model.*` and `model.visual.*`, so the published .pt does. `save_pretrained` writes the names
    of its older layout, `model.*` and `visual.*`; Qwen2_5_VLModel alone, without its lm_head, may have no `model.` in front, and
    its language model alone has neither.
    """
    if not name.startswith(TEXT):
        return name
    rest = name.removeprefix(TEXT)
    if rest.startswith(("embed_tokens.", "layers.", "norm.")):
        rest = f"model.language_model.{rest}"
    elif rest.startswith(("visual.", "language_model.")):
        rest = f"model.{rest}"
    elif rest.startswith("model.") and not rest.startswith(("model.language_model.", "model.visual.")):
        rest = f"model.language_model.{rest.removeprefix('model.')}"
    return TEXT + rest


def cosmos_tensors(
    folder: Path, parts: tuple[str, ...] = ("text_encoder", "vae", "transformer")
) -> Mapping[str, Tensor]:
    """Weights of a Cosmos folder's parts, under the published names."""
    return Joined(tuple(_cosmos_part(folder / part) for part in parts))


def _cosmos_part(folder: Path) -> Mapping[str, Tensor]:
    found = renamed(safetensor_files(folder, f"{EXTRACTOR}{folder.name}."), text_name, folder)
    if folder.name != "text_encoder" or EMBEDDING in found or OUTPUT not in found:
        return found
    config = read_json(folder / "config.json")
    nested = config.get("text_config")
    if (nested if isinstance(nested, dict) else config).get("tie_word_embeddings", config.get("tie_word_embeddings")):
        # a save of tied weights keeps one of the two names
        names = {name: name for name in found} | {EMBEDDING: OUTPUT}
        return Renamed(found, names)
    return found


def _open_own(folder: Path, backbone: str | Path | None) -> Checkpoint:
    data = read_json(folder / "config.json")
    where = str(folder / "config.json")
    version = data.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: expected format_version {FORMAT_VERSION}, got {shown(version)}; update dit4dit"
        )
    if not isinstance(data.get("model"), dict):
        raise CheckpointError(f"{where}: expected the model's sizes under 'model', got {shown(data.get('model'))}")
    model = ModelConfig.from_dict(data["model"], f"{where}: model")
    robot = data.get("embodiment")
    if not isinstance(robot, (str, dict, type(None))):
        raise CheckpointError(f"{where}: embodiment: expected a robot's name or description, got {shown(robot)}")
    tokenizer = folder / "tokenizer"
    for place in (*(folder / part for part in FROZEN), tokenizer):
        _expect_folder(place)
    parts = [safetensor_files(folder, "")]
    absent = tuple(
        part
        for part, prefix in FROZEN.items()
        if not (folder / part).is_dir() and not any(name.startswith(prefix) for name in parts[0])
    )
    parts += [safetensor_files(folder / part, "") for part in FROZEN if (folder / part).is_dir()]
    rest = []
    if absent or not tokenizer.is_dir():
        cosmos = find_backbone(backbone, None, weights=True)
        tokenizer = tokenizer if tokenizer.is_dir() else cosmos / "tokenizer"
        if absent:
            rest.append(cosmos_tensors(cosmos, absent))
    return Checkpoint(
        path=folder,
        layout="dit4dit",
        model=model,
        tensors=joined(parts, *rest),
        statistics=read_statistics(folder / "statistics.json"),
        embodiment=robot,
        tokenizer=tokenizer,
    )
