"""Which strategy moves the weights of a run."""

from __future__ import annotations

from dit4dit.training.config import TrainConfig
from dit4dit.training.moves import Moves
from dit4dit.training.parallel import Processes, Root
from dit4dit.training.zero import ZeroMoves


def make_moves(root: Root, config: TrainConfig, processes: Processes) -> Moves:
    """What the strategy wants."""
    kind = ZeroMoves if config.run.strategy in ("zero2", "zero3") else Moves
    return kind(root, config, processes)
