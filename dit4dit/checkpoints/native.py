"""The package's own checkpoint folder: safetensors, a typed configuration, and the frozen parts in folders of their own.

config.json                     format_version, model sizes, embodiment
statistics.json                 normalisation statistics, keyed by embodiment tag
checksums.json                  size and SHA-256 of every other file
model.safetensors               backbone and action head (what recipes train), under the published names
text_encoder/, vae/             frozen parts; a folder that is absent is taken from the backbone instead
tokenizer/                      the tokenizer's files
published/                      only in converted folders: what the published layout needs to come back exactly
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit4dit import __version__
from dit4dit.checkpoints import checksums
from dit4dit.checkpoints.checkpoint import (
    FORMAT_VERSION,
    FROZEN,
    HEAD,
    STEP,
    TEXT,
    TRANSFORMER,
    VAE,
    find_backbone,
    is_own_format,
    open_checkpoint,
    published_files,
)
from dit4dit.config import ModelConfig
from dit4dit.errors import CheckpointError, shown
from dit4dit.files.atomic import whole_folder
from dit4dit.files.folders import visible
from dit4dit.files.keys import read_json

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from dit4dit.model.dit4dit import DiT4DiT

SHARD_SIZE = "2GB"
DOTTED = shutil.ignore_patterns(".*")
"""Files that no reader looks at, as macOS and git leave them, are not copied."""
PT_NAME = re.compile(r"(checkpoints/|final_model/)?[\w.-]+\.pt")
WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
COSMOS_PARTS = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")
Progress = Callable[[str, int], None]
"""Called with a file's name and its bytes when it has been written."""


def _silent(name: str, size: int) -> None:
    pass


@contextlib.contextmanager
def new_folder(
    target: Path, rest: str = "nothing of it stays; free space, or choose another folder", *, needs: int = 0
) -> Iterator[Path]:
    """A temporary folder beside `target` that becomes it, whole, when the block ends without an error.

    Args:
        rest: what to do where it cannot be written.
        needs: bytes that will be written at least.

    Raises:
        CheckpointError: `target` exists already (nothing is ever overwritten), or the disk is full or fails, which is seen before
            anything is written where it has less than `needs`.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target}: exists already; choose another folder or remove it first")
    with whole_folder(target, CheckpointError, rest, durable=True, needs=needs) as partial:
        yield partial


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensors[name].nbytes for name in tensors)


def write_shards(folder: Path, tensors: Mapping[str, Tensor], progress: Progress = _silent) -> None:
    """safetensors files of at most 2 GB each, with the usual index where there are several."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    everything = {name: tensors[name] for name in tensors}
    plan = split_torch_state_dict_into_shards(
        everything, filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD_SIZE
    )
    for filename, names in plan.filename_to_tensors.items():
        seen: set[int] = set()
        shard = {}
        for name in names:
            value = everything[name].detach().cpu().contiguous()
            # safetensors refuses tensors that share memory (tied weights); each name keeps its own bytes
            shard[name] = value.clone() if value.untyped_storage().data_ptr() in seen else value
            seen.add(value.untyped_storage().data_ptr())
        save_file(shard, folder / filename, metadata={"format": "pt"})
        progress(filename, (folder / filename).stat().st_size)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def write_json(path: Path, data: Any) -> None:
    """A JSON file of a checkpoint; ValueError for NaN and infinity, which are no JSON and no size or statistics either."""
    path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")


def write_folder(
    folder: Path,
    *,
    model: ModelConfig,
    embodiment: str | Mapping[str, Any] | None,
    tensors: Mapping[str, Tensor],
    progress: Progress = _silent,
) -> None:
    """config.json and all weights into an existing folder; tensors under the published names."""
    config = {
        "format": "dit4dit",
        "format_version": FORMAT_VERSION,
        "dit4dit_version": __version__,
        "embodiment": embodiment,
        "model": model.to_dict(),
    }
    write_json(folder / "config.json", config)
    frozen = {part: [n for n in tensors if n.startswith(prefix)] for part, prefix in FROZEN.items()}
    kept = [n for n in tensors if not n.startswith(tuple(FROZEN.values()))]
    write_shards(folder, {n: tensors[n] for n in kept}, progress)
    for part, names in frozen.items():
        if names:
            write_shards(folder / part, {n: tensors[n] for n in names}, progress)


def save_model(
    folder: Path,
    model: DiT4DiT,
    *,
    embodiment: str,
    statistics: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    with_frozen: bool = True,
) -> None:
    """Write a model as a folder in the native format, all or nothing.

    Args:
        folder: must not exist yet.
        model: with its text encoder and clip VAE where `with_frozen`.
        with_frozen: False leaves text encoder and VAE out; they are then taken from the backbone at load.
    """
    tensors = named_tensors(model)
    if not with_frozen:
        tensors = {n: t for n, t in tensors.items() if not n.startswith(tuple(FROZEN.values()))}
    elif model.text is None or model.video_vae is None:
        raise ValueError("save_model(with_frozen=True) needs a model with its text encoder and its clip VAE")
    with new_folder(folder, needs=_bytes(tensors)) as partial:
        write_folder(partial, model=model.config, embodiment=embodiment, tensors=tensors)
        write_json(partial / "statistics.json", statistics)
        tokenizer.save_pretrained(partial / "tokenizer")
        checksums.write(partial)


