"""norm_linear: residual, norm, modulation and the product behind them, every implementation against the reference,
at the released sizes.

python -m dit4dit.benchmarks.ops.bench_norm_linear --device cuda --compile --json result.json
"""

from __future__ import annotations

from dit4dit.benchmarks.op_bench import bench

if __name__ == "__main__":
    raise SystemExit(bench("norm_linear", __doc__))
