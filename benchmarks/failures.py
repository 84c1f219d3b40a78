"""What a contender that raises costs: its own row, and where it takes the GPU with it, this process."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from typing import Any

import torch
from dit4dit.benchmarks.recording import Recording

NO_TIME = {"left_out": "no time was left", "cut": True}
GPU_LOST = 3
"""Exit code after the GPU was lost: what is left needs a new process."""


class GpuLost(SystemExit):
    """The GPU takes nothing from this process any more; no `except Exception` of one contender keeps it."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = GPU_LOST


class Rows:
    """The rows of one case, each in the file as soon as it is there."""

    def __init__(self, record: Recording, op: str, case: str) -> None:
        self.record, self._common = record, {"op": op, "case": case}

    def add(self, implementation: str, row: dict[str, Any]) -> None:
        """A row; GpuLost where it says that something failed and the GPU has not survived it."""
        self.record.result["rows"].append({**self._common, "implementation": implementation, **row})
        self.record.keep()
        if row.get("failed"):
            check_gpu(f"{self._common['op']} {self._common['case']} {implementation}: {row['left_out']}")


def check_gpu(what: str) -> None:
    """GpuLost unless the GPU still works after `what`; nothing where it was never used."""
    gc.collect()
    if not torch.cuda.is_initialized():
        return
    for last in (False, True):  # CUDA reports an error of one launch once, one of the context every time
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.zeros(1, device="cuda").item()
            return
        except Exception as error:
            if last:
                raise GpuLost(f"{what}; then the GPU was lost: {reason_of(error)}") from None


def settle() -> None:
    """Wait for the GPU, so that what a call did wrong there is raised here and not by the next call."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def reason_of(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def failure(error: BaseException) -> dict[str, Any]:
    """The row of a contender that raised; the frames that hold its tensors are let go."""
    error.__traceback__ = None
    return {"left_out": reason_of(error), "failed": True}


def leave(code: int) -> None:
    """End this process at once: what would be taken down by the interpreter waits for a GPU that is lost, or aborts."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a contender may have closed it
            stream.flush()
    os._exit(code)
