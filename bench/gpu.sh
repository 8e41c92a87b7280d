#!/usr/bin/env bash
# Build with CUDA, run the GPU tests, then the benchmarks, in about nine minutes, without a network:
#   bench/gpu.sh            rows go to bench/results/<card>.csv, logs to ${OUT:-bench/results}
#   COMMIT=abc1234 ...      what the rows are labelled with, where there is no git checkout
# Needs there: nvcc, cmake, ninja, a C++ compiler, and a python3 with torch, triton, pytest, pytest-benchmark and hypothesis.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${OUT:-bench/results}" && cd "${OUT:-bench/results}" && pwd)
python=${PYTHON:-python3}
failed=()
started=$SECONDS
stage() { echo "== $1 ($((SECONDS - started)) s)"; }

stage "build"
build=${BUILD:-$(mktemp -d)}
cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_CUDA_FLAGS=-Xptxas=-v >"$out/build.log" 2>&1 &&
    cmake --build "$build" >>"$out/build.log" 2>&1 || { tail -30 "$out/build.log"; exit 1; }
grep "CUDA kernels:" "$out/build.log"
cp "$build/libppomax_kernels.so" kernels/ppomax_kernels/
trap 'rm -f kernels/ppomax_kernels/libppomax_kernels.so' EXIT
export PYTHONPATH="$PWD/kernels:$PWD/engine:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

stage "tests"
# -k: the fixture `impl` runs each test on every back-end; here those on the GPU. ptxas and nvcc were run above.
# One process, since there is one GPU; and such a machine need not have pytest-xdist, which the usual options ask for.
timeout "${TESTS_SECONDS:-200}" "$python" -m pytest -o addopts="-q --strict-markers --benchmark-disable" -m "not slow" tests/kernels -k "triton or cuda" --deselect tests/kernels/test_cuda_build.py \
    --ignore tests/kernels/test_cuda_on_host.py --maxfail 20 --durations=10 2>&1 | tee "$out/tests.log" | tail -25 || failed+=(tests)

stage "benchmarks: small ops and logits"
timeout "${SMALL_SECONDS:-120}" "$python" -m bench --ops gae losses elementwise sample token_logprobs --seconds 0.5 ${COMMIT:+--commit "$COMMIT"} 2>&1 |
    tee "$out/bench-small.log" || failed+=(bench-small)

stage "benchmarks: fused linear ops"
left=$((${TOTAL_SECONDS:-540} - (SECONDS - started)))
timeout "$((left > 30 ? left : 30))" "$python" -m bench --ops linear_ppo_loss linear_token_logprobs linear_nll --seconds 1 ${COMMIT:+--commit "$COMMIT"} 2>&1 |
    tee "$out/bench-linear.log" || failed+=(bench-linear)

[ "$out" = "$PWD/bench/results" ] || cp bench/results/*.csv "$out/" 2>/dev/null
stage "done"
[ ${#failed[@]} -eq 0 ] || { echo "failed or out of time: ${failed[*]}"; exit 1; }
