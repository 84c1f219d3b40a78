"""What decides how fast and what an implementation is beside its call: versions, the driver, the package's own files."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from dit4dit.ops import native, tiles
from dit4dit.ops.aot import manifest

PACKAGES = ("triton", "flash-attn", "flash-attn-3")
"""Packages beside torch whose version decides how fast an implementation is."""
DRIVER = Path("/proc/driver/nvidia/version")
FOLDERS = ("ops", "engine/action_ode")
"""Folders of the package whose code counts: the second plans what the head's kernel does, block by block."""
MODEL = ("model/flow.py", "model/vae.py", "model/video_dit.py")
"""Where the ops have references from."""


@functools.cache
def versions() -> dict[str, str]:
    """Of those of PACKAGES that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def driver() -> str:
    """The version of NVIDIA's driver; where the system does not say it (WSL), of the CUDA that the driver is for."""
    try:
        found = re.search(r"\d+\.\d+[\d.]*", DRIVER.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        found = None
    if found:
        return found.group()
    try:
        return f"CUDA {native.driver().version}"
    except (ImportError, RuntimeError):
        return "unknown"


def kernels_hash() -> str:
    """Of all that decides what an implementation does: the kernels, the ops and what they take from elsewhere in the package, the
    compiled module, what was compiled ahead of time and the tables of tiles. The same wherever and by whomever the same files
    were installed.
    """
    digest = hashlib.blake2b(_package().encode(), digest_size=16)
    own = tiles.own_file()
    digest.update(b"" if own is None else _bytes(own))
    return digest.hexdigest()


@functools.cache
def _package() -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, path in _files():
        content = _bytes(path)
        digest.update(f"{name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _files() -> Iterator[tuple[str, Path]]:
    """(a name that does not depend on the place, file) of the package's files that count, in a fixed order."""
    package = Path(__file__).parent.parent
    python = (path for folder in FOLDERS for path in (package / folder).rglob("*.py"))
    yield from sorted((path.relative_to(package).as_posix(), path) for path in (*python, *(package / f for f in MODEL)))
    yield tiles.TABLE.name, tiles.TABLE
    kernels = importlib.util.find_spec("dit4dit.kernels")
    folders = [] if kernels is None else list(kernels.submodule_search_locations or [])
    yield from sorted((f"kernels/{path.name}", path) for folder in folders for path in Path(folder).glob("*.py"))
    compiled = importlib.util.find_spec("dit4dit._C")  # not loaded for this; None in a source tree without a build
    if compiled is not None and compiled.origin is not None:
        yield "_C", Path(compiled.origin)
    yield manifest.FILE, manifest.FOLDER / manifest.FILE


def _bytes(path: Path) -> bytes:
    """A file's bytes; of one that is not there or cannot be read, the kind of error."""
    try:
        return path.read_bytes()
    except OSError as error:
        return type(error).__name__.encode()
