"""The errors a user can cause. Each message says where, what was wanted, what came, and what to do.

The command line turns any of these into one line and a non-zero exit code; everything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import importlib
from typing import Any


class Dit4DitError(Exception):
    """Base of all errors that a user can mend."""


class InputError(Dit4DitError, ValueError):
    """An observation, instruction, noise or file given to the policy does not fit it."""


class ConfigError(Dit4DitError, ValueError):
    """A configuration names something unknown, lacks something needed, or contradicts itself."""


class CheckpointError(Dit4DitError, ValueError):
    """A checkpoint or backbone folder is missing, truncated, or holds other tensors than its configuration says."""


class DataError(Dit4DitError, ValueError):
    """A data set is damaged, or is not what a robot or mixture says of it; names the file, and the row where there is one."""


class BackendError(Dit4DitError, RuntimeError):
    """An implementation or device that was asked for by name cannot run here."""


class CudaError(Dit4DitError, RuntimeError):
    """CUDA refused a call; the message names it."""


class DeviceError(CudaError):
    """A CUDA error after which nothing on the device works in this process: restart it."""


class OutputError(Dit4DitError, ArithmeticError):
    """The model wrote something that must not reach a robot."""


class TrainingError(Dit4DitError, RuntimeError):
    """A run cannot go on: its loss is no longer a number."""


class SimulatorError(Dit4DitError, RuntimeError):
    """A simulator raised; `traceback` is its own, as text."""

    def __init__(self, message: str, traceback: str = "") -> None:
        super().__init__(message)
        self.traceback = traceback


class WorkerLost(SimulatorError):
    """A simulator's process ended, or gave no answer in time; `traceback` is the end of its log."""


class MissingExtra(Dit4DitError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""


def did_you_mean(word: object, known: list[str] | tuple[str, ...]) -> str:
    """`"; did you mean 'libero'?"` for the nearest of `known`, or an empty string when nothing is near, or `word` is no word."""
    import difflib

    if not isinstance(word, str):
        return ""

    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def require(module: str, extra: str) -> Any:
    """The imported `module` of an optional dependency; MissingExtra, which says how to install it, where it is not there."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != top:
            raise  # the module is there and broken: its own traceback says more
        from importlib import metadata

        # dit4dit-cu12 is the same package: an extra of the other's name would bring the other
        name = metadata.packages_distributions().get("dit4dit", ["dit4dit"])[0]
        raise MissingExtra(f"{top} is not installed; pip install '{name}[{extra}]'") from None
