"""philox_normal: the noise of one GR1 request, every implementation against the reference.

python -m dit4dit.benchmarks.ops.bench_philox_normal --device cuda --compile --json result.json
"""

from __future__ import annotations

from dit4dit.benchmarks.op_bench import bench

if __name__ == "__main__":
    raise SystemExit(bench("philox_normal", __doc__))
