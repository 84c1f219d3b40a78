"""DeepSpeed's ZeRO: optimiser and gradients (stage 2), or the parameters too (stage 3), split over the processes.

`deepspeed.initialize` is called directly: accelerate calls it for GPUs alone and, asked for it on a CPU, trains without it and
says nothing. Checkpoints hold whole tensors, as with the other strategies, so that a run may change its strategy when it goes on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dit4dit.errors import require
from dit4dit.training import optim
from dit4dit.training.config import TrainConfig
from dit4dit.training.moves import Moves, blank_moments, check_tensors
from dit4dit.training.parallel import Root

BUCKET = 50_000_000
"""Gradients sent at once: DeepSpeed keeps buffers of this many values."""
KEPT_WHOLE = 100_000
"""Stage 3 never gives back parameters of at most this many values: gathering them takes longer than they are large."""
MOMENTS = ("exp_avg", "exp_avg_sq")


def settings(config: TrainConfig) -> dict[str, Any]:
    """DeepSpeed's configuration of a run. Arithmetic and accumulation are the run's own, so that losses are any strategy's."""
    stage = int(config.run.strategy.removeprefix("zero"))
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": BUCKET, "overlap_comm": False}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = KEPT_WHOLE
    return {
        "train_micro_batch_size_per_gpu": config.data.batch_size,
        "gradient_accumulation_steps": config.optim.accumulate,
        "gradient_clipping": config.optim.clip,
        "zero_optimization": zero,
        # torch's AdamW, the same as the other strategies'
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def planned(strategy: str, trained: Mapping[str, Tensor], fixed: Sequence[Tensor], ranks: int) -> dict[str, int]:
    """Bytes on each process of float32 parameters that are trained and that are not: {"trained", "frozen", "gradients",
    "optimizer"}. The optimiser moves a copy of its piece, so it holds three times as much as the piece.
    """
    groups: dict[str, list[int]] = {}
    for name, parameter in trained.items():
        groups.setdefault(optim.group_of(name), []).append(parameter.numel())
    sizes = [size for members in groups.values() for size in members]
    still = [parameter.numel() for parameter in fixed]
    if strategy == "zero2":
        # one flat tensor a group, filled up so that every piece has an even number of values
        pieces = sum(2 * -(-sum(members) // (2 * ranks)) for members in groups.values())
        live, frozen = pieces * ranks, sum(still)
    else:
        pieces = sum(-(-size // ranks) for size in sizes)
        live = pieces + sum(size for size in sizes if size <= KEPT_WHOLE)
        frozen = sum(-(-size // ranks) + (size if size <= KEPT_WHOLE else 0) for size in still)
    moved = 3 * pieces + len(groups)  # and a counter of steps for each group
    return {
        name: 4 * values
        for name, values in {
            "trained": live,
            "frozen": frozen,
            "gradients": pieces + BUCKET,
            "optimizer": moved,
        }.items()
    }


class ZeroMoves(Moves):
    """See `Moves`; the engine clips, moves and sends."""

    def wrap(self, root: Root) -> nn.Module:
        os.environ.setdefault("DS_ACCELERATOR", self.processes.device.type)
        deepspeed = require("deepspeed", "deepspeed")
        self._zero, self._access = deepspeed.zero, require("deepspeed.utils", "deepspeed")
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # of the collectives that DeepSpeed calls by their old names, at every step
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
        if self.processes.device.type == "cpu":
            # collectives over shared memory, compiled at their first use: processes that wait spin, and gloo's do not
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.processes.ensure_group()
        # what DeepSpeed sends must lie in one piece, also what the VAE laid out otherwise
        for parameter in root.parameters():
            parameter.data = parameter.data.contiguous()
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=root, optimizer=self.optimizer, config=settings(self.config), dist_init_required=False
        )
        self._link_state()
        return self.engine

    @property
    def splits_parameters(self) -> bool:
        return self.config.run.strategy == "zero3"

    @contextlib.contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        # the loss is divided by the number of micro steps already
        self.engine.backward(loss, scale_wrt_gas=False)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # counts the micro step

    def step(self) -> Tensor:
        self.engine.step()
        self.follow()
        return torch.as_tensor(self.engine.get_global_grad_norm(), device=self.processes.device)

    def weights(self) -> dict[str, Tensor]:
        out = {}
        for name, parameter in optim.named_parameters(self.model).items():
            with self._zero.GatheredParameters([parameter], enabled=self.splits_parameters):
                out[name] = parameter.detach().cpu().clone()
        return out

    def moments(self) -> dict[str, Tensor]:
        # one counter serves all parameters
        steps = next(iter(self._base.state.values()))["step"]
        out = {}
        for name, parameter in self.parameters.items():
            out[f"step.{name}"] = steps.detach().cpu().clone()
            for kind in MOMENTS:
                out[f"{kind}.{name}"] = self._access.safe_get_full_optimizer_state(parameter, kind).cpu()
        return out

    def restore(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], where: str) -> None:
        named = optim.named_parameters(self.model)
        check_tensors({n: self._shape(p) for n, p in named.items()}, weights, f"{where}: weights")
        shapes = {f"{kind}.{n}": self._shape(p) for n, p in self.parameters.items() for kind in MOMENTS}
        shapes |= {f"step.{n}": [] for n in self.parameters}
        check_tensors(shapes, moments, f"{where}: optimiser")
        for state in self._base.state.values():
            state["step"].copy_(moments[f"step.{next(iter(self.parameters))}"])
        for name, parameter in named.items():
            self._set_weight(parameter, weights[name].float())
            for kind in MOMENTS if name in self.parameters else ():
                self._set(parameter, moments[f"{kind}.{name}"], kind)

    @property
    def _base(self) -> torch.optim.Optimizer:
        """torch's optimiser, whose parameters are this process's flat pieces."""
        return self.optimizer.optimizer  # type: ignore[attr-defined]

    def _shape(self, parameter: nn.Parameter) -> list[int]:
        return list(parameter.ds_shape if self.splits_parameters else parameter.shape)  # type: ignore[attr-defined]

    def _link_state(self) -> None:
        """AdamW's state of this process's pieces, and stage 2's map from parameters into it. DeepSpeed makes the map in the
        first step, when only the first group has a state, and the others would not be in it.
        """
        zero: Any = self.optimizer
        flat = zero.fp32_partitioned_groups_flat if self.splits_parameters else zero.single_partition_of_fp32_groups
        for piece in flat:
            self._base.state[piece] = blank_moments(piece)
        if not self.splits_parameters:
            zero._lazy_init_hp_params_optimizer_state()

    @torch.no_grad()
    def _set_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        """The weight that the model uses, and the copy that the optimiser moves."""
        if not self.splits_parameters:
            parameter.copy_(value)
        else:
            parameter.ds_tensor.copy_(self._piece(parameter, value))  # type: ignore[attr-defined]
            if parameter.numel() == value.numel():  # one that is never given back after its use
                parameter.copy_(value)
        if parameter.requires_grad:
            self._set(parameter, value, None)

    def _set(self, parameter: nn.Parameter, value: Tensor, kind: str | None) -> None:
        access, value = self._access, value.to(self.processes.device)
        if self.splits_parameters:
            value = self._piece(parameter, value)
            if kind is None:
                access.safe_set_local_fp32_param(parameter, value)
            else:
                access.safe_set_local_optimizer_state(parameter, value, kind)
        elif kind is None:
            access.safe_set_full_fp32_param(parameter, value)
        else:
            access.safe_set_full_optimizer_state(parameter, value, kind)

    def _piece(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """This process's part of a whole tensor: DeepSpeed fills the last one up with zeros."""
        size: int = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        padded = torch.zeros(size * self.processes.ranks, dtype=value.dtype)
        padded[: value.numel()] = value.flatten().cpu()
        return padded[size * self.processes.rank :][:size]
