#!/usr/bin/env bash
# Builds, tests and measures pycoherence on a GPU, within nine minutes, the most valuable first.
#
#     bench/gpu.sh OUT [--dry-run]
#
# Needs no network: python3 with torch >= 2.10 and triton (PYTHON=... for another), and libraries that
# were built elsewhere in pycoherence/, or a C++ compiler, ninja and nvcc to build them. Each step has
# its time and leaves what it found in OUT as it goes; a step that fails is told, and the next one
# starts; what an earlier run has left in OUT is not measured again. --dry-run goes as far as a
# machine without a GPU can: it compiles and lists the kernels, calls their launchers, collects the
# tests and tries the benchmarks on tiny shapes.
set -uo pipefail
[[ $# -ge 1 ]] || { sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2; }
cd "$(dirname "$0")/.."
mkdir -p "$1" && OUT=$(cd "$1" && pwd)
DRY=${2:-}
PYTHON=${PYTHON:-python3}
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
touch "$OUT/done.txt"
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
    grep -qxF "$name" "$OUT/done.txt" && { say "$name: done before"; return 0; }
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
    ((status == 0)) || { FAILED=1; return $status; }
    case $name in build* | carried* | info) ;; *) echo "$name" >>"$OUT/done.txt" ;; esac
}

build() {
    PYCOHERENCE_BUILD=$1 PIP_BREAK_SYSTEM_PACKAGES=1 \
        "$PYTHON" -m pip install --quiet --no-deps --no-build-isolation --no-index -e .
}

# Whether libraries that were built elsewhere load here: torch's stable ABI lets them.
loads() {
    PYTHONPATH=$PWD "$PYTHON" - <<'PY'
from pycoherence.ops.core.dispatch import load_native
raise SystemExit(" ".join(filter(None, map(load_native, ("cpu", "cuda")))) or 0)
PY
}

# The package without an installation: its kernels in Triton need no build.
link() {
    [[ -e pycoherence/triton_kernels ]] || {
        ln -s ../triton_kernels pycoherence/
        trap 'rm -r "$SCRATCH" pycoherence/triton_kernels' EXIT
    }
    export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
}
export -f build loads
export PYTHON
# Kernels are compiled for the GPU that is here, if there is one, in a third of the time.
[[ $DRY == --dry-run ]] || export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$PYTHON" -c \
    'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')}

: >"$OUT/log.txt"
if step "carried libraries" 30 bash -c loads; then
    link
else
    FAILED=0 # they are only a short cut
    step "build" $BUILD bash -c "build cuda" || step "build without CUDA" $BUILD bash -c "build cpu" ||
        { say "not installed: run from the source folder, without native kernels"; link; }
fi
step "info" 20 "$PYTHON" -m pycoherence info
cp "$SCRATCH/step" "$OUT/info.txt"

if [[ $DRY == --dry-run ]]; then
    step "kernels" 900 "$PYTHON" tests/aot.py --out "$OUT/kernels.jsonl"
    step "launchers" 300 "$PYTHON" tests/launchers.py
    step "host" 120 "$PYTHON" -m bench host --out "$OUT/host.jsonl"
    step "tests, collected" 120 "$PYTHON" -m pytest -q -m gpu --collect-only
    step "headline figures" 120 "$PYTHON" -m bench headline --device cpu --quick --out "$OUT/headline.jsonl"
    step "steps" 120 "$PYTHON" -m bench steps --device cpu --quick --out "$OUT/steps.jsonl"
    step "training" 300 "$PYTHON" -m bench training --quick --rounds 1 --out "$OUT/training.json"
    step "ops" 600 "$PYTHON" -m bench ops --quick --seconds 0 --out "$OUT/ops.jsonl"
    exit $FAILED
fi

# Warnings of libraries that are newer than ours fail no test here. Compiling takes most of the time
# of the tests, so several processes share them if they can.
TESTS=("$PYTHON" -m pytest -q -m gpu --no-header --tb=short -p no:cacheprovider -W default)
"$PYTHON" -c 'import xdist' 2>/dev/null && TESTS+=(-n "$(($(nproc) < 16 ? $(nproc) : 16))")

# 1. Whether the engine is right and how fast: what every other figure stands on.
step "headline figures" 100 "$PYTHON" -m bench headline --device cuda --out "$OUT/headline.jsonl"
if command -v ncu >/dev/null; then
    step "profile of the engine" 30 ncu --clock-control none --kernel-name regex:reduce_tiles \
        --launch-skip 2 --launch-count 1 --section SpeedOfLight --section WarpStateStats \
        "$PYTHON" -m bench headline --device cuda --first 1
    cp "$SCRATCH/step" "$OUT/profile.txt"
fi
# 2. Whether all kernels are right, on their smallest shapes.
if "$PYTHON" -c 'import pytest, hypothesis' 2>/dev/null; then
    step "small shapes" 60 "${TESTS[@]}" tests/kernels/gpu -k small
else
    step "selftest" 60 "$PYTHON" -m pycoherence selftest
fi
# 3. Whole steps: the host and the GPU apart, then beside other libraries.
step "GPT-2, host and GPU" 60 "$PYTHON" -m bench steps --out "$OUT/steps.jsonl"
step "training, norms" 90 "$PYTHON" -m bench training --device cuda --models GPT-2 ResNet-18 \
    --cases plain SqNorms "Opacus ghost" "vmap(grad) norms" --rounds 9 \
    --out "$OUT/training-norms.json"
step "training, order statistics" 45 "$PYTHON" -m bench training --device cuda --models MLP CNN \
    --batch 256 --cases plain "Winsorized(2)" "MedianOfMeans(3)" --rounds 9 \
    --out "$OUT/training-orders.json"
# 4. All tests, then what reads memory.
step "tests" 150 "${TESTS[@]}" tests/kernels/gpu tests/unit/ops tests/unit/optim
if command -v compute-sanitizer >/dev/null; then
    SMALL=("$PYTHON" -m pytest -q -m gpu -W default -k "small and bf16 and float64")
    step "memcheck" 45 compute-sanitizer --tool memcheck --error-exitcode 1 "${SMALL[@]}" tests/kernels/gpu
    # Triton synchronises what it compiles.
    step "racecheck" 45 compute-sanitizer --tool racecheck --error-exitcode 1 "${SMALL[@]}" \
        tests/kernels/gpu/test_cuda_gpu.py
fi
step "ops" 90 "$PYTHON" -m bench ops --device cuda --seconds 0.02 --out "$OUT/ops.jsonl"
"$PYTHON" -m bench table "$OUT" | tee "$OUT/table.md"
exit $FAILED
