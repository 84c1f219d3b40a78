"""What would run and why, and what was measured: verdicts that count, how many do not, and the table that came with dit4dit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from dit4dit.errors import InputError
from dit4dit.ops import dispatch, launch, tiles, verdicts
from dit4dit.ops.aot import loader
from dit4dit.ops.dispatch import Op
from dit4dit.ops.verdicts import NOT_YET, Files, Unfit, Verdict

REASONS = 6
"""Kinds of reasons that are shown."""


@dataclass(frozen=True)
class Measured:
    """One call that was measured.

    Attributes:
        call: `verdicts.call_text`. chosen: what runs it in a plan.
        ms: implementation -> median milliseconds. runner_up: the fastest but the chosen one, if any.
        made: when; "" where that is unknown. shipped: None where it was measured here, otherwise the result of another machine
            that dit4dit came with.
    """

    op: str
    call: str
    chosen: str
    ms: Mapping[str, float]
    runner_up: str | None
    made: str = ""
    shipped: str | None = None


@dataclass(frozen=True)
class Explanation:
    """What `op` would run on a device (None: nothing), why each implementation before that would not, and, where a Triton
    kernel would run, which table its block sizes come from and whether it was compiled ahead of time.

    measured: the calls that a plan chooses for by what was measured, here or (`Measured.shipped`) elsewhere. note: that nothing
    was measured here, where more than one implementation could run.
    """

    op: str
    chosen: str | None
    refused: dict[str, str] = field(default_factory=dict)
    tiles: str | None = None
    kernels: str | None = None
    measured: tuple[Measured, ...] = ()
    note: str | None = None


@dataclass(frozen=True)
class Survey:
    """The files of a device's folder.

    Attributes:
        folder: "" where no place for it is known.
        counting: the verdicts that count here, by op and call. ignored: reason -> number of other files.
    """

    folder: str
    counting: tuple[Verdict, ...] = ()
    ignored: Mapping[str, int] = field(default_factory=dict)

    @property
    def why_ignored(self) -> str:
        """The most frequent reasons and how many files each is for, in one line."""
        found = [f"{reason} ({count})" for reason, count in self.ignored.items()]
        more = [f"and {len(found) - REASONS} other reasons"] if len(found) > REASONS else []
        return "; ".join(found[:REASONS] + more)


def survey(device: torch.device, ops: Mapping[str, Files]) -> Survey:
    """Read every file of a device's folder. ops: what is here (`dispatch.files`)."""
    counting: list[Verdict] = []
    ignored: Counter[str] = Counter()

    def ignore(why: Unfit) -> None:
        ignored[why.reason] += 1

    try:
        where = verdicts.folder(device)
        for found in verdicts.known(device, ignore):
            if why := verdicts.stranger(found, ops.get(found.op)):
                ignore(why)
            else:
                counting.append(found)
    except InputError:
        return Survey("")
    counting.sort(key=lambda verdict: (verdict.op, verdict.call))
    return Survey(str(where), tuple(counting), dict(ignored.most_common()))


def measured(device: torch.device, found: Survey) -> dict[str, list[Measured]]:
    """op -> what decides in plans on this device: the verdicts of its survey, and for other calls the shipped table."""
    rows = {(v.op, v.call): Measured(v.op, v.call, v.chosen, v.ms, v.runner_up, v.made) for v in found.counting}
    table = verdicts.shipped_for(device)
    for key, row in table.get("calls", {}).items():
        op, _, call = key.partition(": ")
        second = verdicts.runner_up(row["ms"], row["chosen"])
        shipped = Measured(op, call, row["chosen"], row["ms"], second, shipped=table["source"])
        rows.setdefault((op, call), shipped)
    by_op: dict[str, list[Measured]] = {}
    for one in rows.values():
        by_op.setdefault(one.op, []).append(one)
    return by_op


def explain(op: str | None = None, device: str | torch.device = "cpu") -> list[Explanation]:
    """For `op`, or for every op, what would run on `device` with usual arguments, and why the better ones would not; and what
    was measured for it.

    What `use_backend` asks for counts. BackendError: no such op; ConfigError: the table that DIT4DIT_TILES names is broken.
    """
    asked, device = [dispatch.find(name) for name in ([op] if op else dispatch.names())], torch.device(device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        reason = f"torch sees {torch.cuda.device_count()} CUDA devices, so not {device}"
        return [Explanation(one.name, None, dict.fromkeys(one.implementations, reason)) for one in asked]
    known = measured(device, survey(device, dispatch.files()))
    found = []
    for one in asked:
        rows = tuple(known.get(one.name, ()))
        here = any(row.shipped is None for row in rows)
        note = None if here or not _has_a_choice(one, device) else NOT_YET
        found.append(replace(_explain(one, device), measured=rows, note=note))
    return found


def _has_a_choice(op: Op, device: torch.device) -> bool:
    """Whether more than one implementation can run its usual arguments on a device."""
    if op.example is None:
        return False
    args, able = op.example(device), 0
    with torch.no_grad():
        for implementation in op.implementations.values():
            able += implementation.ask(args, prepare=True) is None
    return able > 1


def _explain(op: Op, device: torch.device) -> Explanation:
    if op.example is None:
        reason = "unknown: import dit4dit.engine first, which makes an example of the op's arguments"
        return Explanation(op.name, None, dict.fromkeys(op.implementations, reason))
    args = op.example(device)
    wish = op.wish()
    if wish is not None:
        with torch.no_grad():  # as in a plan
            refusal = op._find(wish).ask(args, prepare=True)
        if refusal:
            return Explanation(op.name, None, {wish: refusal})
        return Explanation(op.name, wish, {}, *_origin(op, wish, device))
    with torch.no_grad():
        chosen, refused = op.choose(args, prepare=True)
    if chosen is None:
        return Explanation(op.name, None, refused)
    return Explanation(op.name, chosen.name, refused, *_origin(op, chosen.name, device))


def _origin(op: Op, chosen: str, device: torch.device) -> tuple[str | None, str | None]:
    """`tiles` and `kernels` of an explanation."""
    if chosen != "triton":
        return None, None
    architecture = launch.architecture(device)
    kernels = "interpreted" if device.type == "cpu" else loader.explain(architecture)
    return tiles.source(op.name, architecture), kernels
