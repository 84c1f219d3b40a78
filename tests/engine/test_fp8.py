"""fp8 in the engine: that it is used, what it costs, that it needs its calibration, and what it does to the model."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dit4dit import Noise, Policy, ops
from dit4dit.checkpoints.checkpoint import open_checkpoint
from dit4dit.checkpoints.weights import random_model
from dit4dit.engine import Calibration, Engine, StepInputs, calibrate, errors, stack
from dit4dit.engine.fold import MATRICES, Matrix
from dit4dit.engine.fp8 import Fp8Matrix, x_scale
from dit4dit.errors import CheckpointError, ConfigError, InputError, OutputError
from dit4dit.evaluation import parity
from dit4dit.ops.linear_fp8 import FP8
from dit4dit.presets import preset

CPU = torch.device("cpu")
TINY = preset("tiny").model
EMBEDS = torch.randn(1, 9, TINY.dit.text_in, generator=torch.Generator().manual_seed(1))


def request_of(engine: Engine, batch: int = 1, seed: int = 0) -> StepInputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    config = engine.config
    pack = engine.pack(EMBEDS)
    return StepInputs(
        frame=normal(batch, 3, 32, 64).clamp(-1, 1),
        packs=[pack] * batch,
        state=normal(batch, 1, config.head.state_dim),
        posterior=normal(batch, 16, 1, 4, 8),
        latent=normal(batch, 16, config.latent_frames, 4, 8),
        action=normal(batch, config.head.action_horizon, config.head.action_dim),
    )


@pytest.fixture
def exact() -> Engine:
    return Engine(random_model(TINY, 0, with_text=False))


@pytest.mark.parametrize("name", ["libero_tiny", "gr1_tiny"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_on_the_fixtures(golden_dir: Path, name: str, dtype: torch.dtype) -> None:
    """e4m3 has three bits of significand: a product of two such numbers is off by 4 %, and so is a block's part of the sum."""
    golden = parity.load_golden(golden_dir / name / "golden.safetensors", CPU)
    model = parity.golden_model(open_checkpoint(golden_dir / name), CPU, dtype)
    exact = Engine(model)
    embeds = golden["infer.prompt_embeds"].to(dtype)
    request = StepInputs(
        frame=parity.prepare_video(golden["in.images"][:, :1], dtype)[:, 0],
        packs=[exact.pack(one[None]) for one in embeds],
        state=golden.get("in.state"),
        posterior=golden["infer.posterior_noise"],
        latent=golden["infer.latent_noise"],
        action=golden["infer.action_noise"],
    )
    found = errors(exact, Engine(model, quantization="fp8", calibration=calibrate(exact, [request])), [request])
    for what in ("features", "actions"):
        assert 0.02 < found[what]["rms"] < 0.15, found
        assert found[what]["max"] < 0.2, found


