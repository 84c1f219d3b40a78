"""Arguments that are strange, some of them legal: one clear line each at the door, and nothing has been computed or allocated."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dit4dit import Guidance, Noise, Observation, Policy
from dit4dit.checkpoints import checkpoint as checkpoints
from dit4dit.engine import Plan
from dit4dit.errors import BackendError, CheckpointError, ConfigError, Dit4DitError, InputError
from dit4dit.policy import policy as module
from dit4dit.policy.requests import MAX_SIDE

EXAMPLE = {"image": np.zeros((32, 64, 3), np.uint8), "lang": "go"}
LEFT = np.zeros((4, 8), np.float32)
HERE = Guidance(LEFT)


def refused(call: Callable[[], Any], kind: type[Dit4DitError], *words: str) -> None:
    """One line of that kind with these words in this order, and no error of others behind it."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert re.search(".*".join(map(re.escape, words)), message), message
    assert "\n" not in message
    assert len(message) < 400
    error = caught.value
    assert error.__cause__ is None
    assert error.__context__ is None or error.__suppress_context__


@pytest.fixture
def door(libero_policy: Policy, monkeypatch: pytest.MonkeyPatch) -> Policy:
    """The policy, which may look at arguments and do nothing else."""
    for owner, name in ((libero_policy._runner, "run"), (libero_policy._runner, "warm_up"), (Plan, "__init__")):
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("worked"))
    monkeypatch.setattr(libero_policy._texts, "get", lambda *_: pytest.fail("encoded"))
    return libero_policy


WARM_UPS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "a million": (
        {"pictures": {"primary_image": (10**6, 10**6)}},
        (f"at most {MAX_SIDE} pixels, got 1000000", "cameras"),
    ),
    "all together": (
        {"pictures": {"primary_image": (MAX_SIDE, MAX_SIDE)}, "batch": 16},
        ("at most 8 GiB", "got 12.0", "16 x 16384 x 16384, 32 x 32", "smaller"),
    ),
    "zero": (
        {"pictures": {"primary_image": (0, 480)}},
        ("pictures['primary_image']: expected (height, width)", "(0, 480)"),
    ),
    "negative": ({"pictures": {"primary_image": (-4, 480)}}, ("expected (height, width)", "(-4, 480)")),
    "floats": ({"pictures": {"primary_image": (480.0, 640.0)}}, ("expected (height, width)", "(480.0, 640.0)")),
    "NaN": ({"pictures": {"primary_image": (math.nan, 640)}}, ("expected (height, width)", "nan")),
    "unknown view": (
        {"pictures": {"primary": (4, 4)}},
        ("no view 'primary'", "did you mean 'primary_image'", "wrist_image"),
    ),
    "no name": ({"pictures": {5: (4, 4)}}, ("no view 5", "views: primary_image, wrist_image")),
    "a list": ({"pictures": [(480, 640)]}, ("pictures: expected a dict, view -> (height, width), got list",)),
    "a size": ({"pictures": 480}, ("pictures: expected a dict", "got int")),
    "batch 0": ({"batch": 0}, ("batch: expected 1 to 16, got 0",)),
    "batch 17": ({"batch": 17}, ("batch: expected 1 to 16, got 17",)),
    "batch True": ({"batch": True}, ("batch: expected 1 to 16, got True",)),
    "batch 2.5": ({"batch": 2.5}, ("batch: expected 1 to 16, got 2.5",)),
    "batch 10^300": ({"batch": 10**300}, ("batch: expected 1 to 16, got an integer of 997 bits",)),
    "joined odd": ({"joined": (30, 64)}, ("joined: expected sides divisible by 16, got 30 x 64",)),
    "joined wide": ({"joined": (16, 4800)}, ("joined: ", "at most 1920 x 1920 pixels, got 16 x 4800")),
    "joined a million": ({"joined": (10**6, 10**6)}, ("joined: ", "at most 1920 x 1920")),
    "joined zero": ({"joined": (0, 64)}, ("joined: expected (height, width)", "(0, 64)")),
    "joined and more": (
        {"joined": (32, 64), "pictures": {"primary_image": (4, 4)}},
        ("pictures and joined: give one",),
    ),
    "joined, guided": ({"joined": (32, 64), "max_guidance": 5.0}, ("joined and max_guidance: give one of them",)),
    "bound -1": ({"max_guidance": -1}, ("warm_up: max_guidance: expected a finite number above 0, got -1",)),
    "bound 0": ({"max_guidance": 0.0}, ("max_guidance: expected a finite number above 0, got 0.0",)),
    "bound NaN": ({"max_guidance": math.nan}, ("max_guidance: expected a finite number above 0, got nan",)),
    "bound inf": ({"max_guidance": math.inf}, ("max_guidance: expected a finite number above 0, got inf",)),
    "bound text": ({"max_guidance": "10"}, ("max_guidance: expected a finite number above 0, got '10'",)),
    "bound True": ({"max_guidance": True}, ("max_guidance: expected a finite number above 0, got True",)),
}


