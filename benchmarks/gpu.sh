#!/usr/bin/env bash
# Every check that needs a GPU, in one call: bash benchmarks/gpu.sh [output folder]
# Uses the Python at hand (PYTHON=...), with torch for CUDA, tabulate, pytest, numpy and scikit-learn installed.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${1:-benchmarks/results}
mkdir -p "$out"
name=$("$python" -c 'import datetime, torch; print(datetime.date.today(), "torch" + torch.__version__,
torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "no-gpu", sep="_")') || exit 1
(
    status=0
    echo "# $name"
    "$python" -m pytest -q -m cuda tests || status=1
    "$python" examples/demo.py || status=1
    exit $status
) 2>&1 | tee "$out/$name.txt"
exit "${PIPESTATUS[0]}"
