"""The folded frame encoder against the model's own, on paths of a CPU and of a GPU, and how many kernels it takes there."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dit4dit import ops
from dit4dit.checkpoints.weights import random_model
from dit4dit.config import VaeConfig
from dit4dit.engine import Engine
from dit4dit.engine.encoder import Encoder, Half, Residual, SelfAttention
from dit4dit.engine.listing import engine_without_data
from dit4dit.model.vae import FrameEncoder, mean_and_std
from dit4dit.ops import stand_in
from dit4dit.presets import preset

F32, BF16 = torch.float32, torch.bfloat16
SMALL = VaeConfig(base_dim=6)
SIZES = [(1, 16, 16), (2, 40, 24), (3, 56, 104), (1, 32, 64)]
"""Batch, height, width; the last is two views side by side. Some have odd sizes further down."""


def fresh(dtype: torch.dtype = F32, config: VaeConfig = SMALL, seed: int = 0) -> FrameEncoder:
    """Random weights in which no bias and no gamma is as good as absent."""
    torch.manual_seed(seed)
    encoder = FrameEncoder(config).eval().requires_grad_(False)
    for name, parameter in encoder.named_parameters():
        if name.endswith(("bias", "gamma")):
            torch.nn.init.normal_(parameter, mean=float(name.endswith("gamma")), std=0.3)
    return encoder.to(dtype)


def frame(batch: int, height: int, width: int) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(batch)) * 2 - 1


def widened(image: Tensor, channels: int) -> Tensor:
    """As `ops.preprocess` lays it out."""
    return F.pad(image, (0, 0, 0, 0, 0, channels - 3)).contiguous(memory_format=torch.channels_last)


def error(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> float:
    """The larger of both moments' relative errors."""
    return max(
        ((g.double() - w.double()).abs().max() / w.double().abs().max()).item() for g, w in zip(got, want, strict=True)
    )


def whole(encoder: Encoder, image: Tensor) -> tuple[Tensor, Tensor]:
    """The moments with what they lack, added as `ops.posterior_patches` adds it."""
    moments = encoder(image)
    return mean_and_std(moments if encoder.bias is None else moments.float() + encoder.bias.float()[:, None, None])


