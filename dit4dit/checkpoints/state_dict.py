"""A `.pt` file that others saved -> a flat state dict. What is unambiguous is loaded, and said; what is not is refused.

torch.save writes a zip file, which is mapped; before PyTorch 1.6 it wrote plain pickles, which are read whole. Trainers put
the state dict below `state_dict`, `model` or `module`, DataParallel and torch.compile put words in front of each name.
"""

from __future__ import annotations

import os
import pickle
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit4dit.checkpoints.tensor_files import say_once
from dit4dit.errors import CheckpointError, listed, shown
from dit4dit.files.folders import fault, visible

if TYPE_CHECKING:
    from torch import Tensor

PREFIXES = ("module.", "_orig_mod.")
WRAPPERS = ("state_dict", "model", "module", "model_state_dict")
"""Keys below which trainers put the weights. Elsewhere, as below "ema" or "exp_avg", they may be something else of that shape."""
ZIP, LEGACY = b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
ZERO_PARTS = re.compile(r"(bf16_|fp16_)?zero_pp_rank_\d+")
ZERO_FILES = re.compile(rf"{ZERO_PARTS.pattern}|mp_rank_\d+")


def read(file: Path, known: tuple[str, ...]) -> dict[str, Tensor]:
    """The state dict in `file`, read with `weights_only=True`; memory-mapped where it can be.

    Args:
        known: beginnings of names by which a set of weights is recognised as ours.

    Raises:
        CheckpointError: damaged, not a state dict, or several sets of weights.
    """
    return _unwrap(_load(file), file, known)


def _load(file: Path) -> Any:
    import torch

    if reason := fault(file):
        raise CheckpointError(f"{file}: {reason}")
    start = b""
    try:
        with file.open("rb") as stream:
            start = stream.read(len(LEGACY))
        if start == LEGACY:
            say_once(f"{file}: written in PyTorch's old format, which is read into memory whole")
        elif not start.startswith(ZIP):
            raise pickle.UnpicklingError("neither a zip file nor PyTorch's old format")
        return torch.load(file, map_location="cpu", weights_only=True, mmap=start != LEGACY)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be opened ({error.strerror}); check its permissions") from None
    except (RuntimeError, EOFError, pickle.UnpicklingError, LookupError, ValueError, TypeError, struct.error) as error:
        raise CheckpointError(f"{file}: not readable as a PyTorch checkpoint ({_reason(error, file)}") from None


def _reason(error: Exception, file: Path) -> str:
    """The end of the message, from its bracket on."""
    text = " ".join(str(error).split())
    if kind := re.search(r"unsupported (?:(?:global|class):? )+([\w.]+)", text, re.IGNORECASE):
        return (
            f"it holds objects of {kind[1]}, which are not loaded because unpickling them could run code); save the state dict "
            "alone where it came from: torch.save(model.state_dict(), FILE)"
        )
    if file.stat().st_size > 8 and _is_safetensors(file):
        return f"it is a safetensors file); rename it to {file.with_suffix('.safetensors').name}"
    return f"{file.stat().st_size} bytes; {text[:160]}); truncated, or not written by torch.save? copy it again"


def _is_safetensors(file: Path) -> bool:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return 2 <= length <= file.stat().st_size - 8 and stream.read(1) == b"{"


def _unwrap(data: Any, file: Path, known: tuple[str, ...]) -> dict[str, Tensor]:
    """The one set of our weights in what was loaded: the whole, or what is below one key."""
    import torch

    if not isinstance(data, Mapping):
        raise CheckpointError(f"{file}: expected a flat state dict of tensors, got {type(data).__name__}")
    found: dict[str, dict[str, Tensor]] = {}
    groups = {"": data} | {str(key): value for key, value in data.items() if isinstance(value, Mapping)}
    for key, group in groups.items():
        tensors = {name: x for name, x in group.items() if isinstance(name, str) and isinstance(x, torch.Tensor)}
        if any(name.startswith(known) for name in plain_names(tensors, file)):
            found[key] = tensors
    if len(found) > 1:
        keys = " and ".join(shown(key) if key else "the top level" for key in list(found)[:8])
        raise CheckpointError(
            f"{file}: holds {len(found)} sets of weights, under {keys}; save the one that is meant alone: "
            "torch.save(data[KEY], FILE)"
        )
    if not found:
        if data and all(isinstance(value, torch.Tensor) for value in data.values()):
            return dict(data)  # tensors of some other model: whoever asked says so
        first = next(
            (name for group in groups.values() for name, x in group.items() if isinstance(x, torch.Tensor)), None
        )
        raise CheckpointError(
            f"{file}: expected a flat state dict of tensors under the published names, or one below state_dict, model or "
            f"module, got {type(data).__name__} with the keys {listed(data, 8)}"
            + ("" if first is None else f", whose first tensor is {shown(first, 200)}")
        )
    key, tensors = next(iter(found.items()))
    if key and key not in WRAPPERS:
        raise CheckpointError(
            f"{file}: tensors under our names only below {shown(key)}, expected at the top level or below one of "
            f"{', '.join(WRAPPERS)}; if they are the weights that are meant save them alone: "
            f"torch.save(data[{shown(key)}], FILE)"
        )
    left = [name for name in data if name not in tensors] if not key else [name for name in data if name != key]
    left += [f"{key}.{name}" for name in groups[key] if name not in tensors] if key else []
    if key:
        say_once(f"{file}: the weights below {shown(key)} are used{_left_out(left)}")
    elif left:
        say_once(f"{file}: the tensors at the top level are used{_left_out(left)}")
    return without_prefix(tensors, file)


