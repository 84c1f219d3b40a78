"""What the compiler makes of every Triton kernel, for every architecture, without a GPU: registers, spills, shared memory.

python -m dit4dit.benchmarks.kernels --json kernels.json

The launches are those that the ops would make at the released models' sizes, with their tiles, on tensors without data.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from dit4dit.benchmarks.recording import Recording
from torch import Tensor

from dit4dit.aot_build.compiler import compiled, resources
from dit4dit.model import video_dit
from dit4dit.ops import launch, stand_in
from dit4dit.ops.aot.launch_record import Launch
from dit4dit.ops.aot.specialization import Specialization
from dit4dit.ops.dispatch import find
from dit4dit.ops.linear_fp8 import FP8, LEAST_CAPABILITY

# compute capability -> bytes of shared memory that one thread block can have
SHARED_MEMORY = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}

BF16, F32 = torch.bfloat16, torch.float32
WIDTH, HEADS, DIM = 2048, 16, 128  # the backbone
HEAD_WIDTH, HEAD_HEADS, HEAD_DIM, HEAD_HIDDEN = 768, 12, 64, 2560  # the action head
FRAMES = {588: 3, 784: 2}  # backbone tokens -> latent frames
ACTION_TOKENS = (9, 17, 51)
CONVOLUTIONS = (  # channels, channels out, side of a view
    (8, 96, 224),  # three colours and zeros
    (96, 96, 224),
    (96, 192, 112),
    (192, 192, 112),
    (192, 384, 56),
    (384, 384, 56),
    (384, 384, 28),
    (384, 32, 28),
)
DOWN = ((96, 224), (192, 112), (384, 56))  # channels, side


def _empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _fp8(x: Tensor, columns: int, activation: str = "none") -> tuple[Any, ...]:
    """linear_fp8's arguments for x [..., K] and a matrix [columns, K]."""
    return x, 0.03125, _empty(columns, x.shape[-1], dtype=FP8), _empty(columns, dtype=F32), None, activation, BF16


