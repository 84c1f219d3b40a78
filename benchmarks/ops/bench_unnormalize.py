"""unnormalize: one GR1 chunk to robot units, every implementation against the reference.

python -m dit4dit.benchmarks.ops.bench_unnormalize --device cuda --compile --json result.json
"""

from __future__ import annotations

from dit4dit.benchmarks.op_bench import bench

if __name__ == "__main__":
    raise SystemExit(bench("unnormalize", __doc__))
