"""norm_linear: the Triton kernel against the reference, and "parts", which is what runs where nothing was measured."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from dit4dit.benchmarks.harness import assert_no_worse

from dit4dit import ops
from dit4dit.errors import BackendError, InputError
from dit4dit.ops import norm_linear, onednn
from dit4dit.ops.dispatch import find
from dit4dit.ops.norm_linear import MOST_ROWS, reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ACTIVATIONS = [None, "gelu", "gelu_tanh", "relu"]


def make(shape, columns, dtype, activation, *, branch=True, tables=True, bias=True, offset=0.0, eps=1e-5):
    """shape: (batch, rows, width). offset: of the rows' mean, in standard deviations."""
    batch, rows, width = shape
    generator = torch.Generator().manual_seed(columns + rows)

    def normal(*size):
        return torch.randn(size, generator=generator)

    x = 3 * normal(batch, 1, rows, width) + 3 * offset
    y = normal(batch, 1, rows, width).to(dtype) if branch else None
    shift, scale = (normal(1, width), normal(1, width)) if tables else (None, None)
    weight = (2 * normal(columns, width) / width**0.5).to(dtype)
    return x, y, shift, scale, eps, weight, normal(columns).to(dtype) if bias else None, activation


CASES = [
    # shape, columns, branch, tables, bias
    ((1, 1, 64), 16, True, True, True),
    ((1, 9, 64), 33, False, True, True),
    ((3, 17, 100), 50, True, False, False),
    ((1, 17, 768), 64, True, True, True),
    ((1, 51, 100), 130, True, True, True),
    ((3, 51, 65), 7, True, True, False),
]


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(("case", "activation"), list(zip(CASES, itertools.cycle(ACTIVATIONS), strict=False)))
def test_triton(triton_op, case, activation, dtype):
    shape, columns, branch, tables, bias = case
    args = make(shape, columns, dtype, activation, branch=branch, tables=tables, bias=bias)
    assert_no_worse(partial(triton_op, "norm_linear"), reference, args, float32_limit=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tiles", ["80", "interpreter"])
def test_every_activation_with_every_tile(interpreter, tiles, activation):
    args = make((2, 17, 200), 70, BF16, activation)
    assert_no_worse(partial(interpreter, "norm_linear", tiles=tiles), reference, args)


@pytest.mark.parametrize("offset", [30.0, -300.0])
def test_a_mean_far_from_zero_does_not_drown_the_variance(triton_op, offset):
    args = make((1, 17, 768), 40, F32, None, offset=offset)
    assert_no_worse(partial(triton_op, "norm_linear"), reference, args, float32_limit=1e-4)


def test_eps_counts(triton_op):
    """Rows of almost one value, whose variance is far below eps."""
    x, y, *rest = make((1, 9, 64), 16, F32, None, eps=1e-3)
    args = (1e-3 * x, 1e-3 * y, *rest)
    assert_no_worse(partial(triton_op, "norm_linear"), reference, args, float32_limit=1e-5)


@pytest.mark.parametrize("columns", [7, 40, 600])
def test_the_sum_is_exact_and_the_residual_is_untouched(triton_op, columns):
    """Few thread blocks take many parts of a row each, and many take none; all see the x that came."""
    args = make((2, 17, 400), columns, BF16, None)
    x, y = args[0].clone(), args[1]
    first, second = triton_op("norm_linear", *args), triton_op("norm_linear", *args)
    assert torch.equal(args[0], x)
    assert torch.equal(first[0], x + y.float())
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_not_a_number_stays_in_its_row(triton_op, activation):
    args = make((1, 17, 100), 40, BF16, activation)
    clean = triton_op("norm_linear", *args)
    x, y, rest = args[0].clone(), args[1].clone(), args[2:]
    x[0, 0, 3, 99] = torch.nan
    y[0, 0, 16, 0] = torch.inf
    x_new, out = triton_op("norm_linear", x, y, *rest)
    others = [i for i in range(17) if i not in (3, 16)]
    assert torch.equal(x_new[:, :, others], clean[0][:, :, others])
    assert torch.equal(out[:, :, others], clean[1][:, :, others])
    assert out[0, 0, [3, 16]].isnan().all()


GUARDED = """
import torch
from dit4dit import ops
from dit4dit.benchmarks.guarded import Guarded
from dit4dit.ops import launch
launch.architecture = lambda device: "90"
x, weight, bias = torch.randn(1, 1, 17, 100), torch.randn(33, 100), torch.randn(33)
with torch.no_grad(), Guarded(poison=0xFF) as memory:
    x_new, out = ops.norm_linear(x, x, None, None, 1e-5, weight, bias, None, backend="triton")
    product = ops.linear(x_new, weight, bias, backend="triton")
memory.check()
assert all(bool(t.isfinite().all()) for t in (x_new, out, product))
"""


@pytest.mark.kernels
@pytest.mark.usefixtures("interprets")
def test_nothing_is_written_beside_the_results(tmp_path):
    """Rows and columns past the end of the last tile: those of this kernel and of the product of few rows."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    script = tmp_path / "guarded.py"
    script.write_text(GUARDED)
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["parts", "torch"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("packed", [True, False])
def test_parts_are_the_ops_themselves(name, activation, packed):
    x, y, shift, scale, eps, weight, bias, _ = args = make((2, 9, 96), 48, F32, activation)
    with torch.no_grad():
        if packed and name == "parts":
            find("norm_linear").implementations["parts"].prepare(*args)
            assert onednn.is_packed(weight) == torch.backends.mkldnn.is_available()
        x_new, h = ops.adaln(x, y, None, shift, scale, eps, F32)
        if activation in ("gelu", "gelu_tanh"):
            want = ops.linear_gelu(h, weight, bias, "none" if activation == "gelu" else "tanh")
        else:
            want = ops.linear(h, weight, bias)
            want = torch.relu(want) if activation else want
        got = norm_linear(*args, backend=name)
    assert torch.equal(got[0], x_new)
    assert torch.equal(got[1], want)


def test_parts_take_rows_with_gaps():
    x, y, *rest = make((3, 9, 32), 16, F32, "relu")
    got = norm_linear(x[:, :, -4:], y[:, :, -4:], *rest)
    want = norm_linear(x, y, *rest)
    assert torch.equal(got[0], want[0][:, :, -4:])
    torch.testing.assert_close(got[1], want[1][:, :, -4:], atol=1e-5, rtol=1e-5)


def test_parts_choose_their_implementations_as_any_call():
    args = make((1, 9, 32), 16, F32, None)
    with torch.no_grad(), ops.trace() as ran, ops.use_backend(linear="torch"):
        norm_linear(*args)
    assert ran == {"norm_linear": {"parts"}, "adaln": {"torch"}, "linear": {"torch"}}
    with ops.trace() as ran, ops.use_backend("torch"):
        norm_linear(*args)
    assert ran == {"norm_linear": {"torch"}}


def test_gradients():
    x, y, shift, scale, eps, weight, bias, activation = make((2, 3, 4), 5, torch.float64, "gelu")
    tensors = [t.double().requires_grad_() for t in (x, y, shift, scale, weight, bias)]

    def run(x, y, shift, scale, weight, bias):
        return norm_linear(x, y, shift, scale, eps, weight, bias, activation)

    assert torch.autograd.gradcheck(run, tensors)


@pytest.mark.parametrize("which", [0, 1, 5, 6])
def test_the_kernel_has_no_gradients(monkeypatch, which):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    args = make((1, 9, 32), 16, F32, None)
    args[which].requires_grad_()
    with pytest.raises(BackendError, match="needs a gradient"):
        norm_linear(*args, backend="triton")
    with torch.no_grad():
        assert find("norm_linear").implementations["triton"].refuse(*args) is None


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (make((1, MOST_ROWS + 1, 8), 4, F32, None), f"x has {MOST_ROWS + 1} rows, it takes at most {MOST_ROWS}"),
        (make((1, 1, 8192), 4, F32, None), "rows of 8192, it takes at most 4096"),
        (
            (make((1, 2, 8), 4, F32, None)[0].half(), *make((1, 2, 8), 4, F32, None)[1:]),
            "x is torch.float16, not float32",
        ),
        ((make((2, 4, 8), 4, F32, None)[0][:, :, 1:], *make((2, 3, 8), 4, F32, None)[1:]), "x is not contiguous"),
    ],
)
def test_what_the_kernel_does_not_take(monkeypatch, args, reason):
    norm_linear(*args)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendError, match=reason):
        norm_linear(*args, backend="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(1, 2, 3, 4)), r"x: expected \[B, 1, N, W\] = \[1, 1, 3, 4\], got \[1, 2, 3, 4\]"),
        (dict(x=torch.zeros(3, 4)), r"x: expected \[B, 1, N, W\] = \[B, 1, N, W\], got \[3, 4\]"),
        (dict(x=torch.zeros(1, 1, 3, 4).long()), "x: expected a floating dtype, got torch.int64"),
        (dict(y=torch.zeros(1, 1, 2, 4)), r"y: expected \[B, 1, N, W\] = \[1, 1, 3, 4\], got \[1, 1, 2, 4\]"),
        (dict(shift=torch.zeros(4)), r"shift: expected \[1, W\] = \[1, 4\], got \[4\]"),
        (dict(scale=None), "expected shift and scale both or neither, got one of them"),
        (dict(weight=torch.zeros(5, 3)), r"weight: expected \[O, W\] = \[5, 4\], got \[5, 3\]"),
        (dict(weight=torch.zeros(5, 4, device="meta")), "weight: expected device cpu as x, got meta"),
        (dict(bias=torch.zeros(4)), r"bias: expected \[O\] = \[5\], got \[4\]"),
        (dict(bias=torch.zeros(5).half()), "bias: expected torch.float32 as weight, got torch.float16"),
        (dict(activation="tanh"), "activation: expected one of None, 'gelu', 'gelu_tanh', 'relu', got 'tanh'"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    rows, table = torch.zeros(1, 1, 3, 4), torch.zeros(1, 4)
    given = dict(x=rows, y=rows, shift=table, scale=table, eps=1e-5, weight=torch.zeros(5, 4), bias=torch.zeros(5))
    with pytest.raises(InputError, match=message):
        norm_linear(**{**given, "activation": None, **change})
