"""What a simulator's setup needs and this machine lacks, all of it at once and before anything is installed."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from dit4dit.errors import ConfigError, SimulatorError
from dit4dit.evaluation import libero_assets
from dit4dit.evaluation.simulators import LIBRARIES, Graphics, Simulator, check_place, interpreter
from dit4dit.progress import waiting

NEEDED_GB = {"libero": 3.0, "gr1": 12.0}
"""Free space at least: packages with a CPU build of torch 2, LIBERO's assets 0.4; GR1's assets are several."""
SMALL = "termcolor"
"""A package of both lock files whose wheel is a few kilobytes: whether the index can be reached."""
SHARED = {"egl": ("EGL", "libEGL.so.1"), "osmesa": ("OSMesa", "libOSMesa.so.8")}
PATIENCE = 60.0
"""Seconds for a host to answer."""


def check_libero(
    simulator: Simulator, graphics: Graphics, lock: Path, *, assets: Path | None, python: str | None, torch: str
) -> None:
    """ConfigError with everything that LIBERO's setup lacks; see `simulator_setup.setup_libero` for the arguments."""
    with waiting("checking what libero needs"):
        found = _common(simulator, graphics, python, lock)
        there = libero_assets.place(simulator)
        if assets is not None:
            found += libero_assets.missing(assets, "--assets") + libero_assets.in_the_way(simulator)
        elif there is not None:
            found += libero_assets.missing(there, "assets")
        else:
            found += _hub()
        if torch.endswith(".whl") and "://" not in torch and not Path(torch).is_file():
            found.append(f"--torch {torch}: no such file; give a wheel, or a requirement such as torch==2.13.0")
    _stop(simulator, found)


def check_gr1(
    simulator: Simulator, graphics: Graphics, lock: Path, *, python: str | None, repositories: Mapping[str, str]
) -> None:
    """ConfigError with everything that GR1's setup lacks. repositories: name -> URL of those that are not checked out."""
    with waiting("checking what gr1 needs"):
        found = _common(simulator, graphics, python, lock)
        if shutil.which("git") is None:
            found.append("git: not installed; GR1 comes from public repositories (Debian's package: git)")
        else:
            found += [line for name, url in repositories.items() for line in _repository(name, url)]
    _stop(simulator, found)


def _stop(simulator: Simulator, found: Sequence[str]) -> None:
    if found:
        lines = "".join(f"\n  - {line}" for line in found)
        raise ConfigError(f"{simulator.name}: nothing was installed; to be put right first ({len(found)}):{lines}")


def _common(simulator: Simulator, graphics: Graphics, python: str | None, lock: Path) -> list[str]:
    found = _folder(simulator)
    if not simulator.python.exists():
        try:
            chosen = interpreter(simulator.name, python)
        except ConfigError as error:
            found.append(str(error))
        else:
            found += _python(chosen, lock)
    return [*found, *_drawing(graphics)]


def _folder(simulator: Simulator) -> list[str]:
    """Is its place free, writable, and large enough?"""
    found = []
    try:
        check_place(simulator)
    except ConfigError as error:
        found.append(str(error))
    there = next(folder for folder in (simulator.folder, *simulator.folder.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "cannot be written" if there.is_dir() else "is a file"
        return [*found, f"{simulator.folder}: {there} {why}; choose another folder with --path"]
    free, needed = shutil.disk_usage(there).free / 1e9, NEEDED_GB[simulator.name]
    if not simulator.installed and free < needed:
        found.append(
            f"{simulator.folder}: needs {needed:g} GB, {free:.1f} GB are free; free space, or choose another disk with --path"
        )
    return found


def _python(python: str, lock: Path) -> list[str]:
    """Can this interpreter make an environment, and does its pip reach the packages?"""
    if last_words([python, "-c", "import venv, ensurepip"]) is not None:
        return [
            f"{python}: has no venv with pip (Debian's package: python3-venv); install it, or name another with --python"
        ]
    if last_words([python, "-m", "pip", "--version"]) is not None:
        return []  # the new environment's pip will tell
    wanted = next(line for line in lock.read_text().splitlines() if line.startswith(f"{SMALL}=="))
    with tempfile.TemporaryDirectory() as folder:
        pip = [python, "-m", "pip", "--disable-pip-version-check", "--retries", "1", "--timeout", "15"]
        said = last_words([*pip, "download", "--quiet", "--no-deps", "--dest", folder, wanted])
    hint = "connect to it, or name a mirror with PIP_INDEX_URL"
    return [] if said is None else [f"package index: {wanted} cannot be downloaded ({said:.200}); {hint}"]


def _drawing(graphics: Graphics) -> list[str]:
    name, file = SHARED[graphics]
    if _loads(ctypes.util.find_library(name) or file):
        return []
    other = "osmesa" if graphics == "egl" else "egl"
    return [
        f"{graphics}: {file} is not installed; Debian's packages: {LIBRARIES[graphics]}; or draw with --graphics {other}"
    ]


def _loads(file: str) -> bool:
    try:
        ctypes.CDLL(file)
    except OSError:
        return False
    return True


def _hub() -> list[str]:
    """Can the assets be downloaded? One small file is."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            libero_assets.download(Path(folder), only=".gitattributes")
    except SimulatorError as error:
        return [str(error)]
    return []


def _repository(name: str, url: str) -> list[str]:
    said = last_words(["git", "ls-remote", "--quiet", url, "HEAD"])
    return [] if said is None else [f"{name}: {url} cannot be reached ({said:.200}); GR1 has no other source"]


def last_words(words: Sequence[str]) -> str | None:
    """None where the program ends well; otherwise the last line that it wrote."""
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
            env={**os.environ, "GIT_TERMINAL_PROMPT": "0"},
        )
    except OSError as error:
        return str(error)
    except subprocess.TimeoutExpired:
        return f"no answer for {PATIENCE:.0f} s"
    lines = (done.stderr or done.stdout).strip().splitlines()
    return None if done.returncode == 0 else (lines[-1] if lines else f"exit code {done.returncode}")
