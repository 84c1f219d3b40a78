"""Does a data set's gripper say what its robot means? Looked at in the data, before anything is trained on them.

A value that the policy decides (the embodiment's gripper, and action keys of mode `binary`) leaves it as 0 or 1. Data that mean
something else by it, robosuite's -1 and +1 or an opening in metres, train without an error and move the gripper the wrong way, or
never.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dit4dit.data.samples import KeySource, Recording
from dit4dit.errors import DataError
from dit4dit.robots.embodiment import Gripper

Values = list[NDArray[np.float64]]
"""One array [length] per episode."""
LOW, HIGH = -0.1, 1.1
"""Commands are 0 and 1, or what a filter makes of them."""
ROUNDED = 1e-6
"""What float32 adds to a bound."""
IDLE = (0.01, 0.1)
"""How far from 0 and from 1 a gripper that is never used may be measured; 0 to 0.08 would be an opening in metres."""
BINARY_AT = 0.5
"""Mode `binary` is x > 0.5."""
MOVED = 0.3
"""Share of the whole travel that fingers move under one command to be counted: what holds an object is less than open."""
AGAINST, CORRELATION = 0.75, -0.3
"""An error needs both: this share of the counted travel is against the command, and the strongest correlation is below this. Lag
alone gives the one or the other, never both."""
LAGS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Seconds by which fingers may follow the command."""


@dataclass(frozen=True)
class Finding:
    """What is wrong with one column; `column` is the data set's own name of it."""

    column: str
    message: str


def refuse(recordings: Sequence[Recording], without: Sequence[Collection[int]]) -> None:
    """Check all data sets of a mixture; `without`: positions of the episodes of each that are left out.

    Raises:
        DataError: a gripper whose values mean something else, or never change; it names the data set.
    """
    for recording, left_out in zip(recordings, without, strict=True):
        found = findings(recording, left_out)
        if found:
            more = f" (and {len(found) - 1} more; `dit4dit data check` lists all)" if len(found) > 1 else ""
            raise DataError(f"{recording.data.name}: {found[0].message}{more}")


def findings(recording: Recording, without: Collection[int] = ()) -> list[Finding]:
    """Errors of one data set, over all episodes but those at the positions `without`."""
    out = []
    for source, offset, gripper in _decided(recording):
        commands = _values(recording, source, offset, without)
        if not sum(map(len, commands)) or (gripper is None and _idle(np.concatenate(commands))):
            continue
        name = _name("action", source, offset)
        robot = f"robot {recording.robot.name!r}"
        text = _range(name, robot, np.concatenate(commands), gripper)
        if text is None and gripper is not None:
            text = _direction(name, robot, recording, commands, gripper, without)
        if text is not None:
            out.append(Finding(source.where.column, text))
    return out


def notes(recording: Recording, without: Collection[int] = ()) -> list[str]:
    """Warnings: values of mode `binary` that never change. An action that is 0 in every frame, or 1, is sent as that, so it is
    no error: it is of an arm that these tasks do not use.
    """
    out = []
    for source, offset, gripper in _decided(recording):
        if gripper is None:
            values = np.concatenate([np.zeros(0), *_values(recording, source, offset, without)])
            if _idle(values):
                name, value = _name("action", source, offset), f"{abs(values[0]):.0f}"
                out.append(
                    f"{name}: mode binary, and all {len(values)} values are about {value}: the policy would always send that"
                )
    for source, key in zip(recording.state, recording.embodiment.state, strict=True):
        if key.normalization != "binary" or recording.embodiment.state_encoding != "normalized":
            continue
        for offset in range(source.size):
            values = np.concatenate([np.zeros(0), *_values(recording, source, offset, without)])
            if len(values) and len(np.unique(values > BINARY_AT)) == 1:
                out.append(
                    f"{_name('state', source, offset)}: mode binary, and all values lie on one side of {BINARY_AT:g} (seen "
                    f"{values.min():g} to {values.max():g}): the model sees a constant"
                )
    return out


