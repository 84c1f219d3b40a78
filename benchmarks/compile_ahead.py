"""Triton kernels compiled beforehand: on CPU processes, into Triton's own cache, where a launch on the GPU finds them.

A compile process takes Triton's just-in-time path itself, with a driver that names a GPU and never launches: what it stores is
by construction under the key that the same launch looks for later, in another process with the same environment
(TRITON_CACHE_DIR, TRITON_DISABLE_LINE_INFO and DIT4DIT_TILES among others).
"""

from __future__ import annotations

import functools
import os
import signal
import time
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from dit4dit.benchmarks.failures import reason_of

from dit4dit import ops, progress
from dit4dit.aot_build import released
from dit4dit.errors import BackendError, InputError
from dit4dit.ops import launch
from dit4dit.ops.aot import loader
from dit4dit.ops.aot.launch_record import function
from dit4dit.ops.aot.specialization import ALIGNED, POINTERS, Specialization

STARTING = 120.0
"""Seconds for a process to import torch and Triton; on a busy machine that takes longer than a kernel."""
NICE = 10


@dataclass(frozen=True)
class CompiledAhead:
    """What `compile_ahead` did.

    Attributes:
        kernels: different ones that the calls launch.
        shipped: of those, how many this installation has machine code of; nothing is compiled for them.
        compiled: how many are in Triton's cache now.
        refused: `Specialization.key` -> why it is not.
        processes: compile processes started. seconds: wall clock.
    """

    kernels: int
    shipped: int
    compiled: int
    refused: dict[str, str]
    processes: int
    seconds: float

    def data(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "seconds": round(self.seconds, 2)}


def compile_ahead(
    calls: Iterable[ops.Call], capability: str, *, jobs: int | None = None, limit: float = 60.0
) -> CompiledAhead:
    """Compile what the calls would launch by Triton on a GPU, where this installation has no machine code of it.

    calls: (op, arguments on the meta device), as `engine.listing` has them. capability: "90" for 9.0. jobs: processes, at most
    one per core that this process may use, which is the default. limit: seconds that one kernel may take.

    A kernel that does not compile, takes too long or takes its process down costs itself alone. This process does not load
    Triton's driver, and the compile processes touch no GPU.

    InputError: jobs or limit. BackendError: in a process with TRITON_INTERPRET=1, where kernels are Python functions that a
    CPU runs: the compile processes would inherit it and compile nothing.
    """
    begin = time.monotonic()
    if launch.interpreting():
        raise BackendError(
            "compile_ahead: expected kernels that can be compiled, got TRITON_INTERPRET=1, with which Triton's kernels are "
            "interpreted; unset it"
        )
    if jobs is not None and jobs < 1:
        raise InputError(f"compile_ahead jobs: expected 1 or more, got {jobs}")
    if not 0 < limit < float("inf"):
        raise InputError(f"compile_ahead limit: expected seconds above 0, got {limit}")
    found = released.specializations(released.by_triton(calls), int(capability))
    todo = {key: one for key, (one, step) in found.items() if isinstance(loader.find(step, capability), str)}
    reason = launch.no_compiler()
    if reason is not None:
        refused, processes = dict.fromkeys(todo, f"Triton cannot compile: {reason}"), 0
    else:
        cores = len(os.sched_getaffinity(0))
        refused, processes = compile_kernels(todo, int(capability), min(jobs or cores, cores), limit)
    done = len(todo) - len(refused)
    return CompiledAhead(len(found), len(found) - len(todo), done, refused, processes, time.monotonic() - begin)


def compile_kernels(
    kernels: Mapping[str, Specialization], capability: int, jobs: int, limit: float
) -> tuple[dict[str, str], int]:
    """Compile each into Triton's cache, in `jobs` processes: key -> why not, and how many processes were started."""
    todo, refused, started = deque(kernels), dict[str, str](), 0
    working: list[_Process] = []
    with progress.bar("compiling kernels", len(kernels), unit="kernel") as shown:
        try:
            while todo or working:
                while todo and len(working) < jobs:
                    working.append(_Process(capability, limit))
                    working[-1].give(todo.popleft(), kernels)
                    started += 1
                patience = min(one.deadline for one in working) - time.monotonic()
                answered = wait([one.pipe for one in working], max(patience, 0.0))
                for one in list(working):
                    ended = one.answer() if one.pipe in answered else one.overdue()
                    if ended is None:  # still at work
                        continue
                    if ended:
                        refused[one.key] = ended
                    shown.update()
                    if one.alive and todo:
                        one.give(todo.popleft(), kernels)
                        continue
                    if not one.alive and not one.ready:  # no other would start either
                        shown.update(len(todo))
                        refused |= dict.fromkeys(todo, ended)
                        todo.clear()
                    one.end()
                    working.remove(one)
        finally:
            for one in working:
                one.end()
    return refused, started


