"""qk_norm_rope: q/k norm and rotation out of the qkv matrix, every implementation against the reference, at the released sizes.

python -m dit4dit.benchmarks.ops.bench_qk_norm_rope --device cuda --compile --json result.json
"""

from __future__ import annotations

from dit4dit.benchmarks.op_bench import bench

if __name__ == "__main__":
    raise SystemExit(bench("qk_norm_rope", __doc__))
