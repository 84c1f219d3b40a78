"""Verdicts: which implementation of an op was right and the fastest for a call, on the machine that asks (`dit4dit tune`).

One small JSON file a call, in a folder of the device's own below the cache, each written whole. A plan looks its calls up when
it is built. A file that was made on another device, by other versions or by other kernels says so and is ignored; so is one that
cannot be read, or that names an implementation that is not here. Where a call has none, the table of this GPU that came with the
package may know it (`shipped`). Whatever a verdict says, the implementation that it names still refuses what it cannot run.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dit4dit.errors import InputError, said, shown
from dit4dit.files.atomic import whole_file
from dit4dit.files.cache import cache_root
from dit4dit.ops import launch, sources
from dit4dit.tables import cpu_name

log = logging.getLogger("dit4dit.ops")

FORMAT = 1
LARGEST = 1 << 20
"""Bytes of a verdict's file; a larger one is none and is not read."""
LONGEST_REASON = 500
"""Characters that are kept of why an implementation was refused."""
SHIPPED = Path(__file__).with_name("shipped_verdicts")
"""Tables that came with the package: <device>.json, as `python -m dit4dit.benchmarks.shipped` writes them."""
MISNAMED = "a file is of another call than its name says"
UNREADABLE = "unreadable"
NOT_YET = "not yet measured here: run dit4dit tune"

Files = Mapping[str, str | None]
"""Implementations of an op that are here -> the file of one that is not the package's (`dispatch.foreign`), None for ours."""
PROGRAMMATIC_LAUNCH = "programmatic_launch"
SWITCHES: Mapping[str, Files] = {PROGRAMMATIC_LAUNCH: {"off": None, "on": None}}
"""What is no op and is decided by a verdict too, made on the very machine; its choices."""


@dataclass(frozen=True)
class Verdict:
    """What was found for one call.

    Attributes:
        op, call: which (`call_text`).
        place: where (`place`).
        default: what runs without a verdict. chosen: what was right and the fastest; the default unless 2 % faster than it.
        ms: implementation -> median milliseconds, of those that are right.
        refused: implementation -> why it is none that can be chosen.
        foreign: hash of the file of an implementation that is not the package's, where such a one was chosen.
        made: when, UTC.
    """

    op: str
    call: str
    place: Mapping[str, Any]
    default: str
    chosen: str
    ms: Mapping[str, float]
    refused: Mapping[str, str] = field(default_factory=dict)
    foreign: str | None = None
    made: str = ""

    @property
    def runner_up(self) -> str | None:
        """The fastest of the others, if any."""
        return runner_up(self.ms, self.chosen)

    @property
    def file(self) -> str:
        """Its name in the device's folder."""
        return file_name(self.op, self.call)

    def data(self) -> dict[str, Any]:
        """Ready for JSON."""
        refused = {name: reason[:LONGEST_REASON] for name, reason in self.refused.items()}
        return {"format": FORMAT, **asdict(self), "refused": refused}

    @classmethod
    def of(cls, data: Any) -> Verdict:
        """From what `data` returned. ValueError: it is something else."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"expected a verdict of format {FORMAT}")
        kinds = {"op": str, "call": str, "place": dict, "default": str, "chosen": str, "ms": dict, "refused": dict}
        for name, kind in {**kinds, "made": str}.items():
            if not isinstance(data.get(name), kind):
                raise ValueError(f"{name}: expected {kind.__name__}, got {shown(data.get(name))}")
        ms = data["ms"]
        # what is printed of it must be text, and NaN is below nothing
        if not all(text.isprintable() for text in (data["op"], data["call"], data["default"], data["made"], *ms)):
            raise ValueError("expected names and a call that can be printed")
        if not all(type(one) in (int, float) and 0 <= one < 1e9 for one in ms.values()) or data["chosen"] not in ms:
            raise ValueError(
                "ms: expected milliseconds of each implementation that was timed, the chosen one among them"
            )
        if not all(isinstance(reason, str) for reason in data["refused"].values()):
            raise ValueError("refused: expected a reason for each implementation")
        if not isinstance(data.get("foreign"), (str, type(None))):
            raise ValueError(f"foreign: expected a hash or null, got {shown(data['foreign'])}")
        facts: dict[str, Any] = {name: data.get(name) for name in cls.__dataclass_fields__}
        return cls(**facts)


class Unfit(NamedTuple):
    """Why a file is no verdict that counts here. reason: the kind, said once; detail: of this file, as an example."""

    reason: str
    detail: str = ""


def runner_up(ms: Mapping[str, float], chosen: str) -> str | None:
    """The fastest of those that were timed beside the chosen one."""
    return min((name for name in ms if name != chosen), key=ms.__getitem__, default=None)


def call_text(args: Sequence[Any]) -> str:
    """What tells one call of an op from another: shapes, dtypes and strides of tensors, whole numbers and strings, and whether
    something is absent. Not addresses, nor numbers such as an epsilon, which change no speed.
    """
    return ", ".join(map(_argument, args))


def _argument(value: Any) -> str:
    if isinstance(value, Tensor):
        # where there is but one, how far it is to the next is no layout
        strides = [str(step) if size > 1 else "*" for size, step in zip(value.shape, value.stride(), strict=True)]
        layout = "" if value.is_contiguous() else f" strides {'x'.join(strides)}"
        return f"{str(value.dtype).removeprefix('torch.')}[{'x'.join(map(str, value.shape))}]{layout}"
    if isinstance(value, (list, tuple)):
        return f"({call_text(value)})"
    if isinstance(value, float):
        return "float"
    if value is None or isinstance(value, (bool, int, str)):
        return repr(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    described = getattr(value, "call_text", None)
    return str(described) if described is not None else type(value).__name__


def file_name(op: str, call: str) -> str:
    """Of a call's verdict."""
    return f"{op}-{hashlib.blake2b(call.encode(), digest_size=10).hexdigest()}.json"