def truth(source: FrameEncoder, image: Tensor) -> tuple[Tensor, Tensor]:
    """By the same weights in float64."""
    wide = copy.deepcopy(source).double()
    x = image.double()
    for layer in (wide.conv_in, *wide.down_blocks, wide.mid_block, wide.norm_out, wide.conv_out, wide.quant_conv):
        x = layer(x)
    mean, logvar = x.chunk(2, dim=1)
    return mean, torch.exp(0.5 * logvar.clamp(-30, 20))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_float32_is_the_models(size: tuple[int, int, int], apart: bool) -> None:
    source, image = fresh(), frame(*size)
    plain = source(image)
    got = whole(Encoder(source, apart=apart), image)
    assert got[0].shape == (size[0], 16, size[1] // 8, size[2] // 8)
    assert got[0].dtype == got[1].dtype == F32
    assert error(got, plain) <= 1e-6


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_bfloat16_is_no_worse_than_the_model(size: tuple[int, int, int], apart: bool) -> None:
    source, image = fresh(BF16), frame(*size).to(BF16)
    exact = truth(source, image)
    encoder = Encoder(source, apart=apart)
    moments = encoder(widened(image, encoder.channels))
    assert moments.dtype == BF16
    assert moments.is_contiguous(memory_format=torch.channels_last)
    assert error(whole(encoder, widened(image, encoder.channels)), exact) <= 2 * error(source(image), exact)


def test_zeros_in_the_first_convolution_change_nothing() -> None:
    """A frame of 8 channels and the same one of 3."""
    source, image = fresh(BF16), frame(2, 24, 40).to(BF16)
    encoder = Encoder(source, apart=True)
    assert encoder.channels == 8
    assert Encoder(source).channels == Encoder(fresh(), apart=True).channels == 3
    want = whole(encoder, image)
    assert error(whole(encoder, widened(image, 8)), want) < 0.02
    other = widened(image, 8)
    other[:, 3:] = 1e3
    assert torch.equal(encoder(other), encoder(widened(image, 8))), "the weights there are zeros"


def test_weights_are_the_models_own() -> None:
    source = fresh()
    encoder = Encoder(source, apart=True)
    model = {p.untyped_storage().data_ptr() for p in source.parameters()}
    held = [encoder._first.weight]
    for layer in encoder.layers:
        if isinstance(layer, Residual):
            held += [layer.conv1.weight, layer.conv2.weight, layer.gamma1, layer.gamma2]
            held += [] if layer.shortcut is None else [layer.shortcut.weight]
        elif isinstance(layer, Half):
            held.append(layer.conv.weight)
        else:
            assert isinstance(layer, SelfAttention)
            held.append(layer.gamma)
    assert len(held) > 40
    for weight in held:
        assert weight.untyped_storage().data_ptr() in model
        assert weight.dim() < 4 or weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_last_two_convolutions_are_one_rounded_once(dtype: torch.dtype) -> None:
    source = fresh(dtype)
    last, map_ = Encoder(source)._last, source.quant_conv.weight.double()[:, :, 0, 0]
    weight = torch.einsum("om,mchw->ochw", map_, source.conv_out.weight.double())
    bias = map_ @ source.conv_out.bias.double() + source.quant_conv.bias.double()
    # sums of 32 products in float64, in whatever order, round to the same or a neighbouring number
    rounding = 0.51 * torch.finfo(dtype).eps
    assert ((last.weight.double() - weight).abs() <= rounding * weight.abs() + 1e-15).all()
    assert last.bias is not None
    assert ((last.bias.double() - bias).abs() <= rounding * bias.abs() + 1e-15).all()


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_attentions_last_product_is_in_its_values(dtype: torch.dtype, apart: bool) -> None:
    source = fresh(dtype)
    block = source.mid_block.attentions[0]
    (layer,) = (layer for layer in Encoder(source, apart=apart).layers if isinstance(layer, SelfAttention))
    last, values = block.proj.weight[:, :, 0, 0].double(), block.to_qkv.weight[:, :, 0, 0].chunk(3)[2].double()
    weight, bias = last @ values, last @ block.to_qkv.bias.chunk(3)[2].double()
    bias = bias if apart else bias + block.proj.bias.double()
    rounding = 0.51 * torch.finfo(dtype).eps
    assert layer.qkv.bias is not None
    rest = 2 * len(weight)
    assert torch.equal(layer.qkv.weight[:rest], block.to_qkv.weight[:rest, :, 0, 0]), "q and k are the model's"
    assert torch.equal(layer.qkv.bias[:rest], block.to_qkv.bias[:rest])
    for got, want in ((layer.qkv.weight, weight), (layer.qkv.bias, bias)):
        assert ((got.chunk(3)[2].double() - want).abs() <= rounding * want.abs() + 1e-15).all()
    assert (layer.bias is None) != apart
    assert layer.bias is None or torch.equal(layer.bias, block.proj.bias)


def test_float32_is_exact_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """No convolution and no product may take the shorter formats that PyTorch's settings let in."""
    seen: list[str] = []

    def watched(function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            seen.extend((torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision))
            return function(*args, **kwargs)

        return run

    for name in ("conv2d", "linear", "scaled_dot_product_attention"):
        monkeypatch.setattr(F, name, watched(getattr(F, name)))
    assert torch.backends.cudnn.conv.fp32_precision != "ieee"
    with ops.use_backend("torch"):
        Encoder(fresh())(frame(1, 16, 16))
    assert len(seen) == 2 * 29
    assert set(seen) == {"ieee"}
    assert torch.backends.cudnn.conv.fp32_precision != "ieee"


def test_a_copy_encodes_the_same() -> None:
    encoder, image = Encoder(fresh(BF16), apart=True), frame(1, 24, 16).to(BF16)
    want = encoder(image)
    for other in (pickle.loads(pickle.dumps(encoder)), copy.deepcopy(encoder)):
        assert torch.equal(other(image), want)


@pytest.mark.kernels
def test_with_its_kernels_interpreted(interprets: None, tmp_path: Path) -> None:
    """The path of a GPU with this package's own kernels, whatever memory held before: content of an earlier frame, or NaN."""
    script = """
import torch
from test_encoder import BF16, Encoder, F32, error, frame, fresh, truth, whole, widened
from dit4dit import ops
torch.use_deterministic_algorithms(True)  # torch.empty gives NaN
torch.set_num_threads(1)
for dtype in (F32, BF16):
    source = fresh(dtype)
    encoder = Encoder(source, apart=True)
    for size in ((1, 24, 40), (2, 8, 16), (1, 24, 40)):
        image = frame(*size).to(dtype)
        with ops.use_backend(rms_norm_silu="triton", add_pad="triton"), ops.trace() as ran:
            got = whole(encoder, widened(image, encoder.channels))
        assert ran["rms_norm_silu"] == ran["add_pad"] == {"triton"}
        exact = truth(source, image)
        assert error(got, exact) <= max(2 * error(source(image), exact), 1e-6 * (dtype == F32)), (dtype, size)
"""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]),
    }
    command = [sys.executable, "-c", script]  # from elsewhere: the source tree has no kernels as the package has them
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


