"""Files that `dit4dit tune` keeps beside a device's verdicts: who is at work, and at what."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from dit4dit.errors import BackendError, InputError
from dit4dit.files.atomic import whole_file

LOCK, JOURNAL = "tune.lock", "tune.jsonl"
HINT = "set DIT4DIT_CACHE to a folder that can be written"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder for this process alone; it is made where it is missing.

    InputError: it cannot be written. BackendError: another process is at work in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        file = os.fdopen(descriptor, "r+", encoding="ascii", errors="backslashreplace")
    except OSError as error:
        raise InputError(f"tune: {folder}: verdicts cannot be written there ({error.strerror}); {HINT}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = file.readline(20).strip() or "unknown"
            raise BackendError(f"tune: process {pid} is tuning this device already; wait for it, or end it") from None
        except OSError as error:
            raise InputError(f"tune: {folder}: cannot be locked ({error.strerror}); {HINT}") from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


class Journal:
    """What is being run, in the file before it begins: a JSON line when something begins, and one when it has ended.

    An entry without an end is of a run that was killed, maybe with the whole machine. It stays until its call is done.
    """

    def __init__(self, folder: Path | None) -> None:
        """folder: locked; None keeps no journal. InputError: it cannot be written."""
        self.unfinished: dict[tuple[str, str], set[str]] = {}
        """(op, call) -> implementations that an earlier run was at when it was killed."""
        self._file: IO[str] | None = None
        self._open: dict[str, Any] | None = None
        if folder is None:
            return
        path = self._path = folder / JOURNAL
        for op, call, name in _unfinished(path):
            self.unfinished.setdefault((op, call), set()).add(name)
        with whole_file(path, InputError, HINT) as partial:  # only what counts still
            partial.write_text("".join(_line("begin", *key, name) for key, name in self._entries()), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def _entries(self) -> Iterator[tuple[tuple[str, str], str]]:
        for key, names in self.unfinished.items():
            for name in sorted(names):
                yield key, name

    def begin(self, op: str, call: str, name: str, *, durable: bool) -> None:
        """Note that an implementation starts; what was at work before has ended.

        durable: on the disk, for what may take the machine with it; not while something is timed.
        """
        entry = {"op": op, "call": call, "name": name}
        if entry != self._open:
            self.end()
            self._write("begin", entry)
            self._open = entry
            if durable and self._file is not None:
                os.fsync(self._file.fileno())

    def end(self) -> None:
        """What is at work has ended, one way or another."""
        if self._open is not None:
            entry, self._open = self._open, None
            self._write("end", entry)

    def done(self, op: str, call: str) -> None:
        """A call is done: what an earlier run was at there is forgotten."""
        for name in self.unfinished.pop((op, call), ()):
            self._write("end", {"op": op, "call": call, "name": name})

    def close(self) -> None:
        """The end of this run, in order."""
        self.end()
        if self._file is not None:
            self._file.close()

    def _write(self, what: str, entry: dict[str, Any]) -> None:
        file = self._file
        if file is None:
            return
        try:
            file.write(_line(what, **entry))
            file.flush()
        except OSError as error:
            self._file = None  # what is full now is so at the end of the run too
            with contextlib.suppress(OSError):
                file.close()
            raise InputError(f"tune: {self._path}: cannot be written ({error.strerror}); {HINT}") from None


def _line(what: str, op: str, call: str, name: str) -> str:
    return json.dumps({"what": what, "op": op, "call": call, "name": name}) + "\n"


def _unfinished(path: Path) -> list[tuple[str, str, str]]:
    """(op, call, implementation) of each entry without an end; a line that is none, as the last one may be, does not count."""
    open_: dict[tuple[str, str, str], None] = {}
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            data = json.loads(line)
            key = data["op"], data["call"], data["name"]
            what = data["what"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if not all(isinstance(part, str) for part in key):
            continue
        if what == "begin":
            open_[key] = None
        else:
            open_.pop(key, None)
    return list(open_)
