"""One implementation on one call, in a child of `dit4dit tune`: is it right, each time, and does it touch nothing else.

A call is known by its arguments on the meta device; the real ones are random, and the same in every process of one seed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from dit4dit.benchmarks import failures, process_state
from dit4dit.benchmarks.guarded import NAN, Guarded, OutOfBounds
from dit4dit.benchmarks.harness import exact_arguments, expect_no_worse
from dit4dit.benchmarks.op_bench import exact, fill, unexpanded
from dit4dit.benchmarks.ops.bench_action_ode import in_fp8
from torch import Tensor

from dit4dit.config import HeadConfig
from dit4dit.engine.action_ode.program import OneLaunchHead
from dit4dit.engine.fold import fold_head
from dit4dit.errors import said
from dit4dit.model.action_head import ActionHead
from dit4dit.ops.dispatch import Choices, Implementation, find
from dit4dit.ops.verdicts import Verdicts

FLOAT32_LIMIT = 1e-5
POISONS = (NAN, 0x5A, NAN, 0x00, NAN, NAN)
"""Of one call each: memory that is never written must not agree by luck, whatever was there."""
BANDS = (0xA5, 0x3C)
ALIGNED = 16
"""Bytes of which the address of a result is a multiple, as those of torch's allocators are."""
LATE = 2_000_000
"""Clock cycles, about a millisecond, that the stream is busy before a call: work on another one, which does not wait for it, is
overwritten by the poison.
"""
NESTING = ("action_ode",)
"""Ops that call others, which are to be tuned first."""


class Wrong(Exception):
    """What an implementation does that it must not. `unsound`: memory of others may have been written too."""

    def __init__(self, reason: str, unsound: bool = False) -> None:
        super().__init__(reason)
        self.unsound = unsound


@dataclass(frozen=True)
class Outcome:
    """What became of one implementation: right where there is no reason. refused: it says so itself, which is no failure."""

    reason: str | None = None
    refused: bool = False
    unsound: bool = False

    def data(self) -> dict[str, Any]:
        return {"reason": self.reason, "refused": self.refused, "unsound": self.unsound}


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with each tensor in it changed: in lists, tuples, dataclasses and a head's weights."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, OneLaunchHead):
        return OneLaunchHead(mapped(value.folded, change), value.config, value.steps, fp8=value.fp8)
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(inner, change) for inner in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: mapped(getattr(value, f.name), change) for f in fields(value)})
    return value


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in it, in order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    mapped(value, note)
    return found


def real(args: Sequence[Any], device: torch.device, seed: int) -> tuple[Any, ...]:
    """Arguments without data -> random ones of the same shapes, strides and dtypes on a device."""
    generator = torch.Generator(device).manual_seed(seed)

    def filled(tensor: Tensor) -> Tensor:
        made: Tensor = fill((tensor,), str(device), torch.bfloat16, generator)[0]
        return made

    def one(value: Any) -> Any:
        if isinstance(value, OneLaunchHead):
            return real_head(value, device, seed)
        return mapped(value, filled)

    return tuple(map(one, args))


def real_head(head: OneLaunchHead, device: torch.device, seed: int) -> OneLaunchHead:
    """A head of the same kind with random weights."""
    config: HeadConfig = head.config
    generator = torch.Generator(device).manual_seed(seed)
    with torch.device(device):
        made = ActionHead(config).eval()
    for parameter in made.parameters():
        parameter.detach().normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    dtype = head.folded.decode_out.weight.dtype
    return OneLaunchHead(fold_head(made.to(dtype), head.steps), config, head.steps, fp8=head.fp8)


@dataclass(frozen=True)
class Yardstick:
    """What a result is held to: the reference's, and the truth; of a head in e4m3 also those with its weights so rounded."""

    pairs: tuple[tuple[Any, Any], ...]

    @classmethod
    def of(cls, reference: Callable[..., Any], args: tuple[Any, ...]) -> Yardstick:
        given, pairs = [args], []
        if isinstance(args[0], OneLaunchHead) and args[0].fp8:
            head = args[0]
            dtype = head.folded.decode_out.weight.dtype
            given.append((_with(head, mapped(in_fp8(head.folded), lambda t: t.to(dtype))), *args[1:]))
        for each in given:
            # copies: a reference may return what it was given
            pairs.append((mapped(reference(*each), Tensor.clone), mapped(reference(*_exact(each)), Tensor.clone)))
        return cls(tuple(pairs))

    def expect(self, got: Any) -> None:
        """AssertionError where a result is further from each truth than the house allows."""
        for i, (plain, truth) in enumerate(self.pairs):
            try:
                return expect_no_worse(got, plain, truth, float32_limit=FLOAT32_LIMIT)
            except AssertionError:
                if i == len(self.pairs) - 1:
                    raise


