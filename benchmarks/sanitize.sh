#!/usr/bin/env bash
# NVIDIA's compute-sanitizer over the GPU tests of single ops: out-of-bounds and uninitialised accesses, races in shared memory,
# wrong barriers.
#
# Usage: benchmarks/sanitize.sh [TOOL...]       memcheck racecheck synccheck
#
# Environment: PYTHON (python3, which must have pytest), TESTS (tests/ops), LIMIT (120 s a tool).
# Exit code 9: a tool found something; 1: a test failed, or none ran; 124: out of time; 2: compute-sanitizer is not there.
set -uo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
command -v compute-sanitizer >/dev/null || {
  echo "error: no compute-sanitizer on PATH; it comes with the CUDA toolkit" >&2
  exit 2
}
python="$(command -v "${PYTHON:-python3}")" || {
  echo "error: no ${PYTHON:-python3}; give its path in PYTHON" >&2
  exit 2
}
read -ra tests <<<"${TESTS:-tests/ops}"
cd / # away from the source tree, which would be taken for the package
# each tensor an allocation of its own, so that what lies behind one is not another's
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
export DIT4DIT_LAUNCHES="${DIT4DIT_LAUNCHES:-20}"  # each takes many times longer here
worst=0
(($#)) || set -- memcheck racecheck synccheck
for tool in "$@"; do
  printf '== %s\n' "$tool"
  more=()
  # the one-launch head keeps barriers in every block: more than synccheck tracks by itself, which then ends the process
  [[ "$tool" == synccheck ]] && more=(--num-cuda-barriers 65536)
  timeout --kill-after=5 "${LIMIT:-120}" compute-sanitizer --tool "$tool" --error-exitcode 9 "${more[@]}" \
    "$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -q -x -p no:cacheprovider -m gpu -k "not tiles_search" \
    "${tests[@]/#/$root/}"
  code=$?
  ((code == 0)) || printf 'FAILED (%s): %s\n' "$code" "$tool"
  ((worst >= code)) || worst="$code"
done
exit "$worst"
