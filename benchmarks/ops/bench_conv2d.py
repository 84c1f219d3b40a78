"""conv2d: the VAE's convolutions at the sizes of a GR1 image, every implementation against the reference.

python -m dit4dit.benchmarks.ops.bench_conv2d --device cuda --compile --json result.json
"""

from __future__ import annotations

from dit4dit.benchmarks.op_bench import bench

if __name__ == "__main__":
    raise SystemExit(bench("conv2d", __doc__))
