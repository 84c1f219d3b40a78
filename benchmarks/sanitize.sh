#!/usr/bin/env bash
# NVIDIA's compute-sanitizer over the GPU tests of single ops: out-of-bounds and uninitialised accesses, races in shared memory,
# wrong barriers.
#
# Usage: benchmarks/sanitize.sh [TOOL...]       memcheck racecheck synccheck
#
# Environment: PYTEST (pytest), TESTS (tests/ops), LIMIT (120 s a tool).
# Exit code 9: a tool found something; 1: a test failed, or none ran; 124: out of time; 2: compute-sanitizer is not there.
set -uo pipefail
cd "$(dirname "$0")/.."
command -v compute-sanitizer >/dev/null || {
  echo "error: no compute-sanitizer on PATH; it comes with the CUDA toolkit" >&2
  exit 2
}
pytest="$(command -v "${PYTEST:-pytest}")" || {
  echo "error: no ${PYTEST:-pytest}; give its path in PYTEST" >&2
  exit 2
}
read -ra tests <<<"${TESTS:-tests/ops}"
# each tensor an allocation of its own, so that what lies behind one is not another's
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
export DIT4DIT_LAUNCHES="${DIT4DIT_LAUNCHES:-20}"  # each takes many times longer here
worst=0
(($#)) || set -- memcheck racecheck synccheck
for tool in "$@"; do
  printf '== %s\n' "$tool"
  timeout --kill-after=5 "${LIMIT:-120}" compute-sanitizer --tool "$tool" --error-exitcode 9 \
    "$pytest" -q -x -p no:cacheprovider -m gpu -k "not tune" "${tests[@]}"
  code=$?
  ((code == 0)) || printf 'FAILED (%s): %s\n' "$code" "$tool"
  ((worst >= code)) || worst="$code"
done
exit "$worst"
