"""Weights to train backbone and head from as one when there is nothing to start from: every layer's output about as large as its
input, so that what the action loss says reaches the picture and the words.
"""

from __future__ import annotations

import torch
from torch import nn

from dit4dit.model.dit4dit import DiT4DiT

GAIN = 3**0.5
"""What a linear layer's usual weights, uniform within 1/sqrt(width), lack to variance 1/width."""
POSITION = 0.2
"""Scale of the action head's position embedding, whose usual size drowns the tokens it is added to."""


@torch.no_grad()
def rescale(model: DiT4DiT) -> None:
    """Rescale the usual random weights of the backbone and the action head, in place; a checkpoint's weights replace this.

    With the usual ones a signal loses two thirds of its variance in each layer, while biases and position embeddings keep theirs:
    at the end of a small model, what depends on the picture and the words is a tenth of what does not.
    """
    transformer, head = model.backbone.transformer, model.head
    parts = [transformer] if head is None else [transformer, head]
    kept = transformer.time_embed.t_embedder.linear_1  # `open_gates` solves for what follows it
    for layer in (layer for part in parts for layer in part.modules() if isinstance(layer, nn.Linear)):
        if layer is not kept:
            layer.weight.mul_(GAIN)
            if layer.bias is not None:
                layer.bias.zero_()
    if head is not None and head.position_embedding is not None:
        head.position_embedding.weight.mul_(POSITION)
    transformer.open_gates()
