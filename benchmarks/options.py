"""How far each option that changes numbers is from the exact engine, on the same inputs and the same noise.

The exact engine is what `Policy.from_pretrained` gives without options. Errors are relative in the 2-norm, per request:
|option - exact| / |exact| over the normalised actions, and over the backbone's features where those change at all. With a
checkpoint the largest difference of each action is given in robot units too.

Pictures are smooth random ones, states uniform in the model's range, and each request has its own noise. With random weights
the numbers show what an option does to one network; of a trained model they say little. A random VAE has a posterior about
as wide as its latents, a trained one a narrow one, so that `posterior="mean"` in particular looks worse than it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from dit4dit.benchmarks.contenders import Inputs
from dit4dit.benchmarks.failures import check_gpu, reason_of
from dit4dit.benchmarks.harness import machine
from dit4dit.benchmarks.recording import Recording
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from dit4dit import ops, progress
from dit4dit.checkpoints.weights import random_model
from dit4dit.config import ModelConfig
from dit4dit.engine import Calibration, Engine, StepInputs, calibrate, stack
from dit4dit.engine.engine import STEPS
from dit4dit.envs import tabletop_vae_dir
from dit4dit.envs.tabletop import TabletopEnv
from dit4dit.errors import Dit4DitError
from dit4dit.policy.policy import Policy
from dit4dit.presets import Preset
from dit4dit.robots import EMBODIMENTS
from dit4dit.robots.processor import Codec
from dit4dit.tables import table

INSTRUCTION = "pick up the red block and place it in the bowl"


@dataclass(frozen=True)
class Option:
    """Arguments of `Policy.from_pretrained` that change numbers, and what to call them."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


# everything that the README offers; a new option is one more line here
OPTIONS = (
    Option('posterior="mean"', {"posterior": "mean"}),
    *(Option(f"steps={steps}", {"steps": steps}) for steps in STEPS),
    Option("head_dtype=bfloat16", {"head_dtype": torch.bfloat16}),
    # what a GPU runs by default, and the same with the published code's head
    Option("dtype=bfloat16", {"dtype": torch.bfloat16, "head_dtype": torch.bfloat16}),
    Option("dtype=bfloat16, head_dtype=float32", {"dtype": torch.bfloat16, "head_dtype": torch.float32}),
    Option("quantization=fp8", {"quantization": "fp8"}),
)
CALIBRATION_REQUESTS = 4
"""Requests, others than those that are measured, from which fp8 gets its scales."""


@dataclass(frozen=True)
class Subject:
    """A model to try options on.

    Attributes:
        name, weights: preset or checkpoint, and where its weights are from, in words.
        load: options -> an engine of this model with them.
        embeds: embedding of the instruction, [1, L, text_in].
        dtype: of the backbone.
        codec: from normalised actions to robot units; None for a preset, which has no statistics.
        picture: seed -> what the robot sees, uint8 [H, W, 3] at the model's size; None takes smooth random pictures.
    """

    name: str
    weights: str
    config: ModelConfig
    views: int
    load: Callable[[Mapping[str, Any]], Engine]
    embeds: Tensor
    codec: Codec | None = None
    dtype: str = "float32"
    picture: Callable[[int], NDArray[np.uint8]] | None = None


def of_preset(name: str, preset: Preset, *, device: torch.device, dtype: torch.dtype, seed: int) -> Subject:
    """A preset with random weights, a function of the seed. The tabletop has its trained VAE and looks at its own world."""
    config = preset.model
    trained = load_file(tabletop_vae_dir() / "model.safetensors") if name == "tabletop" else None

    def load(arguments: Mapping[str, Any]) -> Engine:
        options = dict(arguments)
        kinds = {"dtype": options.pop("dtype", dtype), "head_dtype": options.pop("head_dtype", torch.float32)}
        return Engine(
            random_model(config, seed, device=device, with_text=False, vae_weights=trained, **kinds), **options
        )

    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(1, config.text.max_length, config.dit.text_in, generator=generator).to(device, dtype)
    views = len(EMBODIMENTS[preset.embodiment].views)
    kind = str(dtype).removeprefix("torch.")
    if trained is None:
        return Subject(f"preset {name}", "random", config, views, load, embeds, dtype=kind)
    weights = "random but for the trained VAE"
    return Subject(f"preset {name}", weights, config, views, load, embeds, dtype=kind, picture=tabletop_picture)


def tabletop_picture(seed: int) -> NDArray[np.uint8]:
    """The built-in world at the start of an episode."""
    picture: NDArray[np.uint8] = np.asarray(TabletopEnv(seed).reset().observation["image"], dtype=np.uint8)
    return picture


