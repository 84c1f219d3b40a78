"""What a launch is compiled for, held to Triton's own view of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dit4dit.aot_build import released
from dit4dit.ops import launch
from dit4dit.ops.aot.launch_record import Launch
from dit4dit.ops.aot.launch_record import function as triton_function
from dit4dit.ops.aot.specialization import Specialization


class Pointer:
    """What Triton looks at of a tensor."""

    def __init__(self, x: torch.Tensor) -> None:
        self.dtype, self._address = x.dtype, x.data_ptr() or 4096 + x.storage_offset() * x.element_size()

    def data_ptr(self) -> int:
        return self._address


def tritons(step: Launch) -> Specialization:
    """By the code of Triton's just-in-time compiler."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    function = triton_function(step.kernel)
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(function.signature, function.params, backend)
    given = {k: Pointer(v) if isinstance(v, torch.Tensor) else v for k, v in step.arguments.items()}
    bound, kinds, options = bind(**given, **step.constants, **step.tile)
    arguments, constants = {}, {}
    for (name, value), (kind, attribute) in zip(bound.items(), kinds, strict=True):
        if kind == "constexpr":
            constants[name] = value
        else:
            arguments[name] = kind + (":16" if attribute == "D" else "")
    return Specialization(step.kernel, arguments, constants, options)


@pytest.mark.skipif(launch.interpreting(), reason="a process with TRITON_INTERPRET=1 cannot compile")
@pytest.mark.parametrize("fp8", [False, True])
def test_every_launch_of_a_released_model_is_what_triton_takes_it_for(fp8):
    pytest.importorskip("triton")
    calls = released.record(released.Variant("libero", torch.bfloat16, fp8), batches=(1, 3))
    keys = {}
    for chip in (80, 90):
        for step in released.launches(calls, chip):
            ours = Specialization.of(step)
            assert ours == tritons(step)
            keys.setdefault(ours.key, ours)
            assert keys[ours.key] == ours
    assert len(keys) > 20


def example(**arguments: Any) -> Launch:
    x = torch.zeros(32, dtype=torch.bfloat16)
    given = {"x": x, "rows": 48, "eps": 1e-5, "gate": None, **arguments}
    return Launch("adaln", (1,), given, {"WIDTH": 64}, {"ROWS": 4, "num_warps": 4, "num_stages": 1})


@pytest.mark.parametrize(
    ("arguments", "name", "kind"),
    [
        ({}, "x", "*bf16:16"),
        ({"x": torch.zeros(32, dtype=torch.bfloat16)[1:]}, "x", "*bf16"),
        ({"x": torch.zeros(32, dtype=torch.bfloat16)[8:]}, "x", "*bf16:16"),
        ({"x": torch.empty(8, device="meta")[1:]}, "x", "*fp32"),
        ({}, "rows", "i32:16"),
        ({"rows": 0}, "rows", "i32:16"),
        ({"rows": -3}, "rows", "i32"),
        ({"rows": 2**31}, "rows", "i64:16"),
        ({"rows": 1}, "rows", None),
        ({}, "gate", None),
        ({"eps": 1.0}, "eps", "fp32"),
    ],
)
def test_kinds(arguments, name, kind):
    found = Specialization.of(example(**arguments))
    assert found.arguments.get(name) == kind
    assert (name in found.constants) == (kind is None)


def test_keys_tell_what_differs():
    base = example()
    others = [
        example(rows=49),
        example(rows=1),
        example(gate=base.arguments["x"]),
        example(x=base.arguments["x"].half()),
        replace(base, kernel="linear_gelu"),
        replace(base, constants={"WIDTH": 128}),
        replace(base, constants={"WIDTH": 64, "TANH": True}),
        replace(base, constants={"WIDTH": 64, "TANH": False}),
        replace(base, tile={**base.tile, "ROWS": 8}),
        replace(base, tile={**base.tile, "num_warps": 8}),
    ]
    keys = {Specialization.of(step).key for step in [base, *others]}
    assert len(keys) == 1 + len(others)
    assert Specialization.of(example(rows=64, eps=2.0)).key in keys
    found = Specialization.of(base)
    turned = (dict(reversed(part.items())) for part in (found.arguments, found.constants, found.options))
    assert Specialization(found.kernel, *turned).key == found.key


@pytest.mark.parametrize("value", [torch.zeros(1, dtype=torch.int8), True, "x"])
def test_other_arguments_are_refused(value):
    with pytest.raises(TypeError, match="adaln: rows: expected"):
        Specialization.of(example(rows=value))
