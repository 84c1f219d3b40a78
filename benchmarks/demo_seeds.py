"""Several runs of `make demo-train` as one result: `python benchmarks/demo_seeds.py demo-train/seed-* --out FILE.json`.

Writes FILE.json (each run's own demo-train.json, by seed, and whether the goal is met) and FILE.png beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import tyro

from dit4dit.demo.report import ROWS, plot_success
from dit4dit.files.json_files import strict, write_json

GOAL = {"success": 0.8, "minutes": 20.0}


def merged(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The runs by seed, in their order, with the goal beside what was reached."""
    seeds = {str(run["seed"]): run for run in sorted(runs, key=lambda run: run["seed"])}
    if len(seeds) < len(runs):
        raise SystemExit(f"demo_seeds: expected runs of different seeds, got {sorted(run['seed'] for run in runs)}")
    success = [run["success"]["after"]["rate"] for run in seeds.values()]
    minutes = [run["total_seconds"] / 60 for run in seeds.values()]
    return {
        "command": "make demo-train SEED=N",
        "goal": GOAL,
        "met": min(success) >= GOAL["success"] and max(minutes) <= GOAL["minutes"],
        "success": {"lowest": min(success), "mean": sum(success) / len(success)},
        "minutes": {"longest": max(minutes), "mean": sum(minutes) / len(minutes)},
        "seeds": seeds,
    }


def main(folders: Annotated[list[Path], tyro.conf.Positional], out: Path) -> None:
    """Merge the runs in `folders` into `out` (JSON, and a picture beside it)."""
    files = [folder / "demo-train.json" for folder in folders]
    if missing := [str(file) for file in files if not file.is_file()]:
        raise SystemExit(
            f"demo_seeds: no such file: {', '.join(missing)}; make demo-train writes one when it has ended"
        )
    result = merged([json.loads(file.read_text()) for file in files])
    write_json(out, strict(result))
    bars = {
        f"seed {seed}: {ROWS[name]}": one
        for seed, run in result["seeds"].items()
        for name, one in run["success"].items()
    }
    plot_success(out.with_suffix(".png"), bars)
    print(f"wrote {out} and {out.with_suffix('.png')}; goal met: {result['met']}")


if __name__ == "__main__":
    tyro.cli(main)
