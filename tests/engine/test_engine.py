"""The engine against the model it was built from, against the published code, and its promises about repeats."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from stateless import without_state

from dit4dit import Noise, Policy, ops
from dit4dit.checkpoints.weights import random_model
from dit4dit.cli import main
from dit4dit.engine import Engine
from dit4dit.engine.action_ode.program import OneLaunchHead
from dit4dit.engine.fold import Matrix, fold_backbone, fold_head
from dit4dit.errors import BackendError, ConfigError, InputError
from dit4dit.evaluation import parity
from dit4dit.model import flow
from dit4dit.ops import onednn
from dit4dit.presets import preset

CPU = torch.device("cpu")
TINY = preset("tiny").model


def inputs(config, batch: int, seed: int = 0, rows: int = 4, columns: int = 8) -> dict[str, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator)

    return {
        "frame": normal(3, 8 * rows, 8 * columns).clamp(-1, 1),
        "state": None if config.head.state_dim is None else normal(1, config.head.state_dim),
        "posterior": normal(16, 1, rows, columns),
        "latent": normal(16, config.latent_frames, rows, columns),
        "action": normal(config.head.action_horizon, config.head.action_dim),
    }


def both(config, batch: int, **kinds) -> tuple[torch.Tensor, torch.Tensor]:
    """(engine, model) on the same random weights and inputs."""
    model = random_model(config, 1, with_text=False, **kinds)
    for name, parameter in model.backbone.transformer.named_parameters():
        if "norm" in name and parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    embeds = torch.randn(batch, 9, config.dit.text_in, generator=torch.Generator().manual_seed(2))
    engine = Engine(model)
    packs = [engine.pack(embeds[i : i + 1]) for i in range(batch)]
    given = inputs(config, batch)
    with torch.no_grad():
        context = model.context(embeds)
    return engine.sample(packs=packs, **given), model.sample(context=context, **given)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("state", [True, False])
def test_the_engine_is_the_model(batch: int, state: bool) -> None:
    config = TINY if state else without_state(TINY)
    assert relative(*both(config, batch)) < 1e-5


@pytest.mark.parametrize("state", [True, False])
def test_the_one_launch_head_is_given_what_the_loop_is(state: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reference stands for the kernel, which takes the same arguments."""
    config = TINY if state else without_state(TINY)
    monkeypatch.setattr(OneLaunchHead, "backend", "torch")
    model = random_model(config, 1, with_text=False)
    engine, given = Engine(model), inputs(config, 2)
    packs = [engine.pack(torch.randn(1, 9, config.dit.text_in))] * 2
    want = engine.sample(packs=packs, **given)
    engine.one_launch = OneLaunchHead(engine.head, config.head, engine.steps)
    with ops.trace() as ran:
        assert relative(engine.sample(packs=packs, **given), want) < 1e-5
    assert ran["action_ode"] == {"torch"}


@pytest.mark.parametrize("guided", [True, False])
def test_the_one_launch_reference_is_the_engines_loop_by_the_ops_references(guided: bool) -> None:
    engine, given = Engine(random_model(TINY, 1, with_text=False)), inputs(TINY, 2)
    head, noise = TINY.head, given["action"]
    features = torch.randn(2, 12, head.context_dim)
    guidance = flow.GuidanceTensors(torch.zeros_like(noise), torch.ones(head.action_horizon), 5.0) if guided else None
    with torch.no_grad():
        token = engine.model.head.state_encoder(given["state"])[:, 0]
        one_launch = OneLaunchHead(engine.head, head, engine.steps)
        got = ops.action_ode(one_launch, noise, engine.head.context(features), token, guidance=guidance)
    with ops.use_backend("torch"):
        assert torch.equal(got, engine.actions(features, given["state"], noise, guidance))


def test_nothing_of_the_state_is_kept_for_a_gradient() -> None:
    """Also where the caller's mode would: the model's own weights have gradients, and kernels refuse those."""
    engine = Engine(random_model(TINY, 1, with_text=False).requires_grad_())
    with torch.enable_grad():
        token = engine.token(inputs(TINY, 2)["state"])
    assert token is not None
    assert not token.requires_grad


def test_the_head_is_never_taken_by_itself_and_a_wish_that_cannot_be_met_raises() -> None:
    model = random_model(TINY, 0, with_text=False)
    assert Engine(model).one_launch is None
    assert Engine(model, head="library").one_launch is None
    with pytest.raises(BackendError, match="'one_launch' refused: it is on cpu"):
        Engine(model, head="one_launch")
    with pytest.raises(ConfigError, match="engine head: expected one of auto, library, one_launch, got 'fast'"):
        Engine(model, head="fast")
    with pytest.raises(ConfigError, match="engine tune: expected cached or off, got 'now'"):
        Engine(model, tune="now")