def place(device: torch.device) -> dict[str, Any]:
    """What a verdict hangs on beside its call: the device, its driver, versions, and the package's kernels and tiles.

    "device" is its name, for a CPU with the number of torch's threads.
    """
    facts: dict[str, Any] = {"device": device_name(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)  # without an index: the current one
        facts |= {"capability": f"{properties.major}.{properties.minor}", "sms": properties.multi_processor_count}
        facts |= {"driver": sources.driver(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    else:
        facts |= {"capability": torch.backends.cpu.get_cpu_capability(), "interpreted": launch.interpreting()}
    return facts | {"torch": str(torch.__version__)} | sources.versions() | {"kernels": sources.kernels_hash()}


def device_name(device: torch.device) -> str:
    """A GPU's name, which says of a slice (MIG) that it is one; a CPU's, with the number of torch's threads, on which its times
    depend as much.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_cpu()}, {threads} thread{'s' if threads > 1 else ''}"


_cpu = functools.cache(cpu_name)


def slug(name: str) -> str:
    """A device's name as a file name: "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:100] or "unknown"


def folder(device: torch.device) -> Path:
    """Where the verdicts of a device are. InputError: no place for caches is known."""
    return cache_root() / "verdicts" / slug(device_name(device))


def file_hash(path: str) -> str:
    """Of the file that an implementation of others is in; UNREADABLE where there is none to read."""
    try:
        return hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()
    except OSError:
        return UNREADABLE


def write(verdict: Verdict, into: Path) -> Path:
    """The verdict's file in a device's folder, whole or not at all. InputError: it cannot be written."""
    path = into / verdict.file
    with whole_file(path, InputError, "set DIT4DIT_CACHE to a folder that can be written") as partial:
        partial.write_text(json.dumps(verdict.data(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def read(path: Path) -> Verdict | Unfit:
    """A verdict's file, or why it is none; whatever is there, this neither raises nor waits. FileNotFoundError: nothing is."""
    try:
        return Verdict.of(json.loads(_content(path).decode()))
    except FileNotFoundError:
        raise
    except OSError as error:
        return Unfit("a file cannot be read", f"{path.name}: {error.strerror}")
    except (ValueError, RecursionError) as error:
        return Unfit("a file is not a verdict", f"{path.name}: {said(error)}")


def _content(path: Path) -> bytes:
    """Of a regular file that is not too large. ValueError: it is something else, such as a pipe, which would be waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("expected a file")
        if found.st_size > LARGEST:
            raise ValueError(f"expected at most {LARGEST} bytes, got {found.st_size}")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(LARGEST)
    finally:
        os.close(descriptor)


def unfit(found: Verdict, here: Mapping[str, Any]) -> Unfit | None:
    """Why a verdict does not count where `place` is `here`, or None."""
    other = difference(found.place, here)
    return None if other is None else Unfit(other)


def stranger(found: Verdict, files: Files | None) -> Unfit | None:
    """Why what a verdict names is not what is here, or None. files: of its op; None: there is no such op."""
    if files is None:
        return Unfit(f"there is no op {shown(found.op)} here")
    if found.chosen not in files:
        what = f"{shown(found.chosen)} of {found.op}"
        return Unfit(f"there is no implementation {what} here, or the module that registers it was not imported")
    file = files[found.chosen]
    now = None if file is None else file_hash(file)
    if now == found.foreign and now != UNREADABLE:
        return None
    if file is None:
        return Unfit(f"{found.chosen!r} of {found.op} was not dit4dit's own")
    return Unfit(f"the source of {found.chosen!r} of {found.op} has changed or cannot be read", said(file))


def difference(found: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """In what a verdict's place is another one, in a few words, or None."""
    for name, value in here.items():
        if name not in found or type(found[name]) is not type(value) or found[name] != value:
            if name == "kernels":
                return "made by other kernels or tiles than those of this dit4dit"
            return f"made with {name} {shown(found.get(name))}, here it is {shown(value)}"
    gone = [name for name in found if name not in here]
    return f"made with {said(gone[0])} {shown(found[gone[0]])}, which is not here" if gone else None


def known(device: torch.device, say: Callable[[Unfit], None] = lambda _: None) -> Iterator[Verdict]:
    """Every verdict in a device's folder that was made here (`unfit`).

    say: is given why each other file is none, or the folder cannot be read. InputError: no place for caches is known.
    """
    where = folder(device)
    try:
        names = sorted(name for name in os.listdir(where) if name.endswith(".json") and not name.startswith("."))
    except FileNotFoundError:
        return
    except OSError as error:
        say(Unfit("the folder cannot be read", str(error.strerror)))
        return
    here = place(device) if names else {}
    for name in names:
        try:
            found = read(where / name)
        except FileNotFoundError:  # a link to nothing, or gone at this moment
            continue
        if not isinstance(found, Verdict):
            say(found)
        elif why := Unfit(MISNAMED, name) if name != found.file else unfit(found, here):
            say(why)
        else:
            yield found


@functools.cache
def shipped(device_slug: str, capability: str | None) -> Mapping[str, Any]:
    """The table of a GPU that came with the package; a GPU without one takes that of one of its compute capability. {}: none.

    "device", "capability", "source" (the committed result that it was made from), and "calls": "op: call" -> "chosen" and "ms"
    (implementation -> median milliseconds).
    """
    tables = {path.stem: path for path in sorted(SHIPPED.glob("*.json"))}
    named = [tables[device_slug]] if device_slug in tables else tables.values()
    for path in named if capability is not None else ():
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if device_slug in tables or data["capability"] == capability:
            return data
    return {}


def shipped_for(device: torch.device) -> Mapping[str, Any]:
    """`shipped` for a device."""
    if device.type != "cuda":
        return {}
    major, minor = torch.cuda.get_device_capability(device)
    return shipped(slug(device_name(device)), f"{major}.{minor}")


class Verdicts:
    """The verdicts of one device, for plans: each call's file is read once. Picklable; a copy reads them again."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._known: dict[tuple[Path | None, str, str], str | None] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"device": self.device, "_known": {}}

    def choice(self, op: str, args: Sequence[Any], files: Callable[[], Files] | None = None) -> str | None:
        """The implementation that a verdict names for a call, or None. What cannot count is said once and ignored.

        files: gives the op's `Files`; None leaves out whether the implementation is here, and from the same source.
        """
        table = {} if op in SWITCHES else shipped_for(self.device).get("calls", {})
        where = self._folder()
        if where is None and not table:
            return None  # nearly always: nothing was measured, and nothing more is done
        call = call_text(args)
        key = where, op, call
        if key not in self._known:
            chosen = None if where is None else self._look(where, op, call, files)
            if chosen is None and (row := table.get(f"{op}: {call}")) is not None:
                chosen = str(row["chosen"])
            self._known[key] = chosen
        return self._known[key]

    def _folder(self) -> Path | None:
        """Where this device's verdicts are; None where there is no such folder. Of a CPU it may change with torch's threads."""
        try:
            where = folder(self.device)
            os.stat(where)
        except (FileNotFoundError, InputError):
            return None
        except OSError as error:
            self._say(where, Unfit("the folder cannot be read", str(error.strerror)))
            return None
        return where

    def _look(self, where: Path, op: str, call: str, files: Callable[[], Files] | None) -> str | None:
        try:
            found = read(where / file_name(op, call))
        except FileNotFoundError:
            return None
        why: Unfit | None
        if not isinstance(found, Verdict):
            why = found
        elif (found.op, found.call) != (op, call):
            why = Unfit(MISNAMED, file_name(op, call))
        else:
            why = unfit(found, place(self.device)) or (None if files is None else stranger(found, files()))
            if why is None:
                return found.chosen
        self._say(where, why)
        return None

    def _say(self, where: Path, why: Unfit) -> None:
        """Once for a folder and a kind of reason, however many files there are."""
        if (where, why.reason) not in _said:
            _said.add((where, why.reason))
            detail = f" ({why.detail})" if why.detail else ""
            log.warning("verdicts in %s are ignored where %s%s; run dit4dit tune", where, why.reason, detail)


_said: set[tuple[Path, str]] = set()
