"""Calls everything in dit4dit._C with arguments that are sound, then with the same ones spoiled: numbers at every limit, objects
whose methods raise or lie, memory of every kind. A program of its own, as what it looks for ends the process:

python fuzz_native.py --driver FAKE_LIBRARY --cases 20000 --seed 0 --last FILE      (FILE: the number of the case that runs)
python fuzz_native.py --driver FAKE_LIBRARY --only 1234 --seed 0 --last FILE       shows this case, and runs it
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import math
import operator
import os
import random
import re
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from elf import elf
from spoil import Lies, Raises, spoiled

from dit4dit import _C
from dit4dit.errors import CudaError

ITEM = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2}
PLACE = ("address", "shape", "strides", "dtype", "device")


class Place(tuple):
    """A tensor by its address. What it points at is the caller's word, so it is only given where it is within `memory`."""


def place(x: np.ndarray, dtype: str | None = None) -> Place:
    return Place((x.ctypes.data, x.shape, tuple(s // x.itemsize for s in x.strides), dtype or x.dtype.name, "cpu"))


class World:
    """What the calls share: a driver that records, a kernel, and the memory that this case's addresses may point into."""

    def __init__(self, library: str) -> None:
        self.driver = _C.Driver(library)
        self.library = library
        self.memory: list[np.ndarray] = []
        self.segment = f"/dit4dit.fuzz.{os.getpid()}"
        self.producer = _C.StreamWriter(self.segment, **layout(2))

    def array(self, shape: tuple[int, ...], dtype: str, rng: random.Random) -> np.ndarray:
        """Of exactly its size, dense in a random order of dimensions, some of them mirrored."""
        order = rng.sample(range(len(shape)), len(shape))
        x = np.zeros([shape[d] for d in order], dtype).transpose(np.argsort(order))
        self.memory.append(x)
        return x[tuple(slice(None, None, rng.choice((1, 1, -1))) for _ in shape)]

    def may_follow(self, given: Any, depth: int = 3) -> bool:
        """Whether every address in these arguments would be refused, or lies in `memory` with all its elements."""
        if isinstance(given, Place):
            return self._refused_or_within(given)
        inside = given.values() if isinstance(given, dict) else given if isinstance(given, (list, tuple)) else ()
        return depth == 0 or len(inside) > 1000 or all(self.may_follow(x, depth - 1) for x in inside)

    def _refused_or_within(self, given: Place) -> bool:
        try:
            address, shape, strides, dtype, _ = given
            address, *lists = (
                operator.index(address),
                *([operator.index(n) for n in islice(x, 65)] for x in (shape, strides)),
            )
        except Exception:
            return True  # no numbers
        shape, strides = lists
        if not 0 < address < 2**64 or len(shape) != len(strides) or min(shape, default=0) < 0 or not math.prod(shape):
            return True
        item = ITEM.get(dtype, 1) if isinstance(dtype, str) else 1
        reach = [item * s * (n - 1) for s, n in zip(strides, shape, strict=True)]
        begin, end = address + sum(r for r in reach if r < 0), address + item + sum(r for r in reach if r > 0)
        if begin < 0 or end > 2**64:
            return True
        bounds = [
            (x.ctypes.data, x.ctypes.data + x.nbytes) for x in (y if y.base is None else y.base for y in self.memory)
        ]
        return any(low <= begin and end <= high for low, high in bounds)


# -- sound arguments of every function -----------------------------------------------------------------------------------------


def preprocess(world: World, rng: random.Random) -> dict[str, Any]:
    batch, height, width = rng.randint(1, 2), rng.randint(1, 9), [rng.randint(1, 9) for _ in range(rng.randint(1, 3))]
    views = [world.array((batch, rng.randint(1, 20), rng.randint(1, 20), 3), "uint8", rng) for _ in width]
    dtype = rng.choice(("float32", "float16", "bfloat16"))
    out = world.array((batch, 3, height, sum(width)), "uint16" if dtype == "bfloat16" else dtype, rng)
    by_address = dtype == "bfloat16" or rng.random() < 0.5
    return dict(
        views=[rng.choice((view, place(view))) for view in views],
        widths=width,
        out=place(out, dtype) if by_address else out,
        filter=rng.choice(("cv2_area", "bilinear")),
    )


def dense(address: int, shape: tuple[int, ...], dtype: str) -> tuple:
    """On a GPU that is not there; never followed."""
    return address << 32, shape, tuple(math.prod(shape[i + 1 :]) for i in range(len(shape))), dtype, "cuda:0"


def preprocess_cuda(world: World, rng: random.Random) -> dict[str, Any]:
    views = [dense(i + 1, (2, 8, 8, 3), "uint8") for i in range(rng.randint(1, 3))]
    out = dense(9, (2, 3, 4, 4 * len(views)), rng.choice(("float32", "bfloat16", "float16")))
    early = rng.random() < 0.5
    return dict(views=views, widths=[4] * len(views), out=out, filter="bilinear", stream=0, programmatic=early)


def self_attention_cuda(world: World, rng: random.Random) -> dict[str, Any]:
    q, k, v = (dense(i + 1, (2, 2, 9, 128), "bfloat16") for i in range(3))
    return dict(
        q=q,
        k=k,
        v=v,
        out=dense(4, (2, 9, 256), "bfloat16"),
        queries=rng.choice((64, 128)),
        stream=0,
        programmatic=rng.random() < 0.5,
    )


def action_ode_cuda(world: World, rng: random.Random) -> dict[str, Any]:
    """A head of one layer's width, 16; the schedule in it is never read."""
    numbers = dict(
        teams=1, ranks=1, set_words=64, private_floats=256, padded_tokens=16, part=128, slots=6, staging=8192, inbox=0,
        rows=2, width=16, head_dim=16, heads=1, horizon=2, actions=3, padded_actions=16, context_tokens=4, context_columns=32,
        steps=2, batch=1, times=0,
    )  # fmt: skip
    shapes: dict[str, tuple[tuple[int, ...], str]] = dict(
        tiles=((4, 32), "int32"), first_tile=((2,), "int32"), weights=((4096,), "uint8"), constants=((64,), "float32"),
        noise=((1, 2, 3), "float32"), context=((1, 4, 32), "bfloat16"), out=((1, 2, 3), "float32"),
        words=((3, 64), "int32"), private_memory=((256,), "float32"), progress=((2,), "int32"), status=((4,), "int32"),
    )  # fmt: skip
    if rng.random() < 0.3:
        shapes |= {"previous": ((1, 2, 3), "float32"), "guidance": ((2,), "float32")}
    return dict(
        tensors={name: dense(i + 1, *rest) for i, (name, rest) in enumerate(shapes.items())},
        numbers=numbers,
        max_guidance=1.0,
        limit_ns=1,
        stream=0,
    )


KINDS = ("*bf16:16", "*fp32", "i32", "i32:16", "i64", "fp32")
VALUES = {"*bf16:16": 4096, "*fp32": 4, "i32": -7, "i32:16": 48, "i64": 2**40, "fp32": 1e-5}


def load(world: World, rng: random.Random) -> dict[str, Any]:
    kinds = rng.sample(KINDS, rng.randint(0, len(KINDS)))
    image = elf(rng.randbytes(rng.randint(0, 64)))
    if rng.random() < 0.5:  # one byte is another: refused or taken, but never read past its end
        at = rng.randrange(4, len(image))
        image = image[:at] + rng.randbytes(1) + image[at + 1 :]
    arguments = [(f"x{i}", kind) for i, kind in enumerate(kinds)]
    return dict(image=image, entry="kernel", device=0, threads=64, shared=1 << 10, arguments=arguments, scratch=2)


def launch(world: World, rng: random.Random) -> dict[str, Any]:
    return dict(grid=(3, 2), stream=0, arguments=[VALUES[kind] for kind in KINDS], programmatic=rng.random() < 0.5)


def layout(channels: int) -> dict[str, Any]:
    """Of an action stream: a position, then displacements."""
    bounds = (-math.inf, math.inf, 2.0, math.inf, math.inf)
    return dict(
        robot="fuzzed",
        command_period_ns=2_000_000,
        interpolation="cubic",
        seam=("blend", 1, 0.0, 3.0),
        channels=[(f"c{i}", "relative" if i else "position", 0, bounds) for i in range(channels)],
        groups=[("all", "hold", "hold", "finish", 0, 500_000_000)],
    )


def publish(world: World, rng: random.Random) -> dict[str, Any]:
    values = np.zeros((rng.randint(1, 64), 4), np.float32)[:, :2]  # rows that lie apart
    return dict(values=values, observed_at_ns=5, computed_at_ns=6, starts_at_ns=5, control_hz=20.0, now_ns=7)


def a_moment(world: World, rng: random.Random) -> dict[str, Any]:
    return dict(now_ns=rng.randint(1, 10**12))


STREAMS: dict[str, Callable[[World, random.Random], dict[str, Any]]] = {
    "stream_remove": lambda world, rng: dict(name=world.segment + ".none"),
    "StreamWriter": lambda world, rng: dict(name=None, **layout(rng.randint(1, 64))),
    "StreamWriter.publish": publish,
    **dict.fromkeys([f"StreamWriter.{name}" for name in ("heartbeat", "close", "estop")], a_moment),
    "StreamWriter.reader": lambda world, rng: dict(driver=rng.random() < 0.5, dead_after_ns=1, loop_dead_after_ns=0),
    "StreamReader": lambda world, rng: dict(
        name=world.segment, driver=False, dead_after_ns=1, loop_dead_after_ns=0, group=rng.choice((None, "all"))
    ),
    "StreamReader.read": lambda world, rng: dict(now_ns=rng.randint(1, 10**12), out=np.zeros(2)),
    "StreamReader.start_at": lambda world, rng: dict(values=np.array([0.5, math.nan])),
    "StreamReader.estop": a_moment,
    **dict.fromkeys([f"Stream{end}.{name}" for end in ("Reader", "Writer") for name in ("clear_estop", "feedback")],
                    lambda world, rng: {}),
    **dict.fromkeys([f"StreamReader.{name}" for name in ("stop", "described")], lambda world, rng: {}),
}  # fmt: skip
SOUND: dict[str, Callable[[World, random.Random], dict[str, Any]]] = {
    "preprocess": preprocess,
    "preprocess_cuda": preprocess_cuda,
    "self_attention_cuda": self_attention_cuda,
    "action_ode_cuda": action_ode_cuda,
    "action_ode_facts": lambda world, rng: dict(device=0, shared_bytes=0),
    "build_info": lambda world, rng: {},
    "segment_snapshot": lambda world, rng: dict(name=world.segment),
    "segment_names": lambda world, rng: {},
    "stream_bench_clock": lambda world, rng: dict(count=rng.randint(1, 9)),
    "stream_bench_ring": lambda world, rng: dict(count=rng.randint(1, 9)),
    "stream_bench_reader": lambda world, rng: dict(count=rng.randint(1, 9), at_limits=rng.random() < 0.5),
    "stream_bench_loop": lambda world, rng: dict(
        name=world.segment, period_ns=1000, ticks=rng.randint(1, 9), priority=0
    ),
    "Driver": lambda world, rng: dict(library=world.library),
    "Driver.load": load,
    "Driver.version": lambda world, rng: {},
    "Driver.programmatic": lambda world, rng: {},
    "Kernel": lambda world, rng: {},
    "Kernel.launch": launch,
    "Kernel.entry": lambda world, rng: {},
    **STREAMS,
}
ON_GPU = ("preprocess_cuda", "self_attention_cuda", "action_ode_cuda", "action_ode_facts")
REFUSED = {"Kernel": TypeError, "Driver.load": ValueError, **dict.fromkeys(ON_GPU, CudaError)}
"""What a sound call may end in: no GPU is there, a kernel cannot be made from Python, a byte of an image was changed."""


READ = ("Driver.version", "Driver.programmatic", "Kernel.entry")


def parameters(function: Callable[..., Any]) -> list[str]:
    """Their names, from the line that pybind11 begins a docstring with: "preprocess(views: object, ...) -> None"."""
    line = ((function.__init__ if isinstance(function, type) else function).__doc__ or "").splitlines()[0]  # type: ignore[misc]
    return [name for name in re.findall(r"(\w+): ", line) if name != "self"]


def another_number(given: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """One argument less, one more, or one by a name that there is not, which pybind11 refuses by itself.

    All None, as its message has the repr of each, of any length. A name that UTF-8 cannot hold is left out: pybind11 3.1 ends the
    process.
    """
    left: dict[str, Any] = dict.fromkeys(given)
    left.pop(rng.choice([*given, ""]), None)
    return left if len(left) < len(given) and rng.random() < 0.5 else left | {rng.choice(("x", "out", "\0")): None}


def of_a_new_one(name: str, attribute: str) -> Callable[..., Any]:
    """A method of a StreamWriter or StreamReader that has been through nothing: what one call has done is not the next one's."""

    def call(*given: Any, **named: Any) -> Any:
        writer = _C.StreamWriter(None, **layout(2))
        one = writer if name == "StreamWriter" else writer.reader(True, 1, 0)
        return getattr(one, attribute)(*given, **named)

    call.__doc__ = getattr(getattr(_C, name), attribute).__doc__
    return call


def targets(world: World) -> dict[str, Callable[..., Any]]:
    """Everything in the module that can be called or read, by name. SystemExit: one is new here."""
    arguments = [(f"x{i}", kind) for i, kind in enumerate(KINDS)]
    kernel = world.driver.load(elf(), "kernel", 0, 32, 0, arguments, 2)
    found: dict[str, Callable[..., Any]] = {}
    for name, value in vars(_C).items():
        if isinstance(value, type):
            instance = {"Driver": world.driver, "Kernel": kernel}.get(name)
            found[name] = value
            for attribute, member in vars(value).items():
                if name.startswith("Stream") and not attribute.startswith("_"):
                    found[f"{name}.{attribute}"] = of_a_new_one(name, attribute)
                elif not attribute.startswith("_"):  # pybind11 adds one of its own
                    read = functools.partial(getattr, instance, attribute)
                    found[f"{name}.{attribute}"] = read() if callable(member) else read
        elif callable(value):
            found[name] = value
    if unknown := found.keys() - SOUND.keys():
        sys.exit(f"fuzz_native.py: SOUND: expected sound arguments of all that _C has, got none of {sorted(unknown)}")
    for name, value in found.items():
        wanted = [] if name == "Kernel" or name in READ else parameters(value)
        got = list(SOUND[name](world, random.Random(0)))
        if got != wanted:
            sys.exit(f"fuzz_native.py: SOUND[{name!r}]: expected the arguments {wanted}, got {got}")
    return found


# -- the cases ---------------------------------------------------------------------------------------------------------------


def one(
    world: World, all_targets: dict[str, Callable[..., Any]], seed: int, number: int, show: bool
) -> tuple[str, str]:
    """Runs a case; its function, and how it ended: "sound", "left out", or an exception's name."""
    rng = random.Random(f"{seed}/{number}")
    world.memory.clear()
    names = sorted(all_targets)
    name = names[number % len(names)] if number < 4 * len(names) else rng.choice(names)
    given, sound = SOUND[name](world, rng), number < 4 * len(names) or rng.random() < 0.1
    if not sound and (not given or rng.random() < 0.05):
        given = another_number(given, rng)
    elif not sound:
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            argument = rng.choice(list(given))
            given[argument] = spoiled(given[argument], rng)
    if show:
        shown = {key: object.__repr__(x) if isinstance(x, (Raises, Lies)) else repr(x) for key, x in given.items()}
        sys.stdout.write(f"{name} {shown}\n")
    if not world.may_follow(given):
        return name, "left out"
    by_name = rng.random() < 0.5 and all(isinstance(key, str) for key in given)
    try:
        all_targets[name](**given) if by_name else all_targets[name](*given.values())
    except SystemError:
        raise
    except Exception as error:
        if sound and not isinstance(error, REFUSED.get(name, ())):
            raise
        text = str(error)
        assert len(text) < 10_000, f"a message of {len(text)} characters"
        return name, type(error).__name__
    return name, "sound"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--driver", required=True)
    parser.add_argument("--last", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=20000)
    parser.add_argument("--only", type=int)
    args = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    world = World(args.driver)
    all_targets = targets(world)
    ends: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    last = os.open(args.last, os.O_WRONLY | os.O_CREAT)
    for number in range(args.cases) if args.only is None else [args.only]:
        os.pwrite(last, f"{number:12d}".encode(), 0)
        try:
            name, end = one(world, all_targets, args.seed, number, args.only is not None)
        except BaseException as error:
            error.args = (f"case {number} of seed {args.seed}: {error}",)
            raise
        ends[name][end] += 1
    world.producer.close(1)
    _C.stream_remove(world.segment)
    sys.stdout.write(json.dumps({"module": _C.__file__, "ends": ends, "targets": sorted(all_targets)}) + "\n")


if __name__ == "__main__":
    main()
