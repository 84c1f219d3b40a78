"""linear_fp8: the Triton kernels and PyTorch's product against the reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from dit4dit.benchmarks.harness import assert_no_worse

from dit4dit.errors import BackendError, InputError
from dit4dit.ops import launch, linear_fp8, tiles
from dit4dit.ops.linear_fp8 import FP8, _refuse, _refuse_scaled_mm, _run_scaled_mm, launches, quantize, reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def make(shape, columns, dtype, activation="none", *, bias=False, out=None):
    """x within what its scale reaches but for a few values, and a matrix with a scale a row."""
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(shape, generator=generator).to(dtype)
    weight = torch.randn(columns, shape[-1], generator=generator) * torch.rand(columns, 1, generator=generator)
    scale = weight.abs().amax(1) / 448
    added = torch.randn(columns, generator=generator).to(dtype) if bias else None
    return x, 2.0**-7, (weight / scale[:, None]).to(FP8), scale, added, activation, out or dtype


SHAPES = [
    ((1, 16), 16, True),
    ((9, 192), 96, True),
    ((2, 17, 100), 33, False),
    ((1, 51, 128), 64, True),
    ((2, 70, 96), 130, True),
    ((1, 2, 131, 65), 257, False),
]


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize(("shape", "columns", "bias"), SHAPES)
def test_triton(triton_op, shape, columns, bias, activation, dtype):
    args = make(shape, columns, dtype, activation, bias=bias)
    assert_no_worse(partial(triton_op, "linear_fp8"), reference, args)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("shape", "columns", "bias"), SHAPES)
def test_triton_in_float32(interpreter, shape, columns, bias, dtype):
    """Not on a chip, whose tensor cores add e4m3 products in fewer bits."""
    args = make(shape, columns, dtype, "gelu", bias=bias, out=F32)
    assert_no_worse(partial(interpreter, "linear_fp8"), reference, args, float32_limit=1e-5)


@pytest.mark.parametrize("architecture", ["89", "interpreter"])
def test_triton_with_other_tiles(interpreter, architecture):
    args = make((150, 96), 130, BF16, "gelu")
    assert_no_worse(partial(interpreter, "linear_fp8", tiles=architecture), reference, args)


@pytest.mark.parametrize("rows", [9, 70])
def test_quantises_before_the_product_or_inside_it(rows):
    """The table has both, and the tests above run both."""
    args = make((rows, 96), 64, BF16)
    kernels = [step.kernel for step in launches(args, "90")[0]]
    assert kernels == (["linear_fp8"] if rows == 9 else ["linear_fp8.quantize", "linear_fp8"])


def awkward() -> torch.Tensor:
    """Every e4m3 value, the middles between neighbours, a little to both sides of those, and what is out of range."""
    values = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    values = values[values.isfinite()]
    ordered = values.unique()
    middles = (ordered[1:] + ordered[:-1]) / 2
    off = torch.cat([torch.nextafter(middles, torch.full_like(middles, to)) for to in (-1e9, 1e9)])
    return torch.cat([values, middles, off, torch.tensor([449.0, 464.0, 465.0, -1e30, float("inf"), float("-inf")])])


@pytest.mark.parametrize("rows", [9, 70])
def test_quantises_to_the_same_bits_everywhere(triton_op, rows):
    """Through the product with the identity: inside it for few rows, by the kernel before it for many."""
    x = awkward()
    x = torch.cat([x, x.new_zeros(-len(x) % (rows * 64))]).reshape(-1, rows, 64)
    for part in x:
        args = (part, 1.0, torch.eye(64).to(FP8), torch.ones(64), None, "none", F32)
        assert torch.equal(triton_op("linear_fp8", *args), quantize(part, 1.0).float())
        assert torch.equal(reference(*args), quantize(part, 1.0).float())


@pytest.mark.parametrize("rows", [9, 70])
def test_nan_stays_nan(triton_op, rows):
    args = make((rows, 64), 32, BF16)
    args[0][3, 5] = float("nan")
    got = triton_op("linear_fp8", *args)
    assert got[3].isnan().all()
    assert got.isnan().sum() == 32
    assert torch.equal(got.isnan(), reference(*args).isnan())


def test_the_reference_saturates_and_keeps_nan():
    given = torch.tensor([1e6, float("inf"), -float("inf"), float("nan"), 0.3])
    got = quantize(given, 0.5).float()
    assert got[:3].tolist() == [448, 448, -448]
    assert got[3].isnan()
    assert got[4] == 0.625  # of 0.6: steps of 1/16 there


def test_scales_go_to_their_rows():
    x, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0], [2.0, -1.0], [0.0, 4.0]]).to(FP8)
    scale, bias = torch.tensor([0.5, 10.0, 1.0]), torch.tensor([0.0, 0.0, 0.25])
    got = linear_fp8(x, 0.25, weight, scale, bias, "none", F32)
    assert got.tolist() == [[1.5, 0.0, 8.25]]


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("bias", [True, False])
def test_scaled_mm_agrees_with_the_reference(activation, bias):
    """PyTorch has this call on a CPU too, though the op takes it on a GPU only."""
    args = make((2, 17, 64), 48, BF16, activation, bias=bias)
    # rounded to bfloat16 before the activation as well as after it
    assert_no_worse(_run_scaled_mm, reference, args, factor=3)


def test_says_what_a_chip_cannot_do(monkeypatch):
    class OnGpu:  # what the refusals look at before anything else
        device = torch.device("cuda")

    found = {}
    for capability in ((8, 0), (8, 9), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        weight = torch.zeros(16, 8).to(FP8)
        rest = (1.0, weight, torch.ones(16), None, "none", BF16)
        found[capability] = _refuse_scaled_mm(OnGpu, *rest)
        if capability == (8, 0):
            assert "compute capability 8.9 or later, this is 8.0" in _refuse(OnGpu, *rest)
    assert "8.9 or later" in found[8, 0]
    assert "multiples of 16" in found[8, 9]
    assert "no row-wise scales" in found[12, 0]
    assert tiles.nearest("linear_fp8", "80") == "89"


def test_what_triton_refuses(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    args = list(make((2, 4), 5, F32))
    if launch._has_triton():
        assert _refuse(*args) is None
    args[2] = torch.zeros(4, 5).to(FP8).T
    with pytest.raises(BackendError, match="weight is not contiguous"):
        linear_fp8(*args, backend="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(weight=torch.zeros(5, 3).to(FP8)), r"weight: expected \[N, K\] = \[5, 4\], got \[5, 3\]"),
        (dict(weight=torch.zeros(5, 4)), "weight: expected torch.float8_e4m3fn, got torch.float32"),
        (dict(weight_scale=torch.zeros(4)), r"weight_scale: expected \[N\] = \[5\], got \[4\]"),
        (dict(weight_scale=torch.zeros(5).half()), "weight_scale: expected torch.float32, got torch.float16"),
        (dict(bias=torch.zeros(4)), r"bias: expected \[N\] = \[5\], got \[4\]"),
        (dict(activation="relu"), "activation: expected 'none' or 'gelu', got 'relu'"),
        (dict(x_scale=0.3), "x_scale: expected a power of two, got 0.3"),
        (dict(x_scale=-0.5), "x_scale: expected a power of two, got -0.5"),
        (dict(x_scale=float("nan")), "x_scale: expected a power of two, got nan"),
        (dict(out_dtype=torch.int8), "out_dtype: expected a floating dtype"),
        (dict(x=torch.zeros(0, 4)), "x: expected .* with elements"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    given = dict(
        x=torch.zeros(2, 4),
        x_scale=0.5,
        weight=torch.zeros(5, 4).to(FP8),
        weight_scale=torch.zeros(5),
        bias=torch.zeros(5),
        activation="none",
        out_dtype=F32,
    )
    with pytest.raises(InputError, match=message):
        linear_fp8(**{**given, **change})


def test_triton_writes_to_rows_of_a_larger_result(triton_op):
    args = make((1, 6, 32), 48, BF16)
    wanted = triton_op("linear_fp8", *args)
    whole = torch.full((1, 9, 48), torch.nan, dtype=BF16)
    assert torch.equal(triton_op("linear_fp8", *args, out=whole[:, 2:8]), wanted)
    assert torch.equal(linear_fp8(*args, out=whole[:, 2:8], backend="torch"), reference(*args))
    assert whole[:, :2].isnan().all()
    with pytest.raises(InputError, match="linear_fp8: out: expected"):
        linear_fp8(*args, out=whole)
