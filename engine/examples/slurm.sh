#!/bin/bash
# A 13B run over two nodes that ends in time before its limit, and is put back into the queue to go on:
#     OUT=/shared/runs/13b sbatch slurm.sh --model.policy SFT --model.reward_model RM --data.prompts prompts.jsonl
# OUT lies on a file system that all nodes see. GRACE, the seconds of --signal, has to hold an update and a checkpoint: a step
# for which it is too late is given up before its update, and drawn anew by the run that goes on.
#SBATCH --job-name=ppomax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
GRACE=${GRACE:-600}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
how=(--config "${CONFIG:-llama-13b}" --out "$OUT" --run.grace "$GRACE" "$@")
if [ -e "$OUT/config.yaml" ]; then how=(--resume --out "$OUT"); fi
trap 'touch "$OUT/stop"' USR1 # the run sees it after its step, on whichever node it is

srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "${GPUS:-8}" \
    --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --rdzv_endpoint "$first:${PORT:-29500}" \
    -m ppomax train "${how[@]}" &
run=$!
while kill -0 $run 2>/dev/null; do wait $run; status=$?; done
if [ -e "$OUT/stop" ] && [ "$status" -ne 0 ]; then # not the last step yet
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
