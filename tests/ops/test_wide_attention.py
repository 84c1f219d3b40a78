"""Attention of heads wider than 128: both implementations against the reference of self_attention."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from dit4dit.benchmarks import kernels
from dit4dit.benchmarks.harness import assert_no_worse

from dit4dit import ops
from dit4dit.aot_build.compiler import compiled, resources
from dit4dit.errors import BackendError
from dit4dit.ops import launch, self_attention, stand_in, tiles
from dit4dit.ops.aot.specialization import Specialization
from dit4dit.ops.self_attention import reference
from dit4dit.ops.wide_attention import MOST_SCORES, launches, refuse_product

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def make(batch, length, heads, dim, dtype, *, scale=1.0):
    generator = torch.Generator().manual_seed(length + dim)
    qkv = torch.randn(batch, length, 3 * heads * dim, generator=generator)
    qkv[..., : 2 * heads * dim] *= scale
    return qkv.to(dtype), None, None, None, heads, 1e-5


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(
    ("sizes", "architecture"),
    [
        ((1, 1, 1, 384), "90"),
        ((1, 70, 1, 384), "90"),  # one part: the keys are not split
        ((1, 97, 1, 384), "90"),  # two, the second one of one key
        ((1, 400, 1, 384), "interpreter"),  # parts of two blocks of keys and a half
        ((1, 200, 1, 384), "89"),  # the tiles of small shared memory
        ((1, 230, 1, 512), "90"),  # three, four slices of the head
        ((2, 45, 1, 256), "90"),
        ((3, 33, 2, 160), "90"),  # the second slice is a quarter full; several heads
        ((1, 100, 1, 400), "90"),  # the fourth slice is an eighth full, two parts
    ],
)
def test_split(triton_op, sizes, architecture, dtype):
    args = make(*sizes, dtype)
    fn = partial(triton_op, "self_attention", backend="split", tiles=architecture)
    assert_no_worse(fn, reference, args, float32_limit=1e-5)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 384), (1, 97, 1, 384), (3, 33, 2, 160), (1, 50, 1, 640)])
def test_product(sizes, dtype):
    args = make(*sizes, dtype)
    fn = partial(self_attention, backend="product")
    assert_no_worse(fn, reference, args, float32_limit=1e-5)


def test_both_bear_scores_that_are_large(triton_op):
    """No norms keep the VAE's scores small; rounded to bfloat16 before the softmax they would be off by whole weights."""
    args = make(1, 130, 1, 384, BF16, scale=4.0)
    assert_no_worse(partial(self_attention, backend="product"), reference, args)
    assert_no_worse(partial(triton_op, "self_attention", backend="split"), reference, args)


def test_split_reads_out_of_a_larger_matrix_and_nothing_else_of_it(triton_op):
    args = make(2, 40, 1, 384, BF16)
    buffer = torch.full((2, 44, 3 * 384 + 64), float("nan"), dtype=BF16)
    qkv = buffer[:, 3:43, 32:-32]
    qkv.copy_(args[0])
    assert_no_worse(partial(triton_op, "self_attention", backend="split"), reference, (qkv, *args[1:]))


def test_split_gives_the_same_bits_again(triton_op):
    args = make(1, 230, 1, 384, BF16)
    first, second = (triton_op("self_attention", *args, backend="split") for _ in range(2))
    assert torch.equal(first, second)


def meta(*sizes, dtype=BF16):
    qkv, *rest = make(*sizes, dtype)
    return (qkv.to("meta"), *rest)


@pytest.mark.parametrize(("length", "grid", "parts"), [(784, (13, 1, 9), 9), (1568, (25, 1, 5), 5)])
def test_one_image_has_its_keys_split(length, grid, parts):
    todo, out = launches(meta(1, length, 1, 384), "90")
    assert [step.kernel for step in todo] == ["wide_attention", "cross_attention.combine"]
    assert todo[0].grid == grid
    assert todo[1].arguments["splits"] == parts
    assert out.shape == (1, length, 384)


def test_a_batch_fills_the_gpu_without_a_split():
    (only,), _ = launches(meta(16, 784, 1, 384), "90")
    assert only.grid == (13, 16, 1)
    assert only.tile["SPAN"] == 0


def test_a_batch_is_read_sample_by_sample(triton_op):
    """Hopper's tiles for many images take the keys whole."""
    args = make(3, 130, 1, 384, BF16)
    assert tiles.lookup("wide_attention", "90", length=130, dim=384, heads=3)["SPAN"] == 0
    assert_no_worse(partial(triton_op, "self_attention", backend="split"), reference, args)