def _with(head: OneLaunchHead, folded: Any) -> OneLaunchHead:
    return OneLaunchHead(folded, head.config, head.steps, fp8=head.fp8)


def _exact(args: tuple[Any, ...]) -> tuple[Any, ...]:
    wide = exact_arguments(args)
    if not isinstance(args[0], OneLaunchHead):
        return wide
    dtype = wide[2].dtype  # of the features, which is the head's
    return mapped(args[0], lambda t: t.to(dtype) if t.is_floating_point() else t), *wide[1:]


class Case:
    """One call with real arguments: what a result is held to, and copies of all memory that must stay as it is."""

    def __init__(self, op: str, args: Sequence[Any], device: torch.device, seed: int) -> None:
        """args: on the meta device."""
        self.op, self._meta, self._device, self._seed = op, tuple(args), device, seed
        self.args: tuple[Any, ...] = ()
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}  # address -> memory of arguments, and a copy
        self.first: dict[str, list[Tensor]] = {}
        """Implementation -> the bytes of its first result with these arguments."""
        self._choices: dict[str, Choices] = {}
        self.renew()

    def renew(self) -> None:
        """The arguments anew, as they were at first: after something has changed them, or kept something of them."""
        self.args, self._kept = (), {}  # let go of first: there may be no room for both
        self.args = real(self._meta, self._device, self._seed)
        self._kept = {memory.data_ptr(): (memory, memory.clone()) for memory in map(_memory, tensors(self.args))}
        self._layouts = list(map(_layout, tensors(self.args)))
        self.first, self._choices = {}, {}

    def measure(self) -> None:
        """What results are held to, for these arguments and for others in the first tensor: a result that an implementation has
        kept from an earlier call is a wrong one there.
        """
        reference = exact(find(self.op).implementations["torch"].run)
        self._aliases = self._aliased(reference(*self.args))
        self._yardstick = Yardstick.of(reference, self.args)
        with self._other_contents():
            self._other_yardstick = Yardstick.of(reference, self.args)
        failures.settle()

    def trial(self, name: str, implementation: Implementation) -> Outcome:
        """Whether it is right on this call."""
        before = process_state.settings()
        outcome = self._outcome(name, implementation)
        moved = process_state.changed(before)
        if moved is not None:  # others would run, and be timed, with what it has left behind
            outcome = Outcome(f"changed {moved}, for all of the process", unsound=True)
        if outcome.reason is None or outcome.refused:
            return outcome
        self.first.pop(name, None)
        if self._device.type == "cuda":
            failures.check_gpu(f"{outcome.reason}")
        if not outcome.unsound and self.changed() is not None:
            self.renew()
        return outcome

    def _outcome(self, name: str, implementation: Implementation) -> Outcome:
        try:
            if implementation.prepare is not None:
                implementation.prepare(*self.args)
            reason = implementation.refuse(*self.args)
            failures.settle()
            if (changed := self.changed()) is not None:
                raise Wrong(f"getting ready changed {changed}")
            if reason is not None:
                return Outcome(said(reason, 400), refused=True)
            for number, poison in enumerate(POISONS, 1):
                got = self._call(name, implementation, number, poison)
            with self._other_contents():
                other, _ = self._guarded(name, implementation, len(POISONS) + 1, NAN)
                self._agrees(other, self._other_yardstick, "with other values in its first tensor, ")
            if not same(bits_of(got), self.first[name]):
                raise Wrong("its result changed with a later call")
            return Outcome()
        except Wrong as error:
            return Outcome(str(error), unsound=error.unsound)
        except failures.GpuLost:
            raise
        except BaseException as error:  # what Triton and CUDA raise has no common base; nothing may end this process
            return Outcome(f"raised {failures.reason_of(error)}")

    def run(self, name: str, implementation: Implementation) -> Any:
        """One call. The ops that it calls itself are chosen as in a plan: by the verdicts that there are by now."""
        if self.op not in NESTING:
            return implementation.run(*self.args)
        with self._choices.setdefault(name, Choices(Verdicts(self._device))):
            return implementation.run(*self.args)

    def _call(self, name: str, implementation: Implementation, number: int, poison: int) -> Any:
        got, bits = self._guarded(name, implementation, number, poison)
        if number == 1:
            self.expect(name, got)
        elif not same(bits, self.first[name]):
            raise Wrong(f"call {number} gave other bits than the first")
        return got

    def _guarded(self, name: str, implementation: Implementation, number: int, poison: int) -> tuple[Any, list[Tensor]]:
        with Guarded(poison, BANDS[number % len(BANDS)]) as memory:
            if self._device.type == "cuda":
                torch.cuda._sleep(LATE)
            got = self.run(name, implementation)
        bits = bits_of(got)  # before the wait below: as what comes behind reads it, in the order of the stream
        self.checked()
        try:
            memory.check()
        except OutOfBounds as error:
            raise Wrong(f"call {number}: {error}", unsound=True) from None
        changed = self.changed()
        if changed is not None:
            raise Wrong(f"call {number} changed {changed}")
        return got, bits

    def expect(self, name: str, got: Any) -> None:
        """Wrong unless a first result is right; those after it will have to have its bits."""
        self.checked()
        plain = self._yardstick.pairs[0][0]
        if isinstance(got, Tensor) != isinstance(plain, Tensor):
            raise Wrong(f"its result is a {type(got).__name__}, the reference's a {type(plain).__name__}")
        self._agrees(got, self._yardstick)
        if not self._aliased(got) <= self._aliases:
            raise Wrong("its result is memory of an argument, where the reference's is not")
        for mine, its in zip(tensors(got), tensors(plain), strict=True):
            if (kind := _kind(mine)) != (wanted := _kind(its)):
                raise Wrong(f"its result is {kind}, the reference's {wanted}")
            for layout in (torch.contiguous_format, torch.channels_last):  # what comes behind may rely on it
                dense = its.ndim == 4 or layout is torch.contiguous_format
                if dense and its.is_contiguous(memory_format=layout) and not mine.is_contiguous(memory_format=layout):
                    raise Wrong(f"its result has strides {mine.stride()}, where the reference's has {its.stride()}")
        self.first[name] = bits_of(got)

    def checked(self) -> None:
        """Wait for the GPU; raise what a head's launches have to say."""
        failures.settle()
        if isinstance(self.args[0], OneLaunchHead):
            self.args[0].check()

    @staticmethod
    def _agrees(got: Any, yardstick: Yardstick, where: str = "") -> None:
        try:
            yardstick.expect(got)
        except AssertionError as error:
            raise Wrong(f"disagrees with the reference: {where}{said(error, 300)}") from None

    def changed(self) -> str | None:
        """Which argument is not as it was, bit by bit, gaps between rows included; None where all are."""
        layouts = iter(self._layouts)
        for i, arg in enumerate(self.args):
            for tensor in tensors(arg):
                address, shape, _, dtype = before = next(layouts)
                memory, kept = self._kept[address]
                if _layout(tensor) != before or not torch.equal(memory, kept):
                    return f"argument {i} ({str(dtype).removeprefix('torch.')} {list(shape)})"
        return None

    def _aliased(self, result: Any) -> set[int]:
        """Which of the result's tensors are memory of an argument."""
        found = enumerate(tensors(result))
        return {i for i, tensor in found if tensor.untyped_storage().data_ptr() in self._kept}

    @contextlib.contextmanager
    def _other_contents(self) -> Iterator[None]:
        """Inside, the first tensor has its values in another order."""
        first = next(t for arg in self.args if not isinstance(arg, OneLaunchHead) for t in tensors(arg))
        memory, kept = self._kept[first.untyped_storage().data_ptr()]
        once = unexpanded(first, first)
        once.copy_(once.flip(-1) if once.ndim else once)
        self._kept[memory.data_ptr()] = memory, memory.clone()
        try:
            yield
        finally:
            memory.copy_(kept)
            self._kept[memory.data_ptr()] = memory, kept


def _memory(tensor: Tensor) -> Tensor:
    """All bytes of the storage that a tensor is in."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _layout(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...], torch.dtype]:
    return tensor.untyped_storage().data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _kind(tensor: Tensor) -> str:
    """What decides beside values and strides what may be done with a result: kernels get its address, and rely on it."""
    kind = [type(tensor).__name__, str(tensor.device), str(tensor.layout).removeprefix("torch.")]
    kind += ["with a gradient"] * tensor.requires_grad + ["of inference mode"] * tensor.is_inference()
    kind += ["negated"] * tensor.is_neg() + ["conjugate"] * tensor.is_conj()
    if tensor.layout == torch.strided and tensor.data_ptr() % ALIGNED:
        kind.append(f"at an address that is no multiple of {ALIGNED}")
    return ", ".join(kind)


def bits_of(result: Any) -> list[Tensor]:
    """Copies of the bytes of every tensor in a result."""
    return [t.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8) for t in tensors(result)]


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether two results have the same bits."""
    return len(one) == len(other) and all(map(torch.equal, one, other))
