"""`dit4dit demo`: the policy that ships with the package drives the built-in world in closed loop.

It was trained by `dit4dit demo-train`; `metrics.json` beside it says with what, and what it was worth there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dit4dit.demo.train import machine_facts, play, rate
from dit4dit.envs import tabletop_policy_dir
from dit4dit.files.json_files import write_json
from dit4dit.files.keys import read_json
from dit4dit.tables import quantiles_ms, table


def demo(
    out: Path,
    *,
    episodes: int,
    seed: int,
    device: str,
    bar: Callable[[str, int], Any],
    checkpoint: Path | None = None,
) -> dict[str, Any]:
    """Episodes on layouts from `seed` on, one at a time, as a robot would have it; writes demo.json and report.html into `out`.

    Args:
        out: new folder, or one with the same run, which then goes on.
        bar: as in `demo_train`.
        checkpoint: another policy for this world than the package's.
    """
    from dit4dit.evaluation import report

    policy = tabletop_policy_dir() if checkpoint is None else checkpoint
    records = play(policy, out / "run", episodes, bar=bar, videos="all", batch=1, seed=seed, device=device)
    report.write([out / "run"], out)
    seconds = [ms / 1e3 for record in records for ms in record["took"]["chunk_ms"]]
    result = {
        "success": rate(records),
        "seed": seed,
        "chunk_ms": quantiles_ms(seconds),
        "checkpoint": str(policy),
        "trained": read_json(policy / "metrics.json") if checkpoint is None else None,
        "machine": {**machine_facts(1), "device": device},
    }
    write_json(out / "demo.json", result)
    return result


def show(result: dict[str, Any], out: Path) -> str:
    """What the command prints."""
    ms = result["chunk_ms"]
    rows = [["success [95 % interval]", result["success"]["words"]]]
    rows += [[f"one chunk, {name}", f"{ms[name]:.1f} ms"] for name in ("p50", "p95", "p99", "max")]
    return "\n".join(
        [
            table(["layouts never trained on", f"{ms['samples']} chunks on {result['machine']['device']}"], rows),
            f"wrote {out / 'report.html'} (videos), {out / 'report.json'}, {out / 'demo.json'}",
        ]
    )
