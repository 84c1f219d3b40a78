"""Folders that others wrote: which of their files are looked at, and what is wrong with one, seen from its first bytes."""

from __future__ import annotations

import os
import re
from pathlib import Path

from dit4dit.errors import CheckpointError, shown

LFS_POINTER = b"version https://git-lfs"


def visible(folder: Path, ending: str = "") -> list[Path]:
    """What lies in a folder, sorted by name, whose name has that ending in capitals or not; none where there is no folder.

    Names that begin with a dot are left out: macOS puts `._model.safetensors` beside `model.safetensors`. Links are listed
    whether or not they lead anywhere, because a broken one is a download that did not end.
    """
    if not folder.is_dir():
        return []
    try:
        found = [file for file in folder.iterdir() if not file.name.startswith(".")]
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be listed ({error.strerror}); check its permissions") from None
    return sorted(file for file in found if file.name.lower().endswith(ending))


def no_folder(path: Path) -> str | None:
    """Why there is and can be no folder at `path`; None where there is one, or nothing yet."""
    try:
        os.lstat(path)
        if path.is_symlink() and not path.exists():
            return f"is a link to {os.readlink(path)}, which is not there"
        return None if path.is_dir() else "is a file"
    except FileNotFoundError:
        return None
    except ValueError:  # an embedded NUL, a surrogate
        return "is no name that a file can have"
    except OSError as error:
        return f"cannot be looked at ({error.strerror})"


def inside(source: Path, name: object) -> Path:
    """The file that `source` names, below the folder of `source`; links are followed, as a hub's cache is made of them.

    Raises:
        CheckpointError: the name is absolute or leads out of the folder. It is judged as text, before any file is touched.
    """
    parts = re.split(r"[\\/]", name) if isinstance(name, str) else [""]
    if not parts[0] or ".." in parts or re.match(r"[A-Za-z]:", parts[0]) or "\0" in str(name):
        raise CheckpointError(
            f"{source}: names the file {shown(name)}; expected a name inside {source.parent}, without '..': do not use this "
            "folder, or correct the name"
        )
    return source.parent / str(name)


def fault(file: Path) -> str | None:
    """Why a file cannot be what its name says, and what to do; None where its first bytes show nothing.

    Says nothing of a file that is not there: what is missing then is the caller's to say.
    """
    if file.is_symlink() and not file.exists():
        return f"is a link to {os.readlink(file)}, which is not there; the download did not end, start it again"
    if not file.is_file():
        # whoever opens one waits for ever, or reads without an end; what is in /dev a user has named, as a shell's <(...)
        endless = file.exists() and not file.is_dir() and file.parts[:2] != ("/", "dev")
        return "is a pipe, a socket or a device; expected a file, copy it again" if endless else None
    try:
        with file.open("rb") as stream:
            start = stream.read(256)
    except OSError as error:
        return f"cannot be opened ({error.strerror}); check its permissions"
    if not start:
        return "is empty (0 bytes); the copy or download did not end, fetch it again"
    if start.startswith(LFS_POINTER):
        return f"is a git-lfs pointer, not the file itself; run `git lfs pull` in {file.parent}"
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "is an HTML page saved under this name, probably a login or error page; download the file again"
    return None
