"""linear: every implementation against the reference, and what the engine's matrices do with it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from dit4dit.benchmarks.harness import assert_no_worse

from dit4dit import ops
from dit4dit.engine.fold import Matrix
from dit4dit.errors import BackendError, InputError
from dit4dit.ops import linear, onednn
from dit4dit.ops.dispatch import find
from dit4dit.ops.linear import MOST_ROWS, reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def make(shape, columns, dtype, *, bias=True):
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(shape, generator=generator).to(dtype)
    weight = (2 * torch.randn(columns, shape[-1], generator=generator) / shape[-1] ** 0.5).to(dtype)
    return x, weight, torch.randn(columns, generator=generator).to(dtype) if bias else None


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", ["onednn", "torch"])
@pytest.mark.parametrize(
    ("shape", "columns", "bias"),
    [((16,), 16, True), ((9, 192), 96, True), ((2, 17, 100), 33, False), ((1, 2, 131, 65), 257, True)],
)
def test_no_worse_than_the_reference(name, shape, columns, bias, dtype):
    args, found = make(shape, columns, dtype, bias=bias), find("linear").implementations[name]
    with torch.no_grad():
        if found.prepare is not None:
            found.prepare(*args)
        if name == "onednn" and dtype == BF16:
            assert found.refuse(*args) == "weight is torch.bfloat16"
            return
        assert_no_worse(lambda *args: linear(*args, backend=name), reference, args, float32_limit=1e-5)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(
    ("shape", "columns", "bias"),
    [
        ((16,), 16, True),
        ((1, 9, 768), 96, True),
        ((2, 17, 100), 33, False),
        ((3, 1, 51, 65), 257, True),
        ((1, 17, 512), 1030, True),
    ],
)
def test_triton(triton_op, shape, columns, bias, dtype):
    args = make(shape, columns, dtype, bias=bias)
    assert_no_worse(partial(triton_op, "linear"), reference, args, float32_limit=1e-5)


@pytest.mark.parametrize("tiles", ["80", "89", "interpreter"])
def test_triton_with_other_tiles(interpreter, tiles):
    assert_no_worse(partial(interpreter, "linear", tiles=tiles), reference, make((17, 300), 70, BF16))


def test_what_is_not_a_number_stays_in_its_row(triton_op):
    x, weight, bias = make((17, 100), 40, BF16)
    clean = triton_op("linear", x, weight, bias)
    x = x.clone()
    x[3, 99] = torch.nan
    got = triton_op("linear", x, weight, bias)
    assert got[3].isnan().all()
    assert torch.equal(got[[0, 2, 4, 16]], clean[[0, 2, 4, 16]])


def test_what_the_kernel_does_not_take(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, weight, bias = make((MOST_ROWS + 1, 8), 4, F32)
    with pytest.raises(BackendError, match=f"x has {MOST_ROWS + 1} rows, it takes at most {MOST_ROWS}"):
        linear(x, weight, bias, backend="triton")
    x = x[1:].requires_grad_()
    with pytest.raises(BackendError, match="x needs a gradient"):
        linear(x, weight, bias, backend="triton")


def test_gradients():
    tensors = [x.requires_grad_() for x in make((2, 3, 4), 5, torch.float64)]
    assert torch.autograd.gradcheck(linear, tensors)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_plans_products_are_packed_alike_for_every_batch(batch, monkeypatch):
    rows = []
    monkeypatch.setattr(onednn, "pack", lambda weight, count: rows.append(count))
    x, weight, _ = make((batch, 17, 64), 32, F32)
    onednn.prepare(x, weight)
    onednn.prepare(x[:, None], weight)
    onednn.prepare(x[0], weight)
    onednn.prepare(x.bfloat16(), weight)
    assert rows == [17, 17, 17]


def test_a_matrix_is_this_op():
    matrix = Matrix(*make((1, 8), 5, F32)[1:])
    x = torch.randn(2, 3, 8)
    with ops.trace() as ran:
        got = matrix(x)
    assert ran == {"linear": {"torch"}}
    assert torch.equal(got, torch.nn.functional.linear(x, matrix.weight, matrix.bias))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(weight=torch.zeros(5, 3)), r"linear: weight: expected \[N, K\] = \[5, 4\], got \[5, 3\]"),
        (dict(weight=torch.zeros(5)), r"linear: weight: expected \[N, K\] = \[N, 4\], got \[5\]"),
        (dict(bias=torch.zeros(4)), r"linear: bias: expected \[N\] = \[5\], got \[4\]"),
        (dict(bias=torch.zeros(5).half()), "linear: bias: expected torch.float32 as x, got torch.float16"),
        (dict(weight=torch.zeros(5, 4).half()), "linear: weight: expected torch.float32 as x, got torch.float16"),
        (dict(x=torch.zeros(0, 4)), "linear: x: expected .* with elements"),
        (dict(x=torch.zeros(())), "linear: x: expected .* with elements"),
        (dict(x=torch.zeros(2, 4).long()), "linear: x: expected a floating dtype, got torch.int64"),
        (dict(weight=torch.zeros(5, 4, device="meta")), "linear: weight: expected device cpu as x, got meta"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    given = dict(x=torch.zeros(2, 4), weight=torch.zeros(5, 4), bias=torch.zeros(5))
    with pytest.raises(InputError, match=message):
        linear(**{**given, **change})


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["torch", "onednn"])
def test_writes_to_rows_of_a_larger_result(name, bias, batch):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(batch, 5, 24, generator=generator), torch.randn(40, 24, generator=generator)
    offset = torch.randn(40, generator=generator) if bias else None
    onednn.pack(weight, 5)
    whole = torch.full((batch, 9, 40), torch.nan)
    with torch.no_grad():
        wanted = linear(x, weight, offset, backend=name)
        got = linear(x, weight, offset, out=whole[:, 3:8], backend=name)
    assert torch.equal(got, wanted)
    assert got.data_ptr() == whole[:, 3:].data_ptr()
    assert whole[:, :3].isnan().all()
    assert whole[:, 8:].isnan().all()
    with pytest.raises(InputError, match=r"linear: out: expected torch.float32 \[\d, 5, 40\]"):
        linear(x, weight, offset, out=whole)
