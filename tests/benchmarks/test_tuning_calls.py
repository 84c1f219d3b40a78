"""The listed calls are those of a real policy, and of nothing else: whole policies run beside the list on the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dit4dit.benchmarks import tuning_calls
from dit4dit.benchmarks.tuning_calls import Subject, counts, of_checkpoint, of_preset, read_images, requests, todo
from stateless import without_state

from dit4dit import Guidance, Observation, Policy, ops
from dit4dit.checkpoints import checkpoint
from dit4dit.checkpoints.weights import random_model
from dit4dit.engine import Engine
from dit4dit.engine.listing import distinct
from dit4dit.envs import tabletop_policy_dir
from dit4dit.errors import CheckpointError, ConfigError, InputError
from dit4dit.ops.verdicts import call_text
from dit4dit.presets import preset
from dit4dit.robots import LIBERO
from dit4dit.robots.processor import Codec
from dit4dit.robots.statistics import parse

CPU, GPU = torch.device("cpu"), torch.device("cuda")
GO = "go"


def keys(found: list[tuning_calls.Todo]) -> dict[str, int]:
    """ "op: call" -> calls in a step of the first request."""
    return {f"{one.op}: {call_text(one.args)}": one.count for one in found}


def observation(policy: Policy, sizes: dict[str, tuple[int, int]]) -> Observation:
    robot, own = policy.embodiment, policy.config.image_size
    images = {view: np.zeros((*sizes.get(view, own), 3), np.uint8) for view in robot.views}
    return Observation(images, {key.name: np.zeros(key.dim, np.float32) for key in robot.state})


def recorded(policy: Policy, batches: tuple[int, ...], images: dict[str, tuple[int, int]]) -> list[dict[str, int]]:
    """The calls of each kind of request that `tuning_calls.requests` names, as the policy makes them, in its order."""
    height, width = policy.config.image_size
    joined = (height, width * len(policy.embodiment.views))
    example: dict[str, Any] = {"image": np.zeros((*joined, 3), np.uint8), "lang": GO}
    if policy.config.head.state_dim is not None:
        example["state"] = np.zeros((1, policy.config.head.state_dim), np.float32)
    previous = np.zeros((policy.config.head.action_horizon, policy.config.head.action_dim), np.float32)
    found: list[dict[str, int]] = []

    def record(warm_up: Callable[[], object], run: Callable[[], object]) -> None:
        with ops.listing() as warm:
            warm_up()
        with ops.listing() as calls:
            run()
        found.append({key: count for key, (_, count) in distinct(calls).items()})
        assert {key: count for key, (_, count) in distinct(warm).items()} == found[-1]

    policy.infer(observation(policy, {"": (0, 0)}), GO, seed=0)  # makes the prompt's pack, which is no part of a plan
    for batch in batches:
        for sizes in ([images] if images else []) + [{}]:
            seen, words = [observation(policy, sizes)] * batch, [GO] * batch
            for given, most in (
                ([None] * batch, None),
                ([Guidance(previous)] * batch, Guidance(previous).max_guidance),
            ):
                record(
                    lambda batch=batch, sizes=sizes, most=most: policy.warm_up(sizes, batch=batch, max_guidance=most),
                    lambda seen=seen, words=words, given=given: policy.infer_batch(seen, words, guidance=given),
                )
        record(
            lambda batch=batch: policy.warm_up(joined=joined, batch=batch),
            lambda batch=batch: policy.predict_action([example] * batch),
        )
    return found


def check(
    policy: Policy, subject: Subject, images: tuple[str, ...] = (), batches: tuple[int, ...] = (1, 2), **kinds: Any
) -> None:
    """The list of the subject is what the policy does: no call more, none less, and as many in the first request's step."""
    sizes = read_images(images, subject.robot)
    assert policy.engine is not None
    kinds = {"dtype": policy.model.dtype, "head_dtype": policy.model.head.dtype} | kinds
    listed = keys(todo(subject, requests(subject, batches, sizes), CPU, **kinds))
    real = recorded(policy, batches, sizes)
    assert listed.keys() == set().union(*real)
    assert {key: count for key, count in listed.items() if count} == real[0]


