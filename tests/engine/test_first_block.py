"""Latents to block 0's attention: constants of the patch embedding, noise apart and at once, and how many launches it is."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda
from torch.utils._python_dispatch import TorchDispatchMode

from dit4dit import ops
from dit4dit.checkpoints.weights import random_model
from dit4dit.config import ModelConfig
from dit4dit.engine import Engine, Plan, RequestShape, stack
from dit4dit.engine.branch import beside
from dit4dit.engine.fold import Matrix, fold_embedding
from dit4dit.engine.fp8 import Fp8Matrix
from dit4dit.engine.listing import engine_without_data
from dit4dit.errors import InputError
from dit4dit.model.video_dit import patches
from dit4dit.ops import stages, stand_in
from dit4dit.ops.aot.launch_record import Launch
from dit4dit.presets import preset
from dit4dit.robots import EMBODIMENTS

TINY = preset("tiny").model
LEARNED = replace(TINY, dit=replace(TINY.dit, learned_positions=True))
F32, BF16 = torch.float32, torch.bfloat16


def engine_of(config: ModelConfig, dtype: torch.dtype = F32, **options: Any) -> Engine:
    model = random_model(config, 1, with_text=False, dtype=dtype)
    return Engine(model, **options)


def inputs(engine: Engine, batch: int, rows: int = 4, columns: int = 8) -> tuple[torch.Tensor, ...]:
    """frame, posterior and latent noise."""
    generator = torch.Generator().manual_seed(batch)
    z, frames = engine.config.vae.z_dim, engine.config.latent_frames
    shapes = ((batch, 3, 8 * rows, 8 * columns), (batch, z, 1, rows, columns), (batch, z, frames, rows, columns))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


@pytest.mark.parametrize("config", [TINY, LEARNED], ids=["no positions", "learned positions"])
def test_the_constants_are_what_the_mask_channels_and_positions_add(config: ModelConfig) -> None:
    engine = engine_of(config)
    _, _, latent = inputs(engine, 2)
    transformer = engine.model.backbone.transformer
    with torch.no_grad():
        wanted = transformer.embed_latents(latent)
        embedding = fold_embedding(engine.model.backbone)
        rows = patches(latent, config.dit.patch).flatten(4).flatten(2, 3)
        got = embedding.matrix(rows) + embedding.begin(2, 4)
        without = embedding.matrix(rows)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert (got - without)[:, 0].abs().max() > 0.01, "the conditioning frame is marked"
    assert bool((got == without)[:, 1:].all()) is not config.dit.learned_positions
    assert embedding.matrix.weight.is_contiguous()


@pytest.mark.parametrize("config", [TINY, LEARNED], ids=["no positions", "learned positions"])
@pytest.mark.parametrize("batch", [1, 3])
def test_apart_is_the_same_as_at_once(config: ModelConfig, batch: int) -> None:
    """And the same as the plain model; a sample's features do not depend on its batch."""
    engine = engine_of(config)
    frame, posterior, latent = inputs(engine, batch)
    embeds = torch.randn(batch, 5, config.dit.text_in, generator=torch.Generator().manual_seed(0))
    packs = [engine.pack(embeds[i : i + 1]) for i in range(batch)]
    model = engine.model
    with torch.no_grad():
        wanted = model.backbone.features(model.backbone.condition(frame, posterior), latent, model.context(embeds))
    found = {}
    for apart in (False, True):
        engine.branches = apart
        with ops.listing() as calls:
            found[apart] = engine.features(frame, stack(packs), posterior, latent)
        assert [op for op, _ in calls].count("adaln") == 3 * len(engine.blocks) + apart
        alone = engine.features(frame[:1], stack(packs[:1]), posterior[:1], latent[:1])
        torch.testing.assert_close(found[apart][:1], alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[True], found[False], rtol=1e-5, atol=1e-5)
    assert (found[True] - wanted).abs().max() < 1e-5 * wanted.abs().max()
    latents = torch.cat([engine.condition(frame, posterior), latent[:, :, 1:]], dim=2)
    assert torch.equal(engine.backbone(latents, stack(packs)), found[True])


def test_the_posteriors_mean_needs_no_noise() -> None:
    engine = engine_of(TINY, posterior="mean")
    frame, posterior, latent = inputs(engine, 2)
    pack = stack([engine.pack(torch.randn(1, 5, TINY.dit.text_in)) for _ in range(2)])
    want = engine.features(frame, pack, posterior, latent)
    assert torch.equal(engine.features(frame, pack, torch.full_like(posterior, torch.nan), latent), want)
    scale = engine.model.backbone.scale
    mean, _ = engine.model.backbone.frame_encoder(frame)
    torch.testing.assert_close(engine.condition(frame, posterior), scale.normalize(mean[:, :, None]))


@pytest.mark.parametrize("kind", ["bfloat16", "fp8"])
def test_apart_in_narrow_floats(kind: str) -> None:
    engine = engine_of(TINY, BF16)
    if kind == "fp8":
        narrow = [b.with_matrices(lambda _, matrix: Fp8Matrix.quantized(matrix, 8.0)) for b in engine.blocks]
        engine.blocks = tuple(narrow)
    frame, posterior, latent = inputs(engine, 2)
    pack = stack([engine.pack(torch.randn(1, 5, TINY.dit.text_in)) for _ in range(2)])
    found = []
    for engine.branches in (False, True):
        found.append(engine.features(frame.to(BF16), pack, posterior, latent))
    assert (found[0] - found[1]).norm() < 0.02 * found[0].norm()


