"""Camera images to the model's input: resize each view, join the views side by side, scale to [-1, 1], cast.

Two filters are kept by name because released checkpoints were trained with one and served with the other:
`cv2_area` gives the bits of OpenCV's INTER_AREA on uint8, `bilinear` those of torch's interpolate on float.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dit4dit.errors import InputError, did_you_mean, shown
from dit4dit.ops import launch, native, programmatic, stand_in
from dit4dit.ops.aot.launch_record import Launch
from dit4dit.ops.device_tables import DeviceTable
from dit4dit.ops.dispatch import Implementation, Op

_Size = tuple[int, int] | None
FILTERS = ("cv2_area", "bilinear")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def reference(
    views: Sequence[Tensor],
    size: tuple[int, int] | None,
    resize: str,
    dtype: torch.dtype,
    channels: int | None = None,
) -> Tensor:
    """The definition: see `preprocess` for the arguments and the result."""
    resized = []
    for view in views:
        h, w = size or view.shape[1:3]
        x = view.float()  # [B, H, W, 3]
        if (h, w) != tuple(view.shape[1:3]):
            x = cv2_area(x, h, w) if resize == "cv2_area" else bilinear(x, h, w)
        resized.append(x)
    x = torch.cat(resized, dim=2)  # [B, h, sum w, 3]
    # a tensor, not a number: torch on CUDA would multiply by 1/255 instead of dividing
    x = 2 * (x / torch.full((), 255.0, device=x.device)) - 1
    if channels is None:
        return x.permute(0, 3, 1, 2).contiguous().to(dtype)
    return F.pad(x, (0, channels - 3)).to(dtype).permute(0, 3, 1, 2)


def bilinear(x: Tensor, h: int, w: int) -> Tensor:
    """float32 [B, H, W, C] -> [B, h, w, C]; as torch's interpolate(align_corners=False), no antialias, no rounding."""
    x0, x1, wx0, wx1 = _bilinear_taps(x.shape[2], w, x.device)
    y0, y1, wy0, wy1 = _bilinear_taps(x.shape[1], h, x.device)
    x = x[:, :, x0] * wx0[:, None] + x[:, :, x1] * wx1[:, None]
    return x[:, y0] * wy0[:, None, None] + x[:, y1] * wy1[:, None, None]


def cv2_area(x: Tensor, h: int, w: int) -> Tensor:
    """float32 [B, H, W, C] of whole numbers 0..255 -> [B, h, w, C] likewise; as OpenCV's INTER_AREA on uint8.

    OpenCV has three ways, all rounding to whole numbers: the mean of a box where both factors are whole, the mean
    weighted by the covered area where both axes shrink otherwise, and a bilinear stand-in in 11-bit fixed point where
    either axis grows.
    """
    scale_y, scale_x = _cv2_scale(x.shape[1], h), _cv2_scale(x.shape[2], w)
    if min(scale_y, scale_x) < 1:
        return _cv2_enlarge(x, h, w)
    if scale_y.is_integer() and scale_x.is_integer():
        boxes = x.unflatten(2, (w, int(scale_x))).unflatten(1, (h, int(scale_y)))  # [B, h, sy, w, sx, C]
        total = boxes.int().sum(dim=(2, 4))
        if (scale_y, scale_x) == (2, 2):
            return ((total + 2) >> 2).float()  # halves go up, unlike below
        return torch.round(total.float() * _float32(1 / (scale_x * scale_y)))
    return torch.round(_weighted(_weighted(x, w, dim=2), h, dim=1))


def _weighted(x: Tensor, n: int, dim: int) -> Tensor:
    """Mean over the covered area along `dim`, summed tap by tap in OpenCV's order, in float32."""
    index, weights = _area_taps(x.shape[dim], n, x.device)
    shape = [n if d == dim else 1 for d in range(x.ndim)]
    total = x.new_zeros(())
    for k in range(weights.shape[1]):
        # past its last tap an output has weight zero, which adds nothing
        taps = x.index_select(dim, (index + k).clamp_max(x.shape[dim] - 1))
        total = total + taps * weights[:, k].view(shape)
    return total


def _cv2_enlarge(x: Tensor, h: int, w: int) -> Tensor:
    x0, x1, wx0, wx1 = _enlarge_taps(x.shape[2], w, x.device)
    y0, y1, wy0, wy1 = _enlarge_taps(x.shape[1], h, x.device)
    x = x.int()
    x = (x[:, :, x0] * wx0[:, None] + x[:, :, x1] * wx1[:, None]) >> 4  # 11 fractional bits -> 7
    top, bottom = x[:, y0] * wy0[:, None, None], x[:, y1] * wy1[:, None, None]
    return (((top >> 16) + (bottom >> 16) + 2) >> 2).float()


def _float32(x: float) -> float:
    return float(np.float32(x))


def _cv2_scale(n_in: int, n_out: int) -> float:
    # the reciprocal of a reciprocal, as OpenCV has it: one rounding more than n_in / n_out
    return 1.0 / (n_out / n_in)


