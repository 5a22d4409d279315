#!/usr/bin/env bash
# Builds, tests and measures pycoherence on a GPU, within nine minutes, the most valuable first.
#
#     bench/gpu.sh OUT [--dry-run]
#
# Needs no network: python3 with torch >= 2.10 and triton (PYTHON=... for another), and, if it is to
# be built, a C++ compiler, ninja and nvcc. Each step has its time and leaves what it found in OUT
# (eight files at most) as it goes; a step that fails is told, and the next one starts. --dry-run
# goes as far as a machine without a GPU can: it builds, compiles and lists the kernels, collects the
# tests and tries the benchmarks on tiny shapes.
set -uo pipefail
[[ $# -ge 1 ]] || { sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2; }
cd "$(dirname "$0")/.."
mkdir -p "$1" && OUT=$(cd "$1" && pwd)
DRY=${2:-}
PYTHON=${PYTHON:-python3}
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
: >"$OUT/summary.txt"
FAILED=0
SECONDS=0
LIMIT=530 BUILD=150
[[ $DRY == --dry-run ]] && LIMIT=3600 BUILD=600

say() { echo "$*" | tee -a "$OUT/summary.txt"; }

# step NAME SECONDS COMMAND...: never longer than what is left of all the time.
step() {
    local name=$1 most=$2 left=$((LIMIT - SECONDS)) start=$SECONDS status
    shift 2
    ((left > 5)) || { say "$name: left out, no time"; FAILED=1; return 1; }
    echo "== $name: $*" >>"$OUT/log.txt"
    timeout --kill-after=5 $((most < left ? most : left)) "$@" >"$SCRATCH/step" 2>&1
    status=$?
    cat "$SCRATCH/step" >>"$OUT/log.txt"
    case $status in
        0) say "$name: ok, $((SECONDS - start)) s" ;;
        124 | 137) say "$name: STOPPED after $((SECONDS - start)) s" ;;
        *) say "$name: FAILED ($status), $((SECONDS - start)) s: $(tail -n 1 "$SCRATCH/step" | cut -c -200)" ;;
    esac
    ((status == 0)) || FAILED=1
    return $status
}

build() {
    PYCOHERENCE_BUILD=$1 PIP_BREAK_SYSTEM_PACKAGES=1 \
        "$PYTHON" -m pip install --quiet --no-deps --no-build-isolation --no-index -e .
}

# The package without an installation: its kernels in Triton need no build.
link() {
    ln -s ../triton_kernels pycoherence/ && trap 'rm -r "$SCRATCH" pycoherence/triton_kernels' EXIT
    export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
    say "not installed: run from the source folder, without native kernels"
}
export -f build
export PYTHON
# Kernels are compiled for the GPU that is here, if there is one, in a third of the time.
[[ $DRY == --dry-run ]] || export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$PYTHON" -c \
    'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')}

: >"$OUT/log.txt"
step "build" $BUILD bash -c "build cuda" || step "build without CUDA" $BUILD bash -c "build cpu" || link
step "info" 30 "$PYTHON" -m pycoherence info
cp "$SCRATCH/step" "$OUT/info.txt"

if [[ $DRY == --dry-run ]]; then
    step "kernels" 900 "$PYTHON" tests/aot.py --out "$OUT/kernels.jsonl"
    step "tests, collected" 120 "$PYTHON" -m pytest -q -m gpu --collect-only
    step "headline figures" 120 "$PYTHON" bench/headline.py --device cpu --quick --out "$OUT/headline.jsonl"
    step "training" 300 "$PYTHON" bench/training.py --quick --rounds 1 --out "$OUT/training.json"
    step "ops" 600 "$PYTHON" bench/run.py --quick --seconds 0 --out "$OUT/ops.jsonl"
    exit $FAILED
fi

# Compiling takes most of the time of the tests, so several processes share them if they can.
TESTS=("$PYTHON" -m pytest -q -m gpu --no-header --tb=short -p no:cacheprovider)
"$PYTHON" -c 'import xdist' 2>/dev/null && TESTS+=(-n 6)

step "headline figures" 120 "$PYTHON" bench/headline.py --device cuda --out "$OUT/headline.jsonl"
if "$PYTHON" -c 'import pytest, hypothesis' 2>/dev/null; then
    step "small shapes" 90 "${TESTS[@]}" tests/gpu -k small
else
    step "selftest" 90 "$PYTHON" -m pycoherence selftest
fi
step "training, norms" 120 "$PYTHON" bench/training.py --device cuda --models GPT-2 ResNet-18 \
    --cases plain SqNorms "Opacus ghost" "vmap(grad) norms" --rounds 15 \
    --out "$OUT/training-norms.json"
step "training, order statistics" 60 "$PYTHON" bench/training.py --device cuda --models MLP CNN \
    --batch 256 --cases plain "Winsorized(2)" "MedianOfMeans(3)" --rounds 15 \
    --out "$OUT/training-orders.json"
if command -v compute-sanitizer >/dev/null; then
    SMALL=("$PYTHON" -m pytest -q -m gpu -k "small and bf16 and float64")
    step "memcheck" 45 compute-sanitizer --tool memcheck --error-exitcode 1 "${SMALL[@]}" tests/gpu
    # What Triton compiles is synchronised by Triton.
    step "racecheck" 45 compute-sanitizer --tool racecheck --error-exitcode 1 "${SMALL[@]}" \
        tests/gpu/test_cuda_gpu.py
fi
step "tests" 180 "${TESTS[@]}" tests/gpu tests/ops tests/optim
step "ops" 90 "$PYTHON" bench/run.py --device cuda --seconds 0.02 --out "$OUT/ops.jsonl"
step "training" 120 "$PYTHON" bench/training.py --device cuda --rounds 5 --out "$OUT/training.json"
exit $FAILED
