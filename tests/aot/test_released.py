"""The list of launches is the engine's own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dit4dit import ops
from dit4dit.aot_build import released
from dit4dit.checkpoints.weights import random_model
from dit4dit.engine import Engine, Plan, RequestShape
from dit4dit.ops.aot.specialization import Specialization
from dit4dit.ops.linear_fp8 import LEAST_CAPABILITY
from dit4dit.presets import preset


def test_every_op_that_a_chunk_calls_is_listed():
    """Against a plan that really runs, on a CPU."""
    config = preset("tiny").model
    engine = Engine(random_model(config, 0, with_text=False))
    shape = RequestShape(1, ((32, 32), (32, 32)), None, "cv2_area", True, 9)
    with ops.trace() as ran, torch.no_grad():
        Plan(engine, shape, torch.zeros(5, 7, dtype=torch.float64)).compute()
    calls = released.record(released.Variant("tiny", torch.bfloat16), batches=(1,))
    listed = {step.kernel.partition(".")[0] for step in released.launches(calls, 90)}
    by_triton = {op for op in ran if "triton" in ops.implementations(op)}
    # qk_norm_rope is part of self_attention, wide_attention an implementation of it, and on a CPU NumPy draws the noise
    assert listed - {"qk_norm_rope", "wide_attention", "philox_normal"} == by_triton
    assert set(ran) - by_triton == {"preprocess"}


def test_float32_heads_leave_products_to_the_library():
    calls = released.record(released.Variant("tiny"), batches=(1,))
    narrow = released.record(released.Variant("tiny", torch.bfloat16), batches=(1,))

    def dtypes(found, kernel):
        steps = [step for step in released.launches(found, 90) if step.kernel == kernel]
        return {step.arguments["x" if kernel == "linear_gelu" else "q"].dtype for step in steps}

    for kernel in ("linear_gelu", "self_attention", "cross_attention"):
        assert dtypes(calls, kernel) == dtypes(narrow, kernel) == {torch.bfloat16}
    # the head's activation is the tanh form, the backbone's is not
    forms = [{step.constants.get("TANH") for step in released.launches(found, 90)} for found in (calls, narrow)]
    assert forms == [{None, False}, {None, False, True}]


def test_chunks_with_guidance_are_among_them():
    """The first step of real-time chunking must find its kernel compiled."""
    calls = released.record(released.Variant("tiny"), batches=(2,))
    steps = [step for step in released.launches(calls, 90) if step.kernel == "euler_step"]
    assert {step.arguments["previous"] is None for step in steps} == {True, False}


def test_the_state_token_is_compiled_for_both_heads():
    """The head in one launch reads it in float32, the loop of library calls in the head's dtype."""
    for head_dtype in (torch.bfloat16, torch.float32):
        calls = released.record(released.Variant("tiny", head_dtype), batches=(1,))
        steps = [step for step in released.launches(calls, 90) if step.kernel == "state_token"]
        assert {step.arguments["out"].dtype for step in steps} == {head_dtype, torch.float32}


def test_fp8_where_the_chip_has_it():
    calls = released.record(released.Variant("tiny", fp8=True), batches=(1,))
    for chip in released.CAPABILITIES:
        found = {step.kernel for step in released.launches(calls, chip)}
        assert ("linear_fp8" in found) == (chip >= LEAST_CAPABILITY)
        assert "self_attention" in found


def test_candidates_are_compiled_for_one_robot():
    """A server's batches have what runs there without a verdict: the rest would be most of what a wheel holds."""
    variant = released.Variant("tiny", torch.bfloat16)
    one, two = (released.launches(released.record(variant, (batch,)), 90) for batch in (1, 2))
    kernels = [{step.kernel for step in steps} for steps in (one, two)]
    assert kernels[0] - kernels[1] == {"conv2d", "linear", "linear_gelu", "norm_linear"}
    assert {"adaln", "self_attention", "cross_attention", "euler_step", "philox_normal"} <= kernels[1]
    shared = [{step.constants["SHARED"] for step in steps if step.kernel == "adaln"} for steps in (one, two)]
    assert shared == [{False, True}, {False}]


@pytest.mark.slow
def test_batches_between_launch_the_same_kernels():
    variant = released.Variant("robocasa_gr1", torch.bfloat16)
    calls, between = released.record(variant), released.record(variant, (6, 7, 11, 13))
    for chip in released.CAPABILITIES:
        assert set(released.specializations(between, chip)) <= set(released.specializations(calls, chip))


def test_each_launch_is_listed_once_for_each_kind():
    variant = released.Variant("tiny")
    once = released.record(variant, batches=(2,))
    again = released.record(replace(variant), batches=(2, 2))
    assert len(once) == len(again) > 10
    keys = [{Specialization.of(step).key for step in released.launches(found, 90)} for found in (once, again)]
    assert keys[0] == keys[1]
