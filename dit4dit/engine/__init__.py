"""The latency path: the same function as the model, with everything that is constant for one instruction computed once."""

from dit4dit.engine.calibration import Calibration
from dit4dit.engine.engine import MAX_BATCH, Engine
from dit4dit.engine.measuring import calibrate, errors
from dit4dit.engine.packs import PackFolder, PromptPack, packs_key, stack, text_fingerprint
from dit4dit.engine.plan import Plan, RequestShape
from dit4dit.engine.step_inputs import StepInputs

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
