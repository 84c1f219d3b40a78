#!/usr/bin/env bash
# Everything that needs a GPU in one call that ends by itself: see gpu_suite.py beside this, which it runs.
#
# Usage: benchmarks/gpu_suite.sh OUT [--continue FILE] [--only PART]...
#
# Environment: PYTHON (python3), and those that gpu_suite.py names.
exec "${PYTHON:-python3}" -I "$(dirname "$0")/gpu_suite.py" run "$@"
