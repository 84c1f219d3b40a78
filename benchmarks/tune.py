"""Measures tiles on the GPU at hand and writes a new table; nothing is ever tuned while a robot runs.

python -m dit4dit.benchmarks.tune --out tiles.json          then read it, and commit it as dit4dit/ops/tiles.json

Each row of the table that calls of the released models take is measured with candidates around it, on those calls; the
row keeps its limits. A candidate that does not agree with the reference, or does not launch, is left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from dit4dit.benchmarks.harness import assert_no_worse, machine, quantiles, time_gpu
from dit4dit.benchmarks.kernels import calls
from dit4dit.benchmarks.op_bench import fill, positional, reference_of

from dit4dit import ops
from dit4dit.ops import launch, tiles

Call = tuple[str, tuple[Any, ...]]  # op, arguments
Measure = Callable[[Call], float | None]  # seconds, or None where the candidate is no good

# what a row may be changed to, beside what it says; tl.dot wants at least 16
CHOICES = {
    "ROWS": (16, 32, 64, 128),
    "COLUMNS": (16, 32, 64, 128, 256),
    "DEPTH": (32, 64, 128),
    "KEYS": (16, 32, 64, 128),
    "SPLIT": (1, 2, 3, 4),
    "FUSED": (0, 1),
    "num_warps": (1, 2, 4, 8),
    "num_stages": (1, 2, 3, 4, 5),
}
ROW_CHOICES = (1, 2, 4, 8, 16)  # of the ops that multiply nothing


def candidates(op: str, tile: dict[str, int]) -> Iterator[dict[str, int]]:
    """The tile itself, then every tile that differs from it in one or two entries by one step of their choices."""
    yield tile
    choices = {**CHOICES, "ROWS": ROW_CHOICES} if op in ("adaln", "qk_norm_rope") else CHOICES
    steps = []
    for name, value in tile.items():
        known = choices.get(name, ())
        if value in known:
            i = known.index(value)
            steps += [(name, known[j]) for j in (i - 1, i + 1) if 0 <= j < len(known)]
    for count in (1, 2):
        for changes in itertools.combinations(steps, count):
            if len({name for name, _ in changes}) == count:
                yield {**tile, **dict(changes)}


def tune(architecture: str, found: list[Call], measure: Measure, rounds: int = 3) -> dict[str, Any]:
    """The table with a measured column for `architecture`: from each row uphill, at most `rounds` times."""
    table = {
        op: {name: [dict(row) for row in rows] for name, rows in columns.items()}
        for op, columns in tiles.table().items()
    }
    for op in table:
        own = [dict(row) for row in table[op][tiles.nearest(op, architecture)]]
        groups: dict[int, list[Call]] = {}
        for call in found:
            if call[0] == op:
                groups.setdefault(row_of(call, architecture), []).append(call)
        for i, group in groups.items():
            own[i]["tile"] = _best(op, own[i]["tile"], group, measure, rounds)
        table[op][architecture] = own
    return table


def row_of(call: Call, architecture: str) -> int:
    """The row of its op's column that a call takes."""
    op, args = call
    meta = tuple(x.to("meta") if isinstance(x, torch.Tensor) else x for x in args)
    with tiles.trying(op, None) as trial:
        reference_of(op, "launches")(meta, architecture)
    return tiles.row(op, architecture, trial.sizes[-1])


def _best(op: str, tile: dict[str, int], group: list[Call], measure: Measure, rounds: int) -> dict[str, int]:
    seen: dict[str, float] = {}
    best = tile
    for _ in range(rounds):
        start = best
        for candidate in candidates(op, start):
            key = json.dumps(candidate, sort_keys=True)
            if key not in seen:
                with tiles.trying(op, candidate):
                    times = [measure(call) for call in group]
                seen[key] = float("inf") if None in times else sum(t for t in times if t is not None)
            if seen[key] < seen.setdefault(json.dumps(best, sort_keys=True), float("inf")):
                best = candidate
        if best == start:
            break
    return best


def measured(call: Call, samples: int) -> float | None:
    """Median seconds of a call on the GPU, or None where it disagrees with the reference or cannot be launched."""
    op, args = call
    fn = positional(op, "triton")
    try:
        assert_no_worse(fn, reference_of(op), args, float32_limit=1e-5)
    except AssertionError:
        return None
    except Exception as error:  # what Triton raises has no common base: too much shared memory, too few registers
        if type(error).__module__.split(".")[0] != "triton":
            raise
        return None
    return quantiles(time_gpu(partial(fn, *args), samples=samples, warmup=5))["p50"]


def write(table: dict[str, Any], note: str, path: Path) -> None:
    """As the committed table is laid out: one row a line."""
    text = json.dumps({"note": note, "tiles": {op: dict.fromkeys(columns) for op, columns in table.items()}}, indent=2)
    for op, columns in table.items():
        head, _, tail = text.partition(f'    "{op}": {{')
        for name, rows in columns.items():
            lines = ",\n".join("        " + json.dumps(row) for row in rows)
            tail = tail.replace(f'      "{name}": null', f'      "{name}": [\n{lines}\n      ]', 1)
        text = f'{head}    "{op}": {{{tail}'
    path.write_text(text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--op", action="append", choices=[op for op in ops.names() if op in tiles.table()])
    parser.add_argument("--batch", type=int, action="append", help="default: 1 and 16")
    parser.add_argument("--samples", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU is visible to PyTorch; tiles are measured on the one they are for")
    generator = torch.Generator().manual_seed(args.seed)
    found = [
        (op, fill(given, "cuda", torch.bfloat16, generator))
        for batch in args.batch or (1, 16)
        for _, op, given in calls(batch)
        if args.op is None or op in args.op
    ]
    architecture = launch.architecture(torch.device("cuda", torch.cuda.current_device()))
    with torch.no_grad():
        table = tune(architecture, found, partial(measured, samples=args.samples))
    here = machine()
    old = json.loads(tiles.TABLE.read_text())["note"]
    write(table, f"{old} Column {architecture} measured on {here['gpu']}, torch {here['torch']}.", args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
