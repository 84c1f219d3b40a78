"""Which policy a command loads: the options that predict, pack, calibrate, serve and eval have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from dit4dit.commands.shell import Device, Dtype, dtype_of
from dit4dit.progress import waiting

if TYPE_CHECKING:
    from dit4dit.policy.policy import Policy
    from dit4dit.robots.embodiment import Embodiment


@dataclass(frozen=True)
class Loading:
    """The policy."""

    checkpoint: str
    """Run folder, .pt file, folder in the native format, or hub id."""
    backbone: str | None = None
    """Cosmos-Predict2.5 folder or hub id."""
    embodiment: str | None = None
    """Robot name or statistics tag; what the checkpoint implies when not given."""
    device: Device = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Dtype = "auto"
    """auto is bfloat16 on a GPU and float32 on a CPU; packs and calibrations are for the one that they were made with."""

    tune: Literal["cached", "off"] = "cached"
    """Run each kernel that dit4dit tune found to be the fastest on this machine (cached), or the defaults (off)."""

    def robot(self) -> Embodiment:
        """Which robot the policy will be for, from the checkpoint's small files: a mistake is found before it is loaded."""
        from dit4dit.checkpoints.checkpoint import open_checkpoint
        from dit4dit.checkpoints.robot import choose_embodiment

        return choose_embodiment(open_checkpoint(self.checkpoint, self.backbone), self.embodiment)[0]

    def load(self, **options: Any) -> Policy:
        """The policy, with these options of `Policy.from_pretrained` beside."""
        from dit4dit.policy.policy import Policy

        place = {"device": self.device, "dtype": dtype_of(self.dtype), "embodiment": self.embodiment, "tune": self.tune}
        with waiting(f"loading {self.checkpoint}"):
            return Policy.from_pretrained(self.checkpoint, self.backbone, **place | options)


# its fields are options of the command itself: --checkpoint, --device
PolicyToLoad = Annotated[Loading, tyro.conf.arg(name="")]