def calls(batch: int = 1) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """(case, op, arguments) of every op call in one step of the released models, bfloat16 with a float32 residual; the
    backbone's matrices also in fp8."""
    norm, f32 = _empty(DIM, dtype=F32), partial(_empty, dtype=F32)
    for tokens, frames in FRAMES.items():
        shape = (batch, frames, tokens // frames)
        x, table, h = f32(*shape, WIDTH), f32(frames, WIDTH), _empty(*shape, WIDTH)
        yield f"{tokens}", "adaln", (x, None, None, table, table, 1e-6, BF16)
        # the first of a step: the residual stream starts as what the mask channels add, a row for each frame
        first = f32(frames, 1, WIDTH).expand(*shape, WIDTH)
        yield f"{tokens} noise", "adaln", (first[:, 1:], h[:, 1:].contiguous(), None, table[1:], table[1:], 1e-6, BF16)
        latents, embedding = f32(batch, 16, frames, 28, 2 * tokens // frames // 14), _empty(WIDTH, 64)
        noise = video_dit.patches(latents[:, :, 1:], 2)
        yield f"{tokens} noise", "patch_tokens", (noise, embedding, first[:, 1:], table[1:], table[1:], 1e-6)
        frame = _empty(batch, 1, *noise.shape[2:])
        yield f"{tokens} condition", "patch_tokens", (frame, embedding, first[:, :1], table[:1], table[:1], 1e-6)
        yield f"{tokens} gated", "adaln", (x, h, table, table, table, 1e-6, BF16)
        attention = (_empty(batch, tokens, 3 * WIDTH), norm, norm, f32(2, tokens, DIM // 2), HEADS, 1e-5)
        yield f"{tokens}", "qk_norm_rope", attention
        yield f"{tokens}", "self_attention", attention
        text = _empty(1, HEADS, 512, DIM)
        yield f"{tokens} to text", "cross_attention", (_empty(batch, tokens, WIDTH), text, text, norm, HEADS, 1e-5)
        yield f"{tokens}", "linear_gelu", (h, _empty(4 * WIDTH, WIDTH), None, "none")
        flat = _empty(batch, tokens, WIDTH)
        for what, x, columns in (("qkv", flat, 3 * WIDTH), ("attention", flat, WIDTH)):
            yield f"{tokens} {what}", "linear", (x, _empty(columns, WIDTH), None)
        yield f"{tokens} feed-forward out", "linear", (_empty(*shape, 4 * WIDTH), _empty(WIDTH, 4 * WIDTH), None)
        wide = _empty(*shape, 4 * WIDTH)
        yield f"{tokens} qkv", "linear_fp8", _fp8(h, 3 * WIDTH)
        yield f"{tokens} attention", "linear_fp8", _fp8(h, WIDTH)
        yield f"{tokens} feed-forward in", "linear_fp8", _fp8(h, 4 * WIDTH, "gelu")
        yield f"{tokens} feed-forward out", "linear_fp8", _fp8(wide, WIDTH)
    for tokens in ACTION_TOKENS:
        width = HEAD_WIDTH
        x, table, h = f32(batch, 1, tokens, width), f32(1, width), _empty(batch, 1, tokens, width)
        yield f"{tokens}", "adaln", (x, h, None, table, table, 1e-5, BF16)
        yield f"{tokens} plain", "adaln", (x, None, None, None, None, 1e-5, BF16)
        yield f"{tokens}", "self_attention", (_empty(batch, tokens, 3 * width), None, None, None, HEAD_HEADS, 0.0)
        features = _empty(batch, HEAD_HEADS, 588, HEAD_DIM)
        cross = (_empty(batch, tokens, width), features, features, None, HEAD_HEADS, 0.0)
        yield f"{tokens} to features", "cross_attention", cross
        yield f"{tokens}", "linear_gelu", (h, _empty(4 * width, width), _empty(4 * width), "tanh")
        for what, columns in (("qkv", 3 * width), ("attention", width)):
            flat, weight = _empty(batch, tokens, width), _empty(columns, width)
            yield f"{tokens} {what}", "linear", (flat, weight, _empty(columns))
            norm_linear = (x, h, table, table, 1e-5, weight, _empty(columns), None)
            yield f"{tokens} {what}", "norm_linear", norm_linear
        weight, bias = _empty(4 * width, width), _empty(4 * width)
        yield f"{tokens} feed-forward in", "norm_linear", (x, h, None, None, 1e-5, weight, bias, "gelu_tanh")
        decode = (_empty(HEAD_HIDDEN, width), _empty(HEAD_HIDDEN), "relu")
        yield f"{tokens} decoder", "norm_linear", (x, h, table, table, 1e-6, *decode)
        x = _empty(batch, 1, tokens, 4 * width)
        yield f"{tokens} feed-forward out", "linear", (x, _empty(width, 4 * width), _empty(width))
    for channels, side in ((96, 224), (192, 112), (384, 28)):
        x = _empty(batch, channels, side, side).contiguous(memory_format=torch.channels_last)
        bias, gamma = _empty(channels), _empty(channels, 1, 1)
        yield f"gr1 {channels} bias", "rms_norm_silu", (x, bias, None, gamma, True, False)
        yield f"gr1 {channels} sum", "rms_norm_silu", (x, bias, x, gamma, True, True)
    yield "gr1 384 attention", "rms_norm_silu", (x, bias, x, gamma, False, True)
    yield "gr1 384 last", "rms_norm_silu", (x, bias, x, gamma, True, False)
    for channels, side in ((96, 224), (192, 112), (384, 56)):
        x = _empty(batch, channels, side, side).contiguous(memory_format=torch.channels_last)
        yield f"gr1 {channels} {side}", "add_pad", (x, _empty(channels), x)
    yield from _vae(batch)
    a, left = f32(batch, 16, 32), f32(batch, 16, 32)
    yield "plain", "euler_step", (a, a, 0.25, None, None, None, None)
    yield "guided", "euler_step", (a, a, 0.25, 0.75, left, f32(16), 5.0)
    requests = _empty(batch, 3, dtype=torch.int64)
    for robot, size in (("gr1", 64), ("libero", 16)):
        layers = (_empty(HEAD_HIDDEN, size), _empty(HEAD_HIDDEN), _empty(HEAD_WIDTH, HEAD_HIDDEN), _empty(HEAD_WIDTH))
        yield robot, "state_token", (f32(batch, size), *layers, F32)
    for robot, latent, size in (("gr1", (16, 3, 28, 28), 29), ("libero", (16, 2, 28, 56), 7)):
        channels, _, rows, columns = latent
        draws = ((0, (channels, 1, rows, columns)), (1, latent), (2, (16, 32)))
        yield robot, "philox_normal", (requests, draws)
        moments = _empty(batch, 2 * channels, rows, columns).contiguous(memory_format=torch.channels_last)
        noise = f32(batch, channels, 1, rows, columns)
        yield robot, "posterior_patches", (moments, _empty(2 * channels), noise, f32(channels), f32(channels), 2, BF16)
        yield robot, "unnormalize", (a, _empty(5, size, dtype=torch.float64))


def _vae(batch: int) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """Convolutions and attention of the image encoder; LIBERO's two views are side by side."""

    def last(*shape: int) -> Tensor:
        return _empty(*shape).contiguous(memory_format=torch.channels_last)

    for robot, views in (("gr1", 1), ("libero", 2)):
        for into, out, side in CONVOLUTIONS:
            x = last(batch, into, side, side * views)
            yield f"{robot} {into} to {out} at {side}", "conv2d", (x, last(out, into, 3, 3), None, 1, 1)
        for channels, side in DOWN:  # zeros below and to the right are part of the buffer
            x = last(batch, channels, side + 1, side * views + 1)
            yield f"{robot} {channels} down from {side}", "conv2d", (x, last(channels, channels, 3, 3), None, 2, 0)
        qkv = _empty(batch, 28 * 28 * views, 3 * 384)
        yield f"{robot} one head of 384", "self_attention", (qkv, None, None, None, 1, 1e-5)


def launches(capability: int, batch: int = 1) -> Iterator[tuple[str, Launch]]:
    """(case, launch) of every call that a capability such as 90 can run, with its tiles."""
    for case, op, args in calls(batch):
        if op == "linear_fp8" and capability < LEAST_CAPABILITY:
            continue
        for implementation in find(op).implementations.values():
            launches = launch.launches_of(implementation.run)
            if launches is None:
                continue
            with stand_in.without_data(), torch.no_grad():
                unsupported = implementation.refuse(*args)
            for step in () if unsupported else launches(args, str(capability))[0]:
                yield f"{op} {case}{_named(implementation.name)}", step


def _named(implementation: str) -> str:
    """Behind a case: the implementation, where it is another than "triton"."""
    return "" if implementation == "triton" else f", {implementation}"


def products(ptx: str) -> str | None:
    """Which tensor core instructions a kernel has: "tcgen05" (10.0), "wgmma" (9.0), "mma" (all, slower there) or None."""
    for name, instruction in (("tcgen05", "tcgen05.mma"), ("wgmma", "wgmma.mma_async"), ("mma", "mma.sync")):
        if instruction in ptx:
            return name
    return None


def multiplies_fp8(ptx: str) -> bool:
    """Whether a kernel's tensor core instructions take e4m3 operands as they are."""
    return re.search(r"mma\S*(e4m3\.e4m3|kind::f8f6f4)", ptx) is not None


# of PTX: what reads or writes memory that others see, and what leaves the straight line from a kernel's beginning
_ACCESS = re.compile(
    r"(ld|ldu|st|red|atom|cp|prefetch|prefetchu|discard|applypriority|multimem|tensormap|bra|brx|call|ret|exit)\b"
)
_OWN = re.compile(r"\.(param|const|shared|local)\b")


def waits(ptx: str) -> str:
    """Whether each kernel in it begins with `wait_for_inputs`: "first", before anything is read or written, or "late", or "no".

    Before it a block may take tensor memory, which others then cannot have, if it lets the next kernel begin only after that.
    """
    found = {_waits(body) for body in ptx.split(".entry ")[1:]}
    return found.pop() if len(found) == 1 else "late"


def _waits(body: str) -> str:
    if "griddepcontrol" not in body:
        return "no"
    before, _, after = body.partition("griddepcontrol.wait;")
    lines = [re.sub(r"^@!?%\w+\s+", "", line.strip()) for line in before.splitlines()]
    accesses = any(_ACCESS.match(line) and (".global" in line or not _OWN.search(line)) for line in lines)
    jumps = any(re.match(r"\$?\w+:$", line) for line in lines)
    whole = "griddepcontrol.launch_dependents;" in before and bool(after) and "tcgen05.alloc" not in after
    ready = "tcgen05.alloc" not in before.partition("griddepcontrol.launch_dependents;")[2]
    return "first" if whole and ready and not accesses and not jumps else "late"


def report(capability: int, batch: int = 1) -> Iterator[dict[str, Any]]:
    """One row a launch: case, kernel, tile, registers, stack, local, shared bytes, tensor core instructions, in fp8 or not, and
    `waits`."""
    for case, step in launches(capability, batch):
        kernel = compiled(Specialization.of(step), capability)
        row = {"case": case, "kernel": step.kernel, "capability": capability, "tile": dict(step.tile)}
        ptx = kernel.asm["ptx"]
        row |= {
            "shared": kernel.metadata.shared,
            "products": products(ptx),
            "fp8": multiplies_fp8(ptx),
            "waits": waits(ptx),
        }
        yield {**row, **resources(kernel.asm["cubin"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, action="append", choices=list(SHARED_MEMORY), help="default: all")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seconds", type=float, help="end after about this long")
    parser.add_argument("--json", type=Path, help="write the rows here, as they come")
    args = parser.parse_args()
    with Recording(args.json, args.seconds) as record:
        record.result["rows"] = []
        for capability in record.each(args.capability or SHARED_MEMORY, "capabilities"):
            for row in report(capability, args.batch):
                record.result["rows"].append(row)
                numbers = " ".join(f"{row[name]:7}" for name in ("registers", "stack", "local", "shared"))
                print(
                    f"{capability:4} {row['case']:28} {row['kernel']:24} {numbers} {row['products'] or ''}", flush=True
                )
                if record.over():
                    break


if __name__ == "__main__":
    main()