@pytest.mark.parametrize(
    "change",
    [
        {"interleave_self_attention": False},
        {"add_pos_embed": False},
        {"num_heads": 2, "head_dim": 48},
        {"num_inference_timesteps": 3},
        {"action_horizon": 51, "action_dim": 5},
    ],
)
def test_other_heads(change) -> None:
    assert relative(*both(replace(TINY, head=replace(TINY.head, **change)), 2)) < 1e-5


@pytest.mark.parametrize("layer, frames", [(0, 1), (4, 9)])
def test_other_depths_and_frames(layer: int, frames: int) -> None:
    assert relative(*both(replace(TINY, extract_layer=layer, frames=frames), 1)) < 1e-5


@pytest.mark.parametrize("name", ["libero_tiny", "gr1_tiny"])
def test_float32_agrees_with_the_published_code(golden_dir: Path, name: str) -> None:
    stages = parity.check(golden_dir / name, device=CPU, dtype=torch.float32, backend=None, engine=True)
    assert [s.name for s in stages] == list(parity.ENGINE_STAGES)
    assert all(s.ok and s.limit == 1e-5 for s in stages), parity.show(stages)
    ran = {s.name: s.implementations for s in stages}
    assert "self_attention" in ran["infer.features"]
    if torch.backends.mkldnn.is_available():
        assert "linear_gelu: onednn" in ran["infer.features"], "what a policy runs, packed matrices included"
    assert "euler_step" in ran["infer.normalized_actions"]


@pytest.mark.parametrize("name", ["libero_tiny", "gr1_tiny"])
def test_bfloat16_is_at_most_twice_as_far_from_the_truth_as_the_plain_model(golden_dir: Path, name: str) -> None:
    errors = [
        {
            s.name: s.error
            for s in parity.check(golden_dir / name, device=CPU, dtype=torch.bfloat16, backend=None, engine=e)
        }
        for e in (True, False)
    ]
    for stage in parity.ENGINE_STAGES:
        assert errors[0][stage] <= 2 * errors[1][stage], stage


