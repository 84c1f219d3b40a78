"""Size and SHA-256 of a folder's files, written beside them when the folder is written, and held against them later."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dit4dit.checkpoints.tensor_files import SHARED, shared_by_links
from dit4dit.errors import CheckpointError, shown
from dit4dit.files.folders import inside
from dit4dit.files.keys import read_json

log = logging.getLogger("dit4dit.checkpoints")

FILE = "checksums.json"
Entries = dict[str, dict[str, Any]]
"""Name below the folder -> {"size": bytes, "sha256": hex digits}."""

_known: dict[tuple[int, int, int, int], str] = {}


def _stamp(file: Path) -> tuple[int, int, int, int]:
    facts = file.stat()
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def sha256(file: Path) -> str:
    """A file's hash; one that this process hashed before and that has not changed (a linked one) is not read again."""
    stamp = _stamp(file)
    return _known[stamp] if stamp in _known else _read(file)


def _read(file: Path) -> str:
    """A file's hash, read from disk."""
    stamp = _stamp(file)
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    _known[stamp] = digest.hexdigest()
    return _known[stamp]


Progress = Callable[[str, int], None]
"""Called with a file's name and its bytes."""


def _silent(name: str, size: int) -> None:
    pass


def entries(
    folder: Path, carried: Mapping[tuple[int, int], str] | None = None, progress: Progress = _silent
) -> Entries:
    """Of every file below `folder` whose name and folders do not begin with a dot.

    Args:
        carried: (device, inode) -> hash, of linked files that are not read again. progress: told of each file, without bytes.
    """
    out: Entries = {}
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        name = file.relative_to(folder)
        if not any(part.startswith(".") for part in name.parts):
            facts = file.stat()
            known = (carried or {}).get((facts.st_dev, facts.st_ino))
            progress(f"{name.as_posix()} (checksum)", 0)
            out[name.as_posix()] = {"size": facts.st_size, "sha256": known or sha256(file)}
    return out


def carried(folder: Path) -> dict[tuple[int, int], str]:
    """(device, inode) -> hash as the folder's own checksums say; empty where it has none. For folders that are linked to."""
    if not (folder / FILE).is_file():
        return {}
    files = {inside(folder / FILE, name): entry["sha256"] for name, entry in read(folder / FILE).items()}
    return {(f.stat().st_dev, f.stat().st_ino): digest for f, digest in files.items() if f.is_file()}


def write(
    folder: Path,
    linked: Mapping[tuple[int, int], str] | None = None,
    progress: Progress = _silent,
) -> None:
    """checksums.json of all other files below `folder`, the last thing that is written there."""
    (folder / FILE).write_text(json.dumps(entries(folder, linked, progress), indent=1) + "\n")


def read(file: Path) -> Entries:
    """The entries of a checksum file; CheckpointError where it is damaged."""
    data = read_json(file)
    for name, entry in data.items():
        good = isinstance(entry, dict) and isinstance(entry.get("size"), int) and isinstance(entry.get("sha256"), str)
        if not good:
            raise CheckpointError(
                f"{file}: {shown(name, 200)}: expected size and sha256, got {shown(entry)}; copy it again"
            )
    return data


def verify(
    file: Path,
    rest: str = "copy it again",
    progress: Progress = _silent,
    *,
    shared: str | None = None,
    reread: bool = True,
) -> int:
    """Read every file that the checksum file `file` lists, and return how many there are.

    A frozen part whose whole folder was removed is left out: it comes from the backbone then.

    Args:
        rest: what to do about a damaged file. progress: called with each file's name and size.
        shared: what to do about a damaged frozen part that checkpoints share, where that is not to load a policy.
        reread: False takes the hash of a file that this process has read and that has not changed since.

    Raises:
        CheckpointError: names the file that is missing, or is not what was written.
    """
    count, digest_of = 0, _read if reread else sha256
    for name, entry in read(file).items():
        path = inside(file, name)
        if path.parent.name in SHARED and not path.parent.exists():
            log.warning("%s: removed, so not checked; it is taken from the backbone", path.parent)
            continue
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, though {file.name} lists it; {rest}")
        size = path.stat().st_size
        progress(name, size)
        if size != entry["size"] or (digest := digest_of(path)) != entry["sha256"]:
            got = f"{size} bytes" if size != entry["size"] else f"SHA-256 {digest[:12]}…"
            raise CheckpointError(
                f"{path}: damaged: expected {entry['size']} bytes with SHA-256 {entry['sha256'][:12]}…, got {got}"
                f"{shared_by_links(path, shared) or f'; {rest}'}"
            )
        count += 1
    return count
