"""The one door: an observation and an instruction in, a chunk of actions in robot units out."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dit4dit.checkpoints.checkpoint import open_checkpoint
from dit4dit.checkpoints.robot import for_checkpoint
from dit4dit.checkpoints.weights import build
from dit4dit.config import ModelConfig
from dit4dit.engine import (
    Calibration,
    Engine,
    PackFolder,
    RequestShape,
    StepInputs,
    calibrate,
    host_memory,
)
from dit4dit.engine.fp8 import check_options
from dit4dit.errors import ConfigError, InputError, OutputError, did_you_mean, shown
from dit4dit.model.dit4dit import DiT4DiT
from dit4dit.policy import garbage, options
from dit4dit.policy.device import pick_device
from dit4dit.policy.prompts import Embedder, Texts, load_tokenizer, plain
from dit4dit.policy.requests import Door, Request, Size, check_room, checked_batch, checked_size, groups, listed
from dit4dit.policy.runner import EngineRunner, ModelRunner, step_inputs
from dit4dit.robots.embodiment import Embodiment
from dit4dit.robots.processor import Codec
from dit4dit.types import ActionChunk, Guidance, Noise, Observation, check_strength

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Policy:
    """A loaded model with its robot's conventions. Make one with `from_pretrained`.

    Attributes:
        model: the model, in evaluation mode.
        codec: embodiment, statistics tag, and the chains between robot units and model values.
    """

    def __init__(
        self,
        model: DiT4DiT,
        codec: Codec,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        prompt_embeds: Mapping[str, Any] | None = None,
        engine: Engine | None = None,
        packs: PackFolder | None = None,
    ) -> None:
        """tokenizer, prompt_embeds: how instructions are embedded; engine: None runs the plain model."""
        self.model = model
        self.codec = codec
        self.engine = engine
        self._runner = ModelRunner(model, codec) if engine is None else EngineRunner(engine, codec)
        embedder = Embedder(model, tokenizer, prompt_embeds)
        self._texts = Texts(model, embedder, engine, packs)
        self._door = Door(codec, model.config, embedder)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        backbone: str | Path | None = None,
        *,
        device: str | torch.device = "auto",
        dtype: torch.dtype | None = None,
        head_dtype: torch.dtype | None = None,
        embodiment: str | Embodiment | None = None,
        engine: Literal["auto", "off"] = "auto",
        steps: int | None = None,
        posterior: Literal["sample", "mean"] = "sample",
        quantization: Literal["fp8"] | None = None,
        calibration: str | Path | Calibration | None = None,
        head: Literal["auto", "library", "one_launch"] = "auto",
        tune: Literal["cached", "off"] = "cached",
        programmatic_launch: Literal["cached", "on", "off"] = "cached",
        prompt_embeds: Mapping[str, Any] | None = None,
        packs: str | Path | None = None,
        text_encoder: bool = True,
    ) -> Policy:
        """Load a checkpoint for inference.

        Args:
            path: published run folder, one of its .pt files, a folder in the native format, or a hub repository id.
            backbone: Cosmos-Predict2.5 folder or hub id (only its small files are needed for a published checkpoint);
                without it DIT4DIT_BACKBONE, then a `cosmos` folder inside the run, then the released model on the hub.
            device: "auto", "cpu", "cuda" or "cuda:N".
            dtype: of text encoder, VAE and backbone; bfloat16 on a GPU and float32 on a CPU when None.
            head_dtype: of the action head; `dtype` when None. The published code runs the head in float32.
            embodiment: an `Embodiment`, its name, or the statistics tag to use; what the checkpoint implies when None.
            engine: "auto", the latency path (`dit4dit.engine`); "off", the plain model.
            steps: Euler steps (1, 2, 4, 8) instead of the checkpoint's number. Changes the result; engine only.
            posterior: "mean" takes the frame's mean latent instead of a sample. Changes the result; engine only.
            quantization: "fp8" multiplies the backbone's matrices in 8-bit floats, with `calibration`; the model is then
                left without its own (`Policy.model` cannot be run). Changes the result; engine only.
            calibration: file of `dit4dit calibrate`, or what `calibrate` returned, for this checkpoint in this dtype.
            head: how the engine runs the action head (`Engine`); "one_launch" needs a GPU and a head in bfloat16.
            tune: "cached" runs each call of a plan by the implementation that `dit4dit tune` found to be the fastest on this
                machine, where it has been run; "off" by the default. Nothing is ever measured here.
            programmatic_launch: on Hopper and later, "on" launches the kernels of a plan while the ones before them still run,
                with the same bits; "cached" where `dit4dit tune` found that faster on this machine.
            prompt_embeds: instruction -> embedding [L, text_in]; when given, no text encoder is loaded at all and only
                these instructions can be used.
            packs: folder where prompt packs are kept between runs (`dit4dit pack`); engine only.
            text_encoder: False loads none; every instruction's pack must be in `packs`.

        Raises:
            Dit4DitError: bad checkpoint, configuration or device; the message says what to do.
        """
        given = (
            steps,
            packs,
            quantization,
            calibration,
            None if head == "auto" else head,
            programmatic_launch == "on" or None,
        )
        options.check_engine(engine, posterior != "sample" or any(option is not None for option in given))
        check_options(quantization, calibration)
        options.check_prompts(packs, prompt_embeds, text_encoder)
        options.check_dtypes(dtype, head_dtype)
        options.check_tune(tune)
        options.check_programmatic(programmatic_launch)
        options.check_kinds(embodiment=embodiment, calibration=calibration, packs=packs, text_encoder=text_encoder)
        place = pick_device(device)
        dtype = dtype or (torch.bfloat16 if place.type == "cuda" else torch.float32)
        if isinstance(calibration, (str, os.PathLike)):
            calibration = Calibration.load(calibration)
        checkpoint = open_checkpoint(path, backbone)
        codec = for_checkpoint(checkpoint, embodiment)
        model = build(
            checkpoint.model,
            checkpoint.tensors,
            str(checkpoint.path),
            device=place,
            dtype=dtype,
            head_dtype=dtype if head_dtype is None else head_dtype,
            with_text=text_encoder and prompt_embeds is None,
        )
        tokenizer = load_tokenizer(checkpoint.tokenizer) if model.text is not None else None
        fast = None
        if engine == "auto":
            fast = Engine(
                model,
                steps=steps,
                posterior=posterior,
                quantization=quantization,
                calibration=calibration,
                release=True,
                head=head,
                tune=tune,
                programmatic_launch=programmatic_launch,
            )
        folder = None if packs is None else PackFolder.of(Path(packs), model)
        return cls(model, codec, tokenizer=tokenizer, prompt_embeds=prompt_embeds, engine=fast, packs=folder)

    @property
    def packs(self) -> PackFolder | None:
        """Where prompt packs are kept between runs."""
        return self._texts.folder

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def embodiment(self) -> Embodiment:
        return self.codec.embodiment

    @property
    def device(self) -> torch.device:
        return self.model.device

    def infer(
        self,
        observation: Observation,
        instruction: str,
        *,
        noise: Noise | None = None,
        seed: int | None = None,
        guidance: Guidance | None = None,
        observed_at_ns: int | None = None,
    ) -> ActionChunk:
        """The next K actions.

        Args:
            observation: named pictures and state, as the embodiment lists them.
            instruction: what to do, in words.
            noise: the request's randomness. seed: shorthand for `Noise.from_seed(seed)`. With neither, a fresh seed is
                taken from the operating system and returned in the chunk.
            guidance: real-time chunking: keep to what is left of the chunk before (`Guidance`).
            observed_at_ns: when the observation was made, `time.monotonic_ns()` of this machine, for the chunk's stamp; the time
                of this call where None.

        Raises:
            InputError: the observation, instruction, noise, guidance or stamp does not fit; nothing has been computed.
        """
        if noise is not None and seed is not None:
            raise InputError("noise and seed: give one of them, got both")
        if seed is not None:
            noise = Noise.from_seed(seed)
        request = self.request(observation, instruction, noise=noise, guidance=guidance, observed_at_ns=observed_at_ns)
        return self.run([request])[0]

    def infer_batch(
        self,
        observations: Sequence[Observation],
        instructions: Sequence[str],
        *,
        noise: Sequence[Noise] | None = None,
        guidance: Sequence[Guidance | None] | None = None,
        observed_at_ns: Sequence[int | None] | None = None,
    ) -> list[ActionChunk]:
        """Several requests in one pass; each one's noise, guidance and stamp are its own, whatever else is in the batch.

        Requests with guidance and those without, or with another bound of it, go in passes of their own.
        """
        return self.run(self._door.requests(observations, instructions, noise, guidance, observed_at_ns))

    def request(
        self,
        observation: Observation,
        instruction: str,
        *,
        noise: Noise | None = None,
        guidance: Guidance | None = None,
        observed_at_ns: int | None = None,
    ) -> Request:
        """What `run` takes, checked here and nowhere else; arguments and errors as of `infer`."""
        return self._door.request(observation, instruction, noise, guidance, observed_at_ns)

    def run(self, requests: Sequence[Request]) -> list[ActionChunk]:
        """The chunk of each request, in as few passes as their kinds allow (`Request.kind`)."""
        for i, request in enumerate(listed("requests", "Request", requests)):
            if not isinstance(request, Request):
                raise InputError(f"requests[{i}]: expected what Policy.request returns, got {type(request).__name__}")
        with plain(self.device):
            texts = [self._texts.get(request.instruction) for request in requests]
            passes = [
                (group, self._runner.run([requests[i] for i in group], [texts[i] for i in group]))
                for group in groups(requests)
            ]
        if not all(np.isfinite(normalized).all() for _, (normalized, _) in passes):
            raise OutputError(
                "actions: the model wrote NaN or infinite values; nothing was returned. Check the checkpoint's weights and, "
                "where they were given, the prompt embeddings"
            )
        chunks: dict[int, ActionChunk] = {}
        names, rate = self.embodiment.action_names, self.embodiment.control_hz
        for _, (_, actions) in passes:
            self.codec.check(actions)
        computed_at = time.monotonic_ns()
        for group, (normalized, actions) in passes:
            for row, i in enumerate(group):
                noise, observed_at = requests[i].noise, requests[i].observed_at_ns
                chunks[i] = ActionChunk(actions[row], names, rate, normalized[row], noise, observed_at, computed_at)
        return [chunks[i] for i in range(len(requests))]

    def calibrate(
        self, observations: Sequence[Observation], instructions: Sequence[str], *, noise: Sequence[Noise] | None = None
    ) -> Calibration:
        """The largest activations of these examples, for `quantization="fp8"`; give some that are like what will come.

        Raises:
            ConfigError: this policy has no engine, or a quantised one. InputError: as in `infer_batch`.
        """
        if self.engine is None:
            raise ConfigError("calibrate: it is the engine that is calibrated; load the policy with engine='auto'")
        with plain(self.device):
            return calibrate(self.engine, self.step_inputs(observations, instructions, noise=noise))

    def step_inputs(
        self, observations: Sequence[Observation], instructions: Sequence[str], *, noise: Sequence[Noise] | None = None
    ) -> Iterator[StepInputs]:
        """What the engine is asked for these observations, one at a time: for measuring it."""
        for request in self._door.requests(observations, instructions, noise):
            packs = [self._texts.get(request.instruction)]
            yield step_inputs(self.model, [request], packs)

    def predict_action(
        self,
        examples: list[dict[str, Any]] | dict[str, Any],
        noise: Noise | Sequence[Noise] | None = None,
        **ignored: Any,
    ) -> dict[str, NDArray[np.float32]]:
        """The published call, with the published result.

        Args:
            examples: dicts with `image` (a uint8 [H, W, 3] array of joined views, used as it is, sides divisible by 16;
                of a list, the first: the others are a training sample's future frames), `lang` (str), and `state`
                ([1, state_dim], encoded and padded; without it the model goes without its state token).
            noise: one per example; fresh when None.
            ignored: other arguments of the published call (do_sample, use_ddim, num_ddim_steps), which it ignores too.

        Returns:
            {"normalized_actions": float32 [B, K, A_model]}
        """
        chunks = self.run(self.published_requests(examples, noise))
        return {"normalized_actions": np.stack([chunk.normalized for chunk in chunks])}

    def published_requests(
        self, examples: list[dict[str, Any]] | dict[str, Any], noise: Noise | Sequence[Noise] | None = None
    ) -> list[Request]:
        """What `run` takes, checked here and nowhere else; arguments and errors as of `predict_action`."""
        return self._door.examples(examples, noise)

    def embed_prompts(self, instructions: Sequence[str]) -> dict[str, Tensor]:
        """instruction -> prompt embedding [L, text_in] on the CPU, for `from_pretrained(prompt_embeds=...)`."""
        if not self._texts.embedder.can_encode:
            raise ConfigError("embed_prompts: this policy was loaded without its text encoder")
        listed("instructions", "strings", instructions)
        for instruction in instructions:
            self._texts.embedder.length(instruction)
        with plain(self.device):
            return {instruction: self._texts.embedder(instruction)[0].cpu() for instruction in instructions}

    def warm_up(
        self,
        pictures: Mapping[str, tuple[int, int]] | None = None,
        *,
        batch: int = 1,
        joined: tuple[int, int] | None = None,
        max_guidance: float | None = None,
        freeze_gc: bool = False,
    ) -> None:
        """Do now what the first chunk would otherwise do; call it before a control loop starts.

        What it makes stays for as long as the policy, whatever other sizes are asked for.

        On a CPU it also lets the process keep the memory of one chunk for the next (`engine.host_memory`).

        Args:
            pictures: view -> height and width of the robot's own pictures; the model's size where not given.
            batch: requests in one pass (`infer_batch`).
            joined: height and width of joined pictures: warm `predict_action` up instead.
            max_guidance: warm up requests with `Guidance` of this bound instead of those without.
            freeze_gc: afterwards collect garbage once and freeze what is alive, so that no full collection of Python's
                interrupts a chunk. It holds for the whole process (`dit4dit.policy.garbage.freeze`): give it in the last warm-up,
                when everything else that stays has been loaded too.

        Raises:
            InputError: a view, size, batch or bound that this policy cannot have, or images beyond `requests.MAX_SIDE` or
                `requests.MAX_IMAGES`; nothing has been made. BackendError: as `engine.Plan`.
        """
        if pictures is not None and not isinstance(pictures, Mapping):
            raise InputError(f"pictures: expected a dict, view -> (height, width), got {type(pictures).__name__}")
        names, given = self.embodiment.views, dict(pictures or {})
        for name in given:
            if name not in names:
                raise InputError(
                    f"pictures: no view {shown(name)}{did_you_mean(name, names)}; views: {', '.join(names)}"
                )
        sizes = [checked_size(f"pictures[{name!r}]", given.get(name, self.config.image_size)) for name in names]
        batch = checked_batch(batch)
        if max_guidance is not None:
            check_strength("warm_up", "linear", max_guidance)
            max_guidance = float(max_guidance)
        size: Size = self.config.image_size
        resize, units = self.embodiment.resize, True
        if joined is not None:
            if given:
                raise InputError("pictures and joined: give one of them")
            sizes, size, resize, units = [checked_size("joined", joined)], None, "bilinear", False
            self._door.check_joined("joined", sizes[0])
            if max_guidance is not None:
                raise InputError("joined and max_guidance: give one of them; predict_action takes no guidance")
        check_room(batch, sizes)
        if self.device.type == "cpu":
            host_memory.hold()
        if isinstance(self._runner, EngineRunner):
            with plain(self.device):
                for length in self._texts.embedder.lengths:
                    with_state = self.codec.state is not None
                    shape = RequestShape(batch, tuple(sizes), size, resize, with_state, length, max_guidance)
                    self._runner.warm_up((shape, units))
        if freeze_gc:
            garbage.freeze()

    def prepare(self, instruction: str) -> Future[None]:
        """Encode an instruction in the background, so that the chunk that first uses it does not wait.

        The future's `result()` returns when it is ready, or raises what went wrong.
        """
        return self._texts.prepare(instruction)

    def has_prepared(self, instruction: str) -> bool:
        """Whether a chunk that uses the instruction now waits for no encoding."""
        return instruction in self._texts
