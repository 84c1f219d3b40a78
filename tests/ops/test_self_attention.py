"""self_attention: every implementation that runs here against the reference, sizes odd and as the model has them."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from attention_emulator import AttentionEmulator
from dit4dit.benchmarks.harness import assert_no_worse
from emulator import needs_compiler

from dit4dit import _C, ops
from dit4dit.errors import BackendError
from dit4dit.ops import self_attention
from dit4dit.ops.self_attention import _refuse_cuda, queries_a_block, reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def make(batch, length, heads, dim, dtype, *, norm=True, rope=True, halves=False):
    """halves: each half of a head turns by angles of its own."""
    generator = torch.Generator().manual_seed(length * dim)
    angles = torch.randn(length, dim if halves else dim // 2, generator=generator)
    weight = (1 + 0.2 * torch.randn(2, dim, generator=generator)).to(dtype)
    return (
        (2 * torch.randn(batch, length, 3 * heads * dim, generator=generator)).to(dtype),
        weight[0] if norm else None,
        weight[1] if norm else None,
        torch.stack([angles.cos(), angles.sin()]) if rope else None,
        heads,
        1e-5,
    )


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ((1, 1, 1, 16), {}),
        ((2, 67, 2, 32), {}),
        ((1, 131, 1, 128), {}),
        ((1, 40, 1, 128), dict(halves=True)),
        ((1, 128, 1, 64), {}),  # no ragged block of keys
        ((2, 9, 2, 64), dict(norm=False, rope=False)),
        ((1, 17, 3, 64), dict(norm=False, rope=False)),
        ((1, 51, 2, 48), dict(norm=False, rope=False)),
    ],
)
def test_triton(triton_op, sizes, parts, dtype):
    args = make(*sizes, dtype, **parts)
    assert_no_worse(partial(triton_op, "self_attention"), reference, args, float32_limit=1e-5)


@pytest.mark.parametrize("tiles", ["80", "interpreter"])
def test_triton_with_other_tiles(interpreter, tiles):
    args = make(1, 150, 2, 32, BF16)
    assert_no_worse(partial(interpreter, "self_attention", tiles=tiles), reference, args)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton", "cudnn", "flash"])
@pytest.mark.parametrize("sizes", [(1, 588, 16, 128), (1, 784, 16, 128), (2, 17, 12, 64)])
def test_on_a_gpu_at_full_size(backend, sizes):
    args = [x.cuda() if isinstance(x, torch.Tensor) else x for x in make(*sizes, BF16)]
    try:
        self_attention(*args, backend=backend)
    except BackendError as error:
        pytest.skip(str(error))
    assert_no_worse(partial(self_attention, backend=backend), reference, args)


def test_gradients():
    qkv, norm_q, norm_k, rotary, heads, eps = make(1, 3, 2, 4, torch.float64)
    tensors = [x.requires_grad_() for x in (qkv, norm_q, norm_k)]
    assert torch.autograd.gradcheck(lambda *x: self_attention(*x, rotary.double(), heads, eps), tensors)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("triton", "qkv is on cpu"),
        ("cuda", "qkv is on cpu"),
        ("cudnn", "the tensors are on cpu"),
        ("flash", "the tensors are on cpu"),
    ],
)
def test_a_wish_that_cannot_be_met_raises(backend, message):
    with pytest.raises(BackendError, match=f"self_attention: '{backend}' refused: {message}"):
        self_attention(*make(1, 3, 1, 16, F32), backend=backend)


# -- the CUDA kernel, run on this CPU: kernels/self_attention.cuh compiled by the host's compiler, for two kinds of chips ------

KERNELS = Path(__file__).parents[2] / "kernels"
VARIANTS = ["copies", "warpgroups"]  # mma.sync, and wgmma of sm_90a


@pytest.fixture(scope="module", params=VARIANTS)
def emulated(request, tmp_path_factory):
    return AttentionEmulator(request.param, tmp_path_factory.mktemp("emulated"))


@needs_compiler
@pytest.mark.parametrize("queries", [64, 128])
@pytest.mark.parametrize("batch,heads", [(2, 1), (1, 2)])
@pytest.mark.parametrize("length", [1, 16, 63, 64, 65, 130])
def test_cuda_by_emulation(emulated, batch, heads, length, queries):
    args = make(batch, length, heads, 128, BF16)
    assert_no_worse(partial(emulated, queries=queries), reference, args)


@needs_compiler
@pytest.mark.parametrize("parts", [dict(norm=False), dict(rope=False), dict(norm=False, rope=False)], ids=str)
def test_cuda_without_norm_or_rotation(emulated, parts):
    qkv, *rest = make(2, 70, 2, 128, BF16, **parts)
    if not parts.get("norm", True):
        qkv = qkv / 4  # scores of the size that norms would give
    assert_no_worse(emulated, reference, (qkv, *rest))


@needs_compiler
def test_cuda_with_weights_in_float32(emulated):
    qkv, norm_q, norm_k, *rest = make(1, 70, 2, 128, BF16)
    args = (qkv, norm_q.float() * 1.001, norm_k.float() * 0.999, *rest)
    assert_no_worse(emulated, reference, args)


@needs_compiler
def test_cuda_where_scores_grow_from_tile_to_tile(emulated):
    """What was summed before must fade; and the largest scores are far from zero."""
    qkv, *rest = make(1, 200, 1, 128, BF16, norm=False, rope=False)
    grown = qkv * torch.linspace(0.1, 2, 200).bfloat16()[None, :, None]
    assert_no_worse(emulated, reference, (grown, *rest))
    assert_no_worse(emulated, reference, (grown.flip(1), *rest))


@needs_compiler
def test_cuda_nan_reaches_its_sample_and_head_alone(emulated):
    qkv, *rest = make(2, 66, 2, 128, BF16)
    qkv[1, 65, 2 * 128] = float("nan")  # k of head 0
    assert_no_worse(emulated, reference, (qkv, *rest))


@needs_compiler
@pytest.mark.parametrize("length", [588, 784])
def test_cuda_at_full_length(emulated, length):
    assert_no_worse(emulated, reference, make(1, length, 1, 128, BF16))


@needs_compiler
def test_cuda_same_bits_in_any_order_and_for_any_block(emulated):
    args = make(2, 130, 1, 128, BF16)
    want = emulated(*args)
    assert torch.equal(emulated(*args, seed=1), want)
    assert torch.equal(emulated(*args, queries=128, seed=2), want)


MUTANTS = {
    "copies: a tile is read before it is there": ("wait_copies<1>()", "wait_copies<2>()"),
    "copies: a tile is filled while it is read": ("fetch(index + 2);", "fetch(index + 3);"),
    "copies: no sync after a tile is there": ("        sync_block();\n        fetch(index", "        fetch(index"),
    "copies: no sync after the norm": (
        "#endif\n        sync_block();\n    }\n    DEVICE std::uint8_t* piece",
        "#endif\n    }\n    DEVICE std::uint8_t* piece",
    ),
    "copies: no sync before the end": ("        sync_block();  // all have read the last values\n", ""),
    "copies: no mask": (">= count) scores[j][i] = -INFINITY", ">= count + 1) scores[j][i] = -INFINITY"),
    "copies: nothing fades": ("values[j][2 * half + e] *= fade;", "values[j][2 * half + e] *= 1;"),
    "copies: the sine has the other sign": ("first * cosine.v[i] - second", "first * cosine.v[i] + second"),
    "copies: angles of the tile before": ("load(angles, key + kRows)", "load(angles, key)"),
    "copies: angles of the rows before": ("load(next, first, begin + kAtOnce)", "load(next, first, begin)"),
    "copies: a row too many": ("if (query < request_.length)", "if (query < request_.length + 1)"),
    "copies: rows past the end are copied": ("const bool there = begin + row < length", "const bool there = true"),
    "warpgroups: strides of keys exchanged": ("step * 16), kGroupBytes, 128)", "step * 16), 128, kGroupBytes)"),
    "warpgroups: strides of values exchanged": (
        "row(j * 16, 0), 128, kGroupBytes)",
        "row(j * 16, 0), kGroupBytes, 128)",
    ),
}


@needs_compiler
@pytest.mark.parametrize("name", MUTANTS)
def test_the_emulation_sees_faults_in_the_kernel(name, tmp_path):
    """What it is worth: each of these changes of the kernel gives an error or a wrong result."""
    old, new = MUTANTS[name]
    kernels = Path(shutil.copytree(KERNELS, tmp_path / "kernels"))
    changed = kernels / "self_attention.cuh"
    assert changed.read_text().count(old) == 1, "the kernel no longer says this"
    changed.write_text(changed.read_text().replace(old, new))
    run = AttentionEmulator(name.partition(":")[0], tmp_path, kernels)
    # 130: the last values lie where the result goes through; 3: one key more would weigh much
    for length, seed in ((130, 0), (130, 1), (130, 2), (3, 0)):
        try:
            assert_no_worse(partial(run, seed=seed), reference, make(1, length, 1, 128, BF16))
        except (AssertionError, RuntimeError):
            return
    pytest.fail("nothing was seen")


# -- the choice -----------------------------------------------------------------------------------------------------------


def test_queries_a_block():
    """On an H200: 160 blocks of 64 for one GR1 sample, blocks of 128 where there are many."""
    assert queries_a_block(588, 16, 132) == queries_a_block(784, 16, 132) == 64
    assert queries_a_block(588, 4 * 16, 132) == 128
    assert queries_a_block(1, 1, 132) == 64


def test_cuda_is_not_chosen_by_itself():
    (found,) = ops.explain("self_attention")
    assert found.refused["cuda"] == "qkv is on cpu"
    assert ops.implementations("self_attention")[0] == "cuda"


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(dtype=F32), "qkv is torch.float32, not bfloat16"),
        (dict(dim=64), "heads of 64; it takes 128"),
        (dict(address=4104), "qkv: its rows do not begin at multiples of 16 bytes"),
        (dict(step=2), "qkv: its rows do not begin at multiples of 16 bytes, or are not dense"),
        (dict(norm=F16), "norm_q is torch.float16 and norm_k torch.float16, not both float32 or both bfloat16"),
        (dict(angles=128), r"rotary has angles for 128 columns; it takes 64, by which both halves turn"),
        (dict(table=BF16), "rotary is torch.bfloat16, not float32"),
        (dict(grad=True), "norm_q needs a gradient"),
        ({}, None),
    ],
    ids=str,
)
def test_what_cuda_refuses(change, message, monkeypatch):
    monkeypatch.setattr("dit4dit.ops.native.no_cuda_kernels", lambda device: None)
    get = {**dict(dtype=BF16, dim=128, step=1, norm=BF16, angles=64, table=F32, grad=False, address=4096), **change}
    qkv = torch.empty(2, 9, get["step"] * 3 * get["dim"], dtype=get["dtype"], device="meta")[..., :: get["step"]]
    norm = torch.empty(get["dim"], dtype=get["norm"], device="meta", requires_grad=get["grad"])
    rotary = torch.empty(2, 9, get["angles"], dtype=get["table"], device="meta")
    qkv, norm, rotary = (as_if_on_a_gpu(x, get["address"]) for x in (qkv, norm, rotary))
    found = _refuse_cuda(qkv, norm, norm, rotary, 1, 1e-5)
    assert (found is None) if message is None else found.startswith(message)


def as_if_on_a_gpu(x, address):
    """What `_refuse_cuda` asks of a tensor."""
    facts = dict(dtype=x.dtype, shape=x.shape, stride=x.stride, is_contiguous=x.is_contiguous)
    return SimpleNamespace(
        device=torch.device("cuda:0"), requires_grad=x.requires_grad, data_ptr=lambda: address, **facts
    )


@pytest.mark.gpu
def test_cuda_is_not_chosen_by_itself_on_a_gpu():
    (found,) = ops.explain("self_attention", "cuda")
    assert found.chosen != "cuda"
    assert found.refused["cuda"].startswith("no measurement here chooses it: run dit4dit tune")


def tensor(*shape, dtype="bfloat16", address=4096, device="cuda:0", strides=None):
    """A tensor as the launcher takes it; the address is never followed."""
    return address, shape, strides or torch.empty(shape, device="meta").stride(), dtype, device


QKV, NORM, OUT = tensor(2, 9, 3 * 256), tensor(128), tensor(2, 9, 256, address=1 << 20)
F32_NORM = tensor(128, dtype="float32")


@pytest.mark.cuda_build
@pytest.mark.parametrize(
    "change,error,message",
    [
        (dict(qkv=tensor(2, 9, 768, dtype="float16")), TypeError, "qkv: expected bfloat16, got float16"),
        (dict(heads=3), ValueError, r"qkv: expected shape \[-1, -1, 1152\] .*, got \[2, 9, 768\]"),
        (dict(heads=0), ValueError, "heads: expected at least 1, got 0"),
        (dict(qkv=tensor(2, 9, 768, address=4104)), ValueError, "qkv: expected an address that is a multiple of 16"),
        (
            dict(qkv=tensor(2, 9, 768, strides=(9 * 772, 772, 1))),
            ValueError,
            r"qkv: expected strides that are multiples of 8, the last one 1, got \[6948, 772, 1\]",
        ),
        (dict(qkv=tensor(2, 9, 768, device="cpu")), ValueError, "qkv: expected device cuda:0, got cpu"),
        (dict(out=tensor(2, 8, 256)), ValueError, r"out: expected shape \[2, 9, 256\] .*, got \[2, 8, 256\]"),
        (dict(out=tensor(2, 9, 256, device="cpu")), ValueError, "out: expected a cuda device such as cuda:0, got cpu"),
        (dict(out=tensor(2, 9, 256, strides=(2304, 0, 1))), ValueError, "out: expected elements that do not overlap"),
        (dict(norm_k=None), ValueError, "norm_k: expected norm_q and norm_k, or neither, got one"),
        (dict(norm_q=tensor(64)), ValueError, r"norm_q: expected shape \[128\] .*, got \[64\]"),
        (dict(norm_q=tensor(128, dtype="float16")), TypeError, "norm_q: expected float32 or bfloat16, got float16"),
        (dict(norm_k=F32_NORM), TypeError, "norm_k: expected bfloat16, got float32"),
        (dict(rotary=tensor(2, 8, 128, dtype="float32")), ValueError, r"rotary: expected shape \[2, 9, 64\]"),
        (dict(rotary=tensor(2, 9, 128, dtype="float32")), ValueError, r"rotary: expected shape \[2, 9, 64\]"),
        (dict(rotary=tensor(2, 9, 64)), TypeError, "rotary: expected float32, got bfloat16"),
        (dict(queries=32), ValueError, "queries: expected 64 or 128, got 32"),
        (dict(out=tensor(2, 9, 256)), ValueError, "out: expected memory of its own, got some that qkv lies in"),
        (
            dict(norm_k=tensor(128, address=(1 << 20) + 16)),
            ValueError,
            "out: expected memory of its own, got some that norm_k lies in",
        ),
        (dict(eps=1e300), ValueError, r"eps: expected a number that a float holds, got 1e\+300"),
        (
            dict(heads=2**31),
            ValueError,
            "heads: expected a whole number from -2147483648 to 2147483647, got 2147483648",
        ),
        (dict(stream=-1), ValueError, "stream: expected a whole number from 0 to"),
        (dict(norm_q=0), TypeError, r"norm_q: expected an array or \(address, .*, got 0"),
        (dict(qkv=tensor(2, 9)), ValueError, r"qkv: expected shape \[-1, -1, 768\]"),
    ],
)
def test_the_launcher_refuses(change, error, message):
    given = dict(qkv=QKV, norm_q=NORM, norm_k=NORM, rotary=None, out=OUT, heads=2, eps=1e-5, queries=64, stream=0)
    with pytest.raises(error, match=message):
        _C.self_attention_cuda(**given | change)


# -- on a GPU ----------------------------------------------------------------------------------------------------------------


def on_gpu(args):
    return [x.cuda() if isinstance(x, torch.Tensor) else x for x in args]


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 16, 63, 64, 65, 130])
@pytest.mark.parametrize("many", [False, True], ids=["blocks of 64", "blocks of 128"])
def test_cuda_on_a_gpu(length, many):
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    batch = 2 * multiprocessors if many else 2
    assert queries_a_block(length, batch, multiprocessors) == (128 if many else 64)
    args = on_gpu(make(batch, length, 1, 128, BF16))
    assert_no_worse(partial(self_attention, backend="cuda"), reference, args)


@pytest.mark.gpu
@pytest.mark.capture
def test_cuda_replays_on_a_gpu_give_the_same_bits():
    args = on_gpu(make(1, 588, 16, 128, BF16))
    want = self_attention(*args, backend="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = self_attention(*args, backend="cuda")
    for _ in range(1000):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, want)