def of_checkpoint(path: str, backbone: str | None, *, device: torch.device, dtype: torch.dtype) -> Subject:
    """A checkpoint's own weights; its text encoder is loaded once, for one instruction."""
    first = Policy.from_pretrained(path, backbone, device=device, dtype=dtype)
    embeds = first.embed_prompts([INSTRUCTION])

    def load(arguments: Mapping[str, Any]) -> Engine:
        given = {"dtype": dtype, "head_dtype": torch.float32, **arguments}
        policy = Policy.from_pretrained(path, backbone, device=device, prompt_embeds=embeds, **given)
        assert policy.engine is not None
        return policy.engine

    placed = embeds[INSTRUCTION][None].to(device)
    views = len(first.embodiment.views)
    kind = str(dtype).removeprefix("torch.")
    return Subject(f"checkpoint {path}", "the checkpoint's", first.config, views, load, placed, first.codec, kind)


def requests(subject: Subject, count: int, seed: int) -> Iterator[Inputs]:
    """`count` requests on the embeddings' device, a function of the seed."""
    config, device = subject.config, subject.embeds.device
    height, width = config.image_size[0], config.image_size[1] * subject.views
    for n in range(count):
        generator = torch.Generator().manual_seed(seed + n)
        if subject.picture is None:
            coarse = torch.rand(1, 3, max(height // 16, 2), max(width // 16, 2), generator=generator) * 2 - 1
            frame = F.interpolate(coarse, (height, width), mode="bicubic").clamp(-1, 1)
        else:
            frame = ops.preprocess([torch.from_numpy(subject.picture(seed + n))[None]], None, "bilinear", torch.float32)
        drawn = Inputs.random(config, subject.views, seed + n, torch.device("cpu"), text=False)
        state = drawn.state
        if state is not None:
            used = state.shape[-1] if subject.codec is None else subject.codec.embodiment.encoded_state_dim
            state = torch.rand(state.shape, generator=generator) * 2 - 1
            state[..., used:] = 0  # a padded state is zero there
        given = replace(drawn, frame=frame, state=state)
        placed = {name: None if value is None else value.to(device) for name, value in vars(given).items()}
        yield Inputs(**{**placed, "embeds": subject.embeds})


@torch.no_grad()
def run(engine: Engine, inputs: Sequence[Inputs]) -> list[tuple[Tensor, Tensor]]:
    """Features and normalised actions of each request, on the CPU."""
    pack = engine.pack(inputs[0].embeds)
    dtype, choices = engine.model.dtype, engine.choices()
    found = []
    for one in inputs:
        with choices:
            features = engine.features(one.frame.to(dtype), stack([pack]), one.posterior, one.latent)
            kept = features.cpu().clone()
            found.append((kept, engine.actions(features, one.state, one.action).cpu().clone()))
    return found


def calibrated(engine: Engine, inputs: Sequence[Inputs]) -> Calibration:
    """What fp8 is to know of these requests."""
    pack, dtype = engine.pack(inputs[0].embeds), engine.model.dtype
    return calibrate(
        engine,
        [StepInputs(i.frame.to(dtype), [pack], i.state, i.posterior, i.latent, i.action) for i in inputs],
    )


@dataclass(frozen=True)
class Exact:
    """A subject's requests, the exact engine's results on them, and what fp8 is to know."""

    subject: Subject
    inputs: Sequence[Inputs]
    results: Sequence[tuple[Tensor, Tensor]]
    calibration: Calibration

    @classmethod
    def of(cls, subject: Subject, seeds: int, seed: int) -> Exact:
        """RuntimeError: the exact engine does not repeat its own bits, so that no difference would mean anything."""
        inputs = list(requests(subject, seeds, seed))
        engine = subject.load({})
        results = run(engine, inputs)
        again = run(engine, inputs[:1])[0]
        if not all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True)):
            raise RuntimeError(f"{subject.name}: the exact engine does not repeat its own bits: nothing is compared")
        return cls(
            subject, inputs, results, calibrated(engine, list(requests(subject, CALIBRATION_REQUESTS, seed + seeds)))
        )

    def row(self, option: Option) -> dict[str, Any]:
        """An option's errors, or "failed" with what it raised."""
        extra = {"calibration": self.calibration} if "quantization" in option.arguments else {}
        try:
            found = run(self.subject.load({**option.arguments, **extra}), self.inputs)
            return errors(self.subject, option, self.results, found)
        except Exception as error:  # what Triton and CUDA raise has no common base
            return {"option": option.name, "arguments": words(option), "failed": reason_of(error)}


