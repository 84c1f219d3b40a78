"""Instruction -> what the model needs of it, once: by its text encoder, or from embeddings given beforehand."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit4dit.engine.packs import PackFolder, PromptPack
from dit4dit.errors import ConfigError, InputError, did_you_mean, shown
from dit4dit.files.folders import fault, visible
from dit4dit.model.text import tokenize
from dit4dit.policy.device import check_process
from dit4dit.policy.recent import Recent, renew_after_fork

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dit4dit.engine import Engine
    from dit4dit.model.dit4dit import DiT4DiT

log = logging.getLogger("dit4dit.policy")

PACK_BUDGET = 2 * 2**30
"""Bytes of prompt packs kept: 27 instructions of the released models in bfloat16."""
CONTEXT_BUDGET = 64 * 2**20
"""Bytes of projected text kept, least recently used out first (1 MB each for the released models in bfloat16)."""


class Embedder:
    """instruction -> prompt embedding [1, L, text_in] on the model's device."""

    def __init__(
        self, model: DiT4DiT, tokenizer: PreTrainedTokenizerBase | None, given: Mapping[str, Any] | None
    ) -> None:
        """given: instruction -> [L, text_in]; when there are some, no other instruction can be used.

        InputError: one of them is no embedding of the model's.
        """
        self._model, self._tokenizer = model, tokenizer
        width = model.config.dit.text_in
        self._given = {words: _embedding(words, value, width) for words, value in (given or {}).items()}

    @property
    def can_encode(self) -> bool:
        """Whether any instruction can be embedded, not only those given."""
        return self._tokenizer is not None and self._model.text is not None

    @property
    def lengths(self) -> set[int]:
        """Text tokens that instructions can have: of the given embeddings, or what the encoder pads to."""
        if self.can_encode or not self._given:
            return {self._model.config.text.max_length}
        return {len(embeds) for embeds in self._given.values()}

    def length(self, instruction: Any) -> int:
        """Text tokens of an instruction, which is checked here and nowhere else.

        InputError: it is no text, or there are embeddings and none of it.
        """
        if not isinstance(instruction, str) or not instruction.strip():
            raise InputError(f"instruction: expected words, got {shown(instruction)}")
        try:
            instruction.encode()
        except UnicodeEncodeError:  # surrogates
            raise InputError(f"instruction: {shown(instruction)} is not valid Unicode; pass it as UTF-8") from None
        if self.can_encode or not self._given:
            return self._model.config.text.max_length
        return len(self._look_up(instruction))

    def __call__(self, instruction: str) -> Tensor:
        """Of an instruction that `length` has taken."""
        if self._tokenizer is None or self._model.text is None:
            return self._look_up(instruction)[None].to(self._model.device)
        tokens = tokenize(self._tokenizer, [instruction], self._model.config.text.max_length)
        return self._model.embed(tokens.to(self._model.device))

    def _look_up(self, instruction: str) -> Tensor:
        """The given embedding [L, text_in]."""
        if instruction not in self._given:
            known = list(self._given)
            raise InputError(
                f"instruction {shown(instruction)}: this policy was loaded without a text encoder and has embeddings for "
                f"{len(known)} others{did_you_mean(instruction, known)}; embed it with Policy.embed_prompts, or make its "
                "pack with dit4dit pack"
            )
        return self._given[instruction]


def _embedding(instruction: Any, value: Any, width: int) -> Tensor:
    """One of the embeddings that a user gives, [L, width], finite; InputError otherwise."""
    if not isinstance(instruction, str):
        raise InputError(f"prompt_embeds: expected instructions as keys, got {type(instruction).__name__}")
    where, again = f"prompt_embeds {shown(instruction)}", "make it again with Policy.embed_prompts"
    try:
        embeds = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{where}: expected numbers [L, {width}], got {type(value).__name__}; {again}") from None
    if embeds.dim() != 2 or embeds.shape[1] != width or not len(embeds):
        raise InputError(f"{where}: expected shape [L, {width}], got {list(embeds.shape)}; {again}")
    if not embeds.is_floating_point() or not embeds.isfinite().all():
        raise InputError(f"{where}: expected finite floats, got {embeds.dtype} or NaN or infinite values; {again}")
    return embeds


