#!/usr/bin/env bash
# From a base model to a trained one, on dialogues in the format of HH-RLHF: minutes on two cores with the model that ships.
#
#     bash engine/examples/three_stages.sh [BASE [DATA [OUT]]]
#
# BASE: a causal language model. DATA: a folder with train.jsonl and held_out.jsonl, rows of `chosen` and `rejected`
# dialogues; made up here if it is not there. The sizes and rates are those of a small model.
set -euo pipefail
base=${1:-default} data=${2:-runs/dialogues} out=${3:-runs/three_stages}
[ -d "$data" ] || python "$(dirname "$0")/dialogues.py" "$data"

# 1. Fine-tuning on the chosen sides.
ppomax sft --model "$base" --data "$data/train.jsonl" --eval_data "$data/held_out.jsonl" \
  --steps 60 --batch_tokens 2048 --optim.lr 5e-4 --out "$out/sft"

# 2. A reward model from it, on the pairs.
ppomax reward-model --model "$out/sft" --data "$data/train.jsonl" --eval_data "$data/held_out.jsonl" \
  --steps 40 --batch_tokens 2048 --optim.lr 3e-4 --out "$out/reward"

# 3. PPO-max against it, on what the dialogues ask; every 5 steps the held-out ones, judged against the start.
ppomax train --model.policy "$out/sft" --model.reward_model "$out/reward" --data.prompts "$data/train.jsonl" \
  --data.eval_prompts "$data/held_out.jsonl" --monitor.eval_every 5 --rollout.max_new_tokens 24 \
  --batch.rollout_size 64 --batch.minibatch_size 16 --steps 15 --out "$out/ppo"

# What came of it: against the fine-tuned model, as a folder for transformers, and in its own words.
ppomax evaluate --policy "$out/ppo" --baseline "$out/sft" --reward_model "$out/reward" \
  --prompts "$data/held_out.jsonl" --max_new_tokens 24 --out "$out/evaluation"
ppomax export "$out/ppo" "$out/exported"
python - "$out/exported" <<'PYTHON'
import sys

from transformers import pipeline

answer = pipeline("text-generation", sys.argv[1])
print(answer("\n\nHuman: how is the music?\n\nAssistant:", max_new_tokens=24)[0]["generated_text"])
PYTHON
