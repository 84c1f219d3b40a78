"""The whole flow-matching ODE of the action head, noise to actions, as one schedule of tiles.

`plan` makes a schedule for a head and a device, by what `cost` predicts that it takes; `validate` proves that it is sound, `twin`
runs it in PyTorch tile by tile, `program` has kernels/action_ode.cu run it on a GPU in one launch.
"""

from dit4dit.engine.action_ode.plan import head_shape, plan
from dit4dit.engine.action_ode.schedule import Device, HeadShape, Schedule

__all__ = ["Device", "HeadShape", "Schedule", "head_shape", "plan"]
