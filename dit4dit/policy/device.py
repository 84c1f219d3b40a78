"""Which device a policy runs on."""

from __future__ import annotations

import torch

from dit4dit.errors import BackendError, shown


def pick_device(device: str | torch.device) -> torch.device:
    """The device; BackendError when it is asked for and absent. "auto" is the GPU where there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    unknown = BackendError(f"device {shown(device)}: expected auto, cpu, cuda or cuda:N")
    if not isinstance(device, (str, torch.device)):
        raise unknown
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise unknown from None
    if chosen.type not in ("cpu", "cuda") or (chosen.type == "cpu" and chosen.index):
        raise unknown
    if chosen.type == "cuda" and not torch.cuda.is_available():
        built = "no GPU is visible to it" if torch.version.cuda else "it is a CPU-only build"
        raise BackendError(
            f"device {shown(device)}: PyTorch {torch.__version__} sees no CUDA ({built}); use --device cpu"
        )
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise BackendError(
            f"device {device!r}: {_count(torch.cuda.device_count())} visible; give cuda:N with a smaller N"
        )
    check_process(chosen)
    return chosen


def _count(gpus: int) -> str:
    return "only 1 GPU is" if gpus == 1 else f"only {gpus} GPUs are"


def check_process(device: torch.device) -> None:
    """BackendError in a process that was forked from one that uses the GPU, which CUDA does not support."""
    if device.type == "cuda" and torch.cuda._is_in_bad_fork():
        raise BackendError(
            f"policy on {device}: this process was forked from one that uses the GPU, and CUDA works in no such process; start "
            "it by multiprocessing.get_context('spawn') and load the policy in it, or fork before the first use of the GPU"
        )
