"""What late chunks cost: runs of `dit4dit eval tabletop --latency MS` as one result.

    python benchmarks/late_chunks.py eval/0 eval/150 eval/300 --out benchmarks/results/MACHINE-tabletop-latency.json

Each run with its counts, its interval and every episode's outcome (1 or 0, by seed); whether the goal is met; the machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import tyro
from dit4dit.benchmarks.harness import machine

from dit4dit.evaluation.runs import Run
from dit4dit.evaluation.summary import summarise
from dit4dit.files.json_files import strict, write_json

GOAL = 0.75
"""Of the episodes at every latency at which the robot stands still until the chunk is there."""


def row(run: Run) -> dict[str, Any]:
    """One run: what was acted out, and what came of it."""
    execution, records = run.config["execution"], sorted(run.records, key=lambda record: record["trial"])
    late = execution["latency"] or {"ms": 0.0, "waiting": "hold"}
    summary = summarise(records)
    rate = summary.overall
    return {
        "latency_ms": late["ms"],
        "while_waiting": late["waiting"],
        "execute": execution["execute"],
        "checkpoint": run.config["policy"]["checkpoint"],
        "success": {
            "successes": rate.successes,
            "episodes": rate.episodes,
            "rate": rate.value,
            "interval_95": [rate.low, rate.high],
        },
        "errors": summary.all_errors,
        "steps": sum(record["steps"] for record in records),
        "steps_held": sum(record["held"] for record in records),
        "first_seed": records[0]["seed"],
        "outcomes": "".join("1" if record["success"] else "0" for record in records),
    }


def merged(runs: list[Run]) -> dict[str, Any]:
    """The runs by latency, with the goal beside what was reached."""
    if wrong := [run.folder for run in runs if run.config["benchmark"] != "tabletop"]:
        raise SystemExit(f"late_chunks: {wrong[0]}: expected a run of `dit4dit eval tabletop`")
    rows = sorted(
        (row(run) for run in runs), key=lambda one: (one["while_waiting"], len(one["outcomes"]), one["latency_ms"])
    )
    held = [one for one in rows if one["while_waiting"] == "hold"]
    return {
        "command": "dit4dit eval tabletop --checkpoint dit4dit/envs/tabletop_policy --device cpu --execute 4 --latency MS "
        "--episodes N --videos none",
        "machine": machine(),
        "goal": GOAL,
        "met": all(one["success"]["rate"] >= GOAL for one in held),
        "runs": rows,
    }


def main(folders: Annotated[list[Path], tyro.conf.Positional], out: Path) -> None:
    """Merge the runs in `folders` into `out`."""
    result = merged([Run.open(folder) for folder in folders])
    write_json(out, strict(result))
    print(f"wrote {out}; goal met: {result['met']}")


if __name__ == "__main__":
    tyro.cli(main)