@pytest.mark.parametrize("name", WARM_UPS)
def test_warm_up(door: Policy, name: str) -> None:
    given, words = WARM_UPS[name]
    refused(lambda: door.warm_up(**given), InputError, *words)


def test_numpy_numbers_are_numbers(small_libero: Path, observation: Observation) -> None:
    policy = Policy.from_pretrained(small_libero, device="cpu")
    policy.warm_up({"primary_image": (np.int64(40), 50)}, batch=np.int32(2), max_guidance=np.float32(5.0))  # type: ignore[arg-type]
    policy.warm_up(batch=2, pictures={"primary_image": (40, 50)}, max_guidance=5)
    assert policy._runner.plans == 1
    wanted = policy.infer(observation, "go", seed=3).normalized
    for seed in (np.int64(3), np.uint8(3)):
        assert np.array_equal(policy.infer(observation, "go", seed=seed).normalized, wanted)  # type: ignore[arg-type]
    assert policy.infer(observation, "go", seed=np.uint64(2**64 - 1)).noise.seed == 2**64 - 1  # type: ignore[arg-type]
    ready = policy.infer_batch(deque([observation]), ("go",), noise=deque([Noise.from_seed(3)]))  # type: ignore[arg-type]
    assert np.array_equal(ready[0].normalized, wanted)


SEED = "seed: expected an integer in 0..2^64-1, got "
INFER: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "a number for noise": ({"noise": 7}, ("noise: expected a Noise, got int", "Noise.from_seed(7)", "seed=7")),
    "an array for noise": ({"noise": LEFT}, ("noise: expected a Noise, got ndarray",)),
    "noises": ({"noise": [Noise.from_seed(0)]}, ("noise: expected a Noise, got list",)),
    "a text": ({"seed": "x"}, (SEED + "'x'",)),
    "negative": ({"seed": -1}, (SEED + "-1",)),
    "too large": ({"seed": 2**64}, (SEED + "18446744073709551616",)),
    "huge": ({"seed": 10**300}, (SEED + "an integer of 997 bits",)),
    "True": ({"seed": True}, (SEED + "True",)),
    "NumPy's True": ({"seed": np.bool_(True)}, (SEED,)),
    "a float": ({"seed": 1.0}, (SEED + "1.0",)),
    "NumPy's float": ({"seed": np.float32(1)}, (SEED,)),
    "an array": ({"seed": np.array(3)}, (SEED + "int64 array []",)),
    "both": ({"noise": Noise.from_seed(0), "seed": 0}, ("noise and seed: give one of them, got both",)),
    "a schedule": ({"guidance": "linear"}, ("guidance: expected a Guidance or None, got str",)),
    "the left-over": ({"guidance": LEFT}, ("guidance: expected a Guidance or None, got ndarray",)),
    "a dict": ({"guidance": {"previous": LEFT}}, ("guidance: expected a Guidance or None, got dict",)),
    "False": ({"guidance": False}, ("guidance: expected a Guidance or None, got bool",)),
    "a long left-over": ({"guidance": Guidance(np.zeros((9, 8), np.float32))}, ("[1 to 8, 8]", "got [9, 8]")),
    "a wide left-over": ({"guidance": Guidance(np.zeros((4, 7), np.float32))}, ("[1 to 8, 8]", "got [4, 7]")),
}


@pytest.mark.parametrize("name", INFER)
def test_infer(door: Policy, observation: Observation, name: str) -> None:
    given, words = INFER[name]
    refused(lambda: door.infer(observation, "go", **given), InputError, *words)