def test_the_command(golden_dir: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "parity.json"
    with pytest.raises(SystemExit) as end:
        main(["parity", str(golden_dir / "libero_tiny"), "--engine", "--device", "cpu", "--json", str(out)])
    assert end.value.code == 0
    assert len(json.loads(out.read_text())["stages"]) == 4
    assert "cross_attention" in capsys.readouterr().out


def test_policy_uses_the_engine_by_default_and_agrees_with_the_plain_model(
    small_libero: Path, make_observation
) -> None:
    fast = Policy.from_pretrained(small_libero, device="cpu")
    plain = Policy.from_pretrained(small_libero, device="cpu", engine="off")
    assert fast.engine is not None
    assert plain.engine is None
    seen = [make_observation(i) for i in range(3)]
    words, noise = ["open", "close", "open"], [Noise.from_seed(1, i) for i in range(3)]
    a, b = (p.infer_batch(seen, words, noise=noise) for p in (fast, plain))
    for x, y in zip(a, b, strict=True):
        assert np.abs(x.normalized - y.normalized).max() < 1e-5 * np.abs(y.normalized).max()
    again = Policy.from_pretrained(small_libero, device="cpu").infer_batch(seen, words, noise=noise)
    assert all(np.array_equal(x.normalized, y.normalized) for x, y in zip(a, again, strict=True))


def test_folding_shares_what_does_not_change_and_rounds_once() -> None:
    model = random_model(TINY, 0, with_text=False)
    block = fold_backbone(model.backbone)[1]
    source = model.backbone.transformer.transformer_blocks[1]
    assert block.mlp_in.weight.data_ptr() == source.ff.net[0].proj.weight.data_ptr()
    x = torch.randn(5, TINY.dit.width)
    want = torch.cat([source.attn1.to_q(x), source.attn1.to_k(x), source.attn1.to_v(x)], dim=-1)
    assert torch.allclose(block.qkv(x), want, atol=1e-6)
    assert source.attn1.to_k.weight.data_ptr() == block.qkv.weight[TINY.dit.width :].data_ptr(), (
        "one copy of the weights"
    )
    assert block.self_norm.shift.shape == (TINY.latent_frames, TINY.dit.width)
    head = fold_head(model.head, 4)
    y = torch.randn(3, TINY.head.width)
    decoder = model.head.action_decoder
    assert torch.allclose(head.decode_in(y), decoder.layer1(model.head.model.proj_out_2(y)), atol=1e-5)
    assert len(head.out_norms) == 4
    assert head.time_bias.shape == (4, TINY.head.width)


def test_matrices_with_and_without_bias_do_not_mix() -> None:
    for layers in ((True, False), (False, True, True)):
        with pytest.raises(AssertionError):
            Matrix.stacked(*(torch.nn.Linear(2, 3, bias=bias) for bias in layers))
    for bias in (True, False):
        joined = Matrix.stacked(*(torch.nn.Linear(2, 3, bias=bias) for _ in range(2)))
        assert (joined.bias is not None) == bias


def test_options_that_change_numbers() -> None:
    model = random_model(TINY, 0, with_text=False)
    given = inputs(TINY, 1)
    embeds = torch.randn(1, 9, TINY.dit.text_in)
    base = Engine(model)
    pack = base.pack(embeds)
    want = base.sample(packs=[pack], **given)
    assert torch.equal(Engine(model, steps=4).sample(packs=[pack], **given), want)
    with torch.no_grad():
        context = model.context(embeds)
    for steps in (1, 2, 8):
        got = Engine(model, steps=steps).sample(packs=[pack], **given)
        assert relative(got, model.sample(context=context, **given, steps=steps)) < 1e-5
        assert not torch.allclose(got, want, atol=1e-3)
    mean = Engine(model, posterior="mean").sample(packs=[pack], **given)
    zero = base.sample(packs=[pack], **{**given, "posterior": torch.zeros_like(given["posterior"])})
    assert torch.equal(mean, zero)
    assert not torch.equal(mean, want)
    for bad in ({"steps": 3}, {"posterior": "median"}):
        with pytest.raises(ConfigError, match="engine"):
            Engine(model, **bad)


def test_options_of_the_engine_need_the_engine(small_libero: Path) -> None:
    with pytest.raises(ConfigError, match="options of the engine"):
        Policy.from_pretrained(small_libero, device="cpu", engine="off", steps=2)
    with pytest.raises(ConfigError, match="give one of them"):
        Policy.from_pretrained(small_libero, device="cpu", packs="anywhere", prompt_embeds={})
    with pytest.raises(ConfigError, match="give packs"):
        Policy.from_pretrained(small_libero, device="cpu", text_encoder=False)


def test_matrices_are_packed_by_the_first_chunk_or_before_it(small_libero: Path, observation) -> None:
    policy = Policy.from_pretrained(small_libero, device="cpu")
    matrix = policy.engine.blocks[0].qkv.weight
    assert not onednn.is_packed(matrix), "loading alone keeps one copy of the weights"
    policy.warm_up()
    assert onednn.is_packed(matrix) or not torch.backends.mkldnn.is_available()
    other = Policy.from_pretrained(small_libero, device="cpu")
    a, b = (p.infer(observation, "go", seed=0).normalized for p in (policy, other))
    assert np.array_equal(a, b)


@pytest.mark.parametrize("engine", ["auto", "off"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda policy: pickle.loads(pickle.dumps(policy))])
def test_a_policy_can_be_copied_and_sent(small_libero: Path, observation, engine, duplicate) -> None:
    policy = Policy.from_pretrained(small_libero, device="cpu", engine=engine)
    want = policy.infer(observation, "go", seed=0).normalized
    twin = duplicate(policy)
    assert np.array_equal(twin.infer(observation, "go", seed=0).normalized, want)
    twin.prepare("another").result(30)


def test_prepare_encodes_beforehand(small_libero: Path, observation, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy.from_pretrained(small_libero, device="cpu")
    policy.prepare("open the drawer").result(30)
    monkeypatch.setattr(policy.model, "embed", lambda tokens: pytest.fail("encoded in the control path"))
    policy.infer(observation, "open the drawer", seed=0)
    with pytest.raises(InputError, match="expected words"):
        policy.prepare(" ").result(30)


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["libero_tiny", "gr1_tiny"])
@pytest.mark.usefixtures("interprets")
def test_every_triton_kernel_on_the_way_agrees_with_the_published_code(
    golden_dir: Path, tmp_path: Path, name: str
) -> None:
    """The whole command under the interpreter, in a process of its own; an op that steps down would fail it."""
    pytest.importorskip("triton")
    out = tmp_path / "parity.json"
    words = ["parity", str(golden_dir / name), "--engine", "--backend", "triton", "--device", "cpu", "--json", str(out)]
    code = f"from dit4dit.cli import main; main({words!r})"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", code]
    # not from the repository's root, whose source tree has no compiled module
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    ran = {s["stage"]: s["ran"] for s in json.loads(out.read_text())["stages"]}
    for op in ("adaln", "self_attention", "cross_attention", "linear_gelu"):
        assert f"{op}: triton" in ran["infer.features"]
    for op in ("conv2d", "rms_norm_silu", "add_pad", "posterior_patches"):
        assert any(f"{op}: triton" in one for one in ran.values())
    for op in ("norm_linear", "linear", "self_attention", "cross_attention", "euler_step"):
        assert f"{op}: triton" in ran["infer.normalized_actions"]


def test_a_kernel_asked_for_and_not_there_fails_the_command(golden_dir: Path, capsys) -> None:
    for backend, message in (("triton", "'triton' refused: x is on cpu"), ("tritn", "did you mean 'triton'")):
        with pytest.raises(SystemExit) as end:
            main(["parity", str(golden_dir / "libero_tiny"), "--engine", "--backend", backend, "--device", "cpu"])
        assert end.value.code == 2
        assert message in capsys.readouterr().err
