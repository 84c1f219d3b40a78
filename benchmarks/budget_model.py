"""How long a launch takes on a GPU: predicted from its FLOPs, bytes, tile and grid, and the constants of `budget_gpu`."""

from __future__ import annotations

import math
from collections.abc import Callable

from dit4dit.benchmarks.budget_gpu import Gpu
from dit4dit.benchmarks.budget_head import costs_of
from dit4dit.benchmarks.budget_trace import Step

from dit4dit.engine.action_ode.cost import head_us

TB = 1e6
"""Bytes a microsecond at 1 TB/s."""
FEW = 64
"""Rows of a product that its weights' bytes and latency decide."""
LARGEST_TILE = 40960
"""Sums that one block of a library's product keeps in registers: 256 x 160."""
FUNCTIONS = ("gelu", "silu", "sigmoid", "exp", "tanh", "_softmax")


def time_us(step: Step, gpu: Gpu) -> float:
    """Microseconds of one launch, without the gap before the next one."""
    return _PREDICTIONS[step.kind](step, gpu)


def gap_us(step: Step, gpu: Gpu, programmatic: bool) -> float:
    """From the end of the launch before to the beginning of this one in a graph.

    programmatic: our kernels are launched before the one before them has ended (programmatic dependent launch), where the GPU has
    that and the step does not launch them plainly; the one-launch head, whose blocks wait for each other, and the branch beside
    a stage are not.
    """
    if step.kind in ("host_copy", "graph"):
        return 0.0
    if step.kind in ("memset", "copy"):
        return float(gpu["memset_gap" if step.kind == "memset" else "gap"])
    early = programmatic and step.facts.get("early", False) and step.name != "action_ode.cu" and step.beside is None
    return float(gpu["gap_programmatic" if early else "gap"])


def moving_us(gpu: Gpu, moved: float, rate: str) -> float:
    """Of bytes at one of the GPU's rates, bounded by its memory where they do not fit into L2."""
    speed = gpu[rate] if moved <= gpu["l2_bytes"] else min(gpu[rate], gpu["memory"])
    return float(moved / (speed * TB))


def waves_us(gpu: Gpu, blocks: int, resident: int, alone: float, full: float) -> float:
    """Of blocks on all SMs, the fullest of which decides.

    resident: blocks that share an SM. alone: microseconds of a block that has one for itself. full: what each adds where several
    share it.
    """
    left = math.ceil(blocks / gpu["sms"])
    total = 0.0
    while left > 0:
        total += max(alone, min(left, resident) * full)
        left -= resident
    return total


# -- libraries ---------------------------------------------------------------------------------------------------------


def _product(step: Step, gpu: Gpu) -> float:
    f = step.facts
    if f["dtype"] in ("float32", "float64"):
        return _plain_product(step, gpu)
    least = step.bytes / (gpu["memory"] * TB)
    begin = gpu["library_few" if f["m"] * f["count"] <= FEW else "library"]
    return float(begin + max(least, _library_tiles(gpu, f["n"], f["m"], f["k"], f["count"], f["dtype"])))


