"""The conditioning frame's tokens: a sample of the VAE's posterior, normalised, as rows for the patch embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit4dit.errors import InputError
from dit4dit.model import vae, video_dit
from dit4dit.ops import launch, tiles
from dit4dit.ops.aot.launch_record import Launch
from dit4dit.ops.arguments import Shapes, floating
from dit4dit.ops.dispatch import Implementation, Op

_Args = tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, int, torch.dtype]


def reference(
    moments: Tensor,
    bias: Tensor | None,
    noise: Tensor | None,
    mean: Tensor,
    std: Tensor,
    patch: int,
    dtype: torch.dtype,
) -> Tensor:
    """The definition: see `posterior_patches` for the arguments and the result."""
    if bias is not None:
        wide = torch.promote_types(moments.dtype, torch.float32)
        moments = moments.to(wide) + bias.to(wide)[:, None, None]
    sample, deviation = vae.mean_and_std(moments)
    if noise is not None:
        sample = sample + deviation * noise[:, :, 0]
    latent = ((sample - mean[:, None, None]) / std[:, None, None]).to(dtype)
    return video_dit.patches(latent[:, :, None], patch).flatten(4, 6).flatten(1, 3)


def posterior_patches(
    moments: Tensor,
    bias: Tensor | None,
    noise: Tensor | None,
    mean: Tensor,
    std: Tensor,
    patch: int,
    dtype: torch.dtype,
    *,
    backend: str | None = None,
) -> Tensor:
    """(m + exp(0.5 * clamp(v, -30, 20)) * noise - mean) / std, in rows of one patch each.

    moments: [B, 2 z, h, w], the posterior's means m and after them the logarithms v of its variances; any layout.
    bias: [2 z] in moments' dtype, what the moments still lack, or None.
    noise: standard normal float32 [B, z, 1, h, w]; None takes the posterior's mean.
    mean, std: of the latents, float32 [z].
    patch: side of a patch; h and w are multiples of it.
    dtype: of the result. The arithmetic is in float32.
    backend: "triton" or "torch"; None chooses.

    Returns [B, (h / patch) * (w / patch), z * patch^2]; a row is (channel, row, column), as the patch embedding takes it.
    InputError: arguments that do not fit; BackendError: a backend that cannot run them.
    """
    sizes = Shapes("posterior_patches").of("mean", mean, "z").of("std", std, "z").of("noise", noise, "B z 1 h w")
    sizes.sizes["2z"] = 2 * sizes["z"]
    sizes.of("moments", moments, "B 2z h w").of("bias", bias, "2z")
    floating("posterior_patches", moments=moments, bias=bias, noise=noise, mean=mean, std=std)
    if bias is not None and bias.dtype != moments.dtype:
        raise InputError(f"posterior_patches: bias: expected {moments.dtype} as moments, got {bias.dtype}")
    for name, tensor in (("noise", noise), ("mean", mean), ("std", std)):
        if tensor is not None and tensor.dtype != torch.float32:
            raise InputError(f"posterior_patches: {name}: expected torch.float32, got {tensor.dtype}")
    if patch < 1 or sizes["h"] % patch or sizes["w"] % patch:
        raise InputError(f"posterior_patches: patch: expected a divisor of {sizes['h']} and {sizes['w']}, got {patch}")
    result: Tensor = _op(moments, bias, noise, mean, std, patch, dtype, backend=backend)
    return result


def launches(args: _Args, architecture: str) -> tuple[list[Launch], Tensor]:
    """The kernels to run, and the tensor they will have written. Tensors may be on the meta device."""
    moments, bias, noise, mean, std, patch, dtype = args
    batch, twice, rows, columns = moments.shape
    channels, tokens = twice // 2, (rows // patch) * (columns // patch)
    out = torch.empty(batch, tokens, channels * patch**2, dtype=dtype, device=moments.device)
    tile = tiles.lookup("posterior_patches", architecture)
    arguments: dict[str, Any] = dict(moments=moments, bias=bias, noise=noise, mean=mean, std=std, out=out)
    strides = zip(("sample", "channel", "row", "column"), moments.stride(), strict=True)
    arguments |= {f"{name}_stride": stride for name, stride in strides}
    arguments |= dict(channels=channels, rows=rows, columns=columns)
    grid = (launch.blocks(channels * rows * columns, tile["BLOCK"]), batch)
    lowest, highest = vae.LOGVAR_BOUNDS
    return [Launch("posterior_patches", grid, arguments, dict(PATCH=patch, LOWEST=lowest, HIGHEST=highest), tile)], out


def _refuse(
    moments: Tensor,
    bias: Tensor | None,
    noise: Tensor | None,
    mean: Tensor,
    std: Tensor,
    patch: int,
    dtype: torch.dtype,
) -> str | None:
    if dtype not in launch.DTYPES:
        return f"dtype is {dtype}"
    # whatever its layout, which the kernel has strides for, its dtype and device are looked at
    layout = sorted(range(4), key=moments.stride, reverse=True)
    pixels = moments.permute(layout)
    return launch.refuse(strided=("moments",), moments=pixels, bias=bias, noise=noise, mean=mean, std=std)


def _example(device: torch.device) -> _Args:
    moments = torch.zeros(1, 8, 4, 4, dtype=torch.bfloat16, device=device).contiguous(memory_format=torch.channels_last)
    table = torch.ones(4, device=device)
    return (
        moments,
        torch.zeros(8, dtype=moments.dtype, device=device),
        torch.zeros(1, 4, 1, 4, 4, device=device),
        table,
        table,
        2,
        torch.bfloat16,
    )


_op = Op(
    "posterior_patches",
    [
        Implementation("triton", launch.refuser(_refuse, launches), launch.runner(launches), device="cuda"),
        Implementation("torch", lambda *_: None, reference),
    ],
    _example,
)
