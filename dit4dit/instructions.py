"""Instruction -> what the model needs of it, once: by its text encoder, or from embeddings given beforehand."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from dit4dit.errors import ConfigError, InputError, did_you_mean
from dit4dit.model.text import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dit4dit.model.dit4dit import DiT4DiT

Key = TypeVar("Key")
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
        if any("\ud800" <= letter <= "\udfff" for letter in instruction):
            raise InputError(f"instruction: {instruction!r:.60} is not valid Unicode; pass it as UTF-8")
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
                f"{len(known)} others{did_you_mean(instruction, known)}; embed it with Policy.embed_prompts, or make its "
                "pack with dit4dit pack"
            )
        embeds = torch.as_tensor(self._given[instruction])
        width = self._model.config.dit.text_in
        if embeds.dim() != 2 or embeds.shape[1] != width:
            raise InputError(f"prompt_embeds {instruction!r}: expected shape [L, {width}], got {list(embeds.shape)}")
        return embeds[None].to(self._model.backbone.transformer.proj_out.weight.device)


class Recent(Generic[Key, Value]):
    """Values of a function, least recently used out first when their cost exceeds the budget.

    Safe to call from several threads: each value is made once, and making one never holds up those that are there.
    """

    def __init__(self, make: Callable[[Key], Value], budget: int, cost: Callable[[Value], int]) -> None:
        self._make, self._budget, self._cost = make, budget, cost
        self._values: OrderedDict[Key, Future[Value]] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, key: Key) -> bool:
        """Whether `get` would return at once."""
        with self._lock:
            value = self._values.get(key)
            return value is not None and value.done()

    def get(self, key: Key) -> Value:
        """The value; made by the caller's thread, or waited for where another thread is making it."""
        with self._lock:
            value = self._values.get(key)
            mine = value is None
            if value is None:
                value = self._values[key] = Future()
            self._values.move_to_end(key)
        if not mine:
            return value.result()
        try:
            value.set_result(self._make(key))
        except BaseException as error:
            with self._lock:
                del self._values[key]
            value.set_exception(error)
            raise
        self._trim()
        return value.result()

    @property
    def total_cost(self) -> int:
        """Cost of all values that are there."""
        return sum(self._cost(v.result()) for v in list(self._values.values()) if v.done())

    def _trim(self) -> None:
        with self._lock:
            while self.total_cost > self._budget:
                done = [known for known, value in self._values.items() if value.done()]
                if len(done) < 2:
                    return
                del self._values[done[0]]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`; ConfigError when its files are missing."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer_config.json").is_file():
        raise ConfigError(f"{folder}: no tokenizer_config.json; give a backbone folder with its tokenizer")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        # tokenizers raises plain Exception for a file that it cannot read; any other unknown kind is a bug
        if type(error) is not Exception and not isinstance(error, (OSError, ValueError, KeyError, ImportError)):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{folder}: not a readable tokenizer ({reason:.120}); copy the folder again") from None
