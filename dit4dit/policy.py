"""The one door: an observation and an instruction in, a chunk of actions in robot units out."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
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
from dit4dit.embodiments.embodiment import Embodiment
from dit4dit.engine import Engine, PackFolder, PromptPack, packs_key
from dit4dit.errors import BackendError, ConfigError, InputError, OutputError
from dit4dit.instructions import Embedder, Recent
from dit4dit.model.checkpoint import open_checkpoint
from dit4dit.model.dit4dit import DiT4DiT
from dit4dit.model.weights import build
from dit4dit.ops import preprocess
from dit4dit.types import ActionChunk, Noise, Observation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENGINES = ("auto", "off")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PACK_BUDGET = 2 * 2**30
"""Bytes of prompt packs kept: 27 instructions of the released models in bfloat16."""
CONTEXT_BUDGET = 64 * 2**20
"""Bytes of projected text kept, least recently used out first (1 MB each for the released models in bfloat16)."""


def pick_device(device: str | torch.device) -> torch.device:
    """The device; BackendError when it is asked for and absent. "auto" is the GPU where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise BackendError(f"device {device!r}: expected auto, cpu, cuda or cuda:N") from None
    if chosen.type not in ("cpu", "cuda"):
        raise BackendError(f"device {device!r}: expected auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        built = "no GPU is visible to it" if torch.version.cuda else "it is a CPU-only build"
        raise BackendError(f"device {device!r}: PyTorch {torch.__version__} sees no CUDA ({built}); use --device cpu")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise BackendError(f"device {device!r}: only {torch.cuda.device_count()} GPUs are visible")
    return chosen


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
        self._embedder = Embedder(model, tokenizer, prompt_embeds)
        self._start_caches()

    def _start_caches(self) -> None:
        self._packs = Recent(self._make_pack, PACK_BUDGET, lambda pack: pack.bytes)
        self._contexts = Recent(self._make_context, CONTEXT_BUDGET, _tensor_bytes)
        self._background = ThreadPoolExecutor(1, thread_name_prefix="dit4dit-instructions")

    def __getstate__(self) -> dict[str, Any]:
        """Threads and caches stay behind; a copy starts its own."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_packs", "_contexts", "_background")}

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
        head: Literal["auto", "library", "one_launch"] = "auto",
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
            head: how the engine runs the action head (`Engine`); "one_launch" needs a GPU and head_dtype=torch.bfloat16.
            prompt_embeds: instruction -> embedding [L, text_in]; when given, no text encoder is loaded at all and only
                these instructions can be used.
            packs: folder where prompt packs are kept between runs (`dit4dit pack`); engine only.
            text_encoder: False loads none; every instruction's pack must be in `packs`.

        Raises:
            Dit4DitError: bad checkpoint, configuration or device; the message says what to do.
        """
        if engine not in ENGINES:
            raise ConfigError(f"engine {engine!r}: expected {' or '.join(ENGINES)}")
        if engine == "off" and (steps is not None or posterior != "sample" or head != "auto" or packs is not None):
            raise ConfigError(
                "steps, posterior, head and packs are options of the engine: leave them out, or use engine='auto'"
            )
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
        fast = Engine(model, steps=steps, posterior=posterior, head=head) if engine == "auto" else None
        folder = None if packs is None else PackFolder(Path(packs), packs_key(model), place)
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
        if not observations or len(observations) != len(instructions):
            raise InputError(
                f"batch: {len(observations)} observations and {len(instructions)} instructions; expected as many"
            )
        for observation in observations:
            if not isinstance(observation, Observation):
                raise InputError(f"observation: expected an Observation, got {type(observation).__name__}")
        noises = _noises(noise, len(observations))
        frame = self._frame([self.embodiment.ordered_views(o.images) for o in observations])
        state = self._states(observations)
        normalized = self._sample(frame, list(instructions), state, noises)
        actions = self.codec.action.inverse(normalized)
        names, rate = self.embodiment.action_names, self.embodiment.rate_hz
        return [
            ActionChunk(actions=actions[i], names=names, rate_hz=rate, normalized=normalized[i], noise=noises[i])
            for i in range(len(observations))
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
        noises = _noises([noise] if isinstance(noise, Noise) else noise, len(found))
        pictures = torch.from_numpy(published_examples.pictures(found, self.config.pixels_per_token))
        width = self.config.head.state_dim
        state = None if width is None else published_examples.encoded_states(found, width)
        words = published_examples.instructions(found)
        frame = preprocess([pictures.to(self.device)], None, "bilinear", self.model.backbone.transformer.dtype)
        placed = None if state is None else torch.from_numpy(state).to(self.device)
        return {"normalized_actions": self._sample(frame, words, placed, noises)}

    def embed_prompts(self, instructions: Sequence[str]) -> dict[str, Tensor]:
        """instruction -> prompt embedding [L, text_in] on the CPU, for `from_pretrained(prompt_embeds=...)`."""
        if not self._embedder.can_encode:
            raise ConfigError("embed_prompts: this policy was loaded without its text encoder")
        with self._plain():
            return {instruction: self._embedder(instruction)[0].cpu() for instruction in instructions}

    def _sample(
        self, frame: Tensor, instructions: list[str], state: Tensor | None, noise: Sequence[Noise]
    ) -> NDArray[np.float32]:
        """frame [B, 3, H, W] in [-1, 1] -> normalised actions [B, K, A_model]."""
        config = self.config
        rows, columns = config.latent_size(frame.shape[2], frame.shape[3])
        shapes = {
            "posterior": (config.vae.z_dim, 1, rows, columns),
            "latent": (config.vae.z_dim, config.latent_frames, rows, columns),
            "action": (config.head.action_horizon, config.head.action_dim),
        }
        drawn = [request.draw(shapes) for request in noise]
        posterior, latent, action = (
            torch.from_numpy(np.stack([d[name] for d in drawn])).to(self.device) for name in shapes
        )
        with self._plain():
            if self.engine is not None:
                packs = [self._packs.get(text) for text in instructions]
                result = self.engine.sample(frame, packs, state, posterior, latent, action)
            else:
                context = torch.cat([self._contexts.get(text) for text in instructions])
                result = self.model.sample(frame, context, state, posterior, latent, action)
        normalized = result.cpu().numpy()
        if not np.isfinite(normalized).all():
            raise OutputError(
                "actions: the model wrote NaN or infinite values; nothing was returned. Check the checkpoint's weights and, "
                "where they were given, the prompt embeddings"
            )
        return normalized

    def _plain(self) -> contextlib.AbstractContextManager[Any]:
        """Outside of the caller's autocast, which would change the numbers and what is cached."""
        return torch.autocast(self.device.type, enabled=False)

    def warm_up(self) -> None:
        """Do now what the first chunk would otherwise do; call it before a control loop starts."""
        if self.engine is not None:
            self.engine.warm_up()

    def prepare(self, instruction: str) -> Future[None]:
        """Encode an instruction in the background, so that the chunk that first uses it does not wait.

        The future's `result()` returns when it is ready, or raises what went wrong.
        """
        cache = self._contexts if self.engine is None else self._packs

        def make() -> None:
            with self._plain():
                cache.get(instruction)

        return self._background.submit(make)

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

    def _frame(self, views: list[list[NDArray[np.uint8]]]) -> Tensor:
        """Checked pictures, per request and view -> joined frame [B, 3, H, W]."""
        columns = []
        for v in range(len(self.embodiment.views)):
            shapes = {request[v].shape for request in views}
            if len(shapes) > 1:
                # views of different sizes cannot be stacked before they are resized: bring each to size on its own
                return torch.cat([self._frame([request]) for request in views])
            columns.append(_to_device(np.stack([request[v] for request in views]), self.device))
        size, dtype = self.config.image_size, self.model.backbone.transformer.dtype
        return preprocess(columns, size, self.embodiment.resize, dtype)

    def _states(self, observations: Sequence[Observation]) -> Tensor | None:
        """Encoded states [B, 1, state_dim]; None for a model without a state token, which looks at no state."""
        if self.codec.state is None:
            return None
        vectors = np.stack([self.embodiment.state_vector(o.state) for o in observations])
        encoded = self.codec.state.forward(vectors[:, None])
        return torch.from_numpy(np.ascontiguousarray(encoded, dtype=np.float32)).to(self.device)


def _noises(noise: Sequence[Noise] | None, count: int) -> list[Noise]:
    """One noise per request, fresh where none is given."""
    if noise is None:
        return [Noise.fresh() for _ in range(count)]
    if not isinstance(noise, (list, tuple)) or any(not isinstance(one, Noise) for one in noise):
        raise InputError(f"noise: expected a list of Noise, one per request, got {type(noise).__name__}")
    if len(noise) != count:
        raise InputError(f"noise: expected one per request ({count}), got {len(noise)}")
    return list(noise)


def _tensor_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _to_device(array: NDArray[np.uint8], device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`; ConfigError when its files are missing."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer_config.json").is_file():
        raise ConfigError(f"{folder}: no tokenizer_config.json; give a backbone folder with its tokenizer")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{folder}: not a readable tokenizer ({reason:.120}); copy the folder again") from None
