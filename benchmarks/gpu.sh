#!/usr/bin/env bash
# Every check that needs a GPU, in one call: bash benchmarks/gpu.sh [output folder] [options of python -m benchmarks]
# Uses the Python at hand (PYTHON=...), with torch for CUDA, tabulate, pytest, numpy and scikit-learn installed, and for
# a chart and a progress bar matplotlib and tqdm.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${1:-benchmarks/results}
shift || true
mkdir -p "$out"
name=$("$python" -c 'from benchmarks.results import stem; print(stem("cuda"))') || exit 1
(
    status=0
    echo "# $name"
    "$python" -m pytest -q -m cuda tests || status=1
    "$python" -m benchmarks --device cuda --out "$out" "$@" || status=1
    "$python" -m benchmarks.scaler --device cuda || status=1
    "$python" examples/demo.py || status=1
    exit $status
) 2>&1 | tee "$out/${name}_checks.txt"
exit "${PIPESTATUS[0]}"
