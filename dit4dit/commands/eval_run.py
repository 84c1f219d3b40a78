"""What every `dit4dit eval BENCHMARK` has in common: its options, and the way from a plan to a run's folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from dit4dit.commands.loading import Loading
from dit4dit.commands.shell import INTERRUPTED, say
from dit4dit.errors import ConfigError, InputError, shown
from dit4dit.evaluation.plan import Plan
from dit4dit.files.atomic import check_folder
from dit4dit.progress import bar
from dit4dit.tables import table

if TYPE_CHECKING:
    from dit4dit.policy.policy import Policy


@dataclass(frozen=True)
class PolicyOptions(Loading):
    """The policy."""

    engine: Literal["auto", "off"] = "auto"
    """off runs the plain model."""
    steps: int | None = None
    """Euler steps (1, 2, 4, 8) instead of the checkpoint's number; changes the result."""
    posterior: Literal["sample", "mean"] = "sample"
    """mean takes the frame's mean latent; changes the result."""
    quantization: Literal["fp8"] | None = None
    """fp8 multiplies the backbone's matrices in 8-bit floats; changes the result."""
    calibration: Path | None = None
    """File of dit4dit calibrate, for and only for fp8."""
    packs: Path | None = None
    """Folder of prompt packs (dit4dit pack)."""

    def load(self, **options: Any) -> Policy:
        return super().load(
            engine=self.engine,
            steps=self.steps,
            posterior=self.posterior,
            quantization=self.quantization,
            calibration=self.calibration,
            packs=self.packs,
            **options,
        )


@dataclass(frozen=True)
class RunOptions:
    """The run."""

    out: Path
    """Folder for run.json, episodes.jsonl, videos and logs."""
    resume: bool = False
    """Go on with the run in --out: finished episodes are kept, errors are tried again."""
    shard: str | None = None
    """i/n: play every n-th episode from the i-th on, to merge with the others (dit4dit eval merge)."""
    workers: int = 4
    """Simulators at a time; the episodes are the same with any number."""
    batch: int = 4
    """Rows of every pass through the policy, filled up where fewer wait; another number may round differently."""
    execute: int | None = None
    """Rows of each chunk that are executed before the next is asked for; when not given, the benchmark's own number."""
    ensemble: int | None = None
    """Average what the last so many chunks say for a step (adaptive ensembling); needs --execute below the chunk's length."""
    ensemble_alpha: float = 0.1
    """Weight of the agreement with the newest chunk."""
    latency: str | None = None
    """Act as if a chunk took so many ms, or "measured": what it takes here."""
    while_waiting: Literal["hold", "continue"] = "hold"
    """What the robot does until a late chunk is there: stand still, or go on with the chunk before."""
    rtc: bool = False
    """Real-time chunking: each chunk goes on from the one before; needs --execute below the chunk's length."""
    rtc_horizon: int | None = None
    """Rows of the left-over that guide at most; all of it when not given."""
    rtc_schedule: Literal["linear", "exp", "ones", "zeros"] | None = None
    """How the guidance falls from the delay to the horizon; linear when not given."""
    rtc_max_guidance: float | None = None
    """Bound of the guidance's strength; 10 when not given."""
    videos: Literal["all", "failures", "none"] = "all"
    """Of which episodes videos are kept."""
    retries: int = 2
    """How often an episode is begun again after its simulator died or hung."""

    def options(self, execute: int | None = None) -> Any:
        """`rollout.Options`; execute: the benchmark's own number."""
        from dit4dit.control.execution import Execution, Latency, RealTime
        from dit4dit.control.seams import Ensemble
        from dit4dit.evaluation.rollout import Options

        ensemble = None if self.ensemble is None else Ensemble(self.ensemble_alpha, self.ensemble)
        return Options(
            execution=Execution(
                execute if self.execute is None else self.execute,
                ensemble,
                self._latency(Latency),
                self._real_time(RealTime),
            ),
            batch=self.batch,
            workers=self.workers,
            retries=self.retries,
            videos=self.videos,
        )

    def _real_time(self, kind: Any) -> Any:
        named = {"horizon": self.rtc_horizon, "schedule": self.rtc_schedule, "max_guidance": self.rtc_max_guidance}
        given = {name: value for name, value in named.items() if value is not None}
        if given and not self.rtc:
            options = ", ".join(f"--rtc-{name.replace('_', '-')}" for name in given)
            raise InputError(f"{options}: goes with --rtc")
        return kind(**given) if self.rtc else None

    def _latency(self, kind: Any) -> Any:
        if self.latency is None:
            if self.while_waiting != "hold":
                raise InputError("--while-waiting: goes with --latency")
            return None
        try:
            return kind(None if self.latency == "measured" else float(self.latency), self.while_waiting)
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            raise InputError(f"--latency: expected milliseconds or 'measured', got {shown(self.latency)}") from None


