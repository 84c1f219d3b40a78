#!/usr/bin/env bash
# Everything that needs a GPU, in one call: build for the visible chip, GPU tests, parity, benchmarks.
# Usage: benchmarks/gpu_suite.sh [OUT]    writes OUT/<machine>.json and a log; dependencies must be there (no downloads).
set -uo pipefail
cd "$(dirname "$0")/.."
out="${1:-benchmarks/results}"
mkdir -p "$out"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
failed=0
step() { printf '== %s (%ss)\n' "$1" "$SECONDS"; }
run() { "$@" || { failed=1; printf 'FAILED: %s\n' "$*"; }; }

step "build and install"
python3 -m pip install -q --no-build-isolation --no-deps --force-reinstall \
  --config-settings=cmake.define.DIT4DIT_CUDA=AUTO . || exit 1
run dit4dit doctor --json "$scratch/doctor.json"

step "GPU tests"
run pytest -q -m gpu tests

step "parity through the engine"
for fixture in libero_tiny gr1_tiny; do
  run dit4dit parity "tests/golden/$fixture" --engine --device cuda --json "$scratch/parity_$fixture.json"
done

step "latency"
for preset in robocasa_gr1 libero; do
  run dit4dit bench latency --preset "$preset" --device cuda --baseline --chunks 50 \
    --json "$scratch/latency_$preset.json" --report "$out/latency_$preset"
done

step "ops"
for file in benchmarks/ops/bench_*.py; do
  name="$(basename "$file" .py)"
  run python3 -m "dit4dit.benchmarks.ops.$name" --device cuda --json "$scratch/$name.json"
done

if command -v compute-sanitizer >/dev/null; then
  step "compute-sanitizer"
  for tool in memcheck racecheck synccheck; do
    run compute-sanitizer --tool "$tool" --error-exitcode 9 python3 -m pytest -q -m gpu \
      tests/ops/test_preprocess.py tests/ops/test_action_ode.py
    run compute-sanitizer --tool "$tool" --error-exitcode 9 python3 -m pytest -q -m gpu \
      tests/ops/test_self_attention.py -k cuda_on_a_gpu
  done
fi

step "results"
python3 - "$scratch" "$out" <<'PYTHON'
import json, re, sys
from pathlib import Path

from dit4dit.benchmarks.harness import machine

scratch, out = map(Path, sys.argv[1:])
here = machine()
parts = {file.stem: json.loads(file.read_text()) for file in sorted(scratch.glob("*.json"))}
name = re.sub(r"[^a-z0-9]+", "-", str(here["gpu"] or here["cpu"]).lower()).strip("-")
(out / f"{name}.json").write_text(json.dumps({"machine": here, **parts}, indent=1) + "\n")
print(f"wrote {out / name}.json: {', '.join(parts)}")
PYTHON
exit "$failed"