def test_a_model_of_one_latent_frame_has_no_noise_to_put() -> None:
    one = replace(TINY, frames=1)
    engine = engine_of(one)
    frame, posterior, latent = inputs(engine, 1)
    pack = stack([engine.pack(torch.randn(1, 5, TINY.dit.text_in))])
    found = []
    for engine.branches in (False, True):
        found.append(engine.features(frame, pack, posterior, latent))
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_features_are_in_the_heads_dtype_and_rounded_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a bfloat16 backbone: its last sum is float32's whatever its parts are."""
    engine = engine_of(TINY, BF16)
    engine.head = replace(engine.head, context=Matrix(engine.head.context.weight.to(dtype)))
    frame, posterior, latent = inputs(engine, 2)
    pack = stack([engine.pack(torch.randn(1, 5, TINY.dit.text_in))])
    parts: list[torch.Tensor] = []
    plain = torch.addcmul

    def seen(*given: torch.Tensor, **out: torch.Tensor) -> torch.Tensor:
        parts.extend(given if out else ())
        return plain(*given, **out)

    monkeypatch.setattr(torch, "addcmul", seen)
    got = engine.features(frame.to(BF16), pack, posterior, latent)
    x, gate, branch = parts
    assert (x.dtype, gate.dtype, branch.dtype) == (F32, F32, BF16)
    want = (x.double() + gate.double() * branch.double()).flatten(1, 2)
    assert got.dtype == dtype
    assert ((got.double() - want).abs() <= 0.51 * torch.finfo(dtype).eps * want.abs() + 1e-6).all()


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("frames", [1, 3])
def test_other_numbers_of_latent_frames_are_named(frames: int, apart: bool) -> None:
    """Apart, what fewer frames leave unwritten would be taken for tokens."""
    engine = engine_of(TINY)
    engine.branches = apart
    frame, posterior, latent = inputs(engine, 1)
    other = latent[:, :, :1].expand(-1, -1, frames, -1, -1)
    pack = stack([engine.pack(torch.randn(1, 5, TINY.dit.text_in))])
    for run in (lambda: engine.features(frame, pack, posterior, other), lambda: engine.backbone(other, pack)):
        with pytest.raises(InputError, match=f"latents: expected 2 latent frames, got {frames}"):
            run()


@pytest.mark.parametrize("where", ["branch", "main"])
def test_two_streams_meet_again(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Also where one raises: the error is that one."""
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    seen = []

    def work(name: str) -> str:
        seen.append((name, cuda.current))
        if fails and name == where:
            raise ValueError(name)
        return name

    for fails in (False, True):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(cuda.stream):
            graph.capture_begin(capture_error_mode="thread_local")
            if fails:
                with pytest.raises(ValueError, match=where):
                    beside(cuda.branch, lambda: work("branch"), lambda: work("main"))
            else:
                assert beside(cuda.branch, lambda: work("branch"), lambda: work("main")) == ("branch", "main")
            assert not cuda.forked
            graph.capture_end()
    assert seen[:2] == [("branch", cuda.branch), ("main", cuda.stream)]
    assert cuda.log == 2 * ["begin", "fork", "join", "end"]


VIEWS = {
    "alias",
    "as_strided",
    "chunk",
    "detach",
    "expand",
    "permute",
    "reshape",
    "select",
    "slice",
    "split",
    "squeeze",
    "t",
}
VIEWS |= {"transpose", "unbind", "unflatten", "unsqueeze", "view", "_unsafe_view", "_reshape_alias"}
VIEWS |= {"empty", "new_empty", "empty_like", "empty_strided"}
"""Of the calls that PyTorch dispatches: those that launch nothing."""


class Launches(TorchDispatchMode):
    """Counts what a step launches on a GPU, by stage: Triton kernels and PyTorch's own calls that are no views."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.found: dict[str | None, Counter[str]] = {}
        made = Launch.__init__

        def counted(launch: Launch, kernel: str, *args: Any, **kwargs: Any) -> None:
            made(launch, kernel, *args, **kwargs)
            self.add(kernel)

        monkeypatch.setattr(Launch, "__init__", counted)

    def add(self, what: str) -> None:
        stage = stages.current()
        self.found.setdefault(stage and stage.name, Counter())[what] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["robocasa_gr1", "libero"])
@pytest.mark.parametrize("batch, copies", [(1, 0), (4, 2)])
def test_launches_around_a_step(name: str, batch: int, copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is copied together, filled or cast: for one request both parts of block 0's input are written in place."""
    config, robot = preset(name).model, EMBODIMENTS[preset(name).embodiment]
    engine = engine_without_data(config)
    views = (config.image_size,) * len(robot.views)
    shape = RequestShape(batch, views, None, robot.resize, True, config.text.max_length)
    plan = Plan(engine, shape, torch.zeros(5, robot.action_dim, dtype=torch.float64))
    with stand_in.without_data(), torch.no_grad():
        plan.compute()  # which makes tables
        with Launches(monkeypatch) as counted:
            plan.compute()
    found, blocks = counted.found, len(engine.blocks)
    assert found["noise"] == Counter(philox_normal=1, state_token=1, patch_tokens=1, mm=1, copy_=copies)
    assert found["latents"] == Counter(posterior_patches=1)
    assert found["outputs"] == Counter(unnormalize=1)
    backbone = found["backbone"]
    assert (backbone["mm"], backbone["adaln"], backbone["copy_"]) == (6 * blocks, 3 * blocks - 1, copies)
    assert backbone["patch_tokens"] == 1
    assert backbone["addcmul"] == 1
    assert not {"cat", "clone", "fill_", "zero_", "_to_copy", "new_zeros", "zeros"} & set(backbone)
    assert None not in found
