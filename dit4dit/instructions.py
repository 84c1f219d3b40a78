"""Instruction -> what the model needs of it, once: by its text encoder, or from embeddings given beforehand."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from dit4dit.errors import ConfigError, InputError, did_you_mean
from dit4dit.model.text import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dit4dit.model.dit4dit import DiT4DiT

Value = TypeVar("Value")


class Embedder:
    """instruction -> prompt embedding [1, L, text_in] on the model's device."""

    def __init__(
        self, model: DiT4DiT, tokenizer: PreTrainedTokenizerBase | None, given: Mapping[str, Any] | None
    ) -> None:
        """given: instruction -> [L, text_in]; when there are some, no other instruction can be used."""
        self._model, self._tokenizer, self._given = model, tokenizer, dict(given or {})

    @property
    def can_encode(self) -> bool:
        """Whether any instruction can be embedded, not only those given."""
        return self._tokenizer is not None and self._model.text is not None

    def __call__(self, instruction: str) -> Tensor:
        if not isinstance(instruction, str) or not instruction.strip():
            raise InputError(f"instruction: expected words, got {instruction!r:.60}")
        return self._encode(instruction) if self.can_encode else self._look_up(instruction)

    def _encode(self, instruction: str) -> Tensor:
        if self._tokenizer is None:
            raise ConfigError("this policy was loaded without its text encoder: it cannot embed instructions")
        device = self._model.backbone.transformer.proj_out.weight.device
        tokens = tokenize(self._tokenizer, [instruction], self._model.config.text.max_length)
        return self._model.embed(tokens.to(device))

    def _look_up(self, instruction: str) -> Tensor:
        if instruction not in self._given:
            known = list(self._given)
            raise InputError(
                f"instruction {instruction!r}: this policy was loaded without a text encoder and has embeddings for "
                f"{len(known)} others{did_you_mean(instruction, known)}; embed it with Policy.embed_prompts"
            )
        embeds = torch.as_tensor(self._given[instruction])
        width = self._model.config.dit.text_in
        if embeds.dim() != 2 or embeds.shape[1] != width:
            raise InputError(f"prompt_embeds {instruction!r}: expected shape [L, {width}], got {list(embeds.shape)}")
        return embeds[None].to(self._model.backbone.transformer.proj_out.weight.device)


class Recent(Generic[Value]):
    """The last `size` values of a function of the instruction; safe to call from several threads."""

    def __init__(self, make: Callable[[str], Value], size: int) -> None:
        self._make, self._size = make, size
        self._values: OrderedDict[str, Value] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, instruction: str) -> Value:
        with self._lock:
            value = self._values.pop(instruction, None)
            if value is None:
                value = self._make(instruction)
            self._values[instruction] = value
            if len(self._values) > self._size:
                self._values.popitem(last=False)
            return value
