"""cross_attention: attention to the text and to the features, every implementation against the reference, at the released sizes.

python -m dit4dit.benchmarks.ops.bench_cross_attention --device cuda --compile --json result.json
"""

from __future__ import annotations

from dit4dit.benchmarks.op_bench import bench

if __name__ == "__main__":
    raise SystemExit(bench("cross_attention", __doc__))
