"""The built-in world (`tabletop`), the small video autoencoder trained on its pictures, and a policy trained on its
demonstrations. Imports no torch.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def tabletop_vae_dir() -> Path:
    """The folder of the tabletop autoencoder that ships with the package: config.json, model.safetensors, metrics.json."""
    return Path(__file__).parent / "tabletop_vae"


def tabletop_policy_dir() -> Path:
    """The folder of the policy that ships with the package: a checkpoint in the native format, and metrics.json."""
    return Path(__file__).parent / "tabletop_policy"


def tabletop_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and one token for each word that the world's prompts are made of: a prompt has at most 40 tokens."""
    from dit4dit.envs.tabletop import BLOCK_COLOURS, INSTRUCTIONS, PLATE_COLOURS
    from dit4dit.model.text import SYSTEM_PROMPT, byte_tokenizer

    texts = (SYSTEM_PROMPT, "system user", *INSTRUCTIONS, *BLOCK_COLOURS, *PLATE_COLOURS)
    words = {word for text in texts for word in re.findall(r"(?<!{)\b[A-Za-z]+\b(?!})", text)}
    return byte_tokenizer(sorted(words))
