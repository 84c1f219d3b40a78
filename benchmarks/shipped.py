"""The table of verdicts of a GPU that dit4dit comes with, made from a committed result of gpu_suite.sh.

python -m dit4dit.benchmarks.shipped benchmarks/results/nvidia-h200.json dit4dit/ops/shipped_verdicts

What `dit4dit tune` found there (parts `tune_*`) goes before rows of `bench ops`, of which the suite times RoboCasa-GR1's; each is
for the calls of that model's plans with the same shapes and dtypes. Only parts that ended well count, and only where all GPU
tests passed; an implementation that was wrong or failed has no times, and a case of which one was timed unsteadily is left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from dit4dit.benchmarks.gpu_results import read_result
from dit4dit.benchmarks.op_bench import PICTURES, cases
from dit4dit.benchmarks.ops.bench_action_ode import TOKENS
from torch import Tensor

from dit4dit import ops
from dit4dit.engine import RequestShape
from dit4dit.engine.listing import calls, distinct, engine_without_data
from dit4dit.errors import InputError
from dit4dit.files.json_files import write_json
from dit4dit.ops.dispatch import find
from dit4dit.ops.verdicts import slug
from dit4dit.presets import preset
from dit4dit.robots import EMBODIMENTS

BETTER = 1.02
"""How many times as fast as the default another one must be to be chosen."""
STEADY = 2.0
"""How many times the median the 95th percentile of `bench ops` may be: beyond it the host was late, and was timed as the GPU."""
PARTS = ("ops", "ops_self_attention")
MODEL = "robocasa_gr1"


def table(result: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The table as `ops.verdicts.shipped` has it. result: of gpu_suite.sh; source: the name of its file.

    InputError: its GPU tests did not pass, or it is not of a GPU.
    """
    if not result["machine"].get("gpu"):
        raise InputError(f"{source}: expected a result of a GPU, got one of a CPU")
    if not _passed(result, "gpu_tests"):
        raise InputError(f"{source}: its GPU tests did not all pass; run benchmarks/gpu_suite.sh again")
    rows = dict(_from_bench(result))
    for name, part in result.items():
        if name.startswith("tune_") and _passed(result, name):
            for row in part["calls"]:
                ms = {name: one for name, one in row["ms"].items() if _is_ours(row["op"], name)}
                if ms:
                    made = _row(ms, row["default"])
                    rows[f"{row['op']}: {row['call']}"] = made | (
                        {"chosen": row["chosen"]} if row["chosen"] in ms else {}
                    )
    machine = result["machine"]
    facts = {"device": machine["gpu"], "capability": machine["gpu_capability"], "source": source}
    return {**facts, "calls": dict(sorted(rows.items()))}


def _passed(result: Mapping[str, Any], part: str) -> bool:
    found = result["suite"]["parts"].get(part, {})
    return found.get("exit_code") == 0 and (part in result or part == "gpu_tests")  # tests have a file of their own


def _is_ours(op: str, name: str) -> bool:
    """Whether dit4dit has this implementation, and has it still."""
    return op in ops.names() and name in ops.implementations(op)


def _row(ms: Mapping[str, float], default: str) -> dict[str, Any]:
    fastest = min(ms, key=ms.__getitem__)
    better = default not in ms or ms[default] >= BETTER * ms[fastest]
    return {"chosen": fastest if better else default, "ms": {name: float(f"{one:.4g}") for name, one in ms.items()}}


