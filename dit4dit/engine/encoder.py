"""The frame encoder, folded: `model.vae.FrameEncoder` in the fewest kernels.

On a GPU a library's convolution adds its bias in a kernel of its own, so convolutions run without: their biases, and the
residuals, are left to what comes behind. That is a norm, which reads the image anyway, or the padding in front of a convolution
that halves the image. On a CPU a convolution's bias costs nothing and stays where it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit4dit import ops
from dit4dit.engine.fold import Matrix
from dit4dit.model.precision import full_precision
from dit4dit.model.vae import AttentionBlock, ChannelRmsNorm, Downsample, FrameEncoder, ResidualBlock
from dit4dit.model.video_backbone import VideoBackbone

ALIGNED = 8
"""Channels of which cuDNN's 16-bit convolutions take multiples; others are padded in kernels of their own."""


@dataclass(frozen=True)
class Convolution:
    """weight [O, C, h, w], channels last in memory; bias [O], or None where it is left to what comes behind."""

    weight: Tensor
    bias: Tensor | None
    stride: int = 1
    padding: int = 0

    @classmethod
    def of(cls, layer: nn.Conv2d) -> Convolution:
        """The layer's, sharing its memory, which is laid out with the channels last for it."""
        assert layer.bias is not None
        layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
        stride, padding = layer.stride[0], layer.padding[0]
        assert isinstance(padding, int)
        return cls(layer.weight.detach(), layer.bias.detach(), stride, padding)

    def __call__(self, x: Tensor) -> Tensor:
        return ops.conv2d(x, self.weight, self.bias, self.stride, self.padding)

    @property
    def matrix(self) -> Matrix:
        """The same map of one pixel's channels, sharing the memory of a weight [O, C, 1, 1]."""
        return Matrix(self.weight.flatten(1), self.bias)

    def apart(self) -> tuple[Convolution, Tensor | None]:
        """Without its bias, and the bias."""
        return replace(self, bias=None), self.bias


