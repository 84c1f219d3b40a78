"""float32 that is float32, however PyTorch was told otherwise; and the caller's settings afterwards."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from waiting import WAIT

from dit4dit.model.precision import full_precision

CUDA, CUDNN, CPU = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
PLACES = (torch.backends, CUDA.matmul, CUDNN.conv, CUDNN.rnn, CPU.matmul, CPU.conv)


def settings() -> tuple[str, ...]:
    return tuple(place.fp32_precision for place in PLACES)


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    old, before = torch.get_float32_matmul_precision(), settings()
    yield
    torch.set_float32_matmul_precision(old)
    CUDNN.allow_tf32 = "tf32" in before[2:4]
    for place, value in zip(PLACES, before, strict=True):
        place.fp32_precision = value


@pytest.mark.parametrize("old", ["highest", "high", "medium"])
@pytest.mark.parametrize("allowed", [True, False])
def test_settings_by_their_old_names(old: str, allowed: bool) -> None:
    torch.set_float32_matmul_precision(old)
    CUDNN.allow_tf32 = allowed
    CUDNN.conv.fp32_precision = CUDNN.rnn.fp32_precision = "tf32" if allowed else "ieee"
    before = settings()
    with full_precision():
        assert set(settings()[1:]) == {"ieee"}
        assert torch.get_float32_matmul_precision() == "highest"
        assert (CUDNN.allow_tf32, CUDA.matmul.allow_tf32) == (False, False)
    assert settings() == before
    assert (torch.get_float32_matmul_precision(), CUDNN.allow_tf32) == (old, allowed)


@pytest.mark.parametrize(("conv", "rnn"), [("ieee", "tf32"), ("tf32", "ieee"), ("none", "none")])
@pytest.mark.parametrize(("product", "cpu"), [("tf32", "none"), ("ieee", "bf16"), ("none", "tf32")])
def test_settings_by_their_new_names(conv: str, rnn: str, product: str, cpu: str) -> None:
    """Also at odds with the old ones, which then cannot be read."""
    CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision = conv, rnn
    CUDA.matmul.fp32_precision, CPU.matmul.fp32_precision, CPU.conv.fp32_precision = product, cpu, cpu
    before = settings()
    with full_precision():
        assert set(settings()[1:]) == {"ieee"}
    assert settings() == before
    with pytest.raises(ValueError, match="in the middle"), full_precision():
        raise ValueError("in the middle")
    assert settings() == before


def test_what_followed_the_setting_above_it_still_does() -> None:
    """Products do where nobody has set them: they must not stay TF32 when that one is put back."""
    for place in (CUDA.matmul, CPU.matmul, CPU.conv):
        place.fp32_precision = "none"
    torch.backends.fp32_precision = "tf32"
    before = settings()
    with full_precision():
        assert set(settings()[1:]) == {"ieee"}
    assert settings() == before
    torch.backends.fp32_precision = "none"
    assert (CUDA.matmul.fp32_precision, CPU.matmul.fp32_precision, CPU.conv.fp32_precision) == ("none",) * 3


def test_the_callers_settings_are_back_when_the_last_guard_closes() -> None:
    torch.set_float32_matmul_precision("high")
    before = settings()
    inside, release = threading.Event(), threading.Event()

    def other() -> None:
        with full_precision():
            inside.set()
            release.wait(WAIT)

    thread = threading.Thread(target=other)
    with full_precision():
        thread.start()
        assert inside.wait(WAIT)
    assert set(settings()[1:]) == {"ieee"}, "another thread is still at it"
    assert (torch.get_float32_matmul_precision(), CUDNN.allow_tf32) == ("highest", False)
    release.set()
    thread.join(WAIT)
    assert settings() == before
    assert (torch.get_float32_matmul_precision(), CUDNN.allow_tf32) == ("high", True)
