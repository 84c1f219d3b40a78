"""Which parameters move and how fast: freezing, parameter groups, AdamW's schedule, clipping, moving average, LoRA."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from dit4dit.checkpoints.checkpoint import EXTRACTOR, FROZEN, HEAD, TRANSFORMER
from dit4dit.config import FlowConfig
from dit4dit.errors import ConfigError, did_you_mean, require, shown
from dit4dit.model.dit4dit import DiT4DiT
from dit4dit.training.config import LoraConfig, OptimConfig

GROUPS = {"backbone_interface": EXTRACTOR, "action_model": HEAD}
"""Parameter group -> prefix of the published names in it; what has neither prefix is in `base`."""


def trained_parts(model: DiT4DiT) -> dict[str, nn.Module]:
    """Published prefix -> module, for the parts that recipes train."""
    parts: dict[str, nn.Module] = {TRANSFORMER: model.backbone.transformer}
    if model.head is not None:
        parts[HEAD] = model.head
    return parts


def named_parameters(model: DiT4DiT) -> dict[str, nn.Parameter]:
    """Parameters of backbone and head under their published names, trained or not."""
    return {prefix + n: p for prefix, part in trained_parts(model).items() for n, p in part.named_parameters()}


def freeze(model: DiT4DiT, patterns: Iterable[str]) -> None:
    """Stop training what the patterns name: a published name, whole or with * and ?, or the dotted path of a module.

    Text encoder and VAE are always frozen; naming them is allowed, because published recipes do.

    Raises:
        ConfigError: a pattern matches nothing, or nothing is left to train.
    """
    parameters = named_parameters(model)
    always = [prefix.rstrip(".") for prefix in FROZEN.values()]
    for pattern in patterns:
        found = [
            name for name in parameters if fnmatchcase(name, pattern) or name.startswith(pattern.rstrip(".") + ".")
        ]
        if not found and not any(fnmatchcase(name, pattern) or name.startswith(pattern + ".") for name in always):
            modules = sorted({name.rsplit(".", i)[0] for name in parameters for i in (1, 2, 3)})
            raise ConfigError(
                f"optim.freeze: {shown(pattern)} matches no parameter{did_you_mean(pattern, [*modules, *always], 10_000)}; "
                f"names begin with {TRANSFORMER} or {HEAD}"
            )
        for name in found:
            parameters[name].requires_grad_(False)


def freeze_unreached(model: DiT4DiT) -> tuple[str, ...]:
    """Freeze what no loss of the model's mode reaches, so that nothing waits for its gradient; says what it was.

    Action mode without gradients to the backbone trains the head alone; with them, the blocks up to the extract layer.
    """
    flow: FlowConfig = model.config.flow
    if flow.training != "action":
        return ()
    transformer = model.backbone.transformer
    if not flow.action_grad_to_backbone:
        transformer.requires_grad_(False)
        return ("the backbone",)
    for part in (*transformer.blocks[model.config.extract_layer + 1 :], transformer.norm_out, transformer.proj_out):
        part.requires_grad_(False)
    return (f"blocks after {model.config.extract_layer}", "the backbone's output head")


def trainable(model: DiT4DiT) -> dict[str, nn.Parameter]:
    """The parameters that are trained, under their published names (adapters under peft's)."""
    found = {name: p for name, p in named_parameters(model).items() if p.requires_grad}
    if not found:
        raise ConfigError("optim.freeze: nothing is left to train; freeze less, or choose another mode")
    return found


def group_of(name: str) -> str:
    """The parameter group of a published name."""
    return next((group for group, prefix in GROUPS.items() if name.startswith(prefix)), "base")


def make_optimizer(parameters: Mapping[str, nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with one group per learning rate; `name` and `top_lr` of each group are kept in it.

    Fused: one pass over each parameter, without the copies as large as all of them that the default makes on a GPU.
    """
    groups = []
    for name in ("base", *GROUPS):
        members = [p for n, p in parameters.items() if group_of(n) == name]
        if members:
            rate = getattr(config.learning_rate, name)
            groups.append({"params": members, "lr": rate, "top_lr": rate, "name": name})
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True)


def schedule(step: int, steps: int, config: OptimConfig) -> float:
    """Factor of every learning rate at `step`: linear warm-up from 0, then a half cosine down to min_lr / base.

    transformers' `cosine_with_min_lr`: the floor is the base group's fraction for every group, so the published head, ten
    times as fast as the base, ends at 5e-6.
    """
    if step < config.warmup_steps:
        return step / config.warmup_steps
    floor = config.min_lr / config.learning_rate.base
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)) * (1 - floor) + floor)


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Set every group's learning rate; returns them by group."""
    for group in optimizer.param_groups:
        group["lr"] = group["top_lr"] * factor
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


class Average:
    """Exponential moving average of parameters, sharded as they are."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.values = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, nn.Parameter]) -> None:
        torch._foreach_lerp_(
            [local(v) for v in self.values.values()], [local(parameters[n]) for n in self.values], 1 - self.decay
        )


def local(tensor: Tensor) -> Tensor:
    """This rank's own piece of a sharded tensor; any other tensor as it is."""
    from torch.distributed.tensor import DTensor

    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def add_lora(model: DiT4DiT, config: LoraConfig, seed: int) -> None:
    """Put low-rank adapters on backbone and head and freeze the rest; the adapters' first weights follow the seed.

    Raises:
        ConfigError: a target that ends no linear layer's name.
    """
    peft = require("peft", "train")
    ends = dict.fromkeys(config.targets, False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part in trained_parts(model).values():
            part.requires_grad_(False)
            linears = [n for n, m in part.named_modules() if isinstance(m, nn.Linear)]
            chosen = [n for n in linears if n.endswith(config.targets)]
            ends |= {end: True for end in config.targets if any(n.endswith(end) for n in chosen)}
            if chosen:
                adapters = peft.LoraConfig(
                    r=config.rank, lora_alpha=config.alpha, target_modules=chosen, lora_dropout=0.0
                )
                peft.inject_adapter_in_model(adapters, part)
    unused = [end for end, used in ends.items() if not used]
    if unused:
        raise ConfigError(
            f"optim.lora.targets: {shown(unused[0])} ends no linear layer's name; known ends: to_q, ff.net.2, ..."
        )


def merged_weights(model: DiT4DiT, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Plain weights of backbone and head under the published names, adapters added in.

    values: the parameters' full tensors by the names of `named_parameters`.
    """
    out = {}
    for prefix, part in trained_parts(model).items():
        scales = {f"{prefix}{n}": m.scaling["default"] for n, m in part.named_modules() if hasattr(m, "lora_A")}
        for name in (n for n in values if n.startswith(prefix)):
            if ".lora_" in name:
                continue
            module = name.removesuffix(".base_layer.weight")
            if name.endswith(".base_layer.weight") and module in scales:
                a, b = (values[f"{module}.lora_{side}.default.weight"] for side in "AB")
                out[f"{module}.weight"] = values[name] + scales[module] * (b.to(values[name].dtype) @ a)
            else:
                out[name.replace(".base_layer.", ".")] = values[name]
    return out
