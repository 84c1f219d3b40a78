"""RoboCasa-GR1 as a benchmark: 24 tabletop environments through gymnasium, the published protocol.

50 episodes an environment, 720 steps, 12 of each chunk's 16 actions. The environments never end by themselves, so an episode
always has all its steps, and both counts can be told: success at any step (what is reported), and success at the last step of an
executed chunk but the last one (`success_at_chunk_ends`), which is all that the published runner sees.

The published runner leaves the seeds of all but the first episode to chance; here episode k has the seed `seed` + k.
"""

from __future__ import annotations

from collections.abc import Sequence

from dit4dit.errors import ConfigError, did_you_mean
from dit4dit.evaluation.plan import Episode, Plan, derived_seed
from dit4dit.evaluation.workers import Launch
from dit4dit.robots import GR1

_CLOSE = ("CupToDrawer", "PotatoToMicrowave", "MilkToMicrowave", "BottleToCabinet", "WineToCabinet", "CanToDrawer")
_NOVEL = {
    "Cuttingboard": ("Basket", "Cardboardbox", "Pan", "Pot", "Tieredbasket"),
    "Placemat": ("Basket", "Bowl", "Plate", "Tieredshelf"),
    "Plate": ("Bowl", "Cardboardbox", "Pan", "Plate"),
    "Tray": ("Cardboardbox", "Plate", "Pot", "Tieredbasket", "Tieredshelf"),
}
TASKS = (
    *(f"PnP{what}Close" for what in _CLOSE),
    *(f"PosttrainPnPNovelFrom{source}To{target}SplitA" for source, targets in _NOVEL.items() for target in targets),
)
EPISODES = 50
MAX_STEPS = 720
EXECUTE = 12
SEED = 7


def environment_id(task: str) -> str:
    """What gymnasium calls the environment, with the module that registers it. Anything with a "/" is such a name already.

    Raises:
        ConfigError: none of the 24 tasks.
    """
    if "/" in task:
        return task
    if task not in TASKS:
        raise ConfigError(
            f"--tasks {task}: unknown{did_you_mean(task, TASKS)}; known: {', '.join(TASKS)}, or gymnasium's own module:id"
        )
    return f"robocasa.utils.gym_utils.gymnasium_groot:gr1_unified/{task}_GR1ArmsAndWaistFourierHands_Env"


def plan(
    launch: Launch,
    tasks: Sequence[str] = TASKS,
    trials: int = EPISODES,
    seed: int = SEED,
    *,
    max_steps: int = MAX_STEPS,
) -> Plan:
    """So many episodes of every task.

    Args:
        launch: of GR1's own environment (`Simulator.launch`).
        tasks: names out of TASKS, or "module:namespace/Name" of another gymnasium environment with the same interface.
        seed: episode k has the seed `seed` + k.

    Raises:
        ConfigError: no such task, or numbers out of range.
    """
    if not tasks or len(set(tasks)) != len(tasks):
        raise ConfigError(f"--tasks: expected each once, got {', '.join(tasks) or 'none'}")
    if trials < 1 or seed < 0 or max_steps < 1:
        raise ConfigError(
            f"expected --trials >= 1, --seed >= 0 and --max-steps >= 1, got {trials}, {seed} and {max_steps}"
        )
    episodes = []
    for task in tasks:
        options = {"environment": environment_id(task), "max_steps": max_steps}
        episodes += [
            Episode("gr1", task, k, seed + k, derived_seed(seed, "gr1", task, k), "gr1", options) for k in range(trials)
        ]
    about = {"tasks": list(tasks), "trials": trials, "seed": seed, "max_steps": max_steps}
    return Plan("gr1", GR1.name, launch, tuple(episodes), about)
