"""The policy as its users call it."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from stateless import without_state

from dit4dit import ActionChunk, Noise, Observation, Policy
from dit4dit.checkpoints.weights import random_model
from dit4dit.errors import BackendError, ConfigError, InputError, OutputError
from dit4dit.policy.device import pick_device
from dit4dit.presets import preset
from dit4dit.robots import LIBERO
from dit4dit.robots.processor import Codec


def golden_examples(folder: Path):
    golden = load_file(folder / "golden.safetensors")
    prompts = json.loads((folder / "golden.json").read_text())["prompts"]
    examples, noise = [], []
    for i, prompt in enumerate(prompts):
        examples.append(
            {"image": [golden["in.images"][i, 0].numpy()], "lang": prompt, "state": golden["in.state"][i].numpy()}
        )
        names = ("posterior", "latent", "action")
        noise.append(Noise(**{n: golden[f"infer.{n}_noise"][i].numpy() for n in names}))
    return examples, noise, golden["infer.normalized_actions"].numpy()


@pytest.mark.parametrize("name", ["libero_tiny", "gr1_tiny"])
def test_predict_action_returns_what_the_published_call_returned(golden_dir: Path, request, name: str) -> None:
    policy = request.getfixturevalue(name.replace("tiny", "policy"))
    examples, noise, want = golden_examples(golden_dir / name)
    got = policy.predict_action(examples, noise=noise)
    assert list(got) == ["normalized_actions"]
    assert got["normalized_actions"].dtype == np.float32
    assert np.abs(got["normalized_actions"] - want).max() / np.abs(want).max() < 1e-5
    single = policy.predict_action({**examples[1], "image": examples[1]["image"][0]}, noise=noise[1])
    assert np.abs(single["normalized_actions"][0] - want[1]).max() / np.abs(want).max() < 1e-5


def test_predict_action_sees_the_first_picture_of_a_list(golden_dir: Path, libero_policy: Policy) -> None:
    """As published: a list holds a training sample's frames; training code calls with all of them."""
    examples, noise, want = golden_examples(golden_dir / "libero_tiny")
    golden = load_file(golden_dir / "libero_tiny" / "golden.safetensors")
    clips = [{**e, "image": list(golden["in.images"][i].numpy())} for i, e in enumerate(examples)]
    got = libero_policy.predict_action(clips, noise=noise, use_ddim=True, num_ddim_steps=20)
    assert np.abs(got["normalized_actions"] - want).max() / np.abs(want).max() < 1e-5


def test_predict_action_without_a_state(libero_policy: Policy) -> None:
    example = {"image": np.zeros((32, 64, 3), np.uint8), "lang": "go"}
    without = libero_policy.predict_action(example, noise=Noise.from_seed(0))["normalized_actions"]
    zero = libero_policy.predict_action({**example, "state": np.zeros((1, 16))}, noise=Noise.from_seed(0))
    assert without.shape == (1, 8, 8)
    assert not np.array_equal(without, zero["normalized_actions"])
    with pytest.raises(InputError, match="give all or none"):
        libero_policy.predict_action([{**example, "state": np.zeros((1, 16))}, example])


def test_same_seed_and_input_same_bits(libero_policy: Policy, small_libero: Path, observation: Observation) -> None:
    a = libero_policy.infer(observation, "open the drawer", seed=5)
    b = libero_policy.infer(observation, "open the drawer", noise=Noise.from_seed(5, 0))
    other = Policy.from_pretrained(small_libero, device="cpu")
    c = other.infer(observation, "open the drawer", seed=5)
    assert np.array_equal(a.normalized, b.normalized)
    assert np.array_equal(a.normalized, c.normalized)
    assert not np.array_equal(a.normalized, libero_policy.infer(observation, "open the drawer", seed=6).normalized)
    assert not np.array_equal(a.normalized, libero_policy.infer(observation, "close the drawer", seed=5).normalized)