def test_of_a_published_checkpoint_with_two_views(small_libero: Path, libero_policy: Policy) -> None:
    check(libero_policy, of_checkpoint(str(small_libero), None, None), ("wrist_image=48x40",))


def test_of_a_published_checkpoint_with_one_view(golden_dir: Path, gr1_policy: Policy) -> None:
    check(gr1_policy, of_checkpoint(str(golden_dir / "gr1_tiny"), None, None))


def test_of_the_preset_tabletop_and_its_checkpoint() -> None:
    policy = Policy.from_pretrained(tabletop_policy_dir(), device="cpu")
    subjects = [of_preset("tabletop"), of_checkpoint(str(tabletop_policy_dir()), None, None)]
    check(policy, subjects[0], (f"{policy.embodiment.views[0]}=96x96",))
    first, second = (keys(todo(one, requests(one, (1,), {}), CPU, dtype=torch.float32)) for one in subjects)
    assert first == second


@pytest.fixture(scope="module")
def embeds() -> dict[str, torch.Tensor]:
    config = preset("tiny").model
    return {GO: torch.zeros(config.text.max_length, config.dit.text_in)}


@pytest.mark.parametrize(
    "dtype,head_dtype,steps",
    [(torch.float32, torch.float32, None), (torch.bfloat16, torch.float32, 2), (torch.bfloat16, torch.bfloat16, None)],
)
def test_of_the_preset_tiny(
    golden_dir: Path, embeds: dict[str, torch.Tensor], dtype: torch.dtype, head_dtype: torch.dtype, steps: int | None
) -> None:
    model = random_model(preset("tiny").model, 0).to(dtype)
    model.head.to(head_dtype)
    said = json.loads((golden_dir / "libero_tiny" / "dataset_statistics.json").read_text())
    statistics, head = parse(said, "franka", "test"), model.config.head
    chains = LIBERO.state_chain(statistics, head.state_dim), LIBERO.action_chain(statistics, head.action_dim)
    policy = Policy(model, Codec(LIBERO, "franka", *chains), prompt_embeds=embeds, engine=Engine(model, steps=steps))
    check(policy, of_preset("tiny"), steps=steps)


def test_of_a_quantised_policy(small_libero: Path, libero_policy: Policy) -> None:
    calibration = libero_policy.calibrate([observation(libero_policy, {})], [GO])
    policy = Policy.from_pretrained(small_libero, device="cpu", quantization="fp8", calibration=calibration)
    check(policy, of_checkpoint(str(small_libero), None, None), batches=(1,), fp8=True)


def test_a_model_without_a_state_token_is_asked_without_a_state() -> None:
    found = requests(Subject("x", without_state(preset("tiny").model), LIBERO), (1,), {})
    assert [shape.state for shape, _ in found] == [False] * 3


def test_on_a_gpu_the_noise_is_a_call_and_the_head_one_more() -> None:
    subject = of_preset("robocasa_gr1")
    plain = todo(subject, requests(subject, (1,), {}), GPU, dtype=torch.bfloat16, head_dtype=torch.float32)
    counted = counts([one for one in plain if one.count])
    # of the linear ones two are block 0's qkv, for the noise and for the conditioning frame
    assert (counted["philox_normal"], counted["linear"], counted["rms_norm_silu"]) == (1, 17, 14)
    assert (counted["patch_tokens"], counted["state_token"]) == (2, 1)
    assert "action_ode" not in counted
    # what is guided adds a call of euler_step, and joined images one of preprocess
    assert len(plain) == sum(counted.values()) + 2
    assert {one.op for one in plain if not one.count} == {"euler_step", "preprocess"}
    subject = of_preset("tiny")
    both = todo(subject, requests(subject, (1, 4), {}), GPU, dtype=torch.bfloat16, head_dtype=torch.bfloat16)
    heads = [one for one in both if one.op == "action_ode"]
    assert [one.count for one in heads] == [
        1,
        0,
        0,
    ]  # batch 1, guided too, and batch 4, which guidance takes from the kernel
    weights = {tuple(one.args[5].shape) for one in both if one.op == "euler_step" and one.args[5] is not None}
    assert weights == {(8,), (1, 8), (4, 8)}, "the kernel's guidance has one row of weights, the library's one a sample"


