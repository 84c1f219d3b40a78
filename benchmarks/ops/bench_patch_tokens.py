"""patch_tokens: block 0's input from noise and from the conditioning frame, every implementation against the reference.

python -m dit4dit.benchmarks.ops.bench_patch_tokens --device cuda --compile --json result.json
"""

from __future__ import annotations

from dit4dit.benchmarks.op_bench import bench

if __name__ == "__main__":
    raise SystemExit(bench("patch_tokens", __doc__))
