"""Work beside other work on a GPU: a second stream, which in a capture becomes a parallel branch of the graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TypeVar

import torch

from dit4dit.ops import programmatic

First = TypeVar("First")
Second = TypeVar("Second")


def beside(
    stream: torch.cuda.Stream | None, branch: Callable[[], First], main: Callable[[], Second]
) -> tuple[First, Second]:
    """The results of `branch`, run on `stream`, and of `main`, run on the current stream; without a stream one after the other.

    `branch` sees all that the current stream has done before, and what comes after sees both. Memory needs nothing else: what
    is made in here is of the stream that it is made on and is read by the other one only after the two have met, and what
    `branch` reads or writes of before must be kept until then.

    Where either raises, the streams have met too, so that a capture is left with nothing but its own stream.
    """
    if stream is None:
        return branch(), main()
    here = torch.cuda.current_stream(stream.device)
    stream.wait_stream(here)
    try:
        with torch.cuda.stream(stream), programmatic.plainly():
            first = branch()
        second = main()
    except BaseException:
        with contextlib.suppress(
            RuntimeError
        ):  # of a capture that is invalid; the error that came first is the one to report
            here.wait_stream(stream)
        raise
    here.wait_stream(stream)
    return first, second