def test_only_some_ops() -> None:
    subject = of_preset("tiny")
    wanted = requests(subject, (1,), {})
    found = todo(subject, wanted, CPU, dtype=torch.float32, only=("adaln", "linear"))
    assert set(counts(found)) == {"adaln", "linear"}
    with pytest.raises(InputError, match=r"--ops 'adalm': no such op; did you mean 'adaln'\?; known: preprocess, "):
        todo(subject, wanted, CPU, dtype=torch.float32, only=("adalm",))
    with pytest.raises(InputError, match="--ops linear_fp8: preset tiny does not call it; it calls: preprocess, "):
        todo(subject, wanted, CPU, dtype=torch.float32, only=("linear_fp8",))


@pytest.mark.parametrize(
    "word,message",
    [
        ("primary_image", "expected VIEW=HEIGHTxWIDTH in pixels, primary_image=480x640 say"),
        ("primary_image=480", "expected VIEW=HEIGHTxWIDTH in pixels"),
        ("primary_image=480x-1", "expected VIEW=HEIGHTxWIDTH in pixels"),
        ("primary_image=²x2", "expected VIEW=HEIGHTxWIDTH in pixels"),
        ("primary_image=0x640", r"--image primary_image: expected \(height, width\) in pixels, got \(0, 640\)"),
        ("primary_imag=480x640", "no such view; did you mean 'primary_image'"),
    ],
)
def test_sizes_that_are_none(word: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_images([word], LIBERO)


def test_sizes() -> None:
    assert read_images(["wrist_image=480x640"], LIBERO) == {"wrist_image": (480, 640)}
    with pytest.raises(InputError, match="--image wrist_image: given twice"):
        read_images(["wrist_image=480x640", "wrist_image=480x640"], LIBERO)
    subject = of_preset("libero")
    with pytest.raises(InputError, match="sides of at most 16384 pixels, got 999999999"):
        requests(subject, (1,), read_images([f"wrist_image=480x{'9' * 50}"], LIBERO))
    with pytest.raises(InputError, match="batch: expected 1 to 16, got 17"):
        requests(subject, (1, 17), {})


def test_a_checkpoint_is_opened_without_its_weights(small_libero: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(dict):
        def __getitem__(self, name: str) -> Any:
            raise AssertionError(f"the weights {name} are read")

    real = checkpoint.load_pt
    monkeypatch.setattr(checkpoint, "load_pt", lambda file: Closed(real(file)))
    subject = of_checkpoint(str(small_libero), None, None)
    assert todo(subject, requests(subject, (1,), {}), CPU, dtype=torch.float32)


def test_mistakes_are_those_of_a_policy(tmp_path: Path, small_libero: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        of_checkpoint(str(tmp_path / "none"), None, None)
    with pytest.raises(ConfigError, match="did you mean 'libero'"):
        of_checkpoint(str(small_libero), None, "lebero")
    with pytest.raises(ConfigError, match="preset 'tini': unknown; did you mean 'tiny'"):
        of_preset("tini")
    subject = of_preset("tiny")
    with pytest.raises(ConfigError, match="engine steps: expected one of"):
        todo(subject, requests(subject, (1,), {}), CPU, dtype=torch.float32, steps=3)
