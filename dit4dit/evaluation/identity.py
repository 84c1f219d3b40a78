"""Which policy a result is of: a hash of the checkpoint's content, and the options that change what it computes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from dit4dit.checkpoints.checkpoint import TEXT, open_checkpoint
from dit4dit.config import hashed_text
from dit4dit.engine.packs import content_hash
from dit4dit.policy.policy import Policy

SAMPLES = 4096
"""Values of each of the text encoder's tensors that are hashed, evenly spread: it is frozen, and its 16 GB are slow to read."""


def checkpoint_hash(path: str | Path, backbone: str | Path | None = None) -> str:
    """32 hex digits of all tensors (of the text encoder's, samples), the model's configuration, and the statistics.

    The same for a checkpoint in the published layout and the native format, wherever it lies.
    """
    checkpoint = open_checkpoint(path, backbone)
    model, statistics = hashed_text("ModelConfig", checkpoint.model), json.dumps(checkpoint.statistics, sort_keys=True)
    items = ((name, checkpoint.tensors[name]) for name in sorted(checkpoint.tensors))
    thinned = ((n, t.reshape(-1)[:: -(-t.numel() // SAMPLES) or 1] if n.startswith(TEXT) else t) for n, t in items)
    digest = hashlib.blake2b(f"{model} {statistics} {checkpoint.embodiment}".encode(), digest_size=16)
    digest.update(content_hash(thinned).encode())
    return digest.hexdigest()


def describe(policy: Policy, path: str | Path, backbone: str | Path | None = None) -> dict[str, Any]:
    """What run.json says of the policy; `path` and `backbone` as they were given to `from_pretrained`."""
    engine = policy.engine
    assert policy.model.head is not None
    return {
        "checkpoint": checkpoint_hash(path, backbone),
        "path": str(path),
        "embodiment": policy.embodiment.name,
        "statistics": policy.codec.tag,
        "device": policy.device.type,
        "dtype": str(policy.model.dtype).removeprefix("torch."),
        "head_dtype": str(policy.model.head.dtype).removeprefix("torch."),
        "engine": None
        if engine is None
        else {"steps": engine.steps, "posterior": engine.posterior, "quantization": engine.quantization},
    }
