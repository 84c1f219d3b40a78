"""What moves the weights: gradients summed over the processes and clipped, AdamW's step, and what a checkpoint keeps of both.

`Moves` does it with torch, on whole parameters or on FSDP2's shards; `dit4dit.training.zero` lets DeepSpeed do it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from dit4dit.errors import ConfigError
from dit4dit.model.dit4dit import DiT4DiT
from dit4dit.training import optim
from dit4dit.training.config import TrainConfig
from dit4dit.training.parallel import Processes, Root, assign, full


class Moves:
    """Gradients, optimiser and moving average of one process.

    Attributes:
        module: what to call instead of `root`: the wrapper in which the strategy hooks in.
        parameters: those that are trained, under their published names.
        scaler: float16's loss scaler, which does nothing otherwise.
        average: the moving average of the parameters, None without one.
    """

    def __init__(self, root: Root, config: TrainConfig, processes: Processes) -> None:
        self.model: DiT4DiT = root.model
        self.config, self.processes = config, processes
        processes.shard(root)
        self.parameters = optim.trainable(root.model)
        self.optimizer: torch.optim.Optimizer = optim.make_optimizer(self.parameters, config.optim)
        self.module: nn.Module = self.wrap(root)
        decay = config.optim.ema
        self.average = None if decay is None else optim.Average(self.parameters, decay)
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=config.run.precision == "float16")

    def wrap(self, root: Root) -> nn.Module:
        """`root` in the strategy's wrapper."""
        return self.processes.wrap(root)

    def set_rates(self, factor: float) -> dict[str, float]:
        """Every group's learning rate as `factor` of its top; returns them by group."""
        return optim.set_rates(self.optimizer, factor)

    @contextlib.contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        """Around forward and backward of one micro step; only the last of a step sends gradients."""
        with contextlib.nullcontext() if last else self.processes.no_sync(self.module):
            yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro step's loss."""
        self.scaler.scale(loss).backward()

    def step(self) -> Tensor:
        """Clip, move, forget the gradients; returns their norm before clipping, the same on every process."""
        self.scaler.unscale_(self.optimizer)
        limit = self.config.optim.clip or float("inf")
        norm = full(torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.follow()
        return norm

    def follow(self) -> None:
        """Bring the moving average up to the weights."""
        if self.average is not None:
            self.average.update(self.parameters)

    def weights(self) -> dict[str, Tensor]:
        """All of backbone and head, trained or not, whole, on the CPU; every process must ask."""
        return {name: full(p).cpu() for name, p in optim.named_parameters(self.model).items()}

    def averaged(self) -> dict[str, Tensor]:
        """The moving average, whole, on the CPU; empty without one; every process must ask."""
        return {} if self.average is None else {n: full(v).cpu() for n, v in self.average.values.items()}

    def moments(self) -> dict[str, Tensor]:
        """AdamW's state, whole, on the CPU, as "exp_avg.<name>" and so on; every process must ask."""
        return {
            f"{kind}.{name}": full(value).cpu()
            for name, parameter in self.parameters.items()
            for kind, value in self.optimizer.state[parameter].items()
        }

    def restore(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], where: str) -> None:
        """The inverse of `weights` and `moments`; ConfigError where names or shapes are others."""
        restore_tensors(optim.named_parameters(self.model), weights, f"{where}: weights")
        for parameter in self.parameters.values():
            self.optimizer.state[parameter] = blank_moments(parameter)
        blank = {f"{kind}.{n}": t for n, p in self.parameters.items() for kind, t in self.optimizer.state[p].items()}
        restore_tensors(blank, moments, f"{where}: optimiser")

    def restore_average(self, average: Mapping[str, Tensor], where: str) -> None:
        """The inverse of `averaged`."""
        if self.average is not None:
            restore_tensors(self.average.values, average, f"{where}: average")


def blank_moments(parameter: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a parameter that it has not moved yet. Fused, it reads all of it on the parameter's device."""
    return {
        "step": torch.zeros((), device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def check_tensors(shapes: Mapping[str, list[int]], values: Mapping[str, Tensor], where: str) -> None:
    """ConfigError unless `values` has the names and shapes of `shapes`."""
    extra = next((name for name in values if name not in shapes), None)
    if extra is not None:
        raise ConfigError(f"{where}: {extra}: this run does not have it; resume with the run's own configuration")
    for name, shape in shapes.items():
        if name not in values or list(values[name].shape) != shape:
            got = "none" if name not in values else list(values[name].shape)
            raise ConfigError(f"{where}: {name}: expected {shape}, got {got}; resume with the run's own configuration")


def restore_tensors(targets: Mapping[str, Tensor], values: Mapping[str, Tensor], where: str) -> None:
    """Write `values` into `targets`, name by name; ConfigError when they do not have the same names and shapes."""
    check_tensors({name: list(target.shape) for name, target in targets.items()}, values, where)
    for name, target in targets.items():
        assign(target, values[name])