def test_chunk_is_in_robot_units(libero_policy: Policy, golden_dir: Path, observation: Observation) -> None:
    chunk = libero_policy.infer(observation, "open the drawer", seed=1)
    assert isinstance(chunk, ActionChunk)
    assert chunk.actions.shape == (8, 7)
    assert chunk.normalized.shape == (8, 8)
    assert chunk.names == ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
    assert chunk.control_hz == 20.0
    limits = json.loads((golden_dir / "libero_tiny" / "dataset_statistics.json").read_text())["franka"]["action"]
    low, high = np.array(limits["min"]), np.array(limits["max"])
    a = np.clip(chunk.normalized[:, :7], -1, 1)
    a[:, 6] = chunk.normalized[:, 6] >= 0.5
    want = np.where(limits["mask"], 0.5 * (a + 1) * (high - low) + low, a)
    assert np.allclose(chunk.actions, want, atol=1e-6)


def test_chunks_are_stamped(libero_policy: Policy, observation: Observation, monkeypatch) -> None:
    """With when the observation was made, as the caller says it or else when the call came, and when the chunk was there."""
    run, ran = libero_policy._runner.run, []

    def timed(*given):
        begun = time.monotonic_ns()
        ran.append((begun, run(*given), time.monotonic_ns()))
        return ran[-1][1]

    monkeypatch.setattr(libero_policy._runner, "run", timed)
    before = time.monotonic_ns()
    chunk = libero_policy.infer(observation, "go")
    after = time.monotonic_ns()
    begun, _, ended = ran[0]
    assert before <= chunk.observed_at_ns <= begun < ended <= chunk.computed_at_ns <= after
    seen = libero_policy.infer_batch([observation] * 2, ["go"] * 2, observed_at_ns=[before - 3, None])
    assert seen[0].observed_at_ns == before - 3
    assert after <= seen[1].observed_at_ns < seen[0].computed_at_ns == seen[1].computed_at_ns
    (published,) = libero_policy.run(
        libero_policy.published_requests({"image": np.zeros((32, 64, 3), np.uint8), "lang": "go"})
    )
    assert seen[1].computed_at_ns <= published.observed_at_ns < published.computed_at_ns


@pytest.mark.parametrize(
    "stamp", [-1, 1.5, True, "now", time.time_ns()], ids=["negative", "float", "bool", "text", "wall clock"]
)
def test_a_stamp_of_another_clock_is_refused(libero_policy: Policy, observation: Observation, stamp) -> None:
    with pytest.raises(InputError, match=r"observed_at_ns: expected time\.monotonic_ns\(\) of when"):
        libero_policy.infer(observation, "go", observed_at_ns=stamp)
    with pytest.raises(InputError, match=r"observed_at_ns: expected one per request \(1\), got 2"):
        libero_policy.infer_batch([observation], ["go"], observed_at_ns=[1, 1])


def test_unseeded_chunks_differ_and_can_be_repeated(libero_policy: Policy, observation: Observation) -> None:
    a, b = (libero_policy.infer(observation, "go") for _ in range(2))
    assert not np.array_equal(a.normalized, b.normalized)
    assert np.array_equal(libero_policy.infer(observation, "go", noise=a.noise).normalized, a.normalized)


def test_a_request_does_not_depend_on_its_batch(libero_policy: Policy, make_observation) -> None:
    requests = [make_observation(i) for i in range(3)]
    words, noise = ["open", "close it", "push"], [Noise.from_seed(9, i) for i in range(3)]
    batch = libero_policy.infer_batch(requests, words, noise=noise)
    assert all(chunk.noise is own for chunk, own in zip(batch, noise, strict=True))
    for i in range(3):
        alone = libero_policy.infer(requests[i], words[i], noise=noise[i])
        assert np.allclose(batch[i].normalized, alone.normalized, atol=2e-5)
    turned = libero_policy.infer_batch(requests[::-1], words[::-1], noise=noise[::-1])
    assert np.allclose(turned[2].normalized, batch[0].normalized, atol=2e-5)


def test_pictures_of_any_size_are_brought_to_size(libero_policy: Policy, make_observation) -> None:
    mixed = [make_observation(0, 256), make_observation(1, 300)]
    noise = [Noise.from_seed(0, i) for i in range(2)]
    batch = libero_policy.infer_batch(mixed, ["go", "go"], noise=noise)
    alone = libero_policy.infer(mixed[1], "go", noise=noise[1])
    assert np.allclose(batch[1].normalized, alone.normalized, atol=2e-5)


