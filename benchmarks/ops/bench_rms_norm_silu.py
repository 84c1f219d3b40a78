"""rms_norm_silu: the VAE's norms at a GR1 picture's sizes, every implementation against the reference.

python -m dit4dit.benchmarks.ops.bench_rms_norm_silu --device cuda --compile --json result.json
"""

from __future__ import annotations

from dit4dit.benchmarks.op_bench import bench

if __name__ == "__main__":
    raise SystemExit(bench("rms_norm_silu", __doc__))
