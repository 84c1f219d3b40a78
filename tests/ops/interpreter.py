"""Runs Triton's kernels on the CPU, in a process of its own: a process that interprets cannot compile.

Reads (op, args, kwargs, architecture) from standard input, as pickled bytes of torch.save, and answers each with a pickle of
(True, result) or (False, message). The kernels take the tiles of `architecture`; all memory that they are given to write is
NaN before.
"""

from __future__ import annotations

import io
import os
import pickle
import sys
from typing import Any, BinaryIO

os.environ["TRITON_INTERPRET"] = "1"

import torch

from dit4dit import ops
from dit4dit.ops import launch


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    torch.use_deterministic_algorithms(True)  # torch.empty gives NaN
    torch.set_num_threads(1)
    architecture = launch.architecture
    while True:
        try:
            op, args, kwargs, tiles = torch.load(io.BytesIO(pickle.load(requests)), weights_only=False)
        except EOFError:
            return
        launch.architecture = (lambda device, name=tiles: name) if tiles else architecture
        answer: tuple[bool, Any]
        try:
            with torch.no_grad(), ops.trace() as ran:
                backend = kwargs.pop("backend", "triton")
                result = getattr(ops, op)(*args, **kwargs, backend=backend)
            assert ran == {op: {backend}}, ran
            answer = True, result
        except Exception as error:  # the asking process raises it
            answer = False, f"{type(error).__name__}: {error}"
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    sys.stdout = sys.stderr
    serve(sys.stdin.buffer, answers)