def _from_bench(result: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """ "op: call" of a plan -> row, for each case of `bench ops` that is such a call."""
    measured: dict[tuple[str, str], dict[str, float]] = {}
    unsteady: set[tuple[str, str]] = set()
    for part in PARTS:
        for row in result[part]["rows"] if _passed(result, part) else ():
            name = "torch" if row["implementation"] == "eager" else row["implementation"]
            if "ms" in row and _is_ours(row["op"], name):
                measured.setdefault((row["op"], row["case"]), {})[name] = row["ms"]["p50"]
                if row["ms"]["p95"] is None or row["ms"]["p95"] > STEADY * row["ms"]["p50"]:
                    unsteady.add((row["op"], row["case"]))
    known = {}
    for op, case, args in cases(ops.names()):
        if (op, case) in measured.keys() - unsteady:
            known[op, _shapes(op, args)] = measured[op, case]
    head = _head(result)
    for op, args, key in _planned():
        ms = known.get((op, _shapes(op, args)))
        if op == "action_ode" and args[4] is None:
            ms = head
        if ms:
            yield key, _row(ms, _default(op, ms))


def _default(op: str, ms: Mapping[str, float]) -> str:
    """What ran without a verdict: the first that takes the call and needs none."""
    in_order = find(op).implementations.values()
    return next(one.name for one in in_order if one.name in ms and not one.measured_only)


def _planned() -> Iterator[tuple[str, tuple[Any, ...], str]]:
    """(op, arguments, "op: call") of the model's plans in bfloat16, as which `bench ops` times: from each of the suite's cameras,
    guided, and in fp8.
    """
    config, robot = preset(MODEL).model, EMBODIMENTS[preset(MODEL).embodiment]
    size, views = (config.image_size[0], config.image_size[1]), len(robot.views)
    cameras = [p for p in PICTURES.values() if (len(p[0]), p[1], p[2]) == (views, size, robot.resize)]
    found: dict[str, tuple[ops.Call, int]] = {}
    for fp8 in (False, True):
        engine = engine_without_data(config, head_dtype=torch.bfloat16, fp8=fp8)
        first = (cameras[0], None)
        for (sizes, _, _), guidance in (
            (first,) if fp8 else (first, (cameras[0], 5.0), *((one, None) for one in cameras[1:]))
        ):
            shape = RequestShape(1, tuple(sizes), size, robot.resize, True, config.text.max_length, guidance)
            found = distinct(calls(engine, shape, robot.action_dim)) | found
    for key, ((op, args), _) in found.items():
        yield op, args, key


def _head(result: Mapping[str, Any]) -> dict[str, float]:
    """Of the action head, as a graph as in a plan: the kernel, PyTorch's kernels and the loop of chosen ones; older results have
    the last as the stage of an engine.
    """
    names = {"eager graph": "torch", "loop graph": "loop", "cuda graph": "cuda"}
    case = next(
        str(tokens) for tokens, (horizon, _) in TOKENS.items() if horizon == preset(MODEL).model.head.action_horizon
    )
    ms: dict[str, float] = {}
    for row in result["ops_action_ode"]["rows"] if _passed(result, "ops_action_ode") else ():
        if row["case"] == case and row["implementation"] in names and "ms" in row:
            ms[names[row["implementation"]]] = row["ms"]["p50"]
    part = f"latency_library_{MODEL}"
    if ms and "loop" not in ms and _passed(result, part) and result[part]["head_dtype"] == "bfloat16":
        ms["loop"] = result[part]["stages"]["engine"]["action_head"]
    return ms if "loop" in ms else {}


def _shapes(op: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a call of `bench ops` and one of a plan have in common where they are the same work: no strides, as plans read k and v
    where they are; no dtype of vectors, which are too small to matter; of a product the rows and not their order.
    """
    given = list(args)
    while given and given[-1] is None:
        given.pop()
    if op.startswith("linear"):
        x = given[0]
        given[0] = x.new_empty(prod(x.shape[:-1]), x.shape[-1])
    return tuple(map(_shape, given))


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (value.dtype if value.ndim > 1 else None, tuple(value.shape))
    if isinstance(value, (list, tuple)):
        return tuple(map(_shape, value))
    return float if isinstance(value, float) else value if isinstance(value, (int, str, type(None))) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="of benchmarks/gpu_suite.sh")
    parser.add_argument("out", type=Path, help="folder that gets the table, by the name of its GPU")
    args = parser.parse_args()
    try:
        made = table(read_result(args.result), args.result.name)
        path = args.out / f"{slug(made['device'])}.json"
        write_json(path, made)
    except ValueError as error:
        sys.stderr.write(f"shipped: {error}\n")
        return 2
    other = {
        key: row for key, row in made["calls"].items() if row["chosen"] != _default(key.partition(":")[0], row["ms"])
    }
    print(f"{path}: {len(made['calls'])} calls, of which not the default:")
    print(json.dumps(other, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