def test_prompt_embeddings_replace_the_text_encoder(
    libero_policy: Policy, small_libero: Path, observation: Observation
) -> None:
    embeds = libero_policy.embed_prompts(["open the drawer"])
    lean = Policy.from_pretrained(small_libero, device="cpu", prompt_embeds=embeds)
    assert lean.model.text is None
    a = lean.infer(observation, "open the drawer", seed=2)
    assert np.array_equal(a.normalized, libero_policy.infer(observation, "open the drawer", seed=2).normalized)
    with pytest.raises(InputError, match=r"loaded without a text encoder.*did you mean 'open the drawer'"):
        lean.infer(observation, "open the drawr", seed=2)
    with pytest.raises(ConfigError, match="without its text encoder"):
        lean.embed_prompts(["x"])
    with pytest.raises(InputError, match=r"expected shape \[L, 64\], got \[3, 5\]"):
        Policy.from_pretrained(small_libero, device="cpu", prompt_embeds={"a": torch.zeros(3, 5)}).infer(
            observation, "a"
        )


def test_text_is_encoded_once_per_instruction(libero_policy: Policy, observation: Observation, monkeypatch) -> None:
    calls = []
    embed = libero_policy.model.embed
    monkeypatch.setattr(libero_policy.model, "embed", lambda tokens: calls.append(1) or embed(tokens))
    for _ in range(3):
        libero_policy.infer(observation, "a new instruction", seed=0)
    assert len(calls) == 1


def test_a_model_without_state_looks_at_no_state() -> None:
    model = random_model(without_state(preset("tiny").model), 0)
    statistics = json.loads((Path(__file__).parents[1] / "golden/libero_tiny/dataset_statistics.json").read_text())
    from dit4dit.robots.statistics import parse

    parsed = parse(statistics, "franka", "test")
    codec = Codec(LIBERO, "franka", None, LIBERO.action_chain(parsed, model.config.head.action_dim))
    policy = Policy(model, codec, prompt_embeds={"go": torch.zeros(4, model.config.dit.text_in)})
    pictures = {v: np.zeros((32, 32, 3), np.uint8) for v in LIBERO.views}
    assert policy.infer(Observation(images=pictures), "go", seed=0).actions.shape == (8, 7)
    assert policy.predict_action({"image": np.zeros((32, 64, 3), np.uint8), "lang": "go"})[
        "normalized_actions"
    ].shape == (1, 8, 8)


BAD_EXAMPLES = [
    ({"image": np.zeros((30, 64, 3), np.uint8)}, "expected sides divisible by 16, got 30 x 64"),
    ({"image": np.zeros((32, 64, 3), np.float32)}, "expected uint8 in 0..255, got float32"),
    ({"image": np.zeros((32, 64), np.uint8)}, "expected shape [H, W, 3] (RGB), got [32, 64]"),
    ({"image": []}, "examples[0].image: missing"),
    ({"state": np.zeros((1, 15), np.float32)}, "expected shape [1, 16], encoded and padded, got [1, 15]"),
    ({"state": np.full((1, 16), np.nan, np.float32)}, "examples[0].state: has NaN"),
    ({"state": "abc"}, "examples[0].state: expected 16 numbers"),
    ({"image": np.zeros((16, 4800, 3), np.uint8)}, "at most 1920 x 1920 pixels, got 16 x 4800"),
    ({"lang": None}, "examples[0].lang: expected a string"),
    ({"lang": " "}, "instruction: expected words"),
    ({"lang": "\ud800"}, "not valid Unicode"),
]


@pytest.mark.parametrize("change, message", BAD_EXAMPLES)
def test_bad_examples_are_refused(libero_policy: Policy, change, message: str) -> None:
    good = {"image": np.zeros((32, 64, 3), np.uint8), "lang": "go", "state": np.zeros((1, 16), np.float32)}
    assert libero_policy.predict_action(good)["normalized_actions"].shape == (1, 8, 8)
    with pytest.raises((InputError, ConfigError)) as caught:
        libero_policy.predict_action({**good, **change})
    assert message in str(caught.value)


