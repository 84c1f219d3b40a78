"""The one door: an observation and an instruction in, a chunk of actions in robot units out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dit4dit import examples as published_examples
from dit4dit.codec import Codec
from dit4dit.config import ModelConfig
from dit4dit.device import pick_device
from dit4dit.embodiments.embodiment import Array, Embodiment, Resize
from dit4dit.engine import (
    MAX_BATCH,
    Calibration,
    Engine,
    PackFolder,
    PromptPack,
    RequestShape,
    StepInputs,
    calibrate,
    host_memory,
    packs_key,
    text_fingerprint,
)
from dit4dit.engine.fp8 import check_options
from dit4dit.errors import ConfigError, InputError, OutputError, did_you_mean
from dit4dit.instructions import Embedder, Recent, load_tokenizer
from dit4dit.model.checkpoint import open_checkpoint
from dit4dit.model.dit4dit import DiT4DiT
from dit4dit.model.weights import build
from dit4dit.requests import Request, groups, noises_of
from dit4dit.runner import EngineRunner, ModelRunner, Size, step_inputs
from dit4dit.types import ActionChunk, Noise, Observation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENGINES = ("auto", "off")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PACK_BUDGET = 2 * 2**30
"""Bytes of prompt packs kept: 27 instructions of the released models in bfloat16."""
CONTEXT_BUDGET = 64 * 2**20
"""Bytes of projected text kept, least recently used out first (1 MB each for the released models in bfloat16)."""


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
        self._pack_folder = packs
        self._runner = ModelRunner(model, codec) if engine is None else EngineRunner(engine, codec)
        self._embedder = Embedder(model, tokenizer, prompt_embeds)
        self._start_caches()

    def _start_caches(self) -> None:
        self._texts: Recent[str, Any] = (
            Recent(self._make_context, CONTEXT_BUDGET, _tensor_bytes)
            if self.engine is None
            else Recent(self._make_pack, PACK_BUDGET, lambda pack: pack.bytes)
        )
        self._background = ThreadPoolExecutor(1, thread_name_prefix="dit4dit-instructions")

    def __getstate__(self) -> dict[str, Any]:
        """Threads and caches stay behind; a copy starts its own."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_texts", "_background")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_caches()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        backbone: str | Path | None = None,
        *,
        device: str | torch.device = "auto",
        dtype: torch.dtype | None = None,
        head_dtype: torch.dtype = torch.float32,
        embodiment: str | Embodiment | None = None,
        engine: Literal["auto", "off"] = "auto",
        steps: int | None = None,
        posterior: Literal["sample", "mean"] = "sample",
        quantization: Literal["fp8"] | None = None,
        calibration: str | Path | Calibration | None = None,
        prompt_embeds: Mapping[str, Any] | None = None,
        packs: str | Path | None = None,
        text_encoder: bool = True,
    ) -> Policy:
        """Load a checkpoint for inference.

        Args:
            path: published run folder, one of its .pt files, a folder in the own format, or a hub repository id.
            backbone: Cosmos-Predict2.5 folder or hub id (only its small files are needed for a published checkpoint);
                without it DIT4DIT_BACKBONE, then a `cosmos` folder inside the run, then the released model on the hub.
            device: "auto", "cpu", "cuda" or "cuda:N".
            dtype: of text encoder, VAE and backbone; bfloat16 on a GPU and float32 on a CPU when None.
            head_dtype: of the action head; the published code runs it in float32.
            embodiment: an `Embodiment`, its name, or the statistics tag to use; what the checkpoint implies when None.
            engine: "auto", the latency path (`dit4dit.engine`); "off", the plain model.
            steps: Euler steps (1, 2, 4, 8) instead of the checkpoint's number. Changes the result; engine only.
            posterior: "mean" takes the frame's mean latent instead of a sample. Changes the result; engine only.
            quantization: "fp8" multiplies the backbone's matrices in 8-bit floats, with `calibration`; the model is then
                left without its own (`Policy.model` cannot be run). Changes the result; engine only.
            calibration: file of `dit4dit calibrate`, or what `calibrate` returned, for this checkpoint in this dtype.
            prompt_embeds: instruction -> embedding [L, text_in]; when given, no text encoder is loaded at all and only
                these instructions can be used.
            packs: folder where prompt packs are kept between runs (`dit4dit pack`); engine only.
            text_encoder: False loads none; every instruction's pack must be in `packs`.

        Raises:
            Dit4DitError: bad checkpoint, configuration or device; the message says what to do.
        """
        if engine not in ENGINES:
            raise ConfigError(f"engine {engine!r}: expected {' or '.join(ENGINES)}")
        given = (steps, packs, quantization, calibration)
        if engine == "off" and (posterior != "sample" or any(option is not None for option in given)):
            raise ConfigError(
                "steps, posterior, packs, quantization and calibration are options of the engine: leave them out, or use "
                "engine='auto'"
            )
        check_options(quantization, calibration)
        if packs is not None and prompt_embeds is not None:
            raise ConfigError(
                "packs and prompt_embeds: give one of them; packs on disk must come from the text encoder"
            )
        if not text_encoder and packs is None and prompt_embeds is None:
            raise ConfigError(
                "text_encoder=False: give packs (dit4dit pack) or prompt_embeds, or no instruction can be used"
            )
        for name, kind in (("dtype", dtype), ("head_dtype", head_dtype)):
            if kind is not None and kind not in DTYPES:
                raise ConfigError(f"{name}: expected torch.float32, bfloat16 or float16, got {kind!r}")
        place = pick_device(device)
        if isinstance(calibration, (str, Path)):
            calibration = Calibration.load(calibration)
        checkpoint = open_checkpoint(path, backbone)
        codec = Codec.for_checkpoint(checkpoint, embodiment)
        model = build(
            checkpoint.model,
            checkpoint.tensors,
            str(checkpoint.path),
            device=place,
            dtype=dtype or (torch.bfloat16 if place.type == "cuda" else torch.float32),
            head_dtype=head_dtype,
            with_text=text_encoder and prompt_embeds is None,
        )
        tokenizer = load_tokenizer(checkpoint.tokenizer) if model.text is not None else None
        options: dict[str, Any] = dict(steps=steps, posterior=posterior, quantization=quantization)
        fast = Engine(model, **options, calibration=calibration, release=True) if engine == "auto" else None
        folder = None
        if packs is not None:
            folder = PackFolder(Path(packs), packs_key(model), place, text_fingerprint(model.text))
        return cls(model, codec, tokenizer=tokenizer, prompt_embeds=prompt_embeds, engine=fast, packs=folder)

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def embodiment(self) -> Embodiment:
        return self.codec.embodiment

    @property
    def device(self) -> torch.device:
        return self.model.backbone.transformer.proj_out.weight.device

    def infer(
        self, observation: Observation, instruction: str, *, noise: Noise | None = None, seed: int | None = None
    ) -> ActionChunk:
        """The next K actions.

        Args:
            observation: named pictures and state, as the embodiment lists them.
            instruction: what to do, in words.
            noise: the request's randomness. seed: shorthand for `Noise.from_seed(seed)`. With neither, a fresh seed is
                taken from the operating system and returned in the chunk.

        Raises:
            InputError: the observation, instruction or noise does not fit; nothing has been computed.
        """
        if noise is not None and seed is not None:
            raise InputError("noise and seed: give one of them, got both")
        if noise is None:
            noise = Noise.fresh() if seed is None else Noise.from_seed(seed)
        return self.infer_batch([observation], [instruction], noise=[noise])[0]

    def infer_batch(
        self, observations: Sequence[Observation], instructions: Sequence[str], *, noise: Sequence[Noise] | None = None
    ) -> list[ActionChunk]:
        """Several requests in one pass; each one's noise is its own, whatever else is in the batch."""
        requests = self._requests(observations, instructions, noise)
        results = self._sample(requests, self.config.image_size, self.embodiment.resize, units=True)
        names, rate = self.embodiment.action_names, self.embodiment.rate_hz
        return [
            ActionChunk(actions=actions, names=names, rate_hz=rate, normalized=normalized, noise=one)
            for (normalized, actions), one in zip(results, (request.noise for request in requests), strict=True)
            if actions is not None
        ]

    def calibrate(
        self, observations: Sequence[Observation], instructions: Sequence[str], *, noise: Sequence[Noise] | None = None
    ) -> Calibration:
        """The largest activations of these examples, for `quantization="fp8"`; give some that are like what will come.

        Raises:
            ConfigError: this policy has no engine, or a quantised one. InputError: as in `infer_batch`.
        """
        if self.engine is None:
            raise ConfigError("calibrate: it is the engine that is calibrated; load the policy with engine='auto'")
        with self._plain():
            return calibrate(self.engine, self.step_inputs(observations, instructions, noise=noise))

    def step_inputs(
        self, observations: Sequence[Observation], instructions: Sequence[str], *, noise: Sequence[Noise] | None = None
    ) -> Iterator[StepInputs]:
        """What the engine is asked for these observations, one at a time: for measuring it."""
        for request in self._requests(observations, instructions, noise):
            packs = [self._texts.get(request.instruction)]
            yield step_inputs(self.model, [request], packs, self.config.image_size, self.embodiment.resize)

    def _requests(
        self, observations: Sequence[Observation], instructions: Sequence[str], noise: Sequence[Noise] | None
    ) -> list[Request]:
        """One request per observation; InputError where something does not fit."""
        if not observations or len(observations) != len(instructions):
            raise InputError(
                f"batch: {len(observations)} observations and {len(instructions)} instructions; expected as many"
            )
        for observation in observations:
            if not isinstance(observation, Observation):
                raise InputError(f"observation: expected an Observation, got {type(observation).__name__}")
        noises = noises_of(noise, len(observations))
        return [
            Request(self.embodiment.ordered_views(o.images), self._state(o), words, one)
            for o, words, one in zip(observations, instructions, noises, strict=True)
        ]

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
        found = published_examples.check(examples)
        noises = noises_of([noise] if isinstance(noise, Noise) else noise, len(found))
        pictures = published_examples.pictures(found, self.config.pixels_per_token)
        width = self.config.head.state_dim
        encoded = None if width is None else published_examples.encoded_states(found, width)
        requests = [
            Request([pictures[i]], None if encoded is None else encoded[i], words, noises[i])
            for i, words in enumerate(published_examples.instructions(found))
        ]
        results = self._sample(requests, None, "bilinear", units=False)
        return {"normalized_actions": np.stack([normalized for normalized, _ in results])}

    def embed_prompts(self, instructions: Sequence[str]) -> dict[str, Tensor]:
        """instruction -> prompt embedding [L, text_in] on the CPU, for `from_pretrained(prompt_embeds=...)`."""
        if not self._embedder.can_encode:
            raise ConfigError("embed_prompts: this policy was loaded without its text encoder")
        with self._plain():
            return {instruction: self._embedder(instruction)[0].cpu() for instruction in instructions}

    def _sample(self, requests: Sequence[Request], size: Size, resize: Resize, *, units: bool) -> list[_Result]:
        """Each request's normalised actions [K, A_model], and with `units` its actions in robot units [K, A]."""
        results: list[_Result | None] = [None] * len(requests)
        with self._plain():
            texts = [self._texts.get(request.instruction) for request in requests]
            for group in groups(requests, texts):
                found = self._runner.run([requests[i] for i in group], [texts[i] for i in group], size, resize, units)
                for i, normalized, actions in zip(group, *found, strict=True):
                    results[i] = normalized, actions
        done = [result for result in results if result is not None]
        if not all(np.isfinite(normalized).all() for normalized, _ in done):
            raise OutputError(
                "actions: the model wrote NaN or infinite values; nothing was returned. Check the checkpoint's weights and, "
                "where they were given, the prompt embeddings"
            )
        return done

    def _plain(self) -> contextlib.AbstractContextManager[Any]:
        """Outside of the caller's autocast, which would change the numbers and what is cached."""
        return torch.autocast(self.device.type, enabled=False)

    def warm_up(self, pictures: Mapping[str, tuple[int, int]] | None = None, *, batch: int = 1) -> None:
        """Do now what the first chunk would otherwise do; call it before a control loop starts.

        On a CPU it also lets the process keep the memory of one chunk for the next (`engine.host_memory`).

        Args:
            pictures: view -> height and width of the robot's own pictures; the model's size where not given.
            batch: requests in one pass (`infer_batch`).
        """
        if self.device.type == "cpu":
            host_memory.hold()
        if not isinstance(self._runner, EngineRunner):
            return
        names, given = self.embodiment.views, dict(pictures or {})
        for name in given:
            if name not in names:
                raise InputError(f"pictures: no view {name!r}{did_you_mean(name, names)}; views: {', '.join(names)}")
        if not 1 <= batch <= MAX_BATCH:
            raise InputError(f"batch: expected 1 to {MAX_BATCH}, got {batch}")
        size = self.config.image_size
        views = tuple(given.get(name, size) for name in names)
        length, state = self.config.text.max_length, self.codec.state is not None
        shape = RequestShape(batch, views, size, self.embodiment.resize, state, length)
        with self._plain():
            self._runner.warm_up(shape)

    def prepare(self, instruction: str) -> Future[None]:
        """Encode an instruction in the background, so that the chunk that first uses it does not wait.

        The future's `result()` returns when it is ready, or raises what went wrong.
        """
        return self._background.submit(self._prepare, instruction)

    def _prepare(self, instruction: str) -> None:
        with self._plain():
            if self.device.type != "cuda":
                self._texts.get(instruction)
                return
            # beside the control loop's stream, which it must not hold up
            stream = torch.cuda.Stream(self.device)
            with torch.cuda.stream(stream):
                self._texts.get(instruction)
            stream.synchronize()

    def _make_pack(self, instruction: str) -> PromptPack:
        """The instruction's pack, from disk or made (and kept on disk) now."""
        assert self.engine is not None
        pack = None if self._pack_folder is None else self._pack_folder.load(instruction)
        if pack is None:
            pack = self.engine.pack(self._embedder(instruction))
            if self._pack_folder is not None:
                self._pack_folder.store(instruction, pack)
        return pack

    @torch.no_grad()
    def _make_context(self, instruction: str) -> Tensor:
        """Projected text [1, L, text_dim], kept for the next chunks of the same instruction."""
        return self.model.context(self._embedder(instruction))

    def _state(self, observation: Observation) -> Array | None:
        """Encoded state [1, state_dim]; None for a model without a state token, which looks at no state."""
        if self.codec.state is None:
            return None
        return self.codec.state.forward(self.embodiment.state_vector(observation.state)[None])


_Result = tuple[Array, Array | None]


def _tensor_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