@pytest.mark.parametrize("names", [{5: np.zeros((4, 4, 3), np.uint8)}, {None: 1}, {("a",): 1}])
def test_names_that_are_no_names(door: Policy, observation: Observation, names: dict[Any, Any]) -> None:
    refused(
        lambda: door.infer(Observation(names, observation.state), "go"), InputError, "unknown view", "primary_image"
    )
    refused(lambda: door.infer(Observation(observation.images, names), "go"), InputError, "state ")


def one(value: Any) -> Any:
    """A generator of one value."""
    return (item for item in [value])


def batches(seen: Observation) -> dict[str, tuple[tuple[Any, ...], dict[str, Any], tuple[str, ...]]]:
    noise = Noise.from_seed(0)
    lists = ("observations: expected a list of Observation, got ", "instructions: expected a list of strings")
    return {
        "generator": ((one(seen), ["go"]), {}, (lists[0] + "generator; give list(observations)",)),
        "map": ((map(id, [seen]), ["go"]), {}, (lists[0] + "map; give list(observations)",)),
        "iterator": (([seen], iter(["go"])), {}, (lists[1], "got list_iterator; give list(instructions)")),
        "a set": (([seen], {"go"}), {}, (lists[1], "got set; give list(instructions)")),
        "an array": (([seen], np.array(["go"])), {}, (lists[1], "got ndarray; give list(instructions)")),
        "noises": (
            ([seen], ["go"]),
            {"noise": one(noise)},
            ("noise: expected a list of Noise", "generator; give list(noise)"),
        ),
        "one noise": (
            ([seen], ["go"]),
            {"noise": noise},
            ("noise: expected a list of Noise, one per request, got Noise",),
        ),
        "a text for noise": (([seen], ["go"]), {"noise": "x"}, ("noise: expected a list of Noise", "got one string")),
        "guidances": (
            ([seen], ["go"]),
            {"guidance": one(HERE)},
            ("guidance: expected a list of Guidance or None", "got generator; give list(guidance)"),
        ),
        "dict": (({"a": seen}, {"a": "go"}), {}, (lists[0] + "dict",)),
        "dicts": (([seen, {"images": {}}], ["go", "go"]), {}, ("observations[1]: expected an Observation, got dict",)),
        "one observation": ((seen, ["go"]), {}, (lists[0] + "Observation",)),
        "one text": (([seen], "go"), {}, (lists[1], "got one string")),
        "bytes": (([seen], b"g"), {}, (lists[1], "got bytes")),
        "None": ((None, ["go"]), {}, (lists[0] + "NoneType",)),
        "nothing": (([], []), {}, ("0 observations and 0 instructions", "at least one")),
        "fewer": (([seen, seen], ["go"]), {}, ("2 observations and 1 instructions",)),
        "no text": (([seen], [5]), {}, ("instruction: expected words, got 5",)),
    }


@pytest.mark.parametrize("name", batches(Observation({})))
def test_infer_batch(door: Policy, observation: Observation, name: str) -> None:
    given, named, words = batches(observation)[name]
    refused(lambda: door.infer_batch(*given, **named), InputError, *words)
    if not named.get("guidance") and door.engine is not None:
        refused(lambda: door.calibrate(*given, **named), InputError, *words)


PREDICT: dict[str, tuple[Any, Any, tuple[str, ...]]] = {
    "generator": (one(EXAMPLE), None, ("examples: expected a dict or a list", "got generator; give list(examples)")),
    "array": (np.array([EXAMPLE]), None, ("examples: expected a dict or a list", "got ndarray; give list(examples)")),
    "text": ("go", None, ("examples: expected a dict or a list of at least one, got str",)),
    "empty": ([], None, ("examples: expected a dict or a list of at least one, got an empty list",)),
    "number in it": ([EXAMPLE, 5], None, ("examples[1]: expected a dict with image and lang, got int",)),
    "a seed for noise": (EXAMPLE, 7, ("noise: expected a list of Noise", "got int")),
    "noises": ([EXAMPLE], one(Noise.from_seed(0)), ("noise: expected a list of Noise", "give list(noise)")),
    "more noises": (EXAMPLE, [Noise.from_seed(0)] * 2, ("noise: expected one per request (1), got 2",)),
    "wide": (
        {**EXAMPLE, "image": np.zeros((16, 4800, 3), np.uint8)},
        None,
        ("examples[0].image: ", "1920 x 1920", "16 x 4800"),
    ),
    "lists": (
        {**EXAMPLE, "image": "x.png"},
        None,
        ("examples[0].image", "expected a uint8 array [H, W, 3], got 'x.png'"),
    ),
    "no words": ({**EXAMPLE, "lang": ["go"]}, None, ("examples[0].lang: expected a string, got ['go']",)),
    "a state of objects": ({**EXAMPLE, "state": object()}, None, ("examples[0].state: expected 16 numbers",)),
}


