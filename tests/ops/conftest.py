"""Running an op's Triton kernels: interpreted on the CPU, and on a GPU where there is one."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dit4dit import ops
from dit4dit.ops import dispatch

Run = Callable[..., Any]


class Interpreter:
    """The process of interpreter.py. Call it with an op's name and arguments."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("interpreter.py")
        self.process = subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __call__(self, op: str, *args: Any, tiles: str | None = "90", **kwargs: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        request = io.BytesIO()
        torch.save((op, args, kwargs, tiles), request)  # plain pickle loses tensors of 8-bit floats
        pickle.dump(request.getvalue(), self.process.stdin)
        self.process.stdin.flush()
        fine, result = pickle.load(self.process.stdout)
        assert fine, result
        return result

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


@pytest.fixture(scope="session")
def interpreter(interprets: None) -> Iterator[Interpreter]:
    process = Interpreter()
    yield process
    process.close()


@pytest.fixture(
    params=[pytest.param("interpreted", marks=pytest.mark.kernels), pytest.param("gpu", marks=pytest.mark.gpu)]
)
def triton_op(request: pytest.FixtureRequest) -> Run:
    """triton_op("adaln", *args): its Triton implementation, results on the CPU, memory NaN before it is written.

    backend: the implementation's name where it is another one.
    """
    if request.param == "interpreted":
        return request.getfixturevalue("interpreter")

    def run(op: str, *args: Any, tiles: str | None = None, backend: str = "triton", **kwargs: Any) -> Any:
        def to(device: str, value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)(to(device, inner) for inner in value)
            if isinstance(value, dict):
                return {name: to(device, inner) for name, inner in value.items()}
            return value.to(device) if isinstance(value, torch.Tensor) else value

        given = to("cuda", args)
        if not kwargs and (reason := dispatch._ops[op].implementations[backend].refuse(*given)):
            pytest.skip(reason)
        torch.use_deterministic_algorithms(True)
        try:
            with torch.no_grad():
                return to("cpu", getattr(ops, op)(*given, **to("cuda", kwargs), backend=backend))
        finally:
            torch.use_deterministic_algorithms(False)

    return run