def measure(
    subjects: Mapping[str, Callable[[], Subject]],
    options: Sequence[Option],
    *,
    seeds: int,
    seed: int,
    record: Recording,
) -> None:
    """Errors of each option over `seeds` requests, of one subject after the other, into `record`, option by option.

    An option that raises costs its own row, a subject whose exact engine does the subject: "failed" says why.
    """
    found: list[dict[str, Any]] = []
    record.result["subjects"] = found
    exact: Exact | None = None
    todo = [(name, option) for name in subjects for option in options]
    with progress.bar("options", len(todo), unit="option") as shown, shown.ticking():
        for name, option in record.each(todo, "options", name=lambda pair: f"{pair[0]}: {pair[1].name}"):
            shown.say(f"{name}: {option.name}")
            if not found or found[-1]["subject"] != name:
                exact = None  # before the next one is built: a released model is large
                found.append({"subject": name, "seeds": seeds, "seed": seed, "machine": machine(), "options": []})
                record.keep()
                try:
                    exact = Exact.of(subjects[name](), seeds, seed)
                except Dit4DitError:
                    raise  # a mistake in the command
                except Exception as error:
                    found[-1]["failed"] = reason_of(error)
                else:
                    found[-1] |= about(exact)
            if exact is not None:
                found[-1]["options"].append(exact.row(option))
            failed = found[-1].get("failed") or found[-1]["options"][-1].get("failed")
            if failed:
                check_gpu(f"{name}: {option.name}: {failed}")
            shown.update()


def about(exact: Exact) -> dict[str, Any]:
    """What a subject's rows must be read with."""
    subject = exact.subject
    return {
        "weights": subject.weights,
        "dtype": subject.dtype,
        "steps": subject.config.head.num_inference_timesteps,
    }


def words(option: Option) -> dict[str, str]:
    return {name: str(value).removeprefix("torch.") for name, value in option.arguments.items()}


def errors(
    subject: Subject, option: Option, exact: Sequence[tuple[Tensor, Tensor]], found: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, Any]:
    """One option's row: errors of actions, of features (None where no bit changed), and in robot units (or None)."""
    features = [relative(got[0], want[0]) for got, want in zip(found, exact, strict=True)]
    actions = [relative(got[1], want[1]) for got, want in zip(found, exact, strict=True)]
    return {
        "option": option.name,
        "arguments": words(option),
        "actions": summary(actions),
        "features": summary(features) if any(features) else None,
        "robot_units": None if subject.codec is None else in_robot_units(subject.codec, exact, found),
    }


def relative(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| in the 2-norm."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def summary(values: Sequence[float]) -> dict[str, Any]:
    return {"mean": sum(values) / len(values), "max": max(values), "per_seed": list(values)}


def in_robot_units(
    codec: Codec, exact: Sequence[tuple[Tensor, Tensor]], found: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, float]:
    """action name -> largest difference over all requests and steps."""
    got, want = (codec.action.inverse(torch.cat([y for _, y in runs]).numpy()) for runs in (found, exact))
    largest = np.abs(got - want).max(axis=(0, 1))
    return {name: float(value) for name, value in zip(codec.embodiment.action_names, largest, strict=True)}


def failed(results: Sequence[Mapping[str, Any]]) -> bool:
    """Whether something raised."""
    return any("failed" in result or any("failed" in row for row in result["options"]) for result in results)


def show(result: dict[str, Any]) -> str:
    """The table that the command prints for one subject."""
    rows = []
    if "weights" not in result:
        return f"{result['subject']}: {result.get('failed', 'not measured')}"
    for row in result["options"]:
        if "failed" in row:
            rows.append([row["option"], "failed", "", "", row["failed"]])
            continue
        features = row["features"]
        most = row["robot_units"]
        name = max(most, key=most.get) if most else ""
        rows.append(
            [
                row["option"],
                f"{row['actions']['mean']:.2e}",
                f"{row['actions']['max']:.2e}",
                f"{features['mean']:.2e}" if features else "unchanged",
                f"{most[name]:.3g} ({name})" if most else "",
            ]
        )
    here = result["machine"]
    random = result["weights"].startswith("random")
    weights = result["weights"] + (": of a trained model this says little" if random else "")
    head = (
        f"{result['subject']}, weights {weights}\n{here['gpu'] or here['cpu']}, torch {here['torch']}, {result['dtype']}; "
        f"exact: {result['steps']} steps, posterior sample, head float32; {result['seeds']} seeds"
    )
    header = ["option", "actions, mean", "max", "features, mean", "largest in robot units"]
    return f"{head}\n{table(header, rows, right=(1, 2, 3))}"