def test_bad_observations_are_refused(libero_policy: Policy, observation: Observation) -> None:
    with pytest.raises(InputError, match="state 'x': expected 1 value, got 3"):
        libero_policy.infer(replace(observation, state={**observation.state, "x": np.zeros(3, np.float32)}), "go")
    with pytest.raises(InputError, match="expected uint8"):
        libero_policy.infer(replace(observation, images={k: v / 255 for k, v in observation.images.items()}), "go")
    with pytest.raises(InputError, match="give one of them"):
        libero_policy.infer(observation, "go", noise=Noise.from_seed(0), seed=0)
    with pytest.raises(InputError, match="1 observations and 2 instructions"):
        libero_policy.infer_batch([observation], ["a", "b"])
    for count in (0, 2):
        noise = [Noise.from_seed(i) for i in range(count)]
        with pytest.raises(InputError, match=rf"noise: expected one per request \(1\), got {count}"):
            libero_policy.infer_batch([observation], ["go"], noise=noise)
    with pytest.raises(InputError, match="noise action: expected shape"):
        libero_policy.infer(observation, "go", noise=Noise(action=np.zeros((9, 8), np.float32), seed=0))


@pytest.mark.parametrize("bad", [None, "abc", [None], []])
def test_bad_example_lists(libero_policy: Policy, bad) -> None:
    with pytest.raises(InputError, match="examples"):
        libero_policy.predict_action(bad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": None}, "state: expected a mapping"),
        ({"state": [1.0]}, "state: expected a mapping"),
        ({"images": None}, "images: expected a mapping"),
    ],
)
def test_containers_of_other_types(libero_policy: Policy, observation: Observation, change, message: str) -> None:
    with pytest.raises(InputError, match=message):
        libero_policy.infer(replace(observation, **change), "go")


def test_other_objects_in_place_of_ours(libero_policy: Policy, observation: Observation) -> None:
    with pytest.raises(InputError, match="expected an Observation, got dict"):
        libero_policy.infer({"images": {}}, "go")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected a Noise, got ndarray"):
        libero_policy.infer(observation, "go", noise=np.zeros(3))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected a list of Noise"):
        libero_policy.infer_batch([observation], ["go"], noise=Noise.from_seed(0))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="instructions: expected a list of strings"):
        libero_policy.infer_batch([observation] * 2, "go")
    with pytest.raises(InputError, match="expected a Guidance or None, got str"):
        libero_policy.infer(observation, "go", guidance="linear")  # type: ignore[arg-type]
    # a noise that is missing in a list is no fresh one, with which nothing could be repeated
    for missing, kind in ((None, "NoneType"), (0, "int")):
        noise: list = [Noise.from_seed(0), missing]
        with pytest.raises(InputError, match=f"noise: expected a list of Noise, one per request, got one with {kind}"):
            libero_policy.infer_batch([observation] * 2, ["go"] * 2, noise=noise)
        with pytest.raises(InputError, match=f"noise: expected a list of Noise, one per request, got one with {kind}"):
            libero_policy.predict_action([{"image": np.zeros((32, 64, 3), np.uint8), "lang": "go"}] * 2, noise=noise)
    for kind in ("float32", torch.int8, torch.float64):
        with pytest.raises(ConfigError, match="dtype: expected"):
            Policy.from_pretrained("anywhere", dtype=kind)  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ["auto", "off"])
def test_the_callers_autocast_changes_nothing(small_libero: Path, observation: Observation, engine) -> None:
    policy = Policy.from_pretrained(small_libero, device="cpu", engine=engine)
    with torch.autocast("cpu", torch.bfloat16):
        inside = policy.infer(observation, "open", seed=0)
        policy.prepare("close").result()
    outside = policy.infer(observation, "open", seed=0)
    fresh = Policy.from_pretrained(small_libero, device="cpu", engine=engine)
    assert np.array_equal(inside.normalized, outside.normalized)
    for words in ("open", "close"):
        want = fresh.infer(observation, words, seed=0).normalized
        assert np.array_equal(policy.infer(observation, words, seed=0).normalized, want)