def _library_tiles(gpu: Gpu, wide: int, rows: int, depth: int, count: int, dtype: str) -> float:
    """The best of a library's tiles: weights on the one side in steps of 64, tokens on the other in steps of 8."""
    rate, best = gpu.tensor_rate(dtype), math.inf
    for m in (64, 128, 192, 256):
        for n in range(8, 257, 8):
            if m * n > LARGEST_TILE or n > max(8, -(-rows // 8) * 8):
                continue
            blocks = count * math.ceil(wide / m) * math.ceil(rows / n)
            lost = 1 + gpu["library_m"] / m + gpu["library_n"] / n
            one = 2.0 * m * n * depth / rate * lost
            best = min(best, waves_us(gpu, blocks, 1, one, one))
    return best


def _plain_product(step: Step, gpu: Gpu) -> float:
    """float32, without tensor cores: few rows follow the depth of their sums, many the arithmetic."""
    f = step.facts
    m, n, k = f["m"], f["n"], f["k"]
    arithmetic = step.flops / (gpu["sms"] * gpu.tensor_rate("float32") * gpu["simt"])
    if m == 1 or f["count"] > 1:
        return float(gpu["simt_few"] + max(arithmetic, step.bytes / (gpu["memory"] * TB)))
    if m <= 16 and n <= 1024:
        return float(gpu["simt_least"])
    if m > 64:
        return float(gpu["simt_few"] + max(arithmetic, step.bytes / (gpu["memory"] * TB)))
    each = "simt_wide" if n > 1024 else "simt_long" if k > 1024 else "simt_short"
    return float(gpu["simt_few"] + k * gpu[each] * 1e-3)


def _convolution(step: Step, gpu: Gpu) -> float:
    f = step.facts
    if f["dtype"] == "float32":
        return float(gpu["convolution"] + step.flops / (gpu["sms"] * gpu.tensor_rate("float32") * gpu["simt"]))
    if f["window"] == 1:
        tiles = _library_tiles(gpu, f["out"], f["pixels"], f["k"], 1, f["dtype"])
        return float(gpu["library"] - 1 + max(tiles, moving_us(gpu, step.bytes, "rows_rate")))
    m, n = convolution_tile(f["pixels"], f["out"], f["stride"])
    blocks = math.ceil(f["pixels"] / m) * math.ceil(f["out"] / n)
    depth = f["window"] * (-(-f["into"] // 8) * 8)
    alone, full = gpu[f"convolution_{m}x{n}"]
    one = 2.0 * m * n * depth / gpu.tensor_rate(f["dtype"])
    arithmetic = waves_us(gpu, blocks, 2, one / alone, one / full)
    return float(gpu["convolution"] + max(arithmetic, moving_us(gpu, step.bytes, "rows_rate")))


def convolution_tile(pixels: int, out: int, stride: int) -> tuple[int, int]:
    """Pixels and channels of cuDNN's tiles, as profiles of an H100 and an H200 show them."""
    if pixels <= 1600:
        return 64, 64
    if stride > 1:
        return 64, 128
    return (256, 64) if out <= 128 else (128, 128)


ATTENTION_TILES = {"cudnn": (128, 128), "flash": (128, 64), "memory_efficient": (64, 64)}
"""Queries and keys of a library's blocks."""


def _attention(step: Step, gpu: Gpu) -> float:
    f = step.facts
    rows, keys = ATTENTION_TILES[step.name]
    share = "attention_cudnn" if step.name == "cudnn" else "attention_flash"
    if step.name == "memory_efficient":
        rows, keys = (32, 128) if f["dim"] > 128 else (rows, keys)
        share = "attention_32_bit" if f["dtype"] == "float32" else "attention_wide"
    padded = math.ceil(f["keys"] / keys) * keys
    one = 4.0 * rows * padded * f["dim"] / gpu.tensor_rate(f["dtype"]) / gpu[share]
    blocks = f["heads"] * math.ceil(f["length"] / rows)
    return float(gpu["attention"] + waves_us(gpu, blocks, 1, one, one))


def _elementwise(step: Step, gpu: Gpu) -> float:
    form = step.facts.get("form", "strided")
    rate = "function_rate" if form == "flat" and step.name in FUNCTIONS else f"{form}_rate"
    return float(gpu[form] + moving_us(gpu, step.bytes, rate))


# -- ours --------------------------------------------------------------------------------------------------------------


def _triton(step: Step, gpu: Gpu) -> float:
    tile = step.facts["tile"]
    if "DEPTH" in tile:
        return _triton_product(step, gpu)
    if "KEYS" in tile:
        return _triton_attention(step, gpu)
    if step.name == "philox_normal":
        return float(gpu["philox"])
    return float(_rows(step, gpu))


def _rows(step: Step, gpu: Gpu) -> float:
    """A kernel that reads and writes its tensors once; with few blocks each waits for its own bytes."""
    blocks = math.prod(step.facts["grid"])
    reading = step.bytes / (min(blocks, gpu["sms"]) * gpu["sm_read"] * 1e3)
    return float(gpu["rows"] + max(moving_us(gpu, step.bytes, "rows_rate"), reading))


def _narrow(rows: int) -> float:
    """What a tile of fewer rows than one warpgroup's instruction has costs: it runs by the instructions of older GPUs."""
    return 2.0 if rows < 64 else 1.0


def _itemsize(dtype: str) -> int:
    return 1 if "float8" in dtype else 4 if dtype == "float32" else 2


def residents(gpu: Gpu, shared: int, warps: int, sums: int) -> int:
    """Blocks that share an SM: by shared memory, warps, and registers (sums: 32-bit values of a block that stay in them)."""
    registers = 32 * warps * 64 + sums
    return max(1, min(gpu["shared_memory_sm"] // (shared + 1024), 64 // warps, 65536 // registers))


def _triton_product(step: Step, gpu: Gpu) -> float:
    f, tile = step.facts, step.facts["tile"]
    rows, columns, depth = tile.get("ROWS", 16), tile.get("COLUMNS", 16), tile["DEPTH"]
    columns += tile.get("WIDER", 0) * columns // 2  # half as many again, which are no power of two
    blocks = math.prod(f["grid"])
    if blocks == 0 or step.flops == 0:
        return float(gpu["triton"])
    moved = (rows + columns) * depth * _itemsize(f["dtype"])
    stages, warps = tile.get("num_stages", 2), tile.get("num_warps", 4)
    resident = residents(gpu, stages * moved, warps, rows * columns)
    inner = _inner(step, rows * columns * blocks)
    lost = (1 + gpu["triton_tile"] * (1 / rows + 1 / columns)) / (1 + gpu["triton_tile"] * 2 / 128)
    one = 2.0 * rows * columns * inner / gpu.tensor_rate(f["dtype"]) * lost * _narrow(rows)
    alone, full = (one / share for share in gpu["triton_product"])
    # each turn waits for what was asked for some turns before
    turns = math.ceil(inner / depth)
    waiting = turns * max(gpu["memory_latency"] / max(1, stages - 1), moved / (gpu["sm_read"] * 1e3))
    arithmetic = waves_us(gpu, blocks, resident, max(alone, waiting), full)
    rate = gpu["triton_few_rate" if rows <= FEW // 2 else "memory"]
    return float(gpu["triton"] + max(arithmetic, step.bytes / (rate * TB)))


def _inner(step: Step, results: int) -> int:
    """Length of one block's sum: of the kernel's constants, or of the part that its tile takes; else by the FLOPs of the call."""
    constants, span = step.facts["constants"], step.facts["tile"].get("SPAN", 0)
    inner = constants.get("INNER", 0)
    if "CHANNELS" in constants:  # a convolution
        inner = constants["CHANNELS"] * constants.get("KERNEL_HEIGHT", 1) * constants.get("KERNEL_WIDTH", 1)
    if not inner:
        return max(1, math.ceil(step.flops / (2.0 * results)))
    return int(min(inner, span) if span else inner)


def _triton_attention(step: Step, gpu: Gpu) -> float:
    f, tile = step.facts, step.facts["tile"]
    rows, keys, warps = tile.get("ROWS", 64), tile["KEYS"], tile.get("num_warps", 4)
    dim = f["constants"].get("DIM", 128)
    blocks = math.prod(f["grid"])
    length = f["lengths"].get("keys", f["lengths"].get("length", keys))
    span = tile.get("SPAN", 0) or length
    padded = math.ceil(min(span, length) / keys) * keys
    shared = (rows + 2 * keys * tile.get("num_stages", 2)) * dim * _itemsize(f["dtype"])
    resident = residents(gpu, shared, warps, rows * dim + rows * keys)
    few, many = gpu["triton_attention"]
    one = 4.0 * rows * padded * dim / gpu.tensor_rate(f["dtype"]) * _narrow(rows)
    alone = one / min(many, few * warps / 4)
    return float(
        gpu["triton"] + max(waves_us(gpu, blocks, resident, alone, one / many), moving_us(gpu, step.bytes, "rows_rate"))
    )


def _cuda(step: Step, gpu: Gpu) -> float:
    if step.name == "action_ode.cu":
        return head_us(step.facts["schedule"], costs_of(gpu))["total"]
    if step.name == "self_attention.cu":
        return _cuda_attention(step, gpu)
    return float(_rows(step, gpu))


def _cuda_attention(step: Step, gpu: Gpu) -> float:
    tile, dim, length = step.facts["tile"], step.facts["constants"]["DIM"], step.facts["lengths"]["length"]
    padded = math.ceil(length / tile["KEYS"]) * tile["KEYS"]
    one = 4.0 * tile["ROWS"] * padded * dim / gpu.tensor_rate(step.facts["dtype"]) / gpu["attention_cuda"]
    return float(gpu["attention"] + waves_us(gpu, math.prod(step.facts["grid"]), 1, one, one))


# -- copies ------------------------------------------------------------------------------------------------------------


def _copy(step: Step, gpu: Gpu) -> float:
    return float(gpu["copy"] + moving_us(gpu, step.bytes, "copy_rate"))


def _host_copy(step: Step, gpu: Gpu) -> float:
    floor = gpu["to_host" if step.facts.get("to_host") else "from_host"]
    return float(floor + step.bytes / (gpu["host_rate"] * TB))


_PREDICTIONS: dict[str, Callable[[Step, Gpu], float]] = {
    "triton": _triton,
    "cuda": _cuda,
    "product": _product,
    "convolution": _convolution,
    "attention": _attention,
    "elementwise": _elementwise,
    "copy": _copy,
    "memset": lambda step, gpu: float(gpu["memset"]),
    "host_copy": _host_copy,
    "graph": lambda step, gpu: float(gpu["graph"]),
}
