"""`dit4dit eval libero` and `dit4dit eval gr1`: the published protocols in the real simulators."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dit4dit.commands import eval_run
from dit4dit.commands.eval_run import PolicyArgument, RunArgument
from dit4dit.commands.shell import say
from dit4dit.errors import ConfigError, SimulatorError
from dit4dit.evaluation import gr1 as gr1_benchmark
from dit4dit.evaluation import libero as libero_benchmark
from dit4dit.evaluation.plan import Plan
from dit4dit.progress import waiting
from dit4dit.tables import table


@dataclass(frozen=True)
class SimulatorOptions:
    """The simulator, and the look at its conventions before the run."""

    path: Path | None = None
    """Its environment; where dit4dit eval setup makes it when not given."""
    graphics: Literal["egl", "osmesa"] | None = None
    """What draws: egl or osmesa; MUJOCO_GL, else egl, when not given."""
    conventions: Literal["stop", "warn", "off"] = "stop"
    """What a contradiction between simulator and checkpoint does: stop the run, only be told, or not be looked for."""
    check_only: bool = False
    """Look at the conventions and play nothing; exit code 1 where there is a contradiction."""
    data_fps: float | None = None
    """Frames per second of the data that the checkpoint was trained on (meta/info.json), to compare."""

    def launch(self, name: Literal["libero", "gr1"]) -> Any:
        from dit4dit.evaluation.simulators import Simulator, graphics_of

        return Simulator.at(name, self.path).launch(graphics_of(self.graphics))


Simulator = Annotated[SimulatorOptions, tyro.conf.arg(name="")]


def libero(
    policy: PolicyArgument,
    run: RunArgument,
    simulator: Simulator,
    suite: tuple[str, ...] = libero_benchmark.PUBLISHED,
    tasks: tuple[int, ...] | None = None,
    trials: int = libero_benchmark.TRIALS,
    seed: int = libero_benchmark.SEED,
    max_steps: int | None = None,
    settle_steps: int = 10,
    camera: int = 256,
) -> int:
    """Success rates in LIBERO, by the published protocol: 50 trials of each task, 8 actions of each chunk.

    Args:
        policy: the policy.
        run: the run.
        simulator: the simulator.
        suite: one or several of libero_spatial, libero_object, libero_goal, libero_10 and libero_90; the first four, which have
            published results, when not given.
        tasks: numbers of tasks, of each suite; all when not given.
        trials: of each task, 1 to 50.
        seed: trial k is placed with seed + k; the noise follows from seed, suite, task and trial.
        max_steps: of an episode; when not given, the suite's own: 220 (spatial), 280 (object), 300 (goal), 520 (10), 400 (90).
        settle_steps: without the policy, before it sees the first picture.
        camera: height and width of both pictures in pixels, as drawn.
    """
    plan = libero_benchmark.plan(
        simulator.launch("libero"),
        suite,
        tasks,
        trials,
        seed,
        max_steps=max_steps,
        settle_steps=settle_steps,
        camera=camera,
    )
    return play(plan, policy, run, simulator, libero_benchmark.EXECUTE)


def gr1(
    policy: PolicyArgument,
    run: RunArgument,
    simulator: Simulator,
    tasks: tuple[str, ...] = gr1_benchmark.TASKS,
    trials: int = gr1_benchmark.EPISODES,
    seed: int = gr1_benchmark.SEED,
    max_steps: int = gr1_benchmark.MAX_STEPS,
) -> int:
    """Success rates in RoboCasa-GR1's tabletop environments, by the published protocol: 50 episodes, 12 actions of each chunk.

    Two counts are told: success at any step, and the published runner's, which looks at the last step of each executed chunk
    alone. Untested with the real environments, which could not be reached from where this was written.

    Args:
        policy: the policy.
        run: the run.
        simulator: the simulator.
        tasks: names, such as PnPCupToDrawerClose; all 24 when not given. Another gymnasium environment with the same interface
            is module:namespace/Name.
        trials: episodes of each task.
        seed: episode k has the seed + k; the noise follows from seed, task and episode.
        max_steps: of every episode: the environments go on after a success.
    """
    plan = gr1_benchmark.plan(simulator.launch("gr1"), tasks, trials, seed, max_steps=max_steps)
    return play(plan, policy, run, simulator, gr1_benchmark.EXECUTE, second="success_at_chunk_ends")


def play(
    plan: Plan,
    policy_options: eval_run.PolicyOptions,
    run_options: eval_run.RunOptions,
    simulator: SimulatorOptions,
    execute: int,
    second: str | None = None,
) -> int:
    """Look at the conventions, then run; `second` is another count that is told."""
    if simulator.check_only and simulator.conventions == "off":
        raise ConfigError("--check-only: there is nothing to do with --conventions off")
    code = 0

    def look(policy: Any) -> bool:
        nonlocal code
        if simulator.conventions == "off":
            return True
        found = examine(plan, policy, policy_options, run_options.out, simulator)
        code = 1 if found else 0
        return not simulator.check_only

    done = eval_run.run(plan, policy_options, run_options, execute=execute, before=look, second=second)
    return code if simulator.check_only else done


def examine(
    plan: Plan, policy: Any, policy_options: eval_run.PolicyOptions, out: Path, simulator: SimulatorOptions
) -> bool:
    """Print the findings; whether there is a contradiction. ConfigError where one is to stop the run."""
    from dit4dit.checkpoints.checkpoint import open_checkpoint
    from dit4dit.evaluation import conventions
    from dit4dit.robots import statistics as stats

    raw = open_checkpoint(policy_options.checkpoint, policy_options.backbone).statistics
    statistics = stats.parse(raw, policy.codec.tag, f"statistics of {policy_options.checkpoint}")
    try:
        with waiting("the simulator's conventions"):
            findings = conventions.examine(policy, plan, statistics, out, data_fps=simulator.data_fps)
    except SimulatorError as error:
        log = out / "logs" / "conventions.log"
        raise SimulatorError(f"{error}; what the simulator printed is in {log}", error.traceback) from None
    say(table(["convention", "verdict", ""], [[f.name, f.verdict, f.text] for f in findings]))
    say(f"what the policy sees: {out / 'policy_input.png'}")
    wrong = conventions.contradictions(findings)
    if wrong and simulator.conventions == "stop" and not simulator.check_only:
        raise ConfigError(
            f"conventions: {'; '.join(f'{f.name}: {f.text}' for f in wrong)}. The simulator and the checkpoint do not fit; see "
            f"{out / 'conventions.json'}. --conventions warn runs all the same"
        )
    return bool(wrong)