def test_every_matrix_of_the_backbone_is_multiplied_in_fp8(exact: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    request = request_of(exact)
    calibration = calibrate(exact, [request])
    fast = Engine(exact.model, quantization="fp8", calibration=calibration)
    for block in fast.blocks:
        for name in MATRICES:
            matrix = getattr(block, name)
            assert isinstance(matrix, Fp8Matrix)
            assert matrix.weight.dtype == FP8
            assert matrix.weight.float().abs().amax(1).min() > 400, "each row fills the range"
    with ops.trace() as ran:
        fast.features(request.frame, stack(request.packs), request.posterior, request.latent)
    assert "linear_fp8" in ran
    assert "linear_gelu" not in ran
    calls = []
    original = ops.linear_fp8
    monkeypatch.setattr(ops, "linear_fp8", lambda *args, **out: calls.append(args[2]) or original(*args, **out))
    fast.features(request.frame, stack(request.packs), request.posterior, request.latent)
    assert len(calls) == 6 * len(fast.blocks)
    assert len({id(weight) for weight in calls}) == 6 * len(fast.blocks)


def test_errors_see_what_is_wrong_and_what_is_not(exact: Engine) -> None:
    request = request_of(exact, batch=2)
    same = errors(exact, Engine(exact.model), [request])
    assert same == {what: {"rms": 0.0, "max": 0.0} for what in ("features", "actions")}
    calibration = calibrate(exact, [request])
    good = errors(exact, Engine(exact.model, quantization="fp8", calibration=calibration), [request])
    assert 0.01 < good["features"]["rms"] < 0.1
    tight = replace(calibration, amax={name: value / 8 for name, value in calibration.amax.items()})
    cut = errors(exact, Engine(exact.model, quantization="fp8", calibration=tight), [request])
    assert cut["features"]["rms"] > 2 * good["features"]["rms"], "activations beyond the calibration are cut"


def test_errors_are_relative_to_the_exact_engine(exact: Engine) -> None:
    """An engine that writes twice as much is wrong by the whole of it, seen from the other side by half."""

    class Doubled:
        def features(self, *given: torch.Tensor) -> torch.Tensor:
            return 2 * exact.features(*given)

        def actions(self, features: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
            return 2 * exact.actions(features / 2, *given)

    request = request_of(exact)
    whole = {what: {"rms": 1.0, "max": 1.0} for what in ("features", "actions")}
    half = {what: {"rms": 0.5, "max": 0.5} for what in ("features", "actions")}
    assert errors(exact, Doubled(), [request]) == {what: pytest.approx(e) for what, e in whole.items()}
    assert errors(Doubled(), exact, [request]) == {what: pytest.approx(e) for what, e in half.items()}


def test_calibration_is_the_largest_of_what_the_matrices_receive(exact: Engine) -> None:
    requests = [request_of(exact, seed=i) for i in range(3)]
    whole = calibrate(exact, requests)
    parts = [calibrate(exact, [request]) for request in requests]
    assert whole.samples == 3
    assert calibrate(exact, [request_of(exact, batch=2)]).samples == 2
    assert set(whole.amax) == {f"blocks.{i}.{name}" for i in range(len(exact.blocks)) for name in MATRICES}
    assert dict(parts[0].merged(parts[1]).merged(parts[2]).amax) == dict(whole.amax)
    assert parts[0].merged(parts[1]).samples == 2
    assert any(parts[0].amax[name] != whole.amax[name] for name in whole.amax)


def test_calibration_agrees_with_what_the_plain_model_multiplies(exact: Engine) -> None:
    request = request_of(exact)
    found = calibrate(exact, [request])
    seen: dict[str, float] = {}
    for i, block in enumerate(exact.model.backbone.transformer.blocks[: len(exact.blocks)]):
        layers = (block.attn1.to_v, block.attn1.out, block.attn2.to_q, block.attn2.out, *block.ff.linears)
        for name, layer in zip(MATRICES, layers, strict=True):
            layer.register_forward_pre_hook(
                lambda _, given, name=f"blocks.{i}.{name}": seen.update({name: float(given[0].abs().max())})
            )
    with torch.no_grad():
        given = {name: value for name, value in request._asdict().items() if name != "packs"}
        exact.model.sample(context=exact.model.context(EMBEDS), **given)
    assert dict(found.amax) == pytest.approx(seen, rel=1e-4)


def test_calibrating_changes_nothing(exact: Engine) -> None:
    request = request_of(exact)
    before = exact.sample(*request)
    calibrate(exact, [request])
    assert torch.equal(exact.sample(*request), before)
    assert torch.equal(Engine(exact.model).sample(*request), before)


def test_scales() -> None:
    assert [x_scale(a) for a in (448, 448.1, 224, 225, 1e-40, 0)] == [1, 2, 0.5, 1, 1, 1]
    weight = torch.tensor([[3.0, -6.0], [0.0, 0.0], [1e-3, 5e-4]])
    matrix = Fp8Matrix.quantized(Matrix(weight), 4.0)
    assert torch.allclose(matrix.weight.float() * matrix.weight_scale[:, None], weight, rtol=0.04)
    assert matrix.x_scale == 2**-6
    assert matrix(torch.tensor([[1.0, 1.0]])).shape == (1, 3)


@pytest.fixture
def calibration(libero_policy: Policy, make_observation, tmp_path: Path) -> Path:
    seen = [make_observation(i) for i in range(2)]
    found = libero_policy.calibrate(seen, ["open", "close"], noise=[Noise.from_seed(1, i) for i in range(2)])
    file = tmp_path / "sub" / "fp8.json"
    found.save(file)
    assert found == Calibration.load(file)
    assert [p.name for p in file.parent.iterdir()] == ["fp8.json"]
    return file


def test_policy(small_libero: Path, libero_policy: Policy, observation, calibration: Path) -> None:
    policy = Policy.from_pretrained(small_libero, device="cpu", quantization="fp8", calibration=calibration)
    policy.warm_up()
    got, want = (p.infer(observation, "open", seed=3).normalized for p in (policy, libero_policy))
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert 0.001 < error < 0.15
    again = Policy.from_pretrained(
        small_libero, device="cpu", quantization="fp8", calibration=Calibration.load(calibration)
    )
    assert np.array_equal(again.infer(observation, "open", seed=3).normalized, got)
    for twin in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert np.array_equal(twin.infer(observation, "open", seed=3).normalized, got)


def test_a_quantised_policy_keeps_no_originals(small_libero: Path, observation, calibration: Path) -> None:
    policy = Policy.from_pretrained(small_libero, device="cpu", quantization="fp8", calibration=calibration)
    transformer = policy.model.backbone.transformer
    first = transformer.blocks[0]
    layers = (first.attn1.to_k, first.attn1.out, first.attn2.to_q, first.attn2.out, *first.ff.linears)
    assert all(layer.weight.is_meta for layer in layers)
    assert not first.attn2.to_k.weight.is_meta, "packs are made with it"
    assert not transformer.blocks[policy.config.extract_layer + 1].ff.linears[0].weight.is_meta
    latents = torch.zeros(1, 16, policy.config.latent_frames, 4, 8)
    with pytest.raises(ConfigError, match="load it again without quantization"), torch.no_grad():
        transformer.features(latents, torch.zeros(1, policy.config.latent_frames), torch.zeros(1, 9, 48), 0)
    with pytest.raises(ConfigError, match="quantised itself"):
        policy.calibrate([observation], ["open"])


def test_originals_go_block_by_block(exact: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak memory is one copy and one block: when a block is quantised, the originals of those before it are gone."""
    model, calibration = exact.model, calibrate(exact, [request_of(exact)])
    del exact
    gc.collect()
    alive: list[weakref.ref] = []
    original = Fp8Matrix.quantized

    def quantized(matrix: Matrix, amax: float) -> Fp8Matrix:
        block = len(alive) // 6
        assert all(kept() is None for kept in alive[: 6 * block])
        alive.append(weakref.ref(matrix.weight))
        return original(matrix, amax)

    monkeypatch.setattr(Fp8Matrix, "quantized", quantized)
    Engine(model, quantization="fp8", calibration=calibration, release=True)
    assert len(alive) == 6 * (TINY.extract_layer + 1)


def test_an_engine_leaves_its_model_alone(exact: Engine) -> None:
    request = request_of(exact)
    before = exact.sample(*request)
    Engine(exact.model, quantization="fp8", calibration=calibrate(exact, [request]))
    assert torch.equal(exact.sample(*request), before)


def test_options_that_do_not_go_together(small_libero: Path, calibration: Path) -> None:
    for options, message in (
        (dict(quantization="fp8"), "dit4dit calibrate"),
        (dict(calibration=calibration), "give both or neither"),
        (dict(quantization="int8", calibration=calibration), "expected 'fp8', or None"),
        (dict(quantization="fp8", calibration=calibration, engine="off"), "options of the engine"),
    ):
        with pytest.raises(ConfigError, match=message):
            Policy.from_pretrained(small_libero, device="cpu", **options)
    model = random_model(TINY, 0, with_text=False)
    with pytest.raises(ConfigError, match="dit4dit calibrate"):
        Engine(model, quantization="fp8")
    plain = Policy.from_pretrained(small_libero, device="cpu", engine="off")
    with pytest.raises(ConfigError, match="load the policy with engine='auto'"):
        plain.calibrate([], [])


def test_calibrations_that_do_not_fit(golden_dir: Path, small_libero: Path, calibration: Path, tmp_path: Path) -> None:
    fp8 = dict(device="cpu", quantization="fp8")
    with pytest.raises(CheckpointError, match="made with other weights or in another dtype"):
        Policy.from_pretrained(golden_dir / "gr1_tiny", calibration=calibration, **fp8)
    with pytest.raises(CheckpointError, match="made with other weights or in another dtype"):
        Policy.from_pretrained(small_libero, calibration=calibration, dtype=torch.bfloat16, **fp8)
    good = json.loads(calibration.read_text())
    bad = {
        "no such file; make it with dit4dit calibrate --out": None,
        "not valid JSON .*; make it again with dit4dit calibrate": "{",
        "of version 1": json.dumps({**good, "version": 2}),
        "not a calibration of": json.dumps({**good, "amax": {"blocks.0.qkv": "NaN"}}),
        "a calibration of version 1; make it": json.dumps({**good, "amax": {**good["amax"], "blocks.0.qkv": -1.0}}),
        "version 1; make it again": json.dumps({**good, "amax": {**good["amax"], "blocks.0.qkv": float("inf")}}),
        "nothing for blocks.1.mlp_in": json.dumps(
            {**good, "amax": {k: v for k, v in good["amax"].items() if k != "blocks.1.mlp_in"}}
        ),
    }
    for message, text in bad.items():
        file = tmp_path / "bad.json"
        file.unlink(missing_ok=True)
        if text is not None:
            file.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            Policy.from_pretrained(small_libero, calibration=file, **fp8)
    with pytest.raises(InputError, match="not written"):
        Calibration.load(calibration).save(calibration / "below" / "x.json")


def test_what_cannot_be_calibrated(exact: Engine) -> None:
    with pytest.raises(InputError, match="at least one example"):
        calibrate(exact, [])
    request = request_of(exact)
    one, other = calibrate(exact, [request]), Calibration("another", 1, {})
    with pytest.raises(ConfigError, match="same weights"):
        one.merged(other)
    with pytest.raises(OutputError, match=r"blocks.0.qkv received NaN"):
        calibrate(exact, [request._replace(latent=request.latent * float("nan"))])


@pytest.mark.kernels
@pytest.mark.usefixtures("interprets")
def test_the_engine_through_the_triton_kernels(tmp_path: Path) -> None:
    """In a process that interprets them; what is left is an e4m3 step here and there where two sums round differently."""
    pytest.importorskip("triton")
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_fp8 import *
exact = Engine(random_model(TINY, 0, with_text=False))
requests = [request_of(exact)]
fast = Engine(exact.model, quantization="fp8", calibration=calibrate(exact, requests))
with torch.no_grad():
    want = fast.features(requests[0].frame, stack(requests[0].packs), requests[0].posterior, requests[0].latent)
    with ops.trace() as ran, ops.use_backend(linear_fp8="triton"):
        got = fast.features(requests[0].frame, stack(requests[0].packs), requests[0].posterior, requests[0].latent)
assert ran["linear_fp8"] == {{"triton"}}, ran
print(float((got - want).norm() / want.norm()))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 5e-3