def _decided(recording: Recording) -> Iterator[tuple[KeySource, int, Gripper | None]]:
    """Source, position in it and gripper rule (None: mode binary) of every action value that leaves the policy as 0 or 1."""
    at, gripper = 0, recording.embodiment.gripper
    for source, key in zip(recording.action, recording.embodiment.action, strict=True):
        for offset in range(source.size):
            if gripper is not None and at == gripper.index:
                yield source, offset, gripper
            elif key.normalization == "binary":
                yield source, offset, None
            at += 1


def _name(part: str, source: KeySource, offset: int) -> str:
    return f"{part}.{source.name}" + f".{offset}" * (source.size > 1)


def _idle(values: NDArray[np.float64]) -> bool:
    """Whether all values are about the 0, or all about the 1, that the policy would send for them."""
    return len(values) > 0 and bool((np.abs(values) <= IDLE[0]).all() or (np.abs(values - 1) <= IDLE[1]).all())


def _values(recording: Recording, source: KeySource, offset: int, without: Collection[int]) -> Values:
    kept = (i for i in range(len(recording.data.meta.episodes)) if i not in without)
    return [source.read(recording.data.values(source.where, i))[:, offset].astype(np.float64) for i in kept]


def _range(name: str, robot: str, values: NDArray[np.float64], gripper: Gripper | None) -> str | None:
    """What is wrong with the values themselves, None where nothing is."""
    low, high, count = float(values.min()) + 0.0, float(values.max()) + 0.0, len(values)  # 0.0 makes 0 of -0
    seen = f"seen {low:g} to {high:g}"
    outside = float(((values < LOW - ROUNDED) | (values > HIGH + ROUNDED)).mean())
    if outside:
        share = f"{100 * outside:.3g} % of {count} values"
        return (
            f"{name}: {share} lie outside {LOW:g}..{HIGH:g} ({seen}); {robot} wants {_wanted(gripper)}. "
            f"{_convert(low, high, gripper)}"
        )
    at = BINARY_AT if gripper is None else gripper.threshold
    above = values > at if gripper is None else values >= at
    if above.any() and not above.all():
        return None
    side = "above" if above.all() else "below"
    if gripper is None:
        never = f"the policy would always send {int(above.all())}"
    else:
        never = f"the policy would never {'close' if above.all() == bool(gripper.open) else 'open'} the gripper"
    return (
        f"{name}: all {count} values lie {side} the threshold {at:g} ({seen}), so {never}; {robot} wants {_wanted(gripper)}. "
        f"{_convert(low, high, gripper)}"
    )


def _wanted(gripper: Gripper | None) -> str:
    if gripper is None:
        return f"0 and 1 (mode binary: what is above {BINARY_AT:g} becomes 1, all else 0)"
    return f"0 = {gripper.word(0)} and 1 = {gripper.word(1)}"


def _convert(low: float, high: float, gripper: Gripper | None) -> str:
    """How such values become the wanted ones."""
    if -HIGH <= low < -BINARY_AT and high <= HIGH:
        if gripper is None:
            return "Write (value + 1) / 2 for values of -1 and +1, or give the key the mode min_max"
        up, down = "(value + 1) / 2", "(1 - value) / 2"
        robosuite, other = (down, up) if gripper.open else (up, down)
        return f"Of robosuite's -1 = open and +1 = close make {robosuite}; where -1 closes, {other}"
    if low == high:
        return "Record episodes in which it changes, too"
    # values that begin well above 0, or below it, are on both sides of the threshold only where 0 is made of the smallest
    start = 0.0 if high > 0 and LOW * high <= low < BINARY_AT * high else low
    scaled = f"value / {high:g}" if start == 0 else f"(value {'-+'[start < 0]} {abs(start):g}) / {high - start:g}"
    if gripper is None:
        return f"Write {scaled}, or give the key the mode min_max"
    return f"Of an opening from {start:g} to {high:g} make {scaled if gripper.open else f'1 - {scaled}'}"