@pytest.mark.parametrize("name", PREDICT)
def test_predict_action(door: Policy, name: str) -> None:
    examples, noise, words = PREDICT[name]
    refused(lambda: door.predict_action(examples, noise), InputError, *words)


def test_the_rest_of_the_door(door: Policy) -> None:
    refused(lambda: door.run([5]), InputError, "requests[0]: expected what Policy.request returns, got int")  # type: ignore[list-item]
    refused(lambda: door.run({}), InputError, "requests: expected a list of Request, got dict")  # type: ignore[arg-type]
    assert door.run([]) == []
    refused(lambda: door.embed_prompts("go"), InputError, "instructions: expected a list of strings, got one string")
    refused(lambda: door.embed_prompts(one("go")), InputError, "got generator; give list(instructions)")


class Anything:
    """Of no type that is known."""


LOADS: dict[str, tuple[dict[str, Any], type[Dit4DitError], tuple[str, ...]]] = {
    "dtype": (
        {"dtype": "float32"},
        ConfigError,
        (
            "dtype: expected torch.float32",
            "got 'float32'; give the torch.dtype",
        ),
    ),
    "short dtype": ({"dtype": "bf16"}, ConfigError, ("dtype: expected torch.float32", "got 'bf16'")),
    "NumPy's dtype": ({"dtype": np.float32}, ConfigError, ("dtype: expected torch.float32", "got the class float32")),
    "head's dtype": ({"head_dtype": "float32"}, ConfigError, ("head_dtype: expected torch.float32",)),
    "device None": ({"device": None}, BackendError, ("device None: expected auto, cpu, cuda or cuda:N",)),
    "device number": ({"device": 0}, BackendError, ("device 0: expected auto, cpu, cuda or cuda:N",)),
    "devices": ({"device": ["cpu"]}, BackendError, ("device ['cpu']: expected auto, cpu, cuda or cuda:N",)),
    "device bytes": ({"device": b"cpu"}, BackendError, ("device b'cpu': expected auto",)),
    "no device": ({"device": ""}, BackendError, ("device '': expected auto",)),
    "a CPU's number": ({"device": "cpu:3"}, BackendError, ("device 'cpu:3': expected auto",)),
    "robot": ({"embodiment": 5}, ConfigError, ("embodiment: expected an Embodiment, its name", "got int")),
    "robots": ({"embodiment": ["libero"]}, ConfigError, ("embodiment: expected an Embodiment", "got list")),
    "packs": ({"packs": 5}, ConfigError, ("packs: expected a folder, got int",)),
    "packs, bytes": ({"packs": b"packs"}, ConfigError, ("packs: expected a folder, got bytes",)),
    "packs, NUL": ({"packs": "a\0b"}, ConfigError, (r"packs 'a\x00b': is no name that a file can have",)),
    "calibration": (
        {"calibration": 5, "quantization": "fp8"},
        ConfigError,
        ("calibration: expected a file of dit4dit calibrate", "got int"),
    ),
    "quantisation": ({"quantization": "int4"}, ConfigError, ("quantization 'int4': expected 'fp8'",)),
    "embeddings": (
        {"prompt_embeds": ["go"]},
        ConfigError,
        ("prompt_embeds: expected a dict", "got list", "embed_prompts"),
    ),
    "encoder": ({"text_encoder": "no"}, ConfigError, ("text_encoder: expected True or False, got 'no'",)),
    "engine": ({"engine": None}, ConfigError, ("engine None: expected auto or off",)),
}