# their fields are options of the command itself: --checkpoint, --out
PolicyArgument = Annotated[PolicyOptions, tyro.conf.arg(name="")]
RunArgument = Annotated[RunOptions, tyro.conf.arg(name="")]


def run(
    plan: Plan,
    policy_options: PolicyOptions,
    run_options: RunOptions,
    *,
    execute: int | None = None,
    before: Callable[[Any], bool] = lambda policy: True,
    second: str | None = None,
) -> int:
    """Play the plan and print its success rates; exit code 1 where episodes ended in an error, 130 after Ctrl-C.

    Args:
        execute: rows of a chunk that the benchmark's protocol executes; all where None.
        before: called with the loaded policy before anything is played; where it returns False, nothing is.
        second: field of the records (`summary`) with another count that the benchmark is told by.
    """
    from dit4dit.evaluation import identity
    from dit4dit.evaluation.rollout import evaluate
    from dit4dit.evaluation.runs import Run
    from dit4dit.evaluation.summary import rows, summarise

    options, plan = run_options.options(execute), plan.part(run_options.shard)
    _check(plan, options, policy_options, run_options)
    check_folder("--out", run_options.out)
    policy = policy_options.load()
    if not before(policy):
        return 0
    about = identity.describe(policy, policy_options.checkpoint, policy_options.backbone)
    kept = Run.open(run_options.out).outcomes if run_options.resume and (run_options.out / "run.json").exists() else {}
    wins, tries, errors = sum(kept.values()), len(kept), 0
    with bar(plan.name, len(plan.episodes), first=tries, unit="episode") as shown:

        def on_episode(record: dict[str, Any]) -> None:
            nonlocal wins, tries, errors
            wins, tries = wins + bool(record["success"]), tries + (record["error"] is None)
            errors += record["error"] is not None
            shown.say(f"success {wins}/{tries}" + f", errors {errors}" * (errors > 0))
            shown.update()

        try:
            evaluate(
                policy,
                plan,
                options,
                run_options.out,
                horizon=policy.config.head.action_horizon,
                about_policy=about,
                resume=run_options.resume,
                on_episode=on_episode,
            )
        except KeyboardInterrupt:
            shown.close()
            say(f"stopped; finished episodes are in {run_options.out}: go on with --resume")
            return INTERRUPTED
    records = Run.open(run_options.out).records
    summary = summarise(records)
    say(table(["suite", "task", "success [95 % interval]", "errors"], rows(summary), right=(3,)))
    if second is not None:
        other = summarise(records, second)
        say(table(["suite", "task", f"{second} [95 % interval]", "errors"], rows(other), right=(3,)))
    say(f"wrote {run_options.out}; dit4dit eval report {run_options.out} makes a page of it")
    if summary.all_errors:
        _say_errors(run_options.out)
    return 1 if summary.all_errors else 0


def _check(plan: Plan, options: Any, policy_options: PolicyOptions, run_options: RunOptions) -> None:
    """What can be told from the small files of checkpoint and run, before the policy is loaded."""
    from dit4dit.checkpoints.checkpoint import open_checkpoint
    from dit4dit.evaluation.batching import check_batch
    from dit4dit.evaluation.rollout import check_robot
    from dit4dit.evaluation.runs import expect_new

    expect_new(run_options.out, run_options.resume)
    check_batch(options.batch)
    check_robot(policy_options.robot(), plan)
    model = open_checkpoint(policy_options.checkpoint, policy_options.backbone).model
    options.execution.check(model.head.action_horizon)


def _say_errors(out: Path) -> None:
    from dit4dit.evaluation.runs import Run

    errors = Run.open(out).errors
    (most, count), *others = Counter(record["error"]["message"] for record in errors).most_common()
    say(
        f"{len(errors)} episodes ended in an error, which says nothing about the policy: --resume tries them again. "
        f"{count} of them: {most}" + f"; and {len(others)} other messages" * bool(others) + "\n"
        f"tracebacks are in {out / 'episodes.jsonl'}, what simulators printed in {out / 'logs'}"
    )
