"""preprocess: every implementation against the reference, on the images of the three robots.

python -m dit4dit.benchmarks.ops.bench_preprocess --device cpu --json result.json
"""

from __future__ import annotations

from dit4dit.benchmarks.op_bench import bench

if __name__ == "__main__":
    raise SystemExit(bench("preprocess", __doc__))
