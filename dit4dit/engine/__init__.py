"""The latency path: the same function as the model, with everything that is constant for one instruction computed once."""

from dit4dit.engine.calibration import Calibration, StepInputs, calibrate, errors
from dit4dit.engine.engine import Engine
from dit4dit.engine.packs import PackFolder, PromptPack, packs_key, stack, text_fingerprint
from dit4dit.engine.plan import MAX_BATCH, Plan, RequestShape

__all__ = [
    "MAX_BATCH",
    "Calibration",
    "Engine",
    "PackFolder",
    "Plan",
    "PromptPack",
    "RequestShape",
    "StepInputs",
    "calibrate",
    "errors",
    "packs_key",
    "stack",
    "text_fingerprint",
]
