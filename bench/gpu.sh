#!/usr/bin/env bash
# Every GPU check and figure in one go, in ten minutes, on any machine with an NVIDIA card, nvcc and a torch that
# sees the card: builds the kernels for this card, runs the GPU tests, the table, and small cases under
# compute-sanitizer. Each step has a limit, and says so if it fails; the exit status is 1 if any did.
# Usage: bench/gpu.sh [FOLDER for the results, default bench/results]
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results="${1:-bench/results}"
mkdir -p "$results"
results="$(cd "$results" && pwd)"
python="${PYTHON:-python3}"
failed=()

# step NAME SECONDS LINES COMMAND...: the output goes to a file, and its last LINES are shown.
step() {
  local name="$1" seconds="$2" lines="$3" status=0
  shift 3
  echo "== $name (at $SECONDS s)"
  timeout -k 5 "$seconds" "$@" >"$results/gpu_$name.txt" 2>&1 || status=$?
  tail -n "$lines" "$results/gpu_$name.txt"
  [ "$status" -eq 0 ] && return
  if [ "$status" -eq 124 ]; then echo "STOPPED: $name took longer than $seconds s"; else echo "FAILED: $name ($status)"; fi
  failed+=("$name")
}

card="$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')" || {
  echo "torch sees no card: set PYTHON to the Python whose torch does"
  exit 1
}

# Only what is missing is asked for: there may be no network, and Python 3.12 brings no setuptools.
wanted='
from importlib.metadata import version
from importlib.util import find_spec
needed = {"pybind11": "pybind11", "numpy": "numpy", "pydantic_core": "pydantic-core>=2.27", "yaml": "pyyaml",
          "click": "click", "rich": "rich", "huggingface_hub": "huggingface_hub", "pytest": "pytest",
          "safetensors": "safetensors", "hypothesis": "hypothesis", "ml_dtypes": "ml_dtypes"}
missing = [package for name, package in needed.items() if not find_spec(name)]
if not find_spec("setuptools.modified" if find_spec("setuptools") else "setuptools"):
    missing.append("setuptools>=77")
print(*missing)'
read -ra missing < <("$python" -c "$wanted")
if [ "${#missing[@]}" -gt 0 ]; then
  step install 60 4 "$python" -m pip install --retries 1 --timeout 10 --disable-pip-version-check "${missing[@]}"
fi

step build 240 2 env PYMERGE_CUDA="$card" "$python" setup.py -q build_ext --inplace
for module in _core _cuda; do
  compgen -G "pymerge/$module.*.so" >/dev/null || {
    echo "pymerge/$module was not built: see $results/gpu_build.txt"
    exit 1
  }
done
[ -e pymerge/kernels ] || { # an installed package has Triton's kernels inside
  ln -s ../kernels pymerge/kernels
  trap 'rm -f pymerge/kernels' EXIT
}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
step info 60 12 "$python" -m pymerge info

# Compiling Triton's kernels takes longer than running them, so several processes share it.
processes="$(nproc)"
[ "$processes" -gt 10 ] && processes=10
warm_up() {
  for experts in 8 4 16 2 32; do for type in bf16 f32; do echo "$experts $type"; done; done |
    xargs -P "$processes" -L 1 "$python" -m bench.gpu --warm
}
run_tests() {
  seq "$processes" | xargs -P "$processes" -I PART "$python" -m pytest -q -p no:cacheprovider --part "PART/$processes" \
    -m gpu tests/test_cuda.py tests/test_triton.py tests/test_ring.py | grep -E "^FAILED|^ERROR|^E  | in [0-9]"
}
export -f warm_up run_tests
export python processes
step warm_up 90 4 bash -o pipefail -c warm_up
step tests 120 40 bash -o pipefail -c run_tests
step table 220 200 "$python" -m bench.gpu --csv "$results/gpu.csv" --seconds 90

# What time is left goes to the sanitizers.
sanitizer="$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)"
for tool in memcheck synccheck racecheck; do
  left=$((590 - SECONDS))
  if [ ! -x "$sanitizer" ] || [ "$left" -lt 20 ]; then
    echo "LEFT OUT: $tool: $([ -x "$sanitizer" ] && echo "$left s are left" || echo "there is no compute-sanitizer")"
    failed+=("$tool")
    continue
  fi
  types=(bf16 f16 f32)
  [ "$tool" = racecheck ] && types=(bf16) # it watches every access to shared memory
  step "$tool" "$((left < 90 ? left : 90))" 3 \
    "$sanitizer" --tool "$tool" --error-exitcode 9 "$python" -m bench.gpu --check "${types[@]}"
done

echo "== done in $SECONDS s; results in $results"
[ "${#failed[@]}" -eq 0 ] || {
  echo "not everything passed: ${failed[*]}"
  exit 1
}
