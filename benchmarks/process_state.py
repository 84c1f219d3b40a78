"""What code can change of its process for all that runs there after it: PyTorch's settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_gpu: Any = torch.backends.cuda
_cudnn: Any = torch.backends.cudnn
_cpu: Any = torch.backends.mkldnn
SETTINGS: dict[str, Callable[[], object]] = {
    "the number of threads": torch.get_num_threads,
    "the default dtype": torch.get_default_dtype,
    "the mode of gradients": torch.is_grad_enabled,
    "the inference mode": torch.is_inference_mode_enabled,
    "autocast": lambda: [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")],
    "the modes that are entered": lambda: (
        torch._C._len_torch_dispatch_stack(),
        torch._C._len_torch_function_stack(),
    ),
    "deterministic algorithms": torch.get_deterministic_debug_mode,
    "cuDNN's flags": lambda: (_cudnn.enabled, _cudnn.benchmark, _cudnn.deterministic),
    "float32's precision": lambda: [
        part.fp32_precision for part in (_gpu.matmul, _cudnn.conv, _cudnn.rnn, _cpu.matmul, _cpu.conv)
    ],
    "reduced-precision sums": lambda: (
        _gpu.matmul.allow_fp16_reduced_precision_reduction,
        _gpu.matmul.allow_bf16_reduced_precision_reduction,
    ),
    "the library of products": lambda: torch._C._get_blas_preferred_backend(),
    "what attention may use": lambda: (
        _gpu.flash_sdp_enabled(),
        _gpu.mem_efficient_sdp_enabled(),
        _gpu.math_sdp_enabled(),
        _gpu.cudnn_sdp_enabled(),
    ),
    "the rounding of small numbers to zero": lambda: (torch.tensor([2.0**-140]) * 1).item() == 0,
    "the current GPU or its stream": lambda: (
        (torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream) if torch.cuda.is_initialized() else None
    ),
}


def settings() -> dict[str, Any]:
    """Each, as it is now in this thread."""
    return {name: read() for name, read in SETTINGS.items()}


def changed(before: dict[str, Any]) -> str | None:
    """Which of them are not as they were, or None."""
    now = settings()
    return ", ".join(name for name in before if now[name] != before[name]) or None
