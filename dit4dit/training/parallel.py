"""Several processes, one model: replicated (DDP through accelerate) or sharded (FSDP2 through torch's `fully_shard`).

accelerate has no FSDP on a CPU, and says nothing when it is asked for one; `fully_shard` has, so that is what runs everywhere.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from dit4dit.errors import require
from dit4dit.model.dit4dit import DiT4DiT
from dit4dit.training.config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Root(nn.Module):
    """The module that is wrapped: every use of the model goes through its `forward`, where DDP and FSDP hook in."""

    def __init__(self, model: DiT4DiT, precision: str) -> None:
        super().__init__()
        self.model, self.autocast = model, AUTOCAST[precision]

    def forward(self, use: Callable[[DiT4DiT], dict[str, Tensor]]) -> dict[str, Tensor]:
        """use(model) in the run's precision; a dictionary, because FSDP looks for tensors in its results."""
        with self.precision():
            return use(self.model)

    def precision(self) -> torch.autocast:
        """The run's autocast. Weights that were cast are not kept: that would be a second copy of the model beside what gradient
        checkpointing saves.
        """
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, dtype=self.autocast, enabled=self.autocast is not None, cache_enabled=False)


class Processes:
    """This process among its peers, and the model wrapped for them."""

    def __init__(self, config: TrainConfig) -> None:
        self.strategy, self.reshard = config.run.strategy, config.run.reshard
        self.accelerator = make_accelerator(config)
        self.device = self.accelerator.device

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def ranks(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all processes are here."""
        self.accelerator.wait_for_everyone()

    def end(self) -> None:
        """Leave the group, after the last step: a process whose interpreter ends with it may abort."""
        if self.ranks > 1:
            self.accelerator.end_training()

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over all processes, in place."""
        if self.ranks > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """One small object per rank, on the first process; an empty list elsewhere."""
        if self.ranks == 1:
            return [value]
        out: list[Any] = [None] * self.ranks if self.first else []
        dist.gather_object(value, out if self.first else None)
        return out

    def agree(self, value: Any) -> Any:
        """The first process's value, on all."""
        if self.ranks == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def shard(self, root: Root) -> None:
        """Split the parameters over the ranks, block by block; before the optimiser is made. The frozen VAE stays whole."""
        if self.strategy != "fsdp2":
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.ensure_group()
        mesh = init_device_mesh(self.device.type, (self.ranks,))
        model = root.model
        whole = {
            p for part in (model.backbone.frame_encoder, model.video_vae) if part is not None for p in part.parameters()
        }
        blocks: list[nn.Module] = [*model.backbone.transformer.blocks, *(model.head.model.blocks if model.head else [])]
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=self.reshard)
        fully_shard(root, mesh=mesh, ignored_params=whole)

    def ensure_group(self) -> None:
        """A process group of one where there is none: what shards needs one."""
        if dist.is_initialized():
            return
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        with tempfile.TemporaryDirectory() as folder:
            dist.init_process_group(backend, init_method=f"file://{folder}/group", rank=0, world_size=1)

    def wrap(self, root: Root) -> nn.Module:
        """The module to call: DDP's wrapper where there are several processes and whole copies."""
        if self.strategy == "ddp" and self.ranks > 1:
            return self.accelerator.prepare_model(root)
        return root

    @contextlib.contextmanager
    def no_sync(self, module: nn.Module) -> Iterator[None]:
        """Gradients stay with this rank: for all micro steps but the last."""
        if isinstance(module, nn.parallel.DistributedDataParallel):
            with module.no_sync():
                yield
        elif self.strategy == "fsdp2":
            module.set_requires_gradient_sync(False)  # type: ignore[operator]
            try:
                yield
            finally:
                module.set_requires_gradient_sync(True)  # type: ignore[operator]
        else:
            yield


def make_accelerator(config: TrainConfig) -> Accelerator:
    """accelerate's view of the processes that torchrun, SLURM or `accelerate launch` started."""
    accelerate = require("accelerate", "train")
    # there are no buffers that training changes
    ddp = require("accelerate.utils", "train").DistributedDataParallelKwargs(
        broadcast_buffers=False, gradient_as_bucket_view=True
    )
    return accelerate.Accelerator(cpu=config.run.device == "cpu", kwargs_handlers=[ddp])


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; every rank must ask."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Write a whole tensor into one that may be sharded; every rank brings the same value, nothing is sent."""
    value = value.to(device=target.device, dtype=target.dtype)
    if isinstance(target, DTensor):
        target.copy_(distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None))
    else:
        target.copy_(value)
