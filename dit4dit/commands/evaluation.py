"""`dit4dit eval ...`: one function per subcommand; what they run is `dit4dit.evaluation`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dit4dit.commands.eval_setup import setup
from dit4dit.commands.shell import finish


def episodes(width: float = 0.1, rate: float = 0.5, confidence: float = 0.95, json: Path | None = None) -> int:
    """How many episodes a success rate needs, so that its Wilson interval is at most so wide.

    Args:
        width: of the whole interval, 0..1; 0.1 is about five points to each side.
        rate: the success rate that is expected, 0..1; 0.5 needs the most.
        confidence: of the interval.
        json: also write the numbers to this file.
    """
    from dit4dit.evaluation import statistics

    count = statistics.episodes_for_width(width, rate, confidence)
    at = statistics.wilson(round(rate * count), count, confidence)
    text = f"{count} episodes: at a success rate of {100 * rate:g} % about {at.percent()}"
    finish(text, {"episodes": count, "width": width, "rate": rate, "confidence": confidence}, json)
    return 0


EVALUATIONS: dict[str, Callable[..., int]] = {"episodes": episodes, "setup": setup}