class _Process:
    """A process that compiles one kernel after another, in a session of its own so that its assembler ends with it."""

    def __init__(self, capability: int, limit: float) -> None:
        # not forked: torch's threads would be missing in the copy
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, capability), daemon=True)
        self._process.start()
        theirs.close()
        self.key, self.ready, self.alive = "", False, True
        self._limit, self.deadline = limit, time.monotonic() + STARTING

    def give(self, key: str, kernels: Mapping[str, Specialization]) -> None:
        self.key = key
        if self.ready:
            self.deadline = time.monotonic() + self._limit
        with suppress(BrokenPipeError):  # it has died since; the next answer says so
            self.pipe.send(kernels[key])

    def answer(self) -> str | None:
        """None: it has begun; "": its kernel is compiled; else why not."""
        try:
            reason: str | None = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.alive = False
            self._process.join()
            return f"the compile process ended with exit code {self._process.exitcode}"
        if reason is None:
            self.ready, self.deadline = True, time.monotonic() + self._limit
        return reason

    def overdue(self) -> str | None:
        """Why its kernel is given up, or None where it has time left."""
        if time.monotonic() < self.deadline:
            return None
        self.alive = False
        return (
            f"it took longer than {self._limit:g} s"
            if self.ready
            else f"the compile process did not start within {STARTING:g} s"
        )

    def end(self) -> None:
        """With all that it has started."""
        self.pipe.close()
        assert self._process.pid is not None  # of a process group 0, this one would be ended
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:  # before its first line, or after its last
            self._process.kill()
        self._process.join()


def _serve(pipe: Connection, capability: int) -> None:
    """Compile what comes through the pipe until it is closed."""
    os.setsid()
    os.nice(NICE)
    os.set_inheritable(pipe.fileno(), False)  # Triton leaves its assembler every file that can be inherited
    from triton.runtime import driver

    driver.set_active(_NamedGpu(capability))
    # compilers print what they are given when they fail; the reason says enough
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    with suppress(EOFError, BrokenPipeError):
        pipe.send(None)
        while True:
            special = pipe.recv()
            try:
                _compile(special)
                reason = ""
            except Exception as error:  # what Triton and its tools raise has no common base
                reason = reason_of(error)
            pipe.send(reason)


def _compile(special: Specialization) -> None:
    """As the first launch would, up to the launch."""
    arguments = {name: _argument(kind) for name, kind in special.arguments.items()}
    given = {**arguments, **special.constants, **special.options}
    kernel = function(special.kernel).run(grid=(1,), warmup=True, **given)
    if torch.cuda.is_available():
        # Triton before 3.7 builds a launcher in C for each signature as well; a launch that lacks it builds it itself
        with suppress(Exception):
            from triton.backends.nvidia.driver import CudaLauncher

            CudaLauncher(kernel.src, kernel.metadata)


def _argument(kind: str) -> Any:
    """A value of which Triton finds the kind that `Specialization` has."""
    aligned, name = kind.endswith(ALIGNED), kind.removesuffix(ALIGNED)
    if name.startswith("*"):
        dtype = next(dtype for dtype, known in POINTERS.items() if known == name[1:])
        # torch aligns what it allocates, so that one element further is not aligned
        return torch.empty(16, dtype=dtype)[0 if aligned else 1 :]
    if name == "fp32":
        return 0.5
    return (2**40 if name == "i64" else 0) + (16 if aligned else 3)


class _NamedGpu:
    """A driver for all that comes before a launch: it names a GPU that this process does not touch."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    @functools.cached_property
    def utils(self) -> Any:
        """What launchers are built with; it needs the driver's library."""
        from triton.backends.nvidia.driver import CudaUtils

        return CudaUtils()
