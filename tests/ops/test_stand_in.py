"""Tensors without data stand for a GPU's: implementations are chosen as there, and record their launches in place of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit4dit import ops
from dit4dit.errors import BackendError
from dit4dit.ops import attention_libraries, dispatch, native, stand_in
from dit4dit.ops.aot.launch_record import Launch
from dit4dit.ops.stand_in import StandIn, without_data

META = torch.device("meta")
BF16 = torch.bfloat16


def recorded(gpu: StandIn, call: Any) -> list[Launch]:
    found: list[Launch] = []
    with without_data(StandIn(gpu.architecture, gpu.multiprocessors, record=found.extend)):
        call()
    return found


def rows() -> tuple[torch.Tensor, ...]:
    x = torch.empty(1, 3, 196, 2048, device="meta")
    table = torch.empty(3, 2048, device="meta")
    return x, table


def adaln() -> Any:
    x, table = rows()
    return ops.adaln(x, None, None, table, table, 1e-6, BF16)


def test_our_kernels_record_their_launches_and_give_their_results() -> None:
    (one,) = recorded(StandIn(), adaln)
    assert (one.kernel, one.arguments["rows"]) == ("adaln", 588)
    with without_data():
        _, h = adaln()
    assert (h.device, h.dtype, list(h.shape)) == (META, BF16, [1, 3, 196, 2048])


def test_outside_they_are_refused() -> None:
    x, table = rows()
    with pytest.raises(BackendError, match="x is on meta"):
        ops.adaln(x, None, None, table, table, 1e-6, BF16, backend="triton")
    assert stand_in.of(META) is None
    assert not stand_in.on_gpu(META)
    assert stand_in.on_gpu(torch.device("cuda"))
    assert not stand_in.on_gpu(torch.device("cpu"))


def test_only_tensors_without_data_stand_for_a_gpus() -> None:
    with without_data():
        assert stand_in.of(torch.device("cpu")) is None
        with pytest.raises(BackendError, match="cpu"):
            ops.adaln(torch.zeros(1, 1, 2, 64), None, None, None, None, 1e-6, BF16, backend="triton")


def test_an_old_gpu_is_refused_as_it_would_be_there() -> None:
    x, table = rows()
    with pytest.raises(BackendError, match=r"needs compute capability 8\.0"), without_data(StandIn("75")):
        ops.adaln(x, None, None, table, table, 1e-6, BF16, backend="triton")
    q = torch.empty(1, 16, 128, 128, dtype=BF16, device="meta")
    with without_data(StandIn("75")):
        assert attention_libraries.refuse_cudnn(q, 128) == "it needs compute capability 8.0 or later"
    with without_data(StandIn("90")):
        assert attention_libraries.refuse_cudnn(q, 128) is None
        assert "not known whether flash-attn is installed" in (attention_libraries.refuse_flash(q, 128) or "")
    assert attention_libraries.refuse_cudnn(q, 128) == "the tensors are on meta"


def test_tiles_are_those_of_the_architecture() -> None:
    qkv = torch.empty(1, 588, 6144, dtype=BF16, device="meta")
    tiles = {
        name: recorded(StandIn(name), lambda: ops.self_attention(qkv, None, None, None, 16, 1e-5, backend="triton"))[
            -1
        ].tile
        for name in ("80", "90")
    }
    assert tiles["80"] != tiles["90"]


def test_what_runs_only_where_it_was_measured_waits_there_too() -> None:
    x = torch.empty(1, 588, 2048, dtype=BF16, device="meta")
    weight = torch.empty(8192, 2048, dtype=BF16, device="meta")
    with without_data():
        chosen, refused = dispatch.find("linear_gelu").choose((x, weight, None, "none"))
    assert chosen is not None
    assert chosen.name == "torch"
    assert "no measurement here chooses it" in refused["triton"]


def test_preprocess_records_the_grid_of_its_kernel() -> None:
    views = [torch.empty(2, 480, 640, 3, dtype=torch.uint8, device="meta") for _ in range(2)]
    (one,) = recorded(StandIn(), lambda: ops.preprocess(views, (224, 200), "cv2_area", BF16))
    assert (one.kernel, one.grid) == ("preprocess.cu", (13, 28, 2)), "blocks of 32 x 8 over 400 x 224, for each request"
    assert set(one.arguments) == {"view0", "view1", "out"}


def test_a_build_without_cuda_predicts_one_that_has_it() -> None:
    with without_data():
        assert native.no_cuda_kernels(META) is None
