"""What was measured for a device, to be shown: verdicts that count, how many do not, and the table that came with dit4dit."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from dit4dit.errors import InputError
from dit4dit.ops import verdicts
from dit4dit.ops.verdicts import Files, Unfit, Verdict


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
        """The reasons and how many files each is for, in one line."""
        return "; ".join(f"{reason} ({count})" for reason, count in self.ignored.items())


def survey(device: torch.device, ops: Mapping[str, Files]) -> Survey:
    """Read every file of a device's folder. ops: what is here (`dispatch.files`)."""
    try:
        where = verdicts.folder(device)
    except InputError:
        return Survey("")
    try:
        names = sorted(name for name in os.listdir(where) if name.endswith(".json") and not name.startswith("."))
    except FileNotFoundError:
        return Survey(str(where))
    except OSError as error:
        return Survey(str(where), (), {f"the folder cannot be read: {error.strerror}": 1})
    here = verdicts.place(device) if names else {}
    counting: list[Verdict] = []
    ignored: Counter[str] = Counter()
    for name in names:
        try:
            found = verdicts.read(where / name)
        except FileNotFoundError:  # a link to nothing, or gone at this moment
            continue
        why: Unfit | None
        if not isinstance(found, Verdict):
            why = found
        elif name != found.file:
            why = Unfit(verdicts.MISNAMED)
        else:
            why = verdicts.unfit(found, here) or verdicts.stranger(found, ops.get(found.op))
            if why is None:
                counting.append(found)
                continue
        ignored[why.reason] += 1
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
