"""Implementations of one call timed in turns, and which of them is to be chosen."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

from dit4dit.benchmarks.failures import settle
from dit4dit.benchmarks.harness import time_cpu, time_gpu

FASTER = 1.02
"""How many times as fast as the default another one has to be."""
MOST_ROUNDS = 0.85
"""The share of the rounds in which it has to be faster at all: 8 of 9, all of 3. By noise alone, however large, that comes
once in 50 calls of 9 rounds; two thirds of them would come in every fourth.
"""
FEWEST = 3
"""Rounds of calls that are too slow for more, and of an implementation that is far behind."""
FAR = 1.5
"""How many times the round's shortest time is far behind, where it is so in each of the first rounds."""
Round = dict[str, float]
"""Implementation -> seconds of a call, median of one block."""


def timed(
    calls: Mapping[str, Callable[[], object]],
    *,
    gpu: bool,
    seconds: float,
    rounds: int,
    samples: int,
    before: Callable[[str], None],
    after: Callable[[str, Exception | None], bool],
) -> list[Round]:
    """The rounds: each a block of samples of every implementation, the order reversed from one round to the next.

    What is far behind in the first rounds is left out of the others. Calls so slow that the rounds take more than twice
    `seconds` get fewer.

    Args:
        calls: implementation -> one call.
        seconds: how long it should take together.
        samples: at most, of a block.
        before: is called before a block. after: after it, with what it raised; False where the
            implementation is out.
    """
    racing, once, found = list(calls), dict[str, float](), list[Round]()

    def take(name: str, measure: Callable[[], float], into: dict[str, float]) -> None:
        before(name)
        value, raised = 0.0, None
        try:
            value = measure()
        except Exception as error:  # what Triton and CUDA raise has no common base
            raised = error.with_traceback(None)  # its frames hold tensors
        if after(name, raised):
            into[name] = value

    for name in racing:
        take(name, partial(_once, calls[name]), once)
    racing = list(once)
    slow = 2 * seconds / max(sum(once[name] * (10 if gpu else 1) for name in racing), 1e-9)
    rounds = max(min(rounds, int(slow)), min(FEWEST, rounds))
    for number in range(rounds):
        share = seconds / rounds / max(len(racing), 1)
        block: Round = {}
        for name in racing if number % 2 == 0 else racing[::-1]:
            take(name, partial(_block, calls[name], once[name], share, samples, gpu), block)
        found.append(block)
        racing = [name for name in racing if name in block]
        if number + 1 == FEWEST:
            racing = [name for name in racing if not _behind(name, found)]
        if not racing or (len(racing) == 1 and number + 1 >= FEWEST):
            break
    return found


def _once(call: Callable[[], object]) -> float:
    """Seconds of a call with the host's part of it."""
    times = []
    for _ in range(2):
        settle()
        begin = time.perf_counter()
        call()
        settle()
        times.append(time.perf_counter() - begin)
    return min(times)


def _block(call: Callable[[], object], once: float, share: float, samples: int, gpu: bool) -> float:
    if gpu:  # beside the samples: a few calls that measure the host, and in each the host's time again, flushing
        most = int((share - 8 * once) / (2.5 * once + 1e-4))
        return median(time_gpu(call, samples=max(3, min(samples, most)), warmup=1))
    most = int(share / max(once, 1e-7))
    return median(time_cpu(call, samples=max(1, min(samples, most)), warmup=1 if most > 2 else 0))


def _behind(name: str, rounds: Sequence[Round]) -> bool:
    return all(block[name] > FAR * min(block.values()) for block in rounds if name in block)


@dataclass(frozen=True)
class Decision:
    """chosen: an implementation. ms: median milliseconds of each. why: in a sentence."""

    chosen: str
    ms: dict[str, float]
    why: str


def decide(rounds: Sequence[Round], default: str | None) -> Decision:
    """The fastest that is 2 % faster than the default by the median of the rounds' ratios, and faster in nearly all of
    them (`MOST_ROUNDS`); else the default. Without a default the fastest.

    rounds: with a time of at least one implementation, and of the default where there is one.
    """
    names = list(dict.fromkeys(name for block in rounds for name in block))
    ms = {name: 1e3 * median(block[name] for block in rounds if name in block) for name in names}
    order = sorted(names, key=ms.__getitem__)
    if default is None or default not in ms:
        return Decision(order[0], ms, "the fastest that is right")
    if len(names) == 1:
        return Decision(default, ms, "the only one that is right")
    nearest: tuple[str, float, int, int] | None = None
    for name in order:
        if name == default:
            continue
        ratios = [block[default] / block[name] for block in rounds if name in block and default in block]
        if not ratios:
            continue
        ratio, ahead = median(ratios), sum(r > 1 for r in ratios)
        if ratio >= FASTER and ahead >= MOST_ROUNDS * len(ratios):
            return Decision(
                name, ms, f"{ratio:.2f} times as fast as {default!r}, ahead in {ahead} of {len(ratios)} rounds"
            )
        if nearest is None:
            nearest = name, ratio, ahead, len(ratios)
    if nearest is None:
        return Decision(default, ms, "no other was timed beside it")
    name, ratio, ahead, count = nearest
    if ratio < 1:
        return Decision(default, ms, f"the fastest; {name!r} takes {1 / ratio:.2f} times as long")
    short = f"{name!r} is {ratio:.3f} times as fast, ahead in {ahead} of {count} rounds"
    return Decision(
        default, ms, f"the default stays: {short}, and {FASTER:g} is asked for, and {MOST_ROUNDS:.0%} of them"
    )