class Kernels(TorchDispatchMode):
    """Counts what a GPU would run: each operation that is no view and makes no empty tensor; a convolution's bias is one more."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        view = any(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.arguments)
        name = func.name().removeprefix("aten::").partition(".")[0]
        if not view and name not in ("empty", "empty_like", "_unsafe_view"):
            self.seen[name] += 1
        if name == "convolution":
            self.seen["bias"] += args[2] is not None
            return out.contiguous(memory_format=torch.channels_last)  # as cuDNN has it; without data torch forgets it
        return out


def kernels(run: Any, *args: Any) -> Counter[str]:
    """What `run` launches on a GPU: library calls by name, and this package's kernels. Attention counts as one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: torch.empty_like(q))
        with stand_in.without_data(), torch.no_grad(), Kernels() as found, ops.listing() as calls:
            run(*args)
    for op, given in calls:
        module = sys.modules[f"dit4dit.ops.{op}"]
        if op in ("rms_norm_silu", "add_pad"):
            for step in module.launches(given, "90")[0]:
                found.seen[step.kernel] += 1
    found.seen["attention"] += sum(op == "self_attention" for op, _ in calls)
    return found.seen


@pytest.mark.parametrize(("name", "views"), [("robocasa_gr1", 1), ("libero", 2)])
@pytest.mark.parametrize("batch", [1, 3])
def test_kernels_on_a_gpu(name: str, views: int, batch: int) -> None:
    """25 convolutions, a product for each of two shortcuts and for attention's q, k and v, one attention, 22 norms, 3 paddings:
    no other pass."""
    engine = engine_without_data(preset(name).model)
    shape = (batch, engine.encoder.channels, 224, 224 * views)
    assert engine.encoder.channels == 8
    given = torch.empty(shape, dtype=BF16, device="meta", memory_format=torch.channels_last)
    found = kernels(engine.encoder, given)
    assert found.total() <= 54, found
    assert (found["convolution"], found["bias"]) == (25, 0)
    assert (found["mm"], found["addmm"], found["attention"]) == (2, 1, 1)
    assert (found["rms_norm_silu"], found["add_pad"]) == (22, 3)
    posterior = torch.empty(batch, 16, 1, 28, 28 * views, device="meta")
    assert kernels(engine.condition, given, posterior).total() <= 64


def test_an_engine_takes_frames_of_either_kind() -> None:
    """`Engine.sample`'s callers have three planes; a plan has what `preprocess` writes."""
    config = preset("tiny").model
    engine = Engine(random_model(config, 0, with_text=False))
    image, noise = frame(2, 32, 64), torch.randn(2, 16, 1, 4, 8)
    want = engine.model.backbone.condition(image, noise)
    for given in (image, image.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(engine.condition(given, noise), want, rtol=1e-5, atol=1e-5)
