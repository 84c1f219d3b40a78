"""Verdicts: which implementation of an op was right and the fastest for a call, on the machine that asks (`dit4dit tune`).

One small JSON file a call, in a folder of the device's own below the cache, each written whole. A plan looks its calls up when
it is built. A file that was made on another device, by other versions or by other kernels says so and is ignored; so is one that
cannot be read. Where a call has none, the table of this GPU that came with the package may know it (`shipped`). Whatever a
verdict says, the implementation that it names still refuses what it cannot run.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit4dit.errors import InputError, said
from dit4dit.files.atomic import whole_file
from dit4dit.files.cache import cache_root
from dit4dit.ops import launch, native, tiles
from dit4dit.tables import machine

log = logging.getLogger("dit4dit.ops")

FORMAT = 1
SHIPPED = Path(__file__).with_name("shipped_verdicts")
"""Tables that came with the package: <device>.json, as `dit4dit tune --table` writes them."""
NOT_YET = "not yet measured here: run dit4dit tune"
PACKAGES = ("triton", "flash-attn", "flash-attn-3")
"""Packages beside torch whose version decides how fast an implementation is."""


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
        others = {name: ms for name, ms in self.ms.items() if name != self.chosen}
        return min(others, key=others.__getitem__) if others else None

    @property
    def file(self) -> str:
        """Its name in the device's folder."""
        return file_name(self.op, self.call)

    def data(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def of(cls, data: Any) -> Verdict:
        """From what `data` returned. ValueError: it is something else."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"expected a verdict of format {FORMAT}")
        kinds = {"op": str, "call": str, "place": dict, "default": str, "chosen": str, "ms": dict, "refused": dict}
        for name, kind in {**kinds, "made": str}.items():
            if not isinstance(data.get(name), kind):
                raise ValueError(f"{name}: expected {kind.__name__}, got {type(data.get(name)).__name__}")
        if not all(type(ms) in (int, float) for ms in data["ms"].values()) or data["chosen"] not in data["ms"]:
            raise ValueError("ms: expected a number for each implementation that was timed, the chosen one among them")
        if not isinstance(data.get("foreign"), (str, type(None))):
            raise ValueError("foreign: expected a hash or null")
        facts: dict[str, Any] = {name: data.get(name) for name in cls.__dataclass_fields__}
        return cls(**facts)


def call_text(args: Sequence[Any]) -> str:
    """What tells one call of an op from another: shapes, dtypes and strides of tensors, whole numbers and words, and whether
    something is absent. Not addresses, nor numbers such as an epsilon, which change no speed.
    """
    return ", ".join(map(_argument, args))


def _argument(value: Any) -> str:
    if isinstance(value, Tensor):
        dense = value.is_contiguous()
        layout = "" if dense else f" strides {'x'.join(map(str, value.stride()))}"
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


@functools.cache
def place(device: torch.device) -> dict[str, Any]:
    """What a verdict hangs on beside its call: the device, its driver, versions, and the package's kernels.

    "device" is its name, for a CPU with the number of torch's threads.
    """
    versions = {name: _version(name) for name in PACKAGES}
    facts: dict[str, Any] = {"device": device_name(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"capability": f"{properties.major}.{properties.minor}", "sms": properties.multi_processor_count}
        facts |= {"driver": _driver(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    else:
        facts |= {"capability": torch.backends.cpu.get_cpu_capability(), "interpreted": launch.interpreting()}
    facts |= {"torch": torch.__version__} | {name: version for name, version in versions.items() if version}
    return facts | {"kernels": kernels_hash()}


def device_name(device: torch.device) -> str:
    """A GPU's name; a CPU's, with the number of torch's threads, on which its times depend as much."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{machine()['cpu']}, {torch.get_num_threads()} threads"


def slug(name: str) -> str:
    """A device's name as a file name: "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def folder(device: torch.device) -> Path:
    """Where the verdicts of a device are."""
    return cache_root() / "verdicts" / slug(device_name(device))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str:
    """The version of NVIDIA's driver, or where the system does not tell it, of the CUDA that the driver is for."""
    try:
        found = re.search(r"\d+\.\d+[\d.]*", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        found = None
    return found.group() if found else f"CUDA {native.driver().version}"


@functools.cache
def kernels_hash() -> str:
    """Of all that decides what an implementation does: the kernels, the ops, the tables of tiles, the compiled module."""
    digest = hashlib.blake2b(digest_size=16)
    ops = Path(__file__).parent
    own = tiles.own_file()
    files = [*sorted(ops.rglob("*.py")), tiles.TABLE, *_kernels(), *([] if own is None else [own])]
    with contextlib.suppress(ImportError):  # a source tree without a build: the references alone run
        files.append(Path(str(native.compiled().__file__)))
    for file in files:
        digest.update(f"{file.name}\n".encode())
        try:
            digest.update(file.read_bytes())
        except OSError as error:
            digest.update(type(error).__name__.encode())
    return digest.hexdigest()


def _kernels() -> list[Path]:
    spec = importlib.util.find_spec("dit4dit.kernels")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    return sorted(path for one in folders for path in Path(one).glob("*.py"))


def file_hash(path: str) -> str:
    """Of a file that an implementation of others is in."""
    try:
        return hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()
    except OSError:
        return "unreadable"


def difference(found: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """In what a verdict's place is another one, in words, or None."""
    for name in here:
        if found.get(name) != here[name]:
            if name == "kernels":
                return "made by other kernels than those of this dit4dit"
            return f"made with {name} {found.get(name)}, this is {here[name]}"
    gone = [name for name in found if name not in here]
    return f"made with {gone[0]} {found[gone[0]]}, which is not here" if gone else None


def write(verdict: Verdict, into: Path) -> Path:
    """The verdict's file in a device's folder, whole or not at all. InputError: it cannot be written."""
    path = into / verdict.file
    with whole_file(path, InputError, "set DIT4DIT_CACHE to a folder that can be written") as partial:
        partial.write_text(json.dumps(verdict.data(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def read(path: Path) -> Verdict | str:
    """A verdict's file, or why it is none. FileNotFoundError: there is no such file."""
    try:
        return Verdict.of(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        return f"{path.name} is not a verdict ({said(error)})"


def known(device: torch.device) -> Iterator[Verdict]:
    """Every verdict of a device that counts here."""
    here, where = place(device), folder(device)
    for path in sorted(where.glob("*.json")) if where.is_dir() else []:
        try:
            found = read(path)
        except FileNotFoundError:  # replaced at this moment
            continue
        if isinstance(found, Verdict) and path.name == found.file and difference(found.place, here) is None:
            yield found


@functools.cache
def shipped(device_slug: str, capability: str | None) -> Mapping[str, str]:
    """ "op: call" -> implementation, from the table of this GPU that came with the package; {} where there is none.

    A GPU without a table takes that of one of its compute capability.
    """
    tables = {path.stem: path for path in sorted(SHIPPED.glob("*.json"))}
    path = tables.get(device_slug)
    if path is not None:
        found: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["chosen"]
        return found
    for other in tables.values():
        data = json.loads(other.read_text(encoding="utf-8"))
        if capability is not None and data["capability"] == capability:
            found = data["chosen"]
            return found
    return {}


class Verdicts:
    """The verdicts of one device, for plans: each call's file is read once. Picklable; a copy reads them again."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._known: dict[tuple[str, str], str | None] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"device": self.device, "_known": {}}

    def choice(self, op: str, args: Sequence[Any]) -> str | None:
        """The implementation that a verdict names for a call, or None. What cannot count is said once and ignored."""
        key = op, call_text(args)
        if key not in self._known:
            self._known[key] = self._look(*key)
        return self._known[key]

    def _look(self, op: str, call: str) -> str | None:
        path = folder(self.device) / file_name(op, call)
        try:
            found = read(path)
        except FileNotFoundError:
            return self._shipped(op, call)
        reason = found if isinstance(found, str) else self._unfit(found, op, call)
        if reason is None:
            assert isinstance(found, Verdict)
            return found.chosen
        self._say(reason)
        return self._shipped(op, call)

    def _unfit(self, found: Verdict, op: str, call: str) -> str | None:
        if (found.op, found.call) != (op, call):
            return "one is of another call than its name says"
        return difference(found.place, place(self.device))

    def _shipped(self, op: str, call: str) -> str | None:
        capability = None
        if self.device.type == "cuda":
            capability = "{}.{}".format(*torch.cuda.get_device_capability(self.device))
        return shipped(slug(device_name(self.device)), capability).get(f"{op}: {call}")

    def ignore(self, op: str, args: Sequence[Any], reason: str) -> None:
        """From now on there is no verdict of this call."""
        self._known[op, call_text(args)] = None
        self._say(reason)

    def _say(self, reason: str) -> None:
        if (self.device, reason) not in _said:
            _said.add((self.device, reason))
            log.warning("verdicts in %s are ignored: %s; run dit4dit tune", folder(self.device), reason)


_said: set[tuple[torch.device, str]] = set()