class Pending:
    """An image that is x + bias + residual: what comes behind adds it up, once. The memory of x and residual is then free."""

    def __init__(self, x: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> None:
        """x is the image's own, and may be written."""
        if bias is None and residual is not None:
            # on a CPU, where a norm is several passes: one more that holds nothing is less than memory that waits for them
            x, residual = x.add_(residual), None
        self._parts: tuple[Tensor, Tensor | None, Tensor | None] | None = x, bias, residual

    def _take(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        assert self._parts is not None
        parts, self._parts = self._parts, None
        return parts

    def norm(self, gamma: Tensor) -> Tensor:
        """The norm of the image, with the swish."""
        (y,) = ops.rms_norm_silu(*self._take(), gamma, True, False)
        return y

    def norm_and_sum(self, gamma: Tensor, *, silu: bool = True) -> tuple[Tensor, Tensor]:
        """The norm of the image, and the image."""
        y, total = ops.rms_norm_silu(*self._take(), gamma, silu, True)
        return y, total

    def padded(self) -> Tensor:
        """The image with zeros on the right and below."""
        return ops.add_pad(*self._take())


@dataclass(frozen=True)
class Residual:
    """A residual block. `bias1` and `bias2` are what its convolutions leave to what comes behind."""

    gamma1: Tensor
    conv1: Convolution
    bias1: Tensor | None
    gamma2: Tensor
    conv2: Convolution
    shortcut: Convolution | Matrix | None
    """A matrix where biases are left: for one pixel's channels a library's convolution clears memory in a launch of its own."""
    bias2: Tensor | None
    """Of conv2, and of the shortcut where there is one."""

    @classmethod
    def of(cls, block: ResidualBlock, *, apart: bool) -> Residual:
        conv1, conv2 = Convolution.of(block.conv1), Convolution.of(block.conv2)
        shortcut: Convolution | Matrix | None = None
        bias1 = bias2 = None
        if apart:
            (conv1, bias1), (conv2, bias2) = conv1.apart(), conv2.apart()
        if isinstance(block.conv_shortcut, nn.Conv2d):
            shortcut = Convolution.of(block.conv_shortcut)
            if apart:
                rest, bias = shortcut.apart()
                assert bias2 is not None
                assert bias is not None
                shortcut, bias2 = rest.matrix, (bias2.double() + bias.double()).to(bias2.dtype)
        return cls(_gamma(block.norm1), conv1, bias1, _gamma(block.norm2), conv2, shortcut, bias2)

    def __call__(self, given: Pending) -> Pending:
        h, x = given.norm_and_sum(self.gamma1)
        h = Pending(self.conv1(h), self.bias1).norm(self.gamma2)
        if isinstance(self.shortcut, Matrix):
            x = _image(self.shortcut(_pixels(x)))
        elif self.shortcut is not None:
            x = self.shortcut(x)
        return Pending(self.conv2(h), self.bias2, x)


@dataclass(frozen=True)
class Half:
    """The convolution that halves the image."""

    conv: Convolution
    bias: Tensor | None

    @classmethod
    def of(cls, block: Downsample, *, apart: bool) -> Half:
        layer = block.resample[1]
        assert isinstance(layer, nn.Conv2d)
        conv = Convolution.of(layer)
        return cls(*conv.apart()) if apart else cls(conv, None)

    def __call__(self, given: Pending) -> Pending:
        return Pending(self.conv(given.padded()), self.bias)


@dataclass(frozen=True)
class SelfAttention:
    """Attention of one head over the pixels."""

    gamma: Tensor
    qkv: Matrix
    """Its values are those of the model behind the model's last product: of one head the two matrices are one."""
    bias: Tensor | None
    """Of the model's last product, where it is left to what comes behind."""

    @classmethod
    def of(cls, block: AttentionBlock, *, apart: bool) -> SelfAttention:
        last = Convolution.of(block.proj).matrix
        qkv = _with_values(Convolution.of(block.to_qkv).matrix, last, with_bias=not apart)
        return cls(_gamma(block.norm), qkv, last.bias if apart else None)

    def __call__(self, given: Pending) -> Pending:
        h, x = given.norm_and_sum(self.gamma, silu=False)
        pixels = _pixels(h)
        y = ops.self_attention(self.qkv(pixels.flatten(1, 2)), None, None, None, 1, 0.0)
        return Pending(_image(y.view(pixels.shape)), self.bias, x)


Layer = Residual | Half | SelfAttention


class Encoder:
    """A frame -> moments of its latent's posterior, with the weights of a model's frame encoder, which it shares.

    Attributes:
        channels: of the frame as its first convolution takes it without a copy; those beyond the third are zeros.
        bias: [2z], what the moments of `__call__` still lack, or None.
        layers: between the first convolution and the last norm.
    """

    def __init__(self, source: FrameEncoder, *, apart: bool | None = None) -> None:
        """apart: whether biases are left to what comes behind a convolution; None: except on a CPU."""
        weight = source.conv_in.weight
        if apart is None:
            apart = weight.device.type != "cpu"
        self.channels = ALIGNED if apart and weight.dtype.itemsize == 2 else 3
        first = Convolution.of(source.conv_in)
        self._first, self._first_bias = first.apart() if apart else (first, None)
        wide = F.pad(first.weight, (0, 0, 0, 0, 0, self.channels - 3)).contiguous(memory_format=torch.channels_last)
        self._wide = replace(self._first, weight=wide)
        mid = source.mid_block
        modules: Sequence[nn.Module] = (*source.down_blocks, mid.resnets[0], mid.attentions[0], mid.resnets[1])
        self.layers = tuple(_layer(module, apart) for module in modules)
        self._gamma = _gamma(source.norm_out)
        last = _product(source.quant_conv, source.conv_out)
        self._last, self.bias = last.apart() if apart else (last, None)

    def __call__(self, frame: Tensor) -> Tensor:
        """frame [B, 3 or `channels`, H, W] in [-1, 1] -> moments [B, 2z, H/8, W/8], but for `bias`: the mean, and the
        logarithm of the variance.

        Computed in the weights' dtype, which the moments have; they are channels last in memory.
        """
        with full_precision():
            x = frame.to(self._first.weight.dtype).contiguous(memory_format=torch.channels_last)
            image = Pending((self._first if x.shape[1] == 3 else self._wide)(x), self._first_bias)
            for layer in self.layers:
                image = layer(image)
            return self._last(image.norm(self._gamma))


@torch.no_grad()
def fold_encoder(backbone: VideoBackbone, *, apart: bool | None = None) -> Encoder:
    """The encoder of the backbone's frames; the backbone's own weights are then channels last too. apart: as of `Encoder`."""
    return Encoder(backbone.frame_encoder, apart=apart)


def _layer(module: nn.Module, apart: bool) -> Layer:
    if isinstance(module, ResidualBlock):
        return Residual.of(module, apart=apart)
    if isinstance(module, Downsample):
        return Half.of(module, apart=apart)
    assert isinstance(module, AttentionBlock)
    return SelfAttention.of(module, apart=apart)


def _pixels(image: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H, W, C], a view."""
    return image.permute(0, 2, 3, 1)


def _image(pixels: Tensor) -> Tensor:
    """The inverse of `_pixels`."""
    return pixels.permute(0, 3, 1, 2)


def _gamma(norm: ChannelRmsNorm) -> Tensor:
    return norm.gamma.detach()


def _with_values(qkv: Matrix, last: Matrix, *, with_bias: bool) -> Matrix:
    """q | k | v of one head with last(v) for v, formed in float64, rounded once. A weighted mean of it is last(mean of v).

    with_bias: whether last's bias is among it, as it is in each of what the mean is taken of; else it is left out.
    """
    assert qkv.bias is not None
    assert last.bias is not None
    q, k, v = qkv.weight.chunk(3)
    map_ = last.weight.double()
    bias = map_ @ qkv.bias.chunk(3)[2].double()
    if with_bias:
        bias += last.bias.double()
    values = Matrix((map_ @ v.double()).to(v.dtype), bias.to(v.dtype))
    assert values.bias is not None
    return Matrix(torch.cat([q, k, values.weight]), torch.cat([*qkv.bias.chunk(3)[:2], values.bias]))


def _product(after: nn.Conv2d, before: nn.Conv2d) -> Convolution:
    """after(before(x)) as one convolution, `after` being of one pixel; formed in float64, rounded once."""
    assert after.bias is not None
    assert before.bias is not None
    map_ = after.weight.detach().double().flatten(1)
    weight = (map_ @ before.weight.detach().double().flatten(1)).view_as(before.weight)
    bias = map_ @ before.bias.detach().double() + after.bias.detach().double()
    kind = Convolution.of(before)
    dense = weight.to(kind.weight.dtype).contiguous(memory_format=torch.channels_last)
    return replace(kind, weight=dense, bias=bias.to(kind.weight.dtype))
