"""Every launch of a function that runs on tensors without data, in order: our kernels, library calls, copies, memsets.

Our kernels record themselves (`ops.stand_in.StandIn`). Of everything else the calls that PyTorch's dispatcher sees are recorded:
each is a kernel, but for views and allocations; attention is one call, whichever library runs it.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from dit4dit import ops
from dit4dit.ops import dispatch, programmatic, stages, stand_in
from dit4dit.ops.aot.launch_record import Launch
from dit4dit.ops.verdicts import call_text

KINDS = ("triton", "cuda", "product", "convolution", "attention", "elementwise", "copy", "memset", "host_copy", "graph")
"""Our two kinds of kernel, what libraries run, copies on the device, memsets, copies from and to the host, graph launches."""


@dataclass(frozen=True)
class Step:
    """One launch.

    Attributes:
        kind: one of `KINDS`.
        name: of the kernel or of the library call.
        stage, beside: where it runs (`ops.stages`).
        flops: multiplications and additions of its products; 0 for other work.
        bytes: of its distinct tensors, each read or written once.
        facts: what a prediction takes besides: grid, tile, constants, shapes, dtype, layout; the one-launch head's schedule.
    """

    kind: str
    name: str
    stage: str
    beside: str | None
    flops: float
    bytes: int
    facts: dict[str, Any] = field(default_factory=dict)


class Trace:
    """What ran inside of `recording`."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def add(self, kind: str, name: str, flops: float, moved: int, **facts: Any) -> None:
        """One more launch, in the stage that is running."""
        stage = stages.current()
        name_of, beside = ("", None) if stage is None else (stage.name, stage.beside)
        self.steps.append(Step(kind, name, name_of, beside, flops, moved, facts))

    def kernels(self, steps: Sequence[Launch], call: ops.Call | None, early: bool) -> None:
        """Our own kernels of one op's call, whose FLOPs belong to those of them that multiply.

        early: whether a step with programmatic launches launches them so.
        """
        many = [step for step in steps if multiplies(step)]
        flops = call_flops(*call) if many and call is not None else 0.0
        for step in steps:
            tensors = [x for x in step.arguments.values() if isinstance(x, Tensor)]
            moved = distinct_bytes(tensors)
            for (kernel, name), share in PARTLY.items():
                part = step.arguments.get(name) if kernel == step.kernel else None
                moved -= int((1 - share) * distinct_bytes([part])) if isinstance(part, Tensor) else 0
            facts: dict[str, Any] = {"grid": list(step.grid), "tile": dict(step.tile)}
            facts["constants"] = {name: value for name, value in step.constants.items() if name != "schedule"}
            if "schedule" in step.constants:
                facts["schedule"] = step.constants["schedule"]
            facts |= {"dtype": _operands(tensors), "lengths": _lengths(step), "early": early}
            kind = "cuda" if step.kernel.endswith(".cu") else "triton"
            self.add(kind, step.kernel, flops / len(many) if step in many else 0.0, moved, **facts)


PARTLY = {("qk_norm_rope", "qkv"): 2 / 3}
"""(kernel, argument) -> which share of it is read: values are neither normed nor rotated."""


def _lengths(step: Launch) -> dict[str, int]:
    """Whole numbers among the arguments, such as rows and columns."""
    return {name: value for name, value in step.arguments.items() if isinstance(value, int)}


def multiplies(step: Launch) -> bool:
    """Whether a kernel of ours multiplies matrices: attention has KEYS in its tile, a product DEPTH; the one-launch head does."""
    return step.kernel == "action_ode.cu" or "KEYS" in step.tile or "DEPTH" in step.tile


def _dtype(tensors: Sequence[Tensor]) -> str:
    """Of the largest tensor."""
    largest = max(tensors, key=lambda x: x.numel(), default=None)
    return "" if largest is None else str(largest.dtype).removeprefix("torch.")


def _operands(tensors: Sequence[Tensor]) -> str:
    """What a kernel of ours multiplies: the narrowest of its floating dtypes, as sums and residuals are wider."""
    floating = [x for x in tensors if x.is_floating_point()]
    return _dtype([x for x in floating if x.element_size() == min(y.element_size() for y in floating)])


def distinct_bytes(tensors: Sequence[Tensor]) -> int:
    """What these tensors take, each once; an expanded dimension is not there twice."""
    seen: dict[tuple[Any, ...], int] = {}
    for x in tensors:
        numbers = math.prod(n for n, step in zip(x.shape, x.stride(), strict=True) if step != 0 or n == 0)
        seen[x.untyped_storage()._cdata, x.storage_offset(), x.shape] = numbers * x.element_size()
    return sum(seen.values())


def call_flops(op: str, args: tuple[Any, ...]) -> float:
    """FLOPs of an op's call, counted while its reference runs on tensors without data."""
    key = op, call_text(args)
    if key not in _counted:
        with outside(), ops.use_backend("torch"), FlopCounterMode(display=False) as counter:
            dispatch.find(op).implementations["torch"].run(*args)
        _counted[key] = float(counter.get_total_flops())
    return _counted[key]


