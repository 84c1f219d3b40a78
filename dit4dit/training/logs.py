"""What a run tells while it goes: log.jsonl always, TensorBoard and Weights & Biases where asked for, a progress bar."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dit4dit import progress
from dit4dit.errors import require
from dit4dit.files.atomic import whole_file
from dit4dit.files.json_files import write_json
from dit4dit.files.keys import read_json
from dit4dit.training.config import RunConfig

log = logging.getLogger("dit4dit.training")


class Meter:
    """Samples per second and the share of time spent waiting for data, since the last reading."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._start, self._samples, self._waited = time.perf_counter(), 0, 0.0

    def add(self, samples: int, waited: float) -> None:
        self._samples += samples
        self._waited += waited

    def read(self) -> dict[str, float]:
        """{"samples_per_s", "data_wait"}; starts anew."""
        seconds = time.perf_counter() - self._start
        out = {"samples_per_s": self._samples / seconds, "data_wait": self._waited / seconds}
        self._restart()
        return out


class Log:
    """All trackers of a run; on ranks other than the first it does nothing."""

    def __init__(
        self, folder: Path, config: RunConfig, *, first_step: int, active: bool, settings: Mapping[str, Any]
    ) -> None:
        """first_step: steps done so far; lines of later ones, which a dead process left, are dropped."""
        self.active = active
        self.file = folder / "log.jsonl"
        self.evaluation_lost = False
        """Whether the log has the first step's losses without an evaluation."""
        self._board = self._wandb = None
        self._bar = tqdm(
            total=config.steps, initial=first_step, unit="step", desc=folder.name, disable=None if active else True
        )
        self._above = contextlib.ExitStack()
        if not self._bar.disable:
            self._above.enter_context(progress.log_lines_above())
        self._lines = progress.Lines(folder.name, first_step, config.steps) if active and self._bar.disable else None
        if not active:
            return
        here = [line for line in _cut(self.file, first_step) if line["step"] == first_step]
        self.evaluation_lost = bool(here) and not any(name.startswith("eval/") for line in here for name in line)
        if "tensorboard" in config.trackers:
            require("tensorboard", "train")
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        if "wandb" in config.trackers:
            identity = folder / "wandb.json"
            wandb = require("wandb", "wandb")
            known = (
                read_json(identity, again="remove it, and the run is a new one there")["id"]
                if identity.is_file()
                else wandb.util.generate_id()
            )
            write_json(identity, {"id": known})
            self._wandb = wandb.init(
                project=config.project,
                name=folder.name,
                id=known,
                resume="allow",
                dir=str(folder),
                config=dict(settings),
            )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line, {"step": ..., name: value}; names with a slash are grouped by the trackers."""
        if not self.active:
            return
        with self.file.open("a") as stream:
            stream.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if self._board is not None:
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def picture(self, step: int, name: str, file: Path) -> None:
        """A picture that stands in `file`."""
        import numpy as np
        from PIL import Image

        if not self.active:
            return
        if self._board is not None:
            self._board.add_image(name, np.asarray(Image.open(file)), step, dataformats="HWC")
        if self._wandb is not None:
            self._wandb.log({name: require("wandb", "wandb").Image(str(file))}, step=step)

    def advance(self) -> None:
        """One more step on the bar, which shows the remaining time by itself."""
        self._bar.update()
        if self._lines is not None:
            self._lines.done += 1
            if self._lines.done != self._lines.total:  # the last line waits for its words
                self._lines.show()

    def tell(self, text: str) -> None:
        """A few words at the bar's end."""
        self._bar.set_postfix_str(text)
        if self._lines is not None:
            self._lines.text = text
            self._lines.show()

    def close(self) -> None:
        self._above.close()
        self._bar.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _cut(file: Path, last: int) -> list[dict[str, float]]:
    """Drop lines of steps after `last`, and a half-written one; returns the others."""
    if not file.is_file():
        return []
    kept, found = [], []
    for line in file.read_text().split("\n"):
        try:
            data = json.loads(line)
        except json.JSONDecodeError:
            continue
        if data["step"] <= last:
            kept.append(line + "\n")
            found.append(data)
    with whole_file(file) as partial:
        partial.write_text("".join(kept))
    return found


@contextlib.contextmanager
def bar(name: str, total: int, active: bool) -> Iterator[Callable[[int], object]]:
    """A progress bar on one rank; gives the function that moves it on."""
    with progress.bar(name, total, active=active) as shown:
        yield shown.update
