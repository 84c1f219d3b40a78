"""Prompt embeddings against transformers' whole model, and the tokens that go in."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from dit4dit.checkpoints.weights import language_weights
from dit4dit.envs import tabletop_tokenizer
from dit4dit.errors import CheckpointError
from dit4dit.model.text import SYSTEM_PROMPT, TextEncoder, byte_tokenizer, qwen_text_arguments, standardize, tokenize
from dit4dit.presets import preset

CONFIG = preset("tiny").model.text


def test_agrees_with_the_whole_qwen_model() -> None:
    torch.manual_seed(0)
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    whole = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=qwen_text_arguments(CONFIG), vision_config=vision)
    ).eval()
    for parameter in whole.model.language_model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = TextEncoder(CONFIG).eval()
    ours.language_model.load_state_dict(language_weights(whole.state_dict()), strict=True)
    tokens = torch.randint(0, CONFIG.vocab_size, (2, 50))
    with torch.no_grad():
        states = whole(input_ids=tokens, output_hidden_states=True).hidden_states[1:]
        got = ours(tokens)
    want = torch.cat([(h - h.mean(-1, True)) / (h.std(-1, keepdim=True) + 1e-8) for h in states], dim=-1)
    assert got.shape == (2, 50, CONFIG.embed_width)
    assert (got - want).abs().max() / want.abs().max() < 1e-5


def test_standardize_uses_the_unbiased_deviation_per_token() -> None:
    h = torch.tensor([[[1.0, 2.0, 3.0, 6.0]]])
    assert torch.allclose(standardize(h), (h - 3.0) / torch.tensor(14 / 3).sqrt())


def test_chat_template_padding_and_truncation() -> None:
    tokenizer = byte_tokenizer()
    tokens = tokenize(tokenizer, ["go", "öffne die Schublade"], 192)
    assert tokens.shape == (2, 192)
    text = tokenizer.decode(tokens[0][tokens[0] != tokenizer.pad_token_id])
    assert text == f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\ngo<|im_end|>\n"
    assert "öffne die Schublade" in tokenizer.decode(tokens[1])
    assert (tokens[0, -20:] == tokenizer.pad_token_id).all()
    assert tokenize(tokenizer, ["x" * 500], 192).shape == (1, 192)
    # Qwen's own template can ask for an answer; a prompt does not
    tokenizer.chat_template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    assert torch.equal(tokenize(tokenizer, ["go", "öffne die Schublade"], 192), tokens)


def test_a_tokenizer_of_another_model_is_named() -> None:
    tokens = torch.full((1, 4), CONFIG.vocab_size - 1)
    assert TextEncoder(CONFIG).eval()(tokens).shape == (1, 4, CONFIG.embed_width)
    with pytest.raises(
        CheckpointError, match=rf"gives token {CONFIG.vocab_size}, and the embedding has {CONFIG.vocab_size} rows; take"
    ):
        TextEncoder(CONFIG)(torch.full((1, 4), CONFIG.vocab_size))


def test_buffers_survive_building_on_meta() -> None:
    torch.manual_seed(1)
    real = TextEncoder(CONFIG).eval()
    with torch.device("meta"):
        blank = TextEncoder(CONFIG).eval()
    blank.language_model.load_state_dict(real.language_model.state_dict(), assign=True)
    blank.restore_buffers(torch.device("cpu"))
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(real(tokens), blank(tokens))


@pytest.mark.parametrize("name", ["libero", "mid", "tiny", "tabletop"])
def test_presets_have_room_for_a_prompt(name: str) -> None:
    text = preset(name).model.text
    assert sum(text.mrope_section) * 2 == text.hidden_size // text.num_heads
    tokenizer = tabletop_tokenizer() if name == "tabletop" else byte_tokenizer()
    tokens = tokenize(tokenizer, ["put the yellow block on the white plate"], text.max_length)
    assert (tokens[0] == 0).any(), "the longest usual instruction must not be cut"


def user_hook(module: torch.nn.Module, args: object, output: object) -> None:
    """One of the user's own, which can be pickled."""


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda encoder: pickle.loads(pickle.dumps(encoder))])
def test_the_hooks_that_transformers_installs_stay_behind(duplicate) -> None:
    """As transformers 5 does in the first call: a local function on each layer, and a mark that they are there."""
    encoder = TextEncoder(CONFIG).eval()
    tokens = torch.randint(0, CONFIG.vocab_size, (1, 7))
    with torch.no_grad():
        want = encoder(tokens)
    model, layer = encoder.language_model, encoder.language_model.layers[0]
    seen = []

    def output_capturing_hook(module, args, output) -> None:
        seen.append(module)

    output_capturing_hook.__module__ = "transformers.utils.output_capturing"
    model.twice = layer.mlp  # a module that is there under two names
    layer.register_forward_hook(output_capturing_hook)
    layer.register_forward_hook(user_hook)
    model._output_capturing_hooks_installed = True
    before = list(layer._forward_hooks.values())
    twin = duplicate(encoder)
    assert list(layer._forward_hooks.values()) == before, "the original keeps its own"
    found = twin.language_model
    assert list(found.layers[0]._forward_hooks.values()) == [user_hook]
    assert not getattr(found, "_output_capturing_hooks_installed", False), "or transformers would not install them anew"
    assert found.twice is found.layers[0].mlp
    assert found.layers[0] is not layer
    assert all(torch.equal(a, b) and a is not b for a, b in zip(encoder.parameters(), twin.parameters(), strict=True))
    with torch.no_grad():
        assert torch.equal(twin(tokens), want)
    assert not seen, "a twin's call runs none of the original's hooks"