_counted: dict[tuple[str, str], float] = {}
_muted = [0]


@contextlib.contextmanager
def outside() -> Iterator[None]:
    """What runs inside is not recorded."""
    _muted[0] += 1
    try:
        yield
    finally:
        _muted[0] -= 1


@contextlib.contextmanager
def recording(gpu: stand_in.StandIn, call: ops.Call | None = None) -> Iterator[Trace]:
    """Record what runs inside; tensors on the meta device stand for those of a GPU. May be nested; the innermost records.

    call: what an implementation that runs by itself is run for.
    """
    trace = Trace()
    with ops.listing() as calls:
        calls += [] if call is None else [call]

        def record(steps: Sequence[Launch]) -> None:
            if not _muted[0]:
                made = calls[-1] if calls else None  # the op that is running: kernels are launched by the innermost
                with outside():
                    trace.kernels(steps, made, programmatic.triton_kernels(gpu.architecture))

        here = replace(gpu, record=record)
        with (
            stand_in.without_data(here),
            torch.no_grad(),
            programmatic.launches(True),
            _Calls(trace),
            _Attention(trace),
        ):
            yield trace


class _Attention(TorchFunctionMode):
    """Attention of PyTorch as one call of the library that would run it."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        q = args[0] if args else kwargs.get("query")
        meta = isinstance(q, Tensor) and q.device.type == "meta"
        if _muted[0] or func is not F.scaled_dot_product_attention or not meta:
            return func(*args, **kwargs)
        _, k, v = args[:3]
        batch, heads, length, dim = q.shape
        library = _library(q)
        with outside():
            if library == "cudnn" and q.stride(1) > q.stride(2):  # its result lies as q does, head after head
                out = q.new_empty(batch, heads, length, v.shape[-1])
            else:
                out = q.new_empty(batch, length, heads, v.shape[-1]).transpose(1, 2)
        flops = 2.0 * batch * heads * length * k.shape[2] * (dim + v.shape[-1])
        facts = {"heads": batch * heads, "length": length, "keys": k.shape[2], "dim": dim, "dtype": _dtype([q])}
        self.trace.add("attention", library, flops, distinct_bytes([q, k, v, out]), **facts)
        return out


def _library(q: Tensor) -> str:
    """Which of PyTorch's attention kernels takes this on a GPU: held to cuDNN, else the first that can."""
    if torch.backends.cuda.cudnn_sdp_enabled() and not torch.backends.cuda.flash_sdp_enabled():
        return "cudnn"
    if q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= 256 and q.shape[-1] % 8 == 0:
        return "flash"
    return "memory_efficient"


class _Calls(TorchDispatchMode):
    """Calls that the dispatcher sees, but for views and allocations."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is torch.ops.aten.convolution.default and out.dim() == 4:
            # libraries leave it so where the weights are; without data torch forgets it
            out = out.contiguous(memory_format=torch.channels_last)
        if not _muted[0] and not _free(func):
            record(self.trace, func, args, kwargs, out)
        return out


@functools.cache
def _free(func: Any) -> bool:
    """Whether a call launches nothing: views, allocations, and what is asked of a tensor on the host."""
    name = func._schema.name.removeprefix("aten::")
    if name.startswith(("empty", "new_empty")) or name in ("_unsafe_view", "lift_fresh", "detach", "_reshape_alias"):
        return True
    views = [r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns]
    return bool(views) and all(views)


def tensors_of(values: Any) -> list[Tensor]:
    """All tensors in arguments or results, looking into lists."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, (list, tuple)):
        return []
    return [x for value in values for x in tensors_of(value)]


PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm")
FILLS = (
    "fill_",
    "zero_",
    "zeros",
    "zeros_like",
    "new_zeros",
    "new_full",
    "new_ones",
    "full",
    "ones",
    "full_like",
    "ones_like",
)


