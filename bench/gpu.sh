#!/usr/bin/env bash
# What a machine with an NVIDIA GPU says of the kernels and the rollout, in stages of at most four minutes, without a network:
#   bench/gpu.sh [smoke] [tests] [ops] [linear] [rollout] [rivals] [sanitize]      default: smoke tests ops linear rollout
#   smoke     versions, ceilings of copy and GEMM, the quick rows of every op
#   tests     the kernel tests on the GPU's back-ends, and the engine's there
#   ops       benchmarks of the small ops and of logits;  linear: of the fused linear ops
#   rollout   decoding of a random model of an 8B's shape, plain and from CUDA graphs
#   rivals    the same by `generate`, static and growing cache
#   sanitize  some kernel tests under compute-sanitizer
# The CUDA kernels are built first; without them it stops. Rows go to bench/results/<card>.csv, logs to ${OUT:-bench/results}.
# COMMIT=abc1234: what rows are labelled with where there is no git checkout. ARCH=90: which card to build for.
# Needs nvcc, cmake, ninja, a C++ compiler, and a python3 with torch, triton, transformers, pytest, hypothesis, pytest-benchmark.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${OUT:-bench/results}" && cd "${OUT:-bench/results}" && pwd)
python=${PYTHON:-python3}
failed=()
started=$SECONDS
export PYTHONPATH="$PWD/kernels:$PWD/engine:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
run() { # NAME SECONDS COMMAND...: a stage with its limit, its log, and its end on the screen
    local name=$1 limit=$2
    shift 2
    echo "== $name ($((SECONDS - started)) s)"
    timeout "$limit" "$@" >"$out/$name.log" 2>&1 || failed+=("$name")
    tail -"${LINES_SHOWN:-25}" "$out/$name.log"
}
bench() { "$python" -m bench "$@" ${COMMIT:+--commit "$COMMIT"}; }
suite() { # -k: the fixture `impl` runs each test on every back-end; here those on the GPU. nvcc and ptxas were run above.
    local workers=()
    "$python" -c "import xdist" 2>/dev/null && workers=(-n "${WORKERS:-8}")
    "$python" -m pytest -o addopts="-q --strict-markers --benchmark-disable" "${workers[@]}" -m "not slow" --maxfail 20 "$@"
}
on_gpu=(tests/kernels -k "triton or cuda or decode" --ignore tests/kernels/test_cuda_build.py --ignore tests/kernels/test_cuda_on_host.py
    --ignore tests/kernels/test_triton_compile.py --ignore tests/kernels/test_errors.py --ignore tests/kernels/test_registration.py)
export -f bench suite
export python

echo "== build"
build=${BUILD:-$(mktemp -d)}
cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release ${ARCH:+-DPPOMAX_CUDA_ARCHITECTURES=$ARCH} >"$out/build.log" 2>&1 &&
    cmake --build "$build" >>"$out/build.log" 2>&1 || { tail -30 "$out/build.log"; exit 1; }
grep "CUDA kernels:" "$out/build.log"
library=kernels/ppomax_kernels/libppomax_kernels.so
[ -e "$library" ] && cp "$library" "$build/before.so"
trap '[ -e "$build/before.so" ] && mv "$build/before.so" "$library" || rm -f "$library"' EXIT
cp "$build/libppomax_kernels.so" "$library"
"$python" - <<'EOF' || exit 1
import sys
import torch
from ppomax_kernels.dispatch import cuda_built
if not (torch.cuda.is_available() and cuda_built()):
    sys.exit("gpu.sh: no CUDA device, or the library was built without CUDA kernels; see the build's log")
EOF

for stage in "${@:-smoke tests ops linear rollout}"; do
    for name in $stage; do
        case $name in
            smoke) run smoke 90 bash -c '"$python" -m torch.utils.collect_env | head -30; bench --quick' ;;
            tests) run tests 240 bash -c 'suite "$@"' _ tests/engine/test_gpu.py "${on_gpu[@]}" ;;
            ops) run ops 200 bash -c 'bench --ops gae losses elementwise sample token_logprobs attention trunk --seconds 0.3' ;;
            linear) run linear 240 bash -c 'bench --ops linear_ppo_loss linear_token_logprobs linear_nll --seconds 0.5' ;;
            rollout) run rollout 200 "$python" -m bench.decode --rows 64 256 --new 64 ;;
            rivals) run rivals 240 "$python" -m bench.decode --rows 64 --new 64 --rivals ;;
            sanitize) run sanitize 240 compute-sanitizer --error-exitcode 1 "$python" -m pytest -o addopts="-q" tests/kernels/test_paged_decode.py tests/kernels/test_gae.py -k "cuda or decode" -x ;;
            *) echo "gpu.sh: no stage $name; see the head of this file"; exit 2 ;;
        esac
    done
done
[ "$out" = "$PWD/bench/results" ] || cp bench/results/*.csv "$out/" 2>/dev/null
[ ${#failed[@]} -eq 0 ] || { echo "failed or out of time: ${failed[*]}"; exit 1; }
echo "== done ($((SECONDS - started)) s)"