def _direction(
    name: str,
    robot: str,
    recording: Recording,
    commands: Values,
    gripper: Gripper,
    without: Collection[int],
) -> str | None:
    """Whether the fingers run against the command; None where they do not, do not move, or the state has none."""
    sources = {source.name: source for source in recording.state}
    if not gripper.fingers or not {key for key, _ in gripper.fingers} <= sources.keys():
        return None
    parts = [[w * x for x in _values(recording, sources[key], 0, without)] for key, w in gripper.fingers]
    openings = [np.sum(each, axis=0) for each in zip(*parts, strict=True)]
    open_ = [(command >= gripper.threshold) == bool(gripper.open) for command in commands]
    found = runs_against(open_, openings, recording.data.fps)
    if found is None:
        return None
    against, movements, r = found
    formula = " ".join(f"{'+-'[w < 0]} {key}" for key, w in gripper.fingers).removeprefix("+ ")
    return (
        f"{name}: the fingers run against the command: {100 * against:.0f} % of what they move in {movements} movements opens "
        f"while the command closes, or closes while it opens (correlation {r:.2f}); {robot} wants {_wanted(gripper)}, and a "
        f"state whose opening is {formula}. Make 1 - value of the command, or correct the state's columns, whichever is reversed"
    )


def runs_against(open_: Sequence[NDArray[np.bool_]], openings: Values, fps: float) -> tuple[float, int, float] | None:
    """(`travel`, `strongest_correlation`) of episodes whose fingers clearly run against the command; None for all others.

    Args:
        open_: per episode whether "open" is commanded. openings: how far the fingers are open, in any unit.
    """
    against, movements = travel(open_, openings)
    if not movements or against < AGAINST:
        return None
    r = strongest_correlation(open_, openings, fps)
    return (against, movements, r) if r < CORRELATION else None


def travel(open_: Sequence[NDArray[np.bool_]], openings: Values) -> tuple[float, int]:
    """Share of the fingers' travel that goes against the command, and how many movements that is of.

    A movement is what the opening changed from just before the command switched until it switches again, where that is `MOVED` of
    the whole range or more: fingers may follow at once or late, stop at an object, or not move at all.
    """
    low, high = np.percentile(np.concatenate(openings), [1, 99])
    right = wrong = 0.0
    count = 0
    for command, opening in zip(open_, openings, strict=True):
        if not len(command):
            continue
        starts = np.r_[0, np.flatnonzero(np.diff(command)) + 1]
        change = opening[np.r_[starts[1:], len(command)] - 1] - opening[np.maximum(starts - 1, 0)]
        counted = np.abs(change) >= max(MOVED * (high - low), 1e-9)
        agrees = (change > 0) == command[starts]
        right += float(np.abs(change[counted & agrees]).sum())
        wrong += float(np.abs(change[counted & ~agrees]).sum())
        count += int(counted.sum())
    return (wrong / (right + wrong) if count else 0.0), count


def strongest_correlation(open_: Sequence[NDArray[np.bool_]], openings: Values, fps: float) -> float:
    """Correlation of "commanded open" with the opening up to a second later, where it is strongest; 0.0 without any."""
    best = 0.0
    for lag in sorted({round(seconds * fps) for seconds in LAGS}):
        pairs = [(c[: len(c) - lag], o[lag:]) for c, o in zip(open_, openings, strict=True) if len(c) > lag]
        if not pairs:
            continue
        command, opening = (np.concatenate(one).astype(np.float64) for one in zip(*pairs, strict=True))
        spread = command.std() * opening.std()
        if spread > 0:
            r = float(((command - command.mean()) * (opening - opening.mean())).mean() / spread)
            best = r if abs(r) > abs(best) else best
    return best