def _left_out(names: list[Any]) -> str:
    return f"; left out: {listed(names, 8)}" if names else ""


def plain_names(names: Iterable[str], file: Path) -> dict[str, str]:
    """Name without what DataParallel and torch.compile put into it -> name as it is.

    A word in front is taken off where all names begin with it; `_orig_mod` inside a name is never a module of the model.
    """
    found = list(names)
    cut = 0
    while found and (prefix := next((p for p in PREFIXES if found[0].startswith(p, cut)), None)):
        if not all(name.startswith(prefix, cut) for name in found):
            break
        cut += len(prefix)
    out: dict[str, str] = {}
    for name in found:
        plain = name[cut:].replace("._orig_mod.", ".")
        if (other := out.setdefault(plain, name)) != name:
            raise CheckpointError(
                f"{file}: {shown(other, 200)} and {shown(name, 200)} are the same tensor; keep one of them"
            )
    return out


def without_prefix(tensors: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The tensors under their plain names; says what was taken off."""
    plain = plain_names(tensors, file)
    changed = [(new, old) for new, old in plain.items() if new != old]
    if changed:
        new, old = changed[0]
        say_once(
            f"{file}: {len(changed)} of {len(plain)} names are read without a prefix: {shown(old, 200)} as {shown(new, 200)}"
        )
    return {new: tensors[old] for new, old in plain.items()}


def is_zero_shard(file: Path) -> bool:
    """Whether a file holds a part of the weights of a DeepSpeed checkpoint."""
    return ZERO_FILES.match(file.name) is not None and any(ZERO_PARTS.match(f.name) for f in visible(file.parent))


def zero_folder(path: Path) -> Path | None:
    """The folder of a DeepSpeed checkpoint in shards, at `path` or one or two folders below; None where there is none."""
    candidates = [path, *_folders(path)]
    candidates += [f for folder in candidates[1:] for f in _folders(folder)]
    for folder in candidates:
        if any(ZERO_PARTS.match(file.name) for file in visible(folder)) or (folder / "zero_to_fp32.py").is_file():
            return folder
    return None


def _folders(path: Path) -> list[Path]:
    """The folders in `path` that can be looked into."""
    return [folder for folder in visible(path) if folder.is_dir() and os.access(folder, os.R_OK | os.X_OK)]


def zero_error(folder: Path) -> CheckpointError:
    """What to type for a DeepSpeed checkpoint in shards; `folder` has them, or is the one above with the file `latest`."""
    tag = ""
    if any(ZERO_PARTS.match(file.name) for file in visible(folder)):
        # the script wants the folder above, and reads there in `latest` which one is meant
        tag = "" if (folder.parent / "latest").is_file() else f" --tag {folder.name}"
        folder = folder.parent
    script = folder / "zero_to_fp32.py"
    run = next((p for p in (folder, *folder.parents) if (p / "config.yaml").is_file()), folder.parent)
    return CheckpointError(
        f"{folder}: holds the shards of a DeepSpeed (ZeRO) checkpoint, not a state dict; put them together with the "
        f"zero_to_fp32.py that DeepSpeed left there: python {script} {folder} {run / 'final_model'} --safe_serialization{tag} "
        f"(an old DeepSpeed without that option: python {script} {folder} {run / 'final_model' / 'pytorch_model.pt'}{tag}), then "
        f"load {run}"
    )
