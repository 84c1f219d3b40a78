"""The simulators' own Python environments: made from lock files, found again, and how a worker is started in them.

Simulators ask for versions that exclude each other's and this package's, so each lives in a virtual environment of its own, in
the cache folder or where `path` says.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dit4dit.errors import ConfigError, SimulatorError
from dit4dit.evaluation.workers import Launch
from dit4dit.files.cache import cache_root
from dit4dit.progress import waiting

Name = Literal["libero", "gr1"]
Graphics = Literal["egl", "osmesa"]
Say = Callable[[str], None]

LOCKS = Path(__file__).parent / "locks"
PYTHONS: dict[str, tuple[str, ...]] = {"libero": ("3.11", "3.12"), "gr1": ("3.11", "3.12")}
"""Versions for which every locked package has a wheel."""
STAMP = "dit4dit-simulator.json"
ANSWER_SECONDS = 300.0
"""A reset builds a whole scene, and the first step in a new environment compiles; on a busy machine both take minutes."""
SHOWN = 70  # characters of a program's line beside the clock
LIBRARIES = {"egl": "libegl1 and libgl1-mesa-dri", "osmesa": "libosmesa6"}
"""Debian's packages that render without a display."""


@dataclass(frozen=True)
class Simulator:
    """One simulator's environment, in `folder`."""

    name: Name
    folder: Path

    @classmethod
    def at(cls, name: Name, path: Path | None) -> Simulator:
        """The environment of this name: in `path`, or in its place in the cache folder."""
        return cls(name, (path or cache_root() / "simulators" / name).absolute())

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def packages(self) -> Path:
        """Where its packages are installed."""
        found = sorted(self.folder.glob("lib/python3.*/site-packages"))
        if not found:
            raise ConfigError(f"{self.folder}: no Python environment; run dit4dit eval setup {self.name}")
        return found[0]

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables that the simulator needs, whatever draws its pictures."""
        return {"LIBERO_CONFIG_PATH": str(self.folder / "libero")} if self.name == "libero" else {}

    @property
    def installed(self) -> dict[str, str]:
        """What the last complete installation was made from; empty where there was none."""
        try:
            found: dict[str, str] = json.loads((self.folder / STAMP).read_text())
        except (
            FileNotFoundError,
            NotADirectoryError,
            ValueError,
        ):  # half a stamp is of an installation that was not complete
            return {}
        return found

    def launch(self, graphics: Graphics, extra: Mapping[str, str] | None = None) -> Launch:
        """How its workers are started.

        Raises:
            ConfigError: it has not been set up.
        """
        if not self.installed or not self.python.exists():
            where = f" --path {self.folder}" if self.folder != Simulator.at(self.name, None).folder else ""
            raise ConfigError(f"{self.folder}: no {self.name} environment; run dit4dit eval setup {self.name}{where}")
        # before anything of it is imported, MuJoCo and PyOpenGL must agree on what draws
        drawing = {"MUJOCO_GL": graphics, "PYOPENGL_PLATFORM": graphics}
        variables = {**self.variables, **drawing, **(extra or {})}
        return Launch(str(self.python), variables, answer_seconds=ANSWER_SECONDS)


def graphics_of(wanted: Graphics | None) -> Graphics:
    """What draws: the one that is wanted, else MUJOCO_GL, else egl."""
    found = wanted or os.environ.get("MUJOCO_GL") or "egl"
    if found not in LIBRARIES:
        raise ConfigError(
            f"MUJOCO_GL={found}: expected egl or osmesa, which draw without a display; choose one with --graphics"
        )
    return "egl" if found == "egl" else "osmesa"


def make_environment(simulator: Simulator, python: str | None) -> None:
    """The empty virtual environment, unless it is there.

    Raises:
        ConfigError: no fitting interpreter, or a folder that holds something else.
    """
    check_place(simulator)
    if not simulator.python.exists():
        run([interpreter(simulator.name, python), "-m", "venv", str(simulator.folder)], "python -m venv", log=None)


def check_place(simulator: Simulator) -> None:
    """ConfigError where its folder holds something else than a Python environment."""
    folder = simulator.folder
    if folder.is_dir() and not simulator.python.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder}: is there and is no Python environment; give an empty or a new folder with --path")


def interpreter(name: str, wanted: str | None) -> str:
    """An interpreter for which the lock file is made: `wanted`, else this process's, else one on PATH."""
    versions = PYTHONS[name]
    if wanted is not None:
        got = version_of(wanted)
        if got not in versions:
            raise ConfigError(
                f"--python {wanted}: expected Python {' or '.join(versions)}, got {got or 'nothing that runs'}"
            )
        return wanted
    for candidate in (sys.executable, *(f"python{version}" for version in reversed(versions))):
        if version_of(candidate) in versions:
            return candidate
    raise ConfigError(
        f"python: {name} needs Python {' or '.join(versions)} and none is on PATH; install one, or name it with --python"
    )


def version_of(python: str) -> str | None:
    """ "3.11"; None where it does not run."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def install(simulator: Simulator, say: Say, *, first: str | None = None, lock: Path | None = None) -> None:
    """Install the locked packages, unless they are there.

    Args:
        first: a requirement that may bring packages of its own, as far as the lock allows.
        lock: requirements file with every package; the simulator's own where None.
    """
    lock = lock or lock_of(simulator)
    made_from = {"lock": hashlib.sha256(lock.read_bytes()).hexdigest(), "first": first or ""}
    if simulator.installed == made_from:
        say(f"packages: as {lock.name} says")
        return
    (simulator.folder / STAMP).unlink(missing_ok=True)
    pip, log = pip_install(simulator), log_of(simulator)
    if first is not None:
        say(f"packages: installing {first}")
        run([*pip, "--constraint", str(lock), first], f"pip install {first}", log=log)
    say(f"packages: installing {lock.name}")
    run([*pip, "--no-deps", "--requirement", str(lock)], f"pip install {lock.name}", log=log)
    (simulator.folder / STAMP).write_text(json.dumps(made_from))


def lock_of(simulator: Simulator) -> Path:
    """Requirements file with every package of the simulator."""
    return LOCKS / f"{simulator.name}.txt"


def log_of(simulator: Simulator) -> Path:
    """Where all that is said while it is set up goes."""
    return simulator.folder / "setup.log"


def pip_install(simulator: Simulator) -> list[str]:
    """The beginning of the command; each download is a line of its output."""
    options = ["--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    return [str(simulator.python), "-m", "pip", "install", *options]


def run(words: Sequence[str], what: str, *, log: Path | None, folder: Path | None = None) -> None:
    """Run a program to its end. Its time and its last line are shown meanwhile; all lines are added to `log`.

    Raises:
        ConfigError: there is no such program.
        SimulatorError: it failed; its last lines and the log are in the message.
    """
    if shutil.which(words[0]) is None:
        raise ConfigError(f"{what}: {words[0]} is not installed")
    last: deque[str] = deque(maxlen=6)
    with waiting(what) as shown, open(os.devnull, "w") if log is None else log.open("a") as kept:
        kept.write(f"$ {' '.join(words)}\n")
        with subprocess.Popen(
            words,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            for line in process.stdout or ():
                kept.write(line)
                kept.flush()
                if line.strip():
                    last.append(line.strip())
                    shown.say(last[-1][:SHOWN])
    if process.returncode:
        there = "" if log is None else f"; all of it is in {log}"
        raise SimulatorError(
            f"{what}: failed with exit code {process.returncode}: {' | '.join(last)}{there}", "\n".join(last)
        )