@pytest.mark.parametrize("engine", ["auto", "off"])
def test_nan_never_reaches_the_robot(small_libero: Path, observation: Observation, engine) -> None:
    policy = Policy.from_pretrained(small_libero, device="cpu", engine=engine)
    with torch.no_grad():
        policy.model.head.action_decoder.layer2.bias[0] = float("nan")
    with pytest.raises(OutputError, match="wrote NaN or infinite"):
        policy.infer(observation, "open", seed=0)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, (torch.float32, torch.float32)),
        ({"dtype": torch.bfloat16}, (torch.bfloat16, torch.bfloat16)),
        ({"dtype": torch.bfloat16, "head_dtype": torch.float32}, (torch.bfloat16, torch.float32)),
        ({"head_dtype": torch.bfloat16}, (torch.float32, torch.bfloat16)),
    ],
)
def test_the_head_has_the_models_dtype_where_nothing_else_is_said(
    small_libero: Path, observation, options, wanted
) -> None:
    policy = Policy.from_pretrained(small_libero, device="cpu", **options)
    assert policy.model.head is not None
    assert (policy.model.dtype, policy.model.head.dtype) == wanted
    assert np.isfinite(policy.infer(observation, "open the drawer", seed=1).actions).all()


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(BackendError, match="expected auto, cpu, cuda"):
        pick_device("tpu-ish")
    with pytest.raises(BackendError, match="expected auto, cpu, cuda"):
        pick_device("meta")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that must be absent")
def test_an_absent_gpu_is_a_clear_error(golden_dir: Path) -> None:
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(BackendError, match=r"sees no CUDA .*; use --device cpu"):
        Policy.from_pretrained(golden_dir / "libero_tiny", device="cuda")


def test_choosing_embodiment_and_tag(libero_run: Path) -> None:
    file = libero_run / "dataset_statistics.json"
    data = json.loads(file.read_text())
    assert Policy.from_pretrained(libero_run, device="cpu", embodiment="libero").codec.tag == "franka"
    file.write_text(json.dumps({**data, "mine": data["franka"]}))
    with pytest.raises(ConfigError, match=r"2 embodiment tags and none chosen.*franka, mine"):
        Policy.from_pretrained(libero_run, device="cpu")
    assert Policy.from_pretrained(libero_run, device="cpu", embodiment="mine").codec.tag == "mine"
    assert Policy.from_pretrained(libero_run, device="cpu", embodiment="libero").codec.tag == "franka"
    assert Policy.from_pretrained(libero_run, device="cpu", embodiment=replace(LIBERO, tag="mine")).codec.tag == "mine"
    with pytest.raises(ConfigError, match="embodiment 'libro': unknown; did you mean 'libero'"):
        Policy.from_pretrained(libero_run, device="cpu", embodiment="libro")
    file.write_text(json.dumps({"one": data["franka"], "other": data["franka"]}))
    with pytest.raises(ConfigError, match="no statistics for 'franka'"):
        Policy.from_pretrained(libero_run, device="cpu", embodiment="libero")
    file.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="its encoded state has 58 values, the model takes at most 16"):
        Policy.from_pretrained(libero_run, device="cpu", embodiment="gr1")


def test_a_checkpoint_that_names_no_robot_asks_for_one(libero_run: Path) -> None:
    config, file = libero_run / "config.yaml", libero_run / "dataset_statistics.json"
    config.write_text(config.read_text().replace("libero_all", "my_own_mix"))
    file.write_text(file.read_text().replace('"franka"', '"my_tag"'))
    with pytest.raises(ConfigError, match="choose one with --embodiment: libero, gr1, g1, tabletop"):
        Policy.from_pretrained(libero_run, device="cpu")
    assert Policy.from_pretrained(libero_run, device="cpu", embodiment="libero").codec.tag == "my_tag"


def test_unknown_engine(golden_dir: Path) -> None:
    with pytest.raises(ConfigError, match="engine 'fast': expected auto or off"):
        Policy.from_pretrained(golden_dir / "libero_tiny", engine="fast")  # type: ignore[arg-type]
