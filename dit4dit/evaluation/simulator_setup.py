"""`dit4dit eval setup`: a simulator's environment from nothing to its first picture. Done again, it only does what is missing."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import yaml

from dit4dit.errors import SimulatorError
from dit4dit.evaluation import libero_assets
from dit4dit.evaluation.gr1 import TASKS, environment_id
from dit4dit.evaluation.setup_checks import check_gr1, check_libero
from dit4dit.evaluation.simulators import (
    LIBRARIES,
    Graphics,
    Say,
    Simulator,
    install,
    lock_of,
    log_of,
    make_environment,
    pip_install,
    run,
)
from dit4dit.evaluation.workers import Worker
from dit4dit.progress import waiting
from dit4dit.robots import GR1, LIBERO, Embodiment

TORCH = "torch==2.13.0"
"""LIBERO reads its initial states with it; a GPU is of no use to it."""
REPOSITORIES = {
    "robosuite": ("https://github.com/ARISE-Initiative/robosuite.git", "a071383d53568ab798eb315c0e95357911be922d"),
    "robocasa-gr1-tabletop-tasks": (
        "https://github.com/robocasa/robocasa-gr1-tabletop-tasks.git",
        "4840e671596f93ca03651524b9f72ffb1aadfeff",
    ),
}
"""Public repositories that GR1 needs, at commits that others have published results with (robosuite's is its release 1.5.1)."""


def setup_libero(
    simulator: Simulator,
    graphics: Graphics,
    say: Say,
    *,
    assets: Path | None = None,
    python: str | None = None,
    torch: str = TORCH,
) -> dict[str, Any]:
    """LIBERO's environment in `simulator.folder` -> what its first step told.

    Args:
        graphics: what draws the pictures of the first step.
        say: takes a line about each thing that is done.
        assets: folder of meshes and textures to link to; what is linked or downloaded already stays where None.
        python: interpreter for the environment. torch: requirement or wheel.

    Raises:
        ConfigError: everything that is missing here, before anything is installed (`setup_checks`).
        SimulatorError: what went wrong, and what to do.
    """
    check_libero(simulator, graphics, lock_of(simulator), assets=assets, python=python, torch=torch)
    make_environment(simulator, python)
    install(simulator, say, first=torch)
    write_libero_config(simulator)
    libero_assets.link(simulator, assets, say)
    return first_step(simulator, graphics, "libero", {"suite": "libero_spatial", "task": 0}, LIBERO)


def write_libero_config(simulator: Simulator) -> None:
    """The file without which the first import of LIBERO asks questions on standard input."""
    root = simulator.packages / "libero" / "libero"
    places = {
        "benchmark_root": root,
        "bddl_files": root / "bddl_files",
        "init_states": root / "init_files",
        "datasets": simulator.folder / "libero" / "datasets",
        "assets": root / "assets",
    }
    target = simulator.folder / "libero" / "config.yaml"
    target.parent.mkdir(exist_ok=True)
    target.write_text(yaml.safe_dump({name: str(path) for name, path in places.items()}))


def setup_gr1(simulator: Simulator, graphics: Graphics, say: Say, *, python: str | None = None) -> dict[str, Any]:
    """RoboCasa-GR1's environment in `simulator.folder` -> what its first step told.

    Not tested as a whole: no machine of this project's could reach the repositories and the assets. What is tested is the
    checkout of a commit, and the locked packages with robosuite's release from the package index.

    Raises:
        ConfigError: everything that is missing here, before anything is installed (`setup_checks`).
        SimulatorError: what went wrong, and what to do.
    """
    sources = {name: simulator.folder / "src" / name for name in REPOSITORIES}
    todo = {name: url for name, (url, commit) in REPOSITORIES.items() if git_head(sources[name]) != commit}
    check_gr1(simulator, graphics, lock_of(simulator), python=python, repositories=todo)
    make_environment(simulator, python)
    install(simulator, say)
    for name, (url, commit) in REPOSITORIES.items():
        say(f"{name}: {url} at {commit[:10]}")
        checkout(url, commit, sources[name])
    words = [word for source in sources.values() for word in ("--editable", str(source))]
    run([*pip_install(simulator), "--no-deps", *words], "pip install of the repositories", log=log_of(simulator))
    done = simulator.folder / "assets-downloaded"
    if not done.exists():
        say("assets: downloading with the repository's own script; several gigabytes")
        tasks = sources["robocasa-gr1-tabletop-tasks"]
        run(
            [str(simulator.python), str(tasks / "robocasa" / "scripts" / "download_tabletop_assets.py"), "-y"],
            "GR1's assets",
            folder=tasks,
            log=log_of(simulator),
        )
        done.touch()
    return first_step(simulator, graphics, "gr1", {"environment": environment_id(TASKS[0])}, GR1)


def checkout(url: str, commit: str, folder: Path) -> None:
    """The repository's files at this commit in `folder`, whatever commit was there before.

    Raises:
        SimulatorError: the repository cannot be reached, or has no such commit.
    """
    git, log = ["git", "-C", str(folder)], folder.with_name(f"{folder.name}.log")
    if not (folder / ".git").exists():
        folder.mkdir(parents=True, exist_ok=True)
        run([*git, "init", "--quiet"], "git init", log=log)
    at = git_head(folder)
    if at == commit:
        return
    run([*git, "fetch", "--quiet", "--depth", "1", url, commit], f"git fetch {url}", log=log)
    run([*git, "checkout", "--quiet", "--force", "--detach", commit], "git checkout", log=log)


def git_head(folder: Path) -> str | None:
    """The commit that is checked out; None in a new repository, and where there is none."""
    head = folder / ".git" / "HEAD"
    text = head.read_text().strip() if head.is_file() else "ref: none"
    return None if text.startswith("ref:") else text


def first_step(
    simulator: Simulator, graphics: Graphics, environment: str, options: dict[str, Any], robot: Embodiment
) -> dict[str, Any]:
    """Make an environment, reset it, step once, in which `robot` stands still: {"versions", "seconds", "picture": [H, W, 3]}."""
    log = simulator.folder / "first-step.log"
    log.unlink(missing_ok=True)
    start = time.perf_counter()
    try:
        with waiting("first step"), Worker(simulator.launch(graphics), log) as worker:
            made = worker.make(environment, options)
            seen = worker.reset(0, 0, pictures=True)
            state = robot.observe(seen["observation"]).state
            worker.step([robot.command(robot.still(state))])
    except SimulatorError as error:
        last = error.traceback.strip().splitlines()[-1:]
        raise SimulatorError(
            f"{environment}: installed, but its first step failed: {error} {' '.join(last)}; its output: {log}. Drawing with "
            f"{graphics} needs {LIBRARIES[graphics]} (names of Debian's packages); --graphics chooses another way",
            error.traceback,
        ) from None
    picture = seen["picture"]
    if picture.max() == picture.min():
        raise SimulatorError(
            f"{environment}: its first picture is one colour; {graphics} draws nothing here, try --graphics"
        )
    return {"versions": made["versions"], "seconds": time.perf_counter() - start, "picture": list(picture.shape)}
