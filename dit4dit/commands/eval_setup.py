"""`dit4dit eval setup`: the environment of a simulator."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from dit4dit.commands.shell import check_outputs, finish, say
from dit4dit.errors import ConfigError

Graphics = Literal["egl", "osmesa"] | None


def setup(
    simulator: tyro.conf.Positional[Literal["libero", "gr1"]],
    path: Path | None = None,
    assets: Path | None = None,
    python: str | None = None,
    torch: str | None = None,
    graphics: Graphics = None,
    json: Path | None = None,
) -> int:
    """Make a simulator's own environment from a lock file, and take a first step in it. Doing it again does what is missing.

    gr1 is untested as a whole: its repositories and assets could not be reached from where it was written.

    Args:
        simulator: libero (from the package index; assets from the hub), or gr1 (public repositories, with git).
        path: folder for it; in the cache folder when not given.
        assets: libero: folder of its meshes and textures to link to, instead of downloading them.
        python: interpreter for it, 3.11 or 3.12; this one, or one on PATH, when not given.
        torch: libero: requirement or wheel of the torch that reads its initial states; torch==2.13.0 when not given. Where the
            index has no CPU build of that, give a wheel: a GPU build is large and no better here.
        graphics: what draws the pictures of the first step: egl or osmesa; MUJOCO_GL, else egl, when not given.
        json: write what the first step told to this file.
    """
    from dit4dit.evaluation import simulator_setup as module
    from dit4dit.evaluation.simulators import Simulator, graphics_of

    check_outputs(json=json)
    place, drawn = Simulator.at(simulator, path), graphics_of(graphics)
    if simulator == "libero":
        result = module.setup_libero(place, drawn, say, assets=assets, python=python, torch=torch or module.TORCH)
    else:
        if assets is not None or torch is not None:
            raise ConfigError(
                "--assets, --torch: are for libero; gr1's repository downloads its assets, and needs no torch"
            )
        say("gr1: this command is untested as a whole; where it fails, its messages say at which step")
        result = module.setup_gr1(place, drawn, say, python=python)
    height, width, _ = result["picture"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    text = (
        f"{simulator}: ready in {place.folder}; first step, with a picture of {width} x {height}, after "
        f"{result['seconds']:.1f} s ({versions})"
    )
    finish(text, {**result, "folder": str(place.folder), "graphics": drawn}, json)
    return 0
