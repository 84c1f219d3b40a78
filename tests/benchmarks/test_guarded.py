"""Outputs between guard bands in poisoned memory: whatever function of torch's they come from."""

from __future__ import annotations

import ctypes

import pytest
import torch
from dit4dit.benchmarks.guarded import BAND, NAN, Guarded, OutOfBounds
from torch import Tensor

like = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
strided = torch.empty_strided((4, 6), (16, 2))
EMPTY = {
    "empty": lambda dtype: torch.empty(3, 5, dtype=dtype),
    "empty, no dimension": lambda dtype: torch.empty((), dtype=dtype),
    "empty, channels last": lambda dtype: torch.empty(2, 3, 4, 5, dtype=dtype, memory_format=torch.channels_last),
    "empty_like": lambda dtype: torch.empty_like(like, dtype=dtype),
    "empty_like, strided": lambda dtype: torch.empty_like(strided.to(dtype)),
    "empty_strided": lambda dtype: torch.empty_strided((4, 6), (16, 2), dtype=dtype),
    "empty_permuted": lambda dtype: torch.empty_permuted((2, 3, 4), (2, 0, 1), dtype=dtype),
    "new_empty": lambda dtype: like.new_empty((7, 3), dtype=dtype),
    "new_empty_strided": lambda dtype: like.new_empty_strided((4, 6), (1, 8), dtype=dtype),
}
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SMALL = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
WHOLE = (torch.int8, torch.int32, torch.int64)


def poke(address: int) -> None:
    byte = ctypes.c_ubyte.from_address(address)
    byte.value ^= 0x10


@pytest.mark.parametrize("dtype", [*FLOATS, *SMALL, *WHOLE, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("name", EMPTY)
def test_memory_without_data_is_poisoned_between_bands(name: str, dtype: torch.dtype) -> None:
    make = EMPTY[name]
    plain = make(dtype)
    with Guarded() as memory:
        got = make(dtype)
    assert (got.shape, got.stride(), got.dtype) == (plain.shape, plain.stride(), dtype)
    assert (got.storage_offset(), got.untyped_storage().nbytes()) == (0, plain.untyped_storage().nbytes())
    assert got.data_ptr() % 64 == 0, "as aligned as torch's own"
    if dtype.is_floating_point:
        assert got.float().isnan().all()
    elif dtype != torch.bool:
        assert got.eq(255 if dtype == torch.uint8 else -1).all()
    memory.check()


@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize("where", ["before", "behind"])
@pytest.mark.parametrize("far", [0, BAND - 1])
def test_a_byte_outside_is_found(name: str, where: str, far: int) -> None:
    with Guarded() as memory:
        got = EMPTY[name](torch.bfloat16)
        size = got.untyped_storage().nbytes()
        poke(got.data_ptr() + (-1 - far if where == "before" else size + far))
    with pytest.raises(OutOfBounds, match=rf"1 bytes {where} a tensor \(bfloat16 \["):
        memory.check()


def test_the_bytes_inside_may_be_written() -> None:
    with Guarded() as memory:
        out = torch.empty(3, 5, dtype=torch.bfloat16)
        out.fill_(2)
        poke(out.data_ptr())
        poke(out.data_ptr() + out.nbytes - 1)
    memory.check()


@pytest.mark.parametrize("poison", [NAN, 0x5A, 0x00])
def test_what_is_poison_is_chosen(poison: int) -> None:
    with Guarded(poison):
        out = torch.empty(5, dtype=torch.float64)
    assert out.view(torch.uint8).eq(poison).all()


FILLED = {
    "zeros": lambda: torch.zeros(3, 5),
    "zeros_like": lambda: torch.zeros_like(like),
    "new_zeros": lambda: like.new_zeros(3, 5),
    "ones": lambda: torch.ones(3, 5),
    "ones_like": lambda: torch.ones_like(like),
    "new_ones": lambda: like.new_ones(3, 5),
    "full": lambda: torch.full((3, 5), 7.0),
    "full_like": lambda: torch.full_like(like, 7.0),
    "new_full": lambda: like.new_full((3, 5), 7.0),
}


@pytest.mark.parametrize("name", FILLED)
def test_memory_with_data_keeps_it_between_bands(name: str) -> None:
    plain = FILLED[name]()
    with Guarded() as memory:
        got: Tensor = FILLED[name]()
        assert torch.equal(got, plain)
        assert got.stride() == plain.stride()
        poke(got.data_ptr() + got.nbytes)
    with pytest.raises(OutOfBounds, match="behind"):
        memory.check()


def test_nothing_of_no_elements_and_nothing_without_data_is_touched() -> None:
    with Guarded() as memory:
        assert torch.empty(0, 3).shape == (0, 3)
        assert torch.empty(2, 3, device="meta").is_meta
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2), out=torch.empty(0)).eq(2).all()
    memory.check()


def test_memory_is_the_tensors_after_the_guard() -> None:
    with Guarded() as memory:
        out = torch.empty(1000)
        out.fill_(3)
    memory.check()
    del memory
    torch.empty(100_000).fill_(5)
    assert out.eq(3).all()


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    with Guarded() as memory:
        out = torch.empty(3, 5, dtype=torch.bfloat16, device="cuda")
        assert out.isnan().all()
        assert out.data_ptr() % 256 == 0
    memory.check()
    with Guarded() as memory:
        out = torch.empty(3, 5, dtype=torch.bfloat16, device="cuda")
        behind = memory._buffers[0][0][BAND + out.nbytes :]
        behind[0] ^= 1
    with pytest.raises(OutOfBounds, match="1 bytes behind"):
        memory.check()