@pytest.mark.parametrize("backend", ["split", "product"])
def test_what_neither_takes(monkeypatch, backend):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    qkv, *_ = make(1, 8, 1, 384, BF16)
    norm = torch.ones(384, dtype=BF16)
    rotary = torch.zeros(2, 8, 192)
    for args, message in (
        ((qkv, norm, norm, None, 1, 1e-5), "without norms and positions"),
        ((qkv, None, None, rotary, 1, 1e-5), "without norms and positions"),
        ((qkv, None, None, None, 3, 1e-5), "heads of 128; it takes more than 128"),
        ((qkv.float().requires_grad_(), None, None, None, 1, 1e-5), "qkv needs a gradient"),
    ):
        with pytest.raises(BackendError, match=f"'{backend}' refused: .*{message}"):
            self_attention(*args, backend=backend)


def test_what_split_does_not_take(monkeypatch):
    with pytest.raises(BackendError, match="qkv is on cpu, where Triton runs only with TRITON_INTERPRET=1"):
        self_attention(*make(1, 8, 1, 384, BF16), backend="split")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendError, match="heads of 514; it takes more than 128, at most 512"):
        self_attention(*make(1, 8, 1, 514, BF16), backend="split")
    with pytest.raises(BackendError, match=r"qkv is torch\.float64"):
        self_attention(*make(1, 8, 1, 384, torch.float64), backend="split")
    with stand_in.without_data(), pytest.raises(BackendError, match="float32 products run without tensor cores"):
        self_attention(*meta(1, 8, 1, 384, dtype=F32), backend="split")


@pytest.mark.parametrize(
    ("batch", "length", "fits"), [(13, 784, True), (14, 784, False), (3, 1568, True), (4, 1568, False)]
)
def test_product_bounds_its_scores(batch, length, fits):
    qkv = torch.empty(batch, length, 3 * 384, dtype=BF16, device="meta")
    reason = refuse_product(qkv, None, None, None, 1, 1e-5)
    assert (reason is None) == fits
    if not fits:
        assert reason == f"{batch * length**2} scores; it takes at most {MOST_SCORES}, which stay in the L2 cache"


def test_product_multiplies_in_the_dtype_that_it_is_given_where_the_library_can():
    """On the meta device, asked in a GPU's place: bfloat16 in, float32 scores, bfloat16 out, no operand made float32."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.softmax, torch.ops.aten._softmax):
                seen.append((args[0].dtype, out.dtype))
            return out

    with Names():
        out = self_attention(*meta(1, 784, 1, 384), backend="product")
    assert seen == [(BF16, F32), (F32, F32), (BF16, BF16)]
    assert out.shape == (1, 784, 384)


@pytest.mark.kernels
@pytest.mark.skipif(launch.interpreting(), reason="a process with TRITON_INTERPRET=1 cannot compile")
@pytest.mark.parametrize("capability", kernels.SHARED_MEMORY)
def test_heads_of_512_compile(capability):
    """No released model has any. Triton makes a kernel that needs too much tensor memory a trap, and says nothing."""
    pytest.importorskip("triton")
    step = launches(meta(1, 784, 1, 512), str(capability))[0][0]
    kernel = compiled(Specialization.of(step), capability)
    found = resources(kernel.asm["cubin"])
    assert found["stack"] + found["local"] == 0
    assert kernel.metadata.shared <= kernels.SHARED_MEMORY[capability]
    assert kernels.products(kernel.asm["ptx"])


@pytest.mark.kernels
@pytest.mark.skipif(launch.interpreting(), reason="a process with TRITON_INTERPRET=1 cannot compile")
@pytest.mark.parametrize(("batch", "length", "dim"), [(1, 784, 384), (1, 1568, 384), (16, 784, 384), (1, 784, 512)])
def test_it_fits_where_8_6_has_less_shared_memory_than_8_0(batch, length, dim):
    """An RTX 30 or A10 has what 8.9 has, not the A100's; a kernel that needs more cannot be launched."""
    pytest.importorskip("triton")
    step = launches(meta(batch, length, 1, dim), "86")[0][0]
    assert compiled(Specialization.of(step), 86).metadata.shared <= kernels.SHARED_MEMORY[89]


def test_neither_runs_unless_asked_for():
    with ops.trace() as ran:
        self_attention(*make(1, 8, 1, 384, BF16))
    assert ran == {"self_attention": {"torch"}}
