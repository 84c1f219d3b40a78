"""The text encoder: instruction -> prompt embedding, a function of the instruction alone.

The weights are Qwen2.5-VL's (released: Cosmos-Reason1-7B); only its language layers are built, because a prompt touches
neither the vision tower nor the output matrix.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dit4dit.config import TextConfig
from dit4dit.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SYSTEM_PROMPT = "You are a helpful assistant who will provide prompts to an image generator."

# the layout of Qwen's own template for conversations of plain text, without the tool and vision branches
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
)


class TextEncoder(nn.Module):
    """All hidden states after the embedding, each normalised per token, concatenated along the width."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

        self.config = config
        self.language_model = Qwen2_5_VLTextModel(qwen_config(config))

    def restore_buffers(self, device: torch.device) -> None:
        """Rebuild what no checkpoint holds (the rotary frequencies), after building on the meta device."""
        rotary = self.language_model.rotary_emb
        self.language_model.rotary_emb = type(rotary)(qwen_config(self.config)).to(device)

    def __getstate__(self) -> dict[str, Any]:
        """Without the hooks that transformers 5 leaves on its layers in the first call and cannot pickle; it makes them anew."""
        return {**self.__dict__, "_modules": {name: _unhooked(module, {}) for name, module in self._modules.items()}}

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids [B, L] -> prompt embeddings [B, L, embed_width] in the weights' dtype.

        Raises:
            CheckpointError: a token has no row in the embedding; on a GPU the kernel that looks it up would spoil the process.
        """
        if not tokens.is_meta and (largest := int(tokens.max())) >= self.config.vocab_size:
            raise CheckpointError(
                f"text encoder: the tokenizer gives token {largest}, and the embedding has {self.config.vocab_size} rows; take "
                "tokenizer and text encoder from the same folder (--backbone)"
            )
        return torch.cat([standardize(h) for h in self.hidden_states(tokens)], dim=-1)

    def hidden_states(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Token ids [B, L] -> the states after each layer [B, L, hidden_size], the last one after the final norm."""
        out = self.language_model(input_ids=tokens, output_hidden_states=True, use_cache=False)
        states: tuple[Tensor, ...] = out.hidden_states[1:]
        return states


def _unhooked(module: Any, done: dict[int, Any]) -> Any:
    """A module of the same parameters and buffers, and so its children, without transformers' own forward hooks.

    done: by id, what has been copied, so that a module that is there twice stays one.
    """
    if module is None or id(module) in done:
        return None if module is None else done[id(module)]
    copy: Any = object.__new__(type(module))
    done[id(module)] = copy
    hooks = {k: hook for k, hook in module._forward_hooks.items() if not _is_of_transformers(hook)}
    # the mark without which transformers installs its hooks
    facts = {name: value for name, value in module.__dict__.items() if name != "_output_capturing_hooks_installed"}
    facts |= {"_forward_hooks": OrderedDict(hooks)}
    facts |= {"_modules": {name: _unhooked(child, done) for name, child in module._modules.items()}}
    copy.__dict__.update(facts)
    return copy


def _is_of_transformers(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("transformers.")


def standardize(h: Tensor) -> Tensor:
    """(h - mean) / (std + 1e-8) over the last axis with the unbiased standard deviation, computed in float32."""
    x = h.float()
    return ((x - x.mean(dim=-1, keepdim=True)) / (x.std(dim=-1, keepdim=True) + 1e-8)).to(h.dtype)


def tokenize(tokenizer: PreTrainedTokenizerBase, instructions: list[str], max_length: int) -> Tensor:
    """Instructions -> token ids [B, max_length], in the chat template, padded and truncated as in the published code."""
    rows = []
    for instruction in instructions:
        conversation = [
            {"role": "system", "content": [{"type": "text", "text": SYSTEM_PROMPT}]},
            {"role": "user", "content": [{"type": "text", "text": instruction}]},
        ]
        ids = tokenizer.apply_chat_template(
            conversation,
            tokenize=True,
            add_generation_prompt=False,
            max_length=max_length,
            truncation=True,
            padding="max_length",
            return_dict=False,
        )
        rows.append(torch.tensor(ids, dtype=torch.long).flatten())
    return torch.stack(rows)


def qwen_config(config: TextConfig) -> Any:
    """transformers' text configuration of the same sizes."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig

    # the marks of Qwen's own vocabulary would lie outside a small one
    qwen = Qwen2_5_VLTextConfig(**qwen_text_arguments(config), bos_token_id=None, eos_token_id=None)
    qwen._attn_implementation = "sdpa"
    return qwen


def qwen_text_arguments(config: TextConfig) -> dict[str, Any]:
    """The keyword arguments (and JSON keys) of transformers' `Qwen2_5_VLTextConfig` for `config`."""
    return {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "rope_theta": config.rope_theta,
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": list(config.mrope_section)},
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_act": "silu",
        "use_sliding_window": False,
    }


def byte_tokenizer(words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer of 256 bytes and three marks, for small models that have no vocabulary of their own.

    Each of `words` (letters alone) is one token, with and without a space before it.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    whole = [space + word for word in words for space in ("", "\u0120")]  # how byte-level BPE writes a space
    tokens = dict.fromkeys([*marks, *alphabet, *whole])
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="right"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
