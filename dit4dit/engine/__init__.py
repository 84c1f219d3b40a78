"""The latency path: the same function as the model, with everything that is constant for one instruction computed once."""

from dit4dit.engine.calibration import Calibration, Request, calibrate, errors
from dit4dit.engine.engine import Engine
from dit4dit.engine.packs import PackFolder, PromptPack, packs_key

__all__ = ["Calibration", "Engine", "PackFolder", "PromptPack", "Request", "calibrate", "errors", "packs_key"]