@pytest.mark.parametrize("name", LOADS)
def test_from_pretrained(small_libero: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    given, kind, words = LOADS[name]
    for work in ("open_checkpoint", "build"):
        monkeypatch.setattr(module, work, lambda *_, **__: pytest.fail("worked"))
    refused(lambda: Policy.from_pretrained(small_libero, **{"device": "cpu", **given}), kind, *words)


def test_a_gpu_that_is_not_there(small_libero: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for count, words in ((1, "only 1 GPU is visible"), (8, "only 8 GPUs are visible")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        refused(
            lambda: Policy.from_pretrained(small_libero, device="cuda:99"),
            BackendError,
            "device 'cuda:99'",
            words,
            "cuda:N",
        )


def test_places_that_are_files_or_folders(small_libero: Path, tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("{}")
    link.symlink_to(tmp_path / "gone")
    load = Policy.from_pretrained
    fp8: dict[str, Any] = {"device": "cpu", "quantization": "fp8"}
    refused(
        lambda: load(small_libero, device="cpu", packs=file), ConfigError, f"packs '{file}': is a file; give a folder"
    )
    refused(
        lambda: load(small_libero, device="cpu", packs=str(file / "a")),
        ConfigError,
        "cannot be looked at (Not a directory)",
    )
    refused(
        lambda: load(small_libero, device="cpu", packs=link), ConfigError, "is a link to", "gone, which is not there"
    )
    again = ("is a folder; expected a file", "dit4dit calibrate")
    refused(lambda: load(small_libero, calibration=tmp_path, **fp8), CheckpointError, str(tmp_path), *again)
    refused(lambda: load(small_libero, calibration=link, **fp8), CheckpointError, "is a link to", "which is not there")
    refused(lambda: load(small_libero, calibration=file / "a", **fp8), CheckpointError, "Not a directory")


EMBEDDINGS: dict[str, tuple[dict[Any, Any], tuple[str, ...]]] = {
    "no words": ({5: torch.zeros(4, 64)}, ("prompt_embeds: expected instructions as keys, got int",)),
    "no numbers": ({"go": "x"}, ("prompt_embeds 'go': expected numbers [L, 64], got str", "Policy.embed_prompts")),
    "one number": ({"go": 5}, ("prompt_embeds 'go': expected shape [L, 64], got []",)),
    "no rows": ({"go": torch.zeros(0, 64)}, ("expected shape [L, 64], got [0, 64]",)),
    "another width": ({"go": torch.zeros(4, 63)}, ("expected shape [L, 64], got [4, 63]",)),
    "a batch": ({"go": torch.zeros(1, 4, 64)}, ("expected shape [L, 64], got [1, 4, 64]",)),
    "whole numbers": ({"go": torch.zeros(4, 64, dtype=torch.int64)}, ("expected finite floats, got torch.int64",)),
    "NaN": ({"go": torch.full((4, 64), torch.nan)}, ("expected finite floats", "NaN")),
}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_prompt_embeddings(libero_policy: Policy, name: str) -> None:
    given, words = EMBEDDINGS[name]
    refused(lambda: Policy(libero_policy.model, libero_policy.codec, prompt_embeds=given), InputError, *words)


PATHS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "None": (None, ("checkpoint: expected a path or a hub id, got NoneType",)),
    "a number": (5, ("checkpoint: expected a path or a hub id, got int",)),
    "bytes": (b"run", ("checkpoint: expected a path or a hub id, got bytes",)),
    "a list": (["run"], ("checkpoint: expected a path or a hub id, got list",)),
    "an object": (Anything(), ("checkpoint: expected a path or a hub id, got Anything",)),
    "nothing": ("", ("checkpoint '': expected a path or a hub id, got none",)),
    "NUL": ("a\0b", (r"checkpoint 'a\x00b': ", "give a ")),
    "no Unicode": ("a\ud800", (r"checkpoint 'a\ud800': ", "give a ")),
    "too long": ("x" * 5000, ("checkpoint 'xxx", "cannot be looked at (File name too long)", "check the name")),
    "nobody's home": (
        "~nobody-of-that-name/run",
        ("checkpoint '~nobody-of-that-name/run': is no name that a file can have",),
    ),
}


@pytest.mark.parametrize("name", PATHS)
def test_a_checkpoint_that_is_no_path(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "_download", lambda *_: pytest.fail("asked the hub"))
    path, words = PATHS[name]
    refused(lambda: Policy.from_pretrained(path, device="cpu"), CheckpointError, *words)


@pytest.mark.parametrize("name", ["a number", "bytes", "too long", "NUL"])
def test_a_backbone_that_is_no_path(small_libero: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "_download", lambda *_: pytest.fail("asked the hub"))
    path, _ = PATHS[name]
    refused(lambda: Policy.from_pretrained(small_libero, path, device="cpu"), CheckpointError, "backbone")


GUIDANCE: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no rows": (
        {"previous": LEFT[:0]},
        ("previous: expected chunk.normalized[executed:]", "got float32 [0, 8]", "guidance=None"),
    ),
    "one row": ({"previous": LEFT[0]}, ("floats [n, A]", "got float32 [8]")),
    "rows of two lengths": ({"previous": [[1.0, 2.0], [3.0]]}, ("previous: expected chunk.normalized[executed:]",)),
    "words": ({"previous": "linear"}, ("previous: expected chunk.normalized[executed:]",)),
    "None": ({"previous": None}, ("previous: expected chunk.normalized[executed:]",)),
    "NaN": ({"previous": LEFT + np.nan}, ("previous: expected finite numbers, got NaN",)),
    "inf": ({"previous": LEFT - np.inf}, ("previous: expected finite numbers",)),
    "beyond float32": (
        {"previous": LEFT.astype(np.float64) + 1e300},
        ("previous: expected finite numbers", "beyond float32"),
    ),
    "delay -1": ({"delay": -1}, ("delay: expected a whole number 0 to 4 (the rows of previous), got -1",)),
    "delay 5": ({"delay": 5}, ("delay: expected a whole number 0 to 4", "got 5")),
    "delay NaN": ({"delay": math.nan}, ("delay: expected a whole number 0 to 4", "got nan")),
    "delay text": ({"delay": "1"}, ("delay: expected a whole number 0 to 4", "got '1'")),
    "delay True": ({"delay": True}, ("delay: expected a whole number 0 to 4", "got True")),
    "horizon -1": ({"horizon": -1}, ("horizon: expected a whole number >= 0", "got -1")),
    "horizon below the delay": (
        {"delay": 2, "horizon": 1},
        ("horizon: expected a whole number >= 2 (at least the delay)",),
    ),
    "horizon NaN": ({"horizon": math.nan}, ("horizon: expected a whole number >= 0", "got nan")),
    "schedule 5": ({"schedule": 5}, ("schedule: expected one of linear, exp, ones, zeros, got 5",)),
    "schedule None": ({"schedule": None}, ("schedule: expected one of linear", "got None")),
    "schedule, a list": ({"schedule": ["linear"]}, ("schedule: expected one of linear", "got ['linear']")),
    "bound -1": ({"max_guidance": -1}, ("max_guidance: expected a finite number above 0, got -1",)),
    "bound NaN": ({"max_guidance": math.nan}, ("max_guidance: expected a finite number above 0, got nan",)),
    "bound text": ({"max_guidance": "5"}, ("max_guidance: expected a finite number above 0, got '5'",)),
    "bound None": ({"max_guidance": None}, ("max_guidance: expected a finite number above 0, got None",)),
    "bound True": ({"max_guidance": True}, ("max_guidance: expected a finite number above 0, got True",)),
    "bound beyond floats": (
        {"max_guidance": 10**400},
        ("expected a finite number above 0, got an integer of 1329 bits",),
    ),
    "bound beyond float32": ({"max_guidance": 1e39}, ("max_guidance: expected a finite number above 0, got 1e+39",)),
}


@pytest.mark.parametrize("name", GUIDANCE)
@pytest.mark.filterwarnings("error")
def test_guidance(name: str) -> None:
    given, words = GUIDANCE[name]
    refused(lambda: Guidance(**{"previous": LEFT, **given}), InputError, "guidance: ", *words)


def test_guidance_takes_numpy_numbers_and_keeps_plain_ones() -> None:
    given = Guidance(LEFT.tolist(), np.int64(1), np.int32(3), "exp", np.float32(5))  # type: ignore[arg-type]
    assert type(given.max_guidance) is float
    assert given.max_guidance == 5.0
    assert given.previous.dtype == np.float32