# Taps are kept where they are used: a CUDA graph cannot be captured while something is brought from the host.
@DeviceTable
def _area_taps(n_in: int, n_out: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """First source index [n_out] and weights float32 [n_out, taps] of outputs that each cover n_in / n_out inputs."""
    scale = _cv2_scale(n_in, n_out)
    first: list[int] = []
    weights: list[list[float]] = []
    for i in range(n_out):
        begin, end = i * scale, i * scale + scale
        width = min(scale, n_in - begin)
        last = min(math.floor(end), n_in - 1)
        start = min(math.ceil(begin), last)
        row = [1.0 / width] * (last - start)
        if start - begin > 1e-3:
            row.insert(0, (start - begin) / width)
            start -= 1
        if end - last > 1e-3:
            row.append(min(min(end - last, 1.0), width) / width)
        first.append(start)
        weights.append(row)
    taps = max(len(row) for row in weights)
    table = torch.tensor(
        [row + [0.0] * (taps - len(row)) for row in weights], dtype=torch.float64, device="cpu"
    ).float()
    return torch.tensor(first, device=device), table.to(device)


@DeviceTable
def _bilinear_taps(n_in: int, n_out: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Left and right source index and their weights, each [n_out]."""
    scale = torch.tensor(n_in, dtype=torch.float32) / n_out
    centre = torch.arange(n_out, dtype=torch.float64) + 0.5
    # torch computes scale * centre - 0.5 as one fused operation in float32; in float64 the product is exact
    x = (scale.double() * centre - 0.5).float().clamp_min(0)
    left = x.floor().clamp_max(n_in - 1)
    weight = x - left
    i = left.long()
    return i.to(device), (i + 1).clamp_max(n_in - 1).to(device), (1 - weight).to(device), weight.to(device)


@DeviceTable
def _enlarge_taps(n_in: int, n_out: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Left and right source index and their weights in 1/2048, each [n_out]."""
    inverse = n_out / n_in
    scale = 1.0 / inverse
    i = torch.arange(n_out, dtype=torch.float64)
    left = (i * scale).floor()
    weight = ((i + 1) - (left + 1) * inverse).float()
    weight = torch.where(weight <= 0, 0, weight - weight.floor())
    weight = torch.where(left >= n_in - 1, 0, weight)
    j = left.long().clamp_max(n_in - 1)
    return (
        j.to(device),
        (j + 1).clamp_max(n_in - 1).to(device),
        torch.round((1 - weight) * 2048).int().to(device),
        torch.round(weight * 2048).int().to(device),
    )


def preprocess(
    views: Sequence[Tensor],
    size: tuple[int, int] | None,
    resize: str,
    dtype: torch.dtype,
    *,
    channels: int | None = None,
    backend: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Resize camera images, join them side by side, and scale them to [-1, 1].

    views: uint8 [B, H_i, W_i, 3], RGB, 0..255, any strides, all on one device; joined from left to right.
    size: (h, w) of each view in the result; None keeps every view as it is, and all must share their height. A view
        that already has the size is copied.
    resize: "cv2_area" (the bits of OpenCV's INTER_AREA on uint8: the result is whole numbers before it is scaled) or
        "bilinear" (torch's interpolate on float: no antialias, align_corners=False, no rounding).
    dtype: float32, bfloat16 or float16; computed in float32, cast to nearest even.
    channels: None for three planes. A number from 3 lays the result out with its channels last in memory, as convolutions on a
        GPU take it, those beyond the third being zeros: cuDNN takes multiples of 8, and would add them itself.
    backend: "cuda", "cpp" or "torch"; None chooses.
    out: written and returned if given, [B, channels or 3, h, sum of widths] of that dtype and device, any strides.

    Returns [B, channels or 3, h, sum of widths], 2 * (x / 255) - 1. The implementations give the same bits.
    InputError: arguments that do not fit; BackendError: a backend that cannot run them.
    """
    views = list(views)
    _check(views, size, resize, dtype, channels, out)
    result: Tensor = _op(views, size, resize, dtype, channels, out, backend=backend)
    return result


def _check(
    views: list[Tensor],
    size: tuple[int, int] | None,
    resize: str,
    dtype: torch.dtype,
    channels: int | None,
    out: Tensor | None,
) -> None:
    if resize not in FILTERS:
        raise InputError(f"preprocess: resize: expected {' or '.join(FILTERS)}, got {shown(resize)}{_near(resize)}")
    if dtype not in DTYPES:
        raise InputError(f"preprocess: dtype: expected one of {', '.join(map(str, DTYPES))}, got {dtype}")
    if channels is not None and (not isinstance(channels, int) or channels < 3):
        raise InputError(f"preprocess: channels: expected None or a whole number from 3, got {shown(channels)}")
    if not views:
        raise InputError("preprocess: views: expected at least one view, got none")
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise InputError(f"preprocess: size: expected (height, width), both at least 1, got {size}")
    for i, view in enumerate(views):
        if view.dtype != torch.uint8:
            raise InputError(f"preprocess: views[{i}]: expected uint8 in 0..255, got {view.dtype}")
        if view.ndim != 4 or view.shape[3] != 3 or 0 in view.shape:
            raise InputError(f"preprocess: views[{i}]: expected [batch, height, width, 3], got {list(view.shape)}")
        if view.shape[0] != views[0].shape[0]:
            raise InputError(
                f"preprocess: views[{i}]: expected a batch of {views[0].shape[0]} as in views[0], got {view.shape[0]}"
            )
        if size is None and view.shape[1] != views[0].shape[1]:
            raise InputError(
                f"preprocess: views[{i}]: without a size every view must share its height: expected "
                f"{views[0].shape[1]} as in views[0], got {view.shape[1]}; give a size, or crop first"
            )
        if view.device != views[0].device:
            raise InputError(f"preprocess: views[{i}]: expected device {views[0].device}, got {view.device}")
    if out is not None:
        shape = (views[0].shape[0], channels or 3, size[0] if size else views[0].shape[1], sum(_widths(views, size)))
        for fact, want, got in [
            ("shape", list(shape), list(out.shape)),
            ("dtype", dtype, out.dtype),
            ("device", views[0].device, out.device),
        ]:
            if want != got:
                raise InputError(f"preprocess: out: expected {fact} {want}, got {got}")


def _near(resize: object) -> str:
    return did_you_mean(resize, FILTERS) if isinstance(resize, str) else ""


def _widths(views: list[Tensor], size: tuple[int, int] | None) -> list[int]:
    return [size[1] if size else view.shape[2] for view in views]


def _result(views: list[Tensor], size: _Size, dtype: torch.dtype, channels: int | None, out: Tensor | None) -> Tensor:
    if out is not None:
        return out
    shape = views[0].shape[0], channels or 3, size[0] if size else views[0].shape[1], sum(_widths(views, size))
    layout = torch.contiguous_format if channels is None else torch.channels_last
    return torch.empty(shape, dtype=dtype, device=views[0].device, memory_format=layout)


# Args of every implementation, as `preprocess` has checked them
def _run_torch(
    views: list[Tensor], size: _Size, resize: str, dtype: torch.dtype, channels: int | None, out: Tensor | None
) -> Tensor:
    x = reference(views, size, resize, dtype, channels)
    return x if out is None else out.copy_(x)


def _run_cpp(
    views: list[Tensor], size: _Size, resize: str, dtype: torch.dtype, channels: int | None, out: Tensor | None
) -> Tensor:
    out = _result(views, size, dtype, channels, out)
    native.compiled().preprocess([native.view(v) for v in views], _widths(views, size), native.view(out), resize)
    return out


def _run_cuda(
    views: list[Tensor], size: _Size, resize: str, dtype: torch.dtype, channels: int | None, out: Tensor | None
) -> Tensor:
    out = _result(views, size, dtype, channels, out)
    if stand_in.recorded(out.device, [_launch(views, out)]):
        return out
    stream, early = native.stream(out.device), programmatic.cuda_kernels(out.device)
    native.compiled().preprocess_cuda(
        [native.view(v) for v in views], _widths(views, size), native.view(out), resize, stream, early
    )
    return out


def _launch(views: list[Tensor], out: Tensor) -> Launch:
    """The CUDA kernel's launch, as kernels/preprocess.cu makes it: a thread for each pixel of the result."""
    batch, _, height, width = out.shape
    grid = (launch.blocks(width, 32), launch.blocks(height, 8), batch)
    arguments = {f"view{i}": view for i, view in enumerate(views)} | {"out": out}
    return Launch("preprocess.cu", grid, arguments, {}, {"num_warps": 8})


def _refuse_cpp(views: list[Tensor], *_: object) -> str | None:
    return None if views[0].device.type == "cpu" else f"views[0] is on {views[0].device.type}"


def _refuse_cuda(views: list[Tensor], *_: object) -> str | None:
    if not stand_in.on_gpu(views[0].device):
        return f"views[0] is on {views[0].device.type}"
    if len(views) > _MOST_VIEWS_CUDA:
        return f"{len(views)} views, it takes at most {_MOST_VIEWS_CUDA}"
    return native.no_cuda_kernels(views[0].device)


_MOST_VIEWS_CUDA = 8  # they travel as a kernel argument

_op = Op(
    "preprocess",
    [
        Implementation("cuda", _refuse_cuda, _run_cuda, device="cuda"),
        Implementation("cpp", _refuse_cpp, _run_cpp, device="cpu"),
        Implementation("torch", lambda *_: None, _run_torch),
    ],
    example=lambda device: (
        [torch.zeros(1, 8, 8, 3, dtype=torch.uint8, device=device)],
        (4, 4),
        "cv2_area",
        torch.float32,
        None,
        None,
    ),
)