def named_tensors(model: DiT4DiT) -> dict[str, Tensor]:
    """All weights of a model under the published names."""
    out = {TRANSFORMER + n: t for n, t in model.backbone.transformer.state_dict().items()}
    if model.head is not None:
        out |= {HEAD + n: t for n, t in model.head.state_dict().items()}
    if model.text is not None:
        out |= {f"{TEXT}model.language_model.{n}": t for n, t in model.text.language_model.state_dict().items()}
    if model.video_vae is not None:
        out |= {VAE + n: t for n, t in model.video_vae.wan.state_dict().items()}
    return out


def to_own(source: Path, target: Path, backbone: Path | None = None, progress: Progress = _silent) -> None:
    """A published run folder -> a folder in the native format, bit-exact, all or nothing."""
    checkpoint = open_checkpoint(source, backbone)
    if checkpoint.layout != "published":
        raise CheckpointError(f"{source}: is in the native format already; wanted a published run folder")
    run, _ = published_files(checkpoint.path)
    cosmos = find_backbone(backbone, run, weights=False)
    with new_folder(target, needs=_bytes(checkpoint.tensors)) as partial:
        write_folder(
            partial,
            model=checkpoint.model,
            embodiment=checkpoint.embodiment,
            tensors=checkpoint.tensors,
            progress=progress,
        )
        shutil.copyfile(run / "dataset_statistics.json", partial / "statistics.json")
        shutil.copytree(cosmos / "tokenizer", partial / "tokenizer", ignore=DOTTED)
        kept = partial / "published"
        kept.mkdir()
        shutil.copyfile(run / "config.yaml", kept / "config.yaml")
        _copy_small_files(cosmos, kept / "cosmos")
        write_json(kept / "source.json", {"file": _pt_name(checkpoint.path, run)})
        checksums.write(partial, progress=progress)


def _pt_name(weights: Path, run: Path) -> str:
    """Where in a published run the .pt file stands whose weights were read from `weights`, which may be of another kind."""
    name = weights.relative_to(run).as_posix()
    if weights.is_file() and PT_NAME.fullmatch(name):
        return name
    step = STEP.fullmatch(weights.name)
    return f"checkpoints/steps_{step[1]}_pytorch_model.pt" if step else "final_model/pytorch_model.pt"


def _copy_small_files(cosmos: Path, target: Path) -> None:
    """The configuration, tokenizer and scheduler files of a Cosmos folder, without weights."""
    for file in [cosmos / "model_index.json", *(f for part in COSMOS_PARTS for f in visible(cosmos / part))]:
        small = file.suffix in (".json", ".jinja", ".txt") and not file.name.endswith(".index.json")
        if file.is_file() and small:
            (target / file.relative_to(cosmos)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / file.relative_to(cosmos))


def to_published(source: Path, target: Path, backbone: Path | None = None, progress: Progress = _silent) -> None:
    """A folder in the native format -> a published run folder, bit-exact, all or nothing.

    A folder that was never published gets a config.yaml and Cosmos JSON files written from its own configuration; the
    small Cosmos files go to `cosmos/` inside the run.
    """
    import torch

    from dit4dit.checkpoints import export

    checkpoint = open_checkpoint(source, backbone)
    if checkpoint.layout != "dit4dit":
        raise CheckpointError(f"{source}: is a published run folder already; wanted a folder in the native format")
    kept = checkpoint.path / "published"
    with new_folder(target, needs=_bytes(checkpoint.tensors)) as partial:
        if kept.is_dir():
            shutil.copyfile(kept / "config.yaml", partial / "config.yaml")
            shutil.copytree(kept / "cosmos", partial / "cosmos", ignore=DOTTED)
            name = str(read_json(kept / "source.json").get("file"))
            if not PT_NAME.fullmatch(name):
                raise CheckpointError(
                    f"{kept / 'source.json'}: expected a .pt file inside the run, got {shown(name, 200)}"
                )
        else:
            (partial / "config.yaml").write_text(export.run_yaml(checkpoint.model, checkpoint.embodiment))
            export.write_cosmos_configs(partial / "cosmos", checkpoint.model)
            shutil.copytree(checkpoint.tokenizer, partial / "cosmos" / "tokenizer", dirs_exist_ok=True, ignore=DOTTED)
            name = "checkpoints/steps_0_pytorch_model.pt"
        shutil.copyfile(checkpoint.path / "statistics.json", partial / "dataset_statistics.json")
        file = partial / name
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.save({n: checkpoint.tensors[n] for n in checkpoint.tensors}, file)
        except RuntimeError as error:  # which is all that a full disk is to it
            raise OSError(f"{name}: {str(error).splitlines()[0]}") from error
        progress(file.name, file.stat().st_size)


def push_to_hub(folder: Path, repository: str, *, private: bool = True) -> str:
    """Upload a folder in the native format; returns its address. Pull it back with `Policy.from_pretrained(repository)`.

    Weight files of an earlier upload that this folder does not have are removed there, so that no tensor is in two files.

    Raises:
        CheckpointError: not in the native format, not what its checksums.json says, or the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if not is_own_format(folder):
        raise CheckpointError(f"{folder}: not a folder in the native format (no config.json); convert it first")
    if (folder / checksums.FILE).is_file():
        checksums.verify(
            folder / checksums.FILE, "convert it again, or, where you changed it on purpose, remove checksums.json"
        )
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        address = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="dit4dit checkpoint", delete_patterns=WEIGHTS
        )
        return str(address)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"hub {repository}: not uploaded ({first}); check the name, the network and your login"
        ) from None
