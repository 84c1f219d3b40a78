"""Files and folders that appear whole or not at all: written beside their place under a hidden name, then renamed.

A reader never sees half of one, whoever writes it a second time at once, and whatever was there before stays until then. A
process that is killed leaves only a hidden name behind.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dit4dit.errors import Dit4DitError, InputError


def temp_name(path: Path) -> Path:
    """A new hidden name beside `path`, which no other process, thread or machine comes to."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


@contextlib.contextmanager
def whole_file(
    path: Path, error: type[Dit4DitError] = InputError, hint: str = "free space, or choose another folder"
) -> Iterator[Path]:
    """A temporary name to write a file under, which becomes `path` when the block ends without an error.

    A link at `path` gives way to the file, and its target is untouched. For a file that a user named see `write_text`.

    Args:
        hint: what to do where it cannot be written.

    Raises:
        error: the disk is full or fails, or the folder cannot be written. Nothing of it stays, and what was there before does.
    """
    partial = temp_name(path)
    with _explained(path, partial, error, hint):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            partial.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise


@contextlib.contextmanager
def whole_folder(
    target: Path, error: type[Dit4DitError], hint: str, *, durable: bool = False, needs: int = 0
) -> Iterator[Path]:
    """A temporary folder beside `target` that becomes it when the block ends without an error. A link at `target` keeps pointing
    at where it points, and the folder appears there.

    Args:
        hint: what to do where it cannot be written.
        durable: sync all of it before it is there, and share it as the umask says; it is the owner's alone otherwise.
        needs: bytes that will be written at least; with less than that free nothing is.

    Raises:
        error: the disk is full or fails, the place cannot be written, or `target` is there by now and is not an empty folder.
    """
    if target.name in ("", ".."):
        raise error(
            f"{target}: not written (it would be replaced while it is in use); give the new folder a name of its own"
        )
    place = Path(os.path.realpath(target)) if target.is_symlink() else target  # no folder can be renamed to a link
    partial = temp_name(place)
    with _explained(target, partial, error, hint, needs):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            partial.mkdir(mode=0o700)
            if (free := _free(place)) is not None and free < needs:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield partial
            if durable:
                _share(partial)
            partial.rename(place)
            if durable:
                _sync(place.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """A text file that a user named. A regular one appears whole; anything else that is there (a device, a pipe) is written
    through, and a link keeps pointing at its target.

    Raises:
        InputError: it is a folder, or cannot be written.
    """
    target, hint = path.resolve(), "choose another file"
    if target.is_dir():
        raise InputError(f"{path}: is a folder; give a file to write")
    if target.exists() and not target.is_file():
        with _explained(path, path, InputError, hint):
            target.write_text(text, encoding="utf-8")
        return
    with whole_file(target, hint=hint) as partial:
        partial.write_text(text, encoding="utf-8")


def check_folder(option: str, folder: Path) -> None:
    """Make the folder; InputError where it cannot be made or written, before anything long begins."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{option} {folder}: is a file; give a folder") from None
        raise InputError(f"{option} {folder}: cannot be written ({_reason(error)}); give another folder") from None


def check_file(option: str, file: Path) -> None:
    """InputError where `write_text` could not write the file, before anything long begins; its folder is made."""
    target = file.resolve()
    if target.is_dir():
        raise InputError(f"{option} {file}: is a folder; give a file to write")
    if target.exists() and not target.is_file():  # a device or a pipe, which is written through
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise InputError(f"{option} {file}: cannot be written ({_reason(error)}); give another file") from None


def _reason(error: OSError) -> str:
    """mkdir says "File exists" of a file that stands in the place of a folder."""
    return "Not a directory" if isinstance(error, FileExistsError) else str(error.strerror)


@contextlib.contextmanager
def _explained(path: Path, partial: Path, error: type[Dit4DitError], hint: str, needs: int = 0) -> Iterator[None]:
    """`error` with the path instead of what a failing disk raises; where there is no room, with what is free and needed."""
    try:
        yield
    except Exception as problem:
        # by its name: whoever writes JSON does not load safetensors
        if not isinstance(problem, OSError) and type(problem).__name__ != "SafetensorError":
            raise
        reason = str(getattr(problem, "strerror", None) or problem)
        if isinstance(problem, shutil.Error):  # of a folder that was copied: a list
            source, _, why = problem.args[0][0]
            reason = f"{source}: {why}"
        name = getattr(problem, "filename", None)
        if name is not None and Path(name) not in (path, path.parent, partial) and partial not in Path(name).parents:
            reason = f"{name}: {reason}"  # another file, which was to be copied
        elif _no_room(problem, path, needs):
            reason += f"; {_room(path, needs)}"
        raise error(f"{path}: not written ({reason}); {hint}") from problem


FULL = {errno.ENOSPC, errno.EDQUOT}


def _no_room(problem: Exception, path: Path, needs: int) -> bool:
    """Whether it is for want of room that something was not written. safetensors and torch say it in words, or not at all."""
    number = getattr(problem, "errno", None)
    words = any(os.strerror(code).lower() in str(problem).lower() for code in FULL)
    return number in FULL or words or (number is None and needs > 0 and (_free(path) or needs) < needs)


def _room(path: Path, needs: int) -> str:
    """What is free where `path` was to be, and what it needs."""
    free = _free(path)
    shown = "what is free cannot be seen" if free is None else f"{size_text(free)} free"
    return f"{shown} in {_place(path)}" + (f", {size_text(needs)} needed" if needs else "")


def size_text(count: int) -> str:
    """Bytes in words: "1.5 GB" (10^9)."""
    for unit, one in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= one:
            return f"{count / one:.1f} {unit}"
    return f"{count} bytes"


def _free(path: Path) -> int | None:
    """Bytes that this user can write where `path` is to be, without its quota; None where that cannot be seen."""
    try:
        return shutil.disk_usage(_place(path)).free
    except OSError:
        return None


def _place(path: Path) -> Path:
    """The nearest folder above `path` that is there."""
    return next((folder for folder in path.absolute().parents if folder.is_dir()), Path("/"))


def _share(folder: Path) -> None:
    """Sync everything in it, and give it the permissions of new files: safetensors makes its own for the owner alone, and a
    folder that was copied from a read-only place would stay read-only.
    """
    umask = os.umask(0)
    os.umask(umask)
    for file in [*folder.rglob("*"), folder]:
        _sync(file)
        file.chmod((0o777 if file.is_dir() else 0o666) & ~umask)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