def record(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """One call as the launches that PyTorch makes of it on a GPU."""
    given, made = tensors_of([args, kwargs]), tensors_of(out)
    if not any(x.device.type == "meta" for x in [*given, *made]):
        return
    name = func._schema.name.removeprefix("aten::")
    with outside():
        moved = distinct_bytes([x for x in [*given, *made] if x.device.type == "meta"])
        counter = None if name in PRODUCTS else flop_registry.get(func._overloadpacket)
        flops = 0.0 if counter is None else float(counter(*args, **kwargs, out_val=out))
    facts = {"dtype": _dtype(made), "shape": list(made[0].shape) if made else []}
    if any(x.device.type == "cpu" and x.dim() > 0 for x in given) and name in ("copy_", "_to_copy"):
        trace.add("host_copy", f"{name} from the host", 0.0, moved, **facts)
    elif name in PRODUCTS:
        _product(trace, name, tensors_of(args), made[0], moved)
    elif name == "convolution":
        _convolution(trace, args, made[0], flops)
    elif name == "constant_pad_nd":
        trace.add("elementwise", "fill_", 0.0, distinct_bytes(made), **facts, form="flat")
        trace.add("elementwise", "copy_", 0.0, 2 * distinct_bytes(given), **facts, form="strided")
    elif name in FILLS:
        trace.add("elementwise", name, 0.0, distinct_bytes(made), **facts, form="flat")
    elif name in ("copy_", "_to_copy", "clone"):
        _copy(trace, name, args, made[0])
    else:
        dense = all(x.stride() == made[0].stride() and x.shape == made[0].shape for x in given if x.dim())
        dense = dense and bool(made) and _dense(made[0])
        trace.add("elementwise", name, flops, moved, **facts, form="flat" if dense else "strided")


def _copy(trace: Trace, name: str, args: Any, out: Tensor) -> None:
    """A copy on the device: one of the same bytes in the same order is the copy engine's, another is a kernel."""
    source = args[1] if name == "copy_" else args[0]
    if not isinstance(source, Tensor):
        trace.add("elementwise", "fill_", 0.0, distinct_bytes([out]), dtype=_dtype([out]), form="flat")
        return
    same = source.dtype == out.dtype and source.shape == out.shape
    form = "flat" if same and source.stride() == out.stride() and _dense(out) else "strided"
    if source.dtype != out.dtype and source.stride() == out.stride():
        form = "flat"
    kind = "copy" if form == "flat" and same else "elementwise"
    with outside():
        trace.add(kind, name, 0.0, distinct_bytes([source]) + distinct_bytes([out]), dtype=_dtype([out]), form=form)


def _dense(x: Tensor) -> bool:
    formats = (torch.contiguous_format, torch.channels_last) if x.dim() == 4 else (torch.contiguous_format,)
    return any(x.is_contiguous(memory_format=form) for form in formats)


def _product(trace: Trace, name: str, given: list[Tensor], out: Tensor, moved: int) -> None:
    """A product by the library. facts: m rows, n columns, k, count of them; in float32 also what its split sums launch."""
    left = [x for x in given if x.dim() >= 2][-2]
    count = math.prod(out.shape[:-2])
    m, n, k = out.shape[-2], out.shape[-1], left.shape[-1]
    bias = name in ("addmm", "baddbmm")
    facts = {"m": m, "n": n, "k": k, "count": count, "bias": bias, "dtype": _dtype([left])}
    result = out.numel() * out.element_size()
    before, after = _split_sums(m, n, k, bias) if _dtype([left]) == "float32" and count == 1 else ((), ())
    for extra in before:
        trace.add("memset" if extra == "memset" else "elementwise", extra, 0.0, result, dtype="float32", form="flat")
    trace.add("product", name, 2.0 * count * m * n * k, moved, **facts)
    for extra in after:
        trace.add("elementwise", extra, 0.0, 2 * result, dtype="float32", form="flat")


def _split_sums(m: int, n: int, k: int, bias: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What cuBLAS launches before and behind a float32 product of few rows, as profiles of an H100 and an H200 show it."""
    if not 16 < m <= 64 and not (1 < m <= 16 and n > 1024):
        return (), ()
    if n > 1024:
        return (), ("split sums",)
    return ("memset",) if k > 1024 else ("memset", "scale"), ("epilogue",) if k <= 1024 and bias else ()


def _convolution(trace: Trace, args: Any, out: Tensor, flops: float) -> None:
    """cuDNN's product, and PyTorch's own kernel for the bias behind it."""
    x, weight, bias, stride = args[:4]
    batch, channels, height, width = out.shape
    facts = {"pixels": batch * height * width, "out": channels, "k": weight[0].numel(), "window": weight[0, 0].numel()}
    facts |= {"stride": stride[0], "dtype": _dtype([x]), "side": [height, width], "into": weight.shape[1]}
    padded = weight.shape[1] % 8 != 0 and facts["dtype"] != "float32"
    with outside():
        if padded:  # cuDNN's kernels take multiples of 8 channels
            trace.add("elementwise", "pad channels", 0.0, 4 * distinct_bytes([x]), dtype=facts["dtype"], form="strided")
            trace.add(
                "elementwise", "pad channels", 0.0, 4 * distinct_bytes([weight]), dtype=facts["dtype"], form="flat"
            )
        if padded or (facts["window"] == 1 and facts["dtype"] != "float32"):
            trace.add("memset", "memset", 0.0, 0)
        trace.add("convolution", "convolution", flops, distinct_bytes([x, weight, out]), **facts)
        if bias is not None:
            moved = 2 * distinct_bytes([out])
            trace.add("elementwise", "add bias", 0.0, moved, dtype=_dtype([out]), form="strided", shape=list(out.shape))
