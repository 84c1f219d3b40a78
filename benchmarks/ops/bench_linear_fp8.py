"""linear_fp8: matrix product in e4m3 with scales, every implementation against the reference, at the released sizes.

python -m dit4dit.benchmarks.ops.bench_linear_fp8 --device cuda --compile --json result.json
"""

from __future__ import annotations

from dit4dit.benchmarks.op_bench import bench

if __name__ == "__main__":
    raise SystemExit(bench("linear_fp8", __doc__))
