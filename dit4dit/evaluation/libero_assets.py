"""LIBERO's meshes and textures, which its package does not bring: their place, what must be among them, where to fetch them."""

from __future__ import annotations

from pathlib import Path

from dit4dit.errors import SimulatorError
from dit4dit.evaluation.simulators import Say, Simulator

DATA_SET = "lerobot/libero-assets"
"""On the hub, where hf-libero itself would look for them: 586 files, 422 MB."""
FETCH = f"hf download {DATA_SET} --repo-type dataset --local-dir FOLDER"
PARTS = (
    "articulated_objects",
    "scenes",
    "stable_hope_objects",
    "stable_scanned_objects",
    "textures",
    "turbosquid_objects",
)
FILES = (
    "articulated_objects/flat_stove.xml",
    "articulated_objects/wooden_cabinet.xml",
    "scenes/libero_floor_base_style.xml",
    "scenes/libero_tabletop_base_style.xml",
    "stable_hope_objects/milk/milk.xml",
    "stable_scanned_objects/basket/basket.xml",
)
"""Some of them that the suites cannot do without, by which folders that are empty or half copied are known."""


def missing(folder: Path, option: str) -> list[str]:
    """One line where the folder has not LIBERO's assets, with what it lacks and what to do; none where it has."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        return [f"{option} {folder}: {what}; fetch LIBERO's assets there first: {FETCH}"]
    lacking = [part for part in PARTS if not (folder / part).is_dir()]
    lacking += [file for file in FILES if file.partition("/")[0] not in lacking and not (folder / file).is_file()]
    if not lacking:
        return []
    near = (folder / "assets", *sorted(folder.glob("*/assets")))
    inner = next((child for child in near if all((child / part).is_dir() for part in PARTS)), None)
    do = f"did you mean {inner}?" if inner else f"fetch all of it: {FETCH}"
    return [f"{option} {folder}: LIBERO's assets are not complete; missing: {', '.join(lacking)}; {do}"]


def _link(simulator: Simulator) -> Path:
    return simulator.packages / "libero" / "libero" / "assets"


def place(simulator: Simulator) -> Path | None:
    """The folder of assets that an earlier setup has linked or downloaded; None where there is none."""
    if not simulator.installed or not _link(simulator).exists():
        return None
    return _link(simulator).resolve()


def in_the_way(simulator: Simulator) -> list[str]:
    """A line where something stands in the place of the link to a folder of assets."""
    if not simulator.installed or not _link(simulator).exists() or _link(simulator).is_symlink():
        return []
    return [f"--assets: {_link(simulator)} is a folder of its own; remove it first"]


def link(simulator: Simulator, assets: Path | None, say: Say) -> None:
    """Assets where LIBERO looks first; whatever its configuration says of them, it does not read."""
    here = _link(simulator)
    if assets is not None:
        here.unlink(missing_ok=True)
        here.symlink_to(assets.resolve(), target_is_directory=True)
    elif not here.exists():
        here.unlink(missing_ok=True)
        say(f"assets: downloading {DATA_SET} from the hub, 422 MB")
        here.symlink_to(download(simulator.folder / "assets"), target_is_directory=True)
    say(f"assets: {here.resolve()}")


def download(target: Path, only: str | None = None) -> Path:
    """LIBERO's assets from the hub into `target`, or one file of them; SimulatorError where it cannot be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        snapshot_download(DATA_SET, repo_type="dataset", local_dir=target, allow_patterns=only)
    except (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OSError,
    ) as error:  # unreachable hosts are OSErrors of several libraries
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SimulatorError(
            f"assets: {DATA_SET} cannot be downloaded ({reason:.200}); fetch it on a machine that reaches the hub "
            f"({FETCH}), copy it here and give its folder with --assets"
        ) from None
    return target
