"""`dit4dit stats`, `dit4dit data check` and `dit4dit bench loader`: the commands about training data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from dit4dit.commands.shell import check_inputs, check_outputs, say
from dit4dit.errors import ConfigError, DataError, InputError
from dit4dit.files.atomic import check_folder
from dit4dit.progress import bar, waiting

if TYPE_CHECKING:
    from dit4dit.config import ModelConfig

Datasets = tyro.conf.Positional[tuple[Path, ...]]


def stats(
    dataset: Datasets = (),
    robot: str | None = None,
    mixture: str | None = None,
    root: Path = Path(),
    robots: Path | None = None,
    modality: Path | None = None,
    skip_bad: bool = False,
    recipe: str | None = None,
    out: Path | None = None,
) -> int:
    """Exact statistics of data sets, merged as the published code merges them.

    Args:
        dataset: LeRobot data set folders; with --mixture, none.
        robot: robot type of the data sets; without one, statistics of their flat columns are shown.
        mixture: a mixture instead, by name; its data sets are folders below --root.
        root: folder that holds the data sets of a mixture.
        robots: YAML file with robots and mixtures of your own.
        modality: a modality.json for data sets that have none.
        skip_bad: leave damaged episodes out, and say how many.
        recipe: check that the model of this training recipe takes the data, too.
        out: write this dataset_statistics.json.
    """
    from dit4dit.data.catalogue import Entry, catalogue
    from dit4dit.data.fit import check_fit
    from dit4dit.data.mixture import Mixture
    from dit4dit.files.json_files import write_json
    from dit4dit.tables import table

    check_outputs(out=out)
    check_inputs(robots=robots, modality=modality)
    known = catalogue(robots)
    if (mixture is None) == (not dataset):
        raise InputError("stats: give data set folders, or --mixture and --root")
    if mixture is None and robot is None:
        if out is not None or skip_bad or recipe is not None:
            raise InputError(
                "stats: --out, --skip-bad and --recipe need --robot (or --mixture): they are about one robot's keys"
            )
        return _flat(dataset, modality)
    if mixture is not None:
        if robot is not None or modality is not None:
            raise InputError(
                "stats: the mixture says robot and modality of each data set; leave out --robot and --modality"
            )
        entries: tuple[Entry, ...] = known.mixture(mixture)
    else:
        assert robot is not None
        named = None if modality is None else str(modality.resolve())
        entries = tuple(Entry(str(path.resolve()), robot, modality=named) for path in dataset)
    model = None if recipe is None else _model(recipe)
    with _progress() as progress:
        opened = Mixture.open(entries, root, known, skip_bad=skip_bad, progress=progress)
        if model is not None:
            for recording in opened.recordings:
                check_fit(recording.embodiment, model)
        found = opened.statistics
    for note in opened.notes:
        say(f"note: {note}")
    for tag, entry in found.items():
        say(f"{tag}: {entry['num_transitions']:,} frames of {entry['num_trajectories']:,} episodes")
        robot_of_tag = next(r.embodiment for r in opened.recordings if r.embodiment.tag == tag)
        state = tuple(f"{k.name}.{i}" if k.dim > 1 else k.name for k in robot_of_tag.state for i in range(k.dim))
        names = {"action": robot_of_tag.action_names, "state": state}
        for part in ("state", "action"):
            if part in entry:
                say(table([part, *_NAMES], _rows(names[part], entry[part]), right=range(1, 7)))
    if out is not None:
        write_json(out, found, allow_nan=False)
        say(f"wrote {out}")
    return 0


def data_check(
    dataset: Datasets,
    robot: str | None = None,
    robots: Path | None = None,
    modality: Path | None = None,
    decode: bool = True,
    recipe: str | None = None,
    out: Path = Path("data_check"),
) -> int:
    """Look for everything in data sets that could spoil training; exit code 1 when there is any.

    Writes a page with sample frames and joint curves (index.html) and everything found (check.json).

    Args:
        dataset: LeRobot data set folders.
        robot: check that they hold what this robot type needs, too.
        robots: YAML file with robots of your own.
        modality: a modality.json for data sets that have none.
        decode: decode every image; --no-decode reads sizes, frame times and frame counts of the video files only.
        recipe: check that the model of this training recipe takes what the robot has, too.
        out: folder for the page and the JSON file.
    """
    from dit4dit.data import sheet
    from dit4dit.data.catalogue import catalogue
    from dit4dit.data.check import check, whole
    from dit4dit.files.json_files import write_json

    if not dataset:
        raise InputError("data check: give at least one data set folder")
    check_inputs(robots=robots, modality=modality)
    if recipe is not None and robot is None:
        raise InputError("data check: --recipe needs --robot: a model takes a robot's keys")
    chosen = None if robot is None else catalogue(robots).robot(robot)
    model = None if recipe is None else _model(recipe)
    check_folder("--out", out)
    results: list[dict[str, Any]] = []
    for path in dataset:
        try:
            with _progress() as progress:
                results.append(
                    check(path, robot=chosen, modality=modality, decode=decode, model=model, progress=progress)
                )
        except (ConfigError, DataError) as error:
            results.append({"dataset": str(path), "errors": [whole(path, error)], "warnings": []})
    for result in results:
        count = len(result["errors"])
        size = f"{result['episodes']:,} episodes, {result['frames']:,} frames: " if "version" in result else ""
        say(f"{result['dataset']}: {size}{'ok' if not count else f'{count} errors' if count > 1 else '1 error'}")
        # one file of many episodes says the same of each of them
        alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for wrong in result["errors"]:
            alike.setdefault((wrong["file"], wrong["row"], wrong["message"]), []).append(wrong)
        for first, *more in list(alike.values())[:20]:
            others = f" and {len(more)} more" if more else ""
            words = f"{sheet.describe(first)} (episode {first['episode']}{others})"
            say(f"  error: {words if first['episode'] is not None else first['message']}")
        if len(alike) > 20:
            say(f"  and {len(alike) - 20} more in {out / 'check.json'}")
        for warning in result["warnings"]:
            say(f"  warning: {warning}")
    write_json(out / "check.json", {"datasets": results})
    with waiting("drawing the page"):
        page = sheet.write(out, results)
    say(f"wrote {page} and {out / 'check.json'}")
    return 1 if any(result["errors"] for result in results) else 0


def bench_loader(
    dataset: Datasets = (),
    robot: str | None = None,
    preset: str = "libero",
    robots: Path | None = None,
    modality: Path | None = None,
    workers: tuple[int, ...] = (0, 1, 2),
    batch_size: int = 8,
    batches: int = 20,
    seconds: float | None = None,
    json: Path | None = None,
) -> int:
    """Samples per second of training's loader, and how much of the time goes into decoding.

    Args:
        dataset: LeRobot data set folders; without any, a small one of random pictures is made for the run.
        robot: robot type of the data sets.
        preset: model whose window (frames, horizon, picture size) is read.
        robots: YAML file with robots of your own.
        modality: a modality.json for data sets that have none.
        workers: numbers of worker processes to time.
        batch_size: samples of a batch.
        batches: timed batches.
        seconds: end after about this long; numbers of workers that were not reached are named in the result.
        json: also write every number to this file, as they come.
    """
    from dit4dit.benchmarks import loader as module  # type: ignore[import-not-found, unused-ignore]
    from dit4dit.benchmarks.recording import Recording, left_out
    from dit4dit.data.catalogue import catalogue
    from dit4dit.presets import preset as find
    from dit4dit.tables import table

    if batches < 1 or batch_size < 1 or min(workers, default=-1) < 0:
        raise InputError("bench loader: expected --batches >= 1, --batch-size >= 1 and --workers >= 0")
    if dataset and robot is None:
        raise InputError("bench loader: give --robot, the robot type of the data sets")
    check_inputs(robots=robots, modality=modality)
    with bar("loader", len(workers) + 2) as shown, Recording(json, seconds) as record:
        record.result["preset"] = preset
        module.measure(
            [path.resolve() for path in dataset],
            robot,
            find(preset).model,
            known=catalogue(robots),
            modality=modality,
            workers=workers,
            batch_size=batch_size,
            batches=batches,
            record=record,
            shown=shown,
        )
    result = record.result
    rows = [[r["workers"], f"{r['samples_per_second']:.1f}"] for r in result["runs"]]
    text = table(["workers", "samples/s"], rows, right=(0, 1))
    share = result["share_of_time"]
    if share is not None:
        text += "\none process: " + ", ".join(f"{name} {100 * part:.0f} %" for name, part in share.items())
    say(text + left_out(result))
    return 0


def _model(recipe: str) -> ModelConfig:
    """The model of a training recipe."""
    from dit4dit.training.recipes import recipe as find

    return find(recipe).model


_NAMES = ("mean", "std", "min", "max", "q01", "q99")


def _rows(names: tuple[str, ...], entry: dict[str, Any]) -> list[list[str]]:
    return [[name, *(f"{entry[key][i]:.6g}" for key in _NAMES)] for i, name in enumerate(names)]


def _flat(datasets: tuple[Path, ...], modality: Path | None) -> int:
    from dit4dit.data.lerobot import LeRobot
    from dit4dit.data.statistics import flat_statistics
    from dit4dit.tables import table

    for path in datasets:
        with _progress() as progress:
            data = LeRobot.open(path, modality=modality, progress=progress)
        used = {where.column for part in ("state", "action") for where in data.modality.part(part).values()}
        problems = data.problems(used)
        if problems:
            raise DataError(
                f"{problems[0]}; `dit4dit data check` lists all, --robot with --skip-bad leaves such episodes out"
            )
        say(f"{path}: {data.meta.frames:,} frames of {len(data.meta.episodes):,} episodes")
        for column in sorted(used):
            found = {name: values.tolist() for name, values in flat_statistics(data, column).items()}
            numbered = tuple(str(i) for i in range(len(found["mean"])))
            say(table([column, *_NAMES], _rows(numbered, found), right=range(1, 7)))
    return 0


@contextmanager
def _progress() -> Iterator[Any]:
    with bar("data", leave=False) as shown, shown.ticking():

        def progress(what: str, done: int, of: int) -> None:
            shown.of(of)
            shown.reach(done)
            shown.say(what[-50:])

        yield progress