class Texts:
    """What the runner needs of each instruction: its prompt pack, or for the plain model its projected text [1, L, text_dim]."""

    def __init__(self, model: DiT4DiT, embedder: Embedder, engine: Engine | None, folder: PackFolder | None) -> None:
        """folder: where packs are kept between runs."""
        self.model, self.embedder, self.engine, self.folder = model, embedder, engine, folder
        self._start()

    def _start(self) -> None:
        self._kept: Recent[str, Any] = (
            Recent(self._make_context, CONTEXT_BUDGET, lambda context: context.numel() * context.element_size())
            if self.engine is None
            else Recent(self._make_pack, PACK_BUDGET, lambda pack: pack.bytes)
        )
        device = self.model.device
        self._side_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._start_thread()
        renew_after_fork(self)

    def _start_thread(self) -> None:
        self._background = ThreadPoolExecutor(1, thread_name_prefix="dit4dit-instructions")

    def after_fork(self) -> None:
        """What is kept stays; the thread is another one."""
        self._kept.after_fork()
        self._start_thread()

    def __getstate__(self) -> dict[str, Any]:
        """Threads, streams and caches stay behind; a copy starts its own."""
        return {name: self.__dict__[name] for name in ("model", "embedder", "engine", "folder")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def __contains__(self, instruction: str) -> bool:
        return instruction in self._kept

    def get(self, instruction: str) -> Any:
        """The instruction's pack or projected text; made now where it is not kept."""
        return self._kept.get(instruction)

    def prepare(self, instruction: str) -> Future[None]:
        """Make it in the background."""
        check_process(self.model.device)
        return self._background.submit(self._prepare, instruction)

    def _prepare(self, instruction: str) -> None:
        self.embedder.length(instruction)
        with plain(self.model.device):
            if self._side_stream is None:
                self.get(instruction)
                return
            # beside the control loop's stream, which it must not hold up
            with torch.cuda.stream(self._side_stream):
                self.get(instruction)
            self._side_stream.synchronize()

    def _make_pack(self, instruction: str) -> PromptPack:
        """The instruction's pack, from disk or made (and kept on disk) now."""
        assert self.engine is not None
        pack = None if self.folder is None else self.folder.load(instruction)
        if pack is None:
            if self.folder is not None and not self.embedder.can_encode:
                raise InputError(
                    f"instruction {shown(instruction)}: no pack of it in {self.folder.folder}, and no text encoder is loaded; "
                    "make it with dit4dit pack (every letter and space counts)"
                )
            pack = self.engine.pack(self.embedder(instruction))
            if self.folder is not None:
                try:
                    self.folder.store(instruction, pack)
                except InputError as error:
                    # the robot goes on: the pack is there, only the next start will not find it
                    log.warning("%s", error)
        return pack

    @torch.no_grad()
    def _make_context(self, instruction: str) -> Tensor:
        context = self.model.context(self.embedder(instruction))
        if context.device.type == "cuda":  # whoever asked for it may go on in another stream
            torch.cuda.current_stream(context.device).synchronize()
        return context


@contextmanager
def plain(device: torch.device) -> Iterator[None]:
    """Outside of the caller's autocast and inference mode, which would change the numbers and what is kept.

    BackendError: see `check_process`.
    """
    check_process(device)
    with torch.autocast(device.type, enabled=False), torch.inference_mode(False), torch.no_grad():
        yield


VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model")
"""Files of which a tokenizer has one, without which transformers fails in many ways."""


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`; ConfigError when its files are missing."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer_config.json").is_file():
        raise ConfigError(f"{folder}: no tokenizer_config.json; give a backbone folder with its tokenizer")
    if not any((folder / name).is_file() or (folder / name).is_symlink() for name in VOCABULARIES):
        raise ConfigError(f"{folder}: none of {', '.join(VOCABULARIES)}; give a backbone folder with its tokenizer")
    for file in visible(folder):
        if reason := fault(file):
            raise ConfigError(f"{file}: {reason}")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        # tokenizers raises plain Exception for a file that it cannot read; any other unknown kind is a bug
        if type(error) is not Exception and not isinstance(error, (OSError, ValueError, KeyError, ImportError)):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{folder}: not a readable tokenizer ({reason:.120}); copy the folder again") from None
