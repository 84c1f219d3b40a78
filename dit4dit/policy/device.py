"""Which device a policy runs on."""

from __future__ import annotations

import torch

from dit4dit.errors import BackendError, shown


def pick_device(device: str | torch.device) -> torch.device:
    """The device; BackendError when it is asked for and absent. "auto" is the GPU where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise BackendError(f"device {shown(device)}: expected auto, cpu, cuda or cuda:N") from None
    if chosen.type not in ("cpu", "cuda"):
        raise BackendError(f"device {shown(device)}: expected auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        built = "no GPU is visible to it" if torch.version.cuda else "it is a CPU-only build"
        raise BackendError(
            f"device {shown(device)}: PyTorch {torch.__version__} sees no CUDA ({built}); use --device cpu"
        )
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise BackendError(f"device {shown(device)}: only {torch.cuda.device_count()} GPUs are visible")
    return chosen
