"""What benchmarks of ops print of their rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dit4dit.tables import quantiles_ms, table


def of_times(seconds: Sequence[float]) -> dict[str, Any]:
    """What a row says of the calls that were timed: "ms" with their quantiles, "jitter", "samples"."""
    found = quantiles_ms(seconds)
    jitter, samples = found.pop("jitter"), found.pop("samples")
    return {"ms": found, "jitter": jitter, "samples": samples}


def show(result: dict[str, Any]) -> str:
    """The table that the command prints, and what was left out, each reason once."""
    here = result["machine"]
    timed = [row for row in result["rows"] if "ms" in row]
    rows = [
        [
            row["op"],
            row["case"],
            row["implementation"],
            f"{row['ms']['p50']:.4f}",
            f"{row['gb_per_s']:,.1f}",
            f"{row['gflop_per_s']:,.0f}" if row["flops"] else "",
            f"{row['ratio']:.2f}" if row["ratio"] else "",
        ]
        for row in timed
    ]
    where = f"{here['gpu'] or here['cpu']}, torch {here['torch']}, {here['torch_threads']} threads, {result['dtype']}"
    header = ["op", "case", "by", "p50 ms", "GB/s", "GFLOP/s", "eager / it"]
    reasons: dict[str, list[str]] = {}
    for row in result["rows"]:
        if "left_out" in row:
            place = f"{row['op']} {row['case']}" if row.get("disagrees") or row.get("failed") else row["op"]
            reasons.setdefault(f"{row['implementation']}: {row['left_out']}", []).append(place)
    lines = [f"{reason} ({', '.join(dict.fromkeys(places))})" for reason, places in reasons.items()]
    return "\n".join([where, table(header, rows, right=range(3, 7)), *(["", "left out", *lines] if lines else [])])


def bad(result: dict[str, Any]) -> list[str]:
    """ "op case implementation" of everything that was not timed because it was wrong or failed."""
    rows = [row for row in result["rows"] if row.get("disagrees") or row.get("failed")]
    return [f"{row['op']} {row['case']} {row['implementation']}" for row in rows]
