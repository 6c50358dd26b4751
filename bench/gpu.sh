#!/usr/bin/env bash
# Every GPU check and figure in one go, on any machine with an NVIDIA card, nvcc and a torch that sees the card:
# builds the kernels for this card, runs the GPU tests, small cases under compute-sanitizer, then the table.
# Usage: bench/gpu.sh [FOLDER for the results, default bench/results]
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results="${1:-bench/results}"
mkdir -p "$results"
python="${PYTHON:-python3}"
card="$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')" || exit 1

echo "== build for sm_$card"
"$python" -m pip install --quiet pybind11 pydantic-core pyyaml click rich pytest hypothesis ml_dtypes 2>/dev/null
PYMERGE_CUDA="$card" "$python" setup.py -q build_ext --inplace || exit 1
[ -e pymerge/kernels ] || { # an installed package has Triton's kernels inside
  ln -s ../kernels pymerge/kernels
  trap 'rm -f pymerge/kernels' EXIT
}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

echo "== tests on the card"
timeout 240 "$python" -m pytest -q -rs tests/test_cuda.py tests/test_triton.py -k "gpu or triton" 2>&1 |
  tee "$results/gpu_tests.txt" | tail -n 5

echo "== compute-sanitizer"
for tool in memcheck racecheck synccheck; do
  timeout 90 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m bench.gpu --small 2>&1 |
    tee "$results/gpu_$tool.txt" | tail -n 1
done

echo "== table"
timeout 240 "$python" -m bench.gpu --csv "$results/gpu.csv"
