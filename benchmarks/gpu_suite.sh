#!/usr/bin/env bash
# Everything that needs a GPU, in one call of less than eight minutes: build for the visible chip, parity, GPU tests, latency
# (with the action head by libraries and in one launch), single ops and the whole head (its kernel in bf16 and fp8, a graph of
# library kernels beside it), options, tiles, counts.
#
# Usage: benchmarks/gpu_suite.sh [OUT]     OUT (benchmarks/results) gets <machine>.json and one folder of pictures a preset
#
# Every part has its own time limit and cannot stop the others; the file is written anew after each part, with what failed and
# the end of its log. Exit code 1 when a part failed. Nothing is downloaded: the dependencies must be there.
#
# Environment: PYTHON (python3), DEVICE (cuda), PRESETS (robocasa_gr1 libero), CHUNKS (100), ALONE (10000 and for fp8 1000: chunks
# of the engine by itself, for the tail), OPS (all), LIMIT (465 s in all),
# BUILD=0 and TESTS=0 leave those parts out. DEVICE=cpu PRESETS=tiny runs what can be run without a GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
out="${1:-benchmarks/results}"
python="${PYTHON:-python3}"
device="${DEVICE:-cuda}"
limit="${LIMIT:-465}"
read -ra presets <<<"${PRESETS:-robocasa_gr1 libero}"
read -ra ops <<<"${OPS:-}"
mkdir -p "$out"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
failed=0

# record NAME EXIT_CODE SECONDS LIMIT WHAT: one line of the file that merge_results.py reads; "-" stands for a part left out
record() {
  local fields=("${@//"$scratch"/SCRATCH}")  # paths of this machine say nothing elsewhere
  printf '%s\t%s\t%s\t%s\t%s\n' "${fields[@]//"$out"/OUT}" >>"$scratch/parts.tsv"
  "$python" -I benchmarks/merge_results.py "$scratch" "$out" "$SECONDS" || failed=1
}

# part NAME SECONDS COMMAND...: run it, at most so long and at most until the whole limit; keep its log and its fate
part() {
  local name="$1" most="$2" begin="$SECONDS" code
  shift 2
  ((most <= limit - SECONDS)) || most=$((limit - SECONDS))
  if ((most < 1)); then
    failed=1
    record "$name" - 0 0 "no time was left"
    return
  fi
  printf '== %s (%ss)\n' "$name" "$SECONDS"
  timeout --kill-after=5 "$most" "$@" 2>&1 | tee "$scratch/$name.log"
  code="${PIPESTATUS[0]}"
  ((code == 0)) || { failed=1; printf 'FAILED (%s): %s\n' "$code" "$*"; }
  record "$name" "$code" "$((SECONDS - begin))" "$most" "$*"
}

if [[ "${BUILD:-1}" == 1 ]]; then
  part build 120 "$python" -m pip install -q --no-build-isolation --no-deps --force-reinstall \
    --config-settings=cmake.define.DIT4DIT_CUDA=AUTO .
else
  record build - 0 0 "BUILD=$BUILD"
fi
# away from here, where the source tree would be taken for the package
(cd "$scratch" && "$python" -c "
import json
from dit4dit.benchmarks.harness import machine
print(json.dumps(machine()))") >"$scratch/machine" || failed=1
part doctor 30 dit4dit doctor --json "$scratch/doctor.json"

for fixture in libero_tiny gr1_tiny; do
  part "parity_$fixture" 40 dit4dit parity "tests/golden/$fixture" --engine --device "$device" \
    --json "$scratch/parity_$fixture.json"
done
if [[ "$device" == cpu ]]; then
  record parity_one_launch - 0 0 "DEVICE=cpu: the kernel runs on a GPU"
else
  part parity_one_launch 40 dit4dit parity tests/golden/gr1_tiny --engine --head one_launch --dtype bfloat16 \
    --device "$device" --json "$scratch/parity_one_launch.json"
fi

# before anything is timed: what is wrong need not be fast
if [[ "$device" == cpu || "${TESTS:-1}" != 1 ]]; then
  record gpu_tests - 0 0 "DEVICE=$device TESTS=${TESTS:-1}"
else
  part gpu_tests 120 env DIT4DIT_LAUNCHES=10000 pytest -q -m gpu tests
fi

for preset in "${presets[@]}"; do
  part "latency_$preset" 130 dit4dit bench latency --preset "$preset" --device "$device" --baseline \
    --chunks "${CHUNKS:-100}" --engine-chunks "${ALONE:-10000}" \
    --json "$scratch/latency_$preset.json" --report "$out/latency_$preset"
done
for preset in "${presets[@]}"; do
  if [[ "$device" == cpu ]]; then
    record "latency_one_launch_$preset" - 0 0 "DEVICE=cpu: the kernel runs on a GPU"
    continue
  fi
  # the library's loop on a bfloat16 head beside it: the yardstick in the same run
  for head in library one_launch; do
    part "latency_${head}_$preset" 40 dit4dit bench latency --preset "$preset" --device "$device" --head "$head" \
      --head-dtype bfloat16 --chunks 20 --engine-chunks "${ALONE:-1000}" --json "$scratch/latency_${head}_$preset.json"
  done
done
for preset in "${presets[@]}"; do
  part "latency_fp8_$preset" 45 dit4dit bench latency --preset "$preset" --device "$device" --quantization fp8 \
    --chunks "${CHUNKS:-100}" --engine-chunks "${ALONE:-1000}" --json "$scratch/latency_fp8_$preset.json"
done

part ops 100 dit4dit bench ops ${ops:+--ops "${ops[@]}"} --sizes gr1 --device "$device" --json "$scratch/ops.json"

part options 60 dit4dit bench options --checkpoint tests/golden/libero_tiny --checkpoint tests/golden/gr1_tiny \
  --preset "${presets[0]}" --seeds 4 --device "$device" --json "$scratch/options.json"

if [[ "$device" == cpu ]]; then
  record tune - 0 0 "DEVICE=cpu: tiles are measured on a GPU"
else
  part tune 65 dit4dit tune --device "$device" --batch 1 --samples 15 --seconds 40 \
    --out "$scratch/tiles.table" --json "$scratch/tune.json"
fi

for preset in "${presets[@]}"; do
  part "flops_$preset" 40 dit4dit bench flops --preset "$preset" --json "$scratch/flops_$preset.json"
done

if [[ "$device" != cpu ]] && command -v compute-sanitizer >/dev/null; then
  part sanitizer 100 env LIMIT=30 \
    TESTS="tests/ops/test_preprocess.py tests/ops/test_action_ode.py tests/ops/test_self_attention.py" benchmarks/sanitize.sh
fi
exit "$failed"
