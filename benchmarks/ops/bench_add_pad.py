"""add_pad: the sums in front of the convolutions that halve a GR1 image, every implementation against the reference.

python -m dit4dit.benchmarks.ops.bench_add_pad --device cuda --compile --json result.json
"""

from __future__ import annotations

from dit4dit.benchmarks.op_bench import bench

if __name__ == "__main__":
    raise SystemExit(bench("add_pad", __doc__))
