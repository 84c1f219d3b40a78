"""state_token: the states of the released models, every implementation against the reference.

python -m dit4dit.benchmarks.ops.bench_state_token --device cuda --compile --json result.json
"""

from __future__ import annotations

from dit4dit.benchmarks.op_bench import bench

if __name__ == "__main__":
    raise SystemExit(bench("state_token", __doc__))
