"""linear_ppo_loss in an Accelerate loop over a transformers model: one rank, or DDP by `accelerate launch`.

    python engine/examples/loss_in_an_accelerate_loop.py [--steps 6]
The loop stays Accelerate's. The loss is called inside a forward of the prepared model, so that DDP's hooks see it; it
takes hidden states and the head's weight, and no logits exist. Sampling is transformers' own `generate`; the task:
words from the first half of the vocabulary. Needs torch, transformers, accelerate and ppomax_kernels."""

import argparse

import ppomax_kernels as K
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB, PROMPTS, LENGTH = 128, 32, 12


class PolicyLoss(nn.Module):
    """What is prepared: a causal LM whose forward gives PPO's loss, or old log-probabilities."""

    def __init__(self, model: LlamaForCausalLM):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, old: Tensor | None = None, advantages: Tensor | None = None) -> Tensor:
        """tokens (B, 1 + T): log-probabilities (B * T,), or with `old` and `advantages` the 0-d loss."""
        hidden = self.model.model(input_ids=tokens[:, :-1]).last_hidden_state.flatten(0, 1)
        weight, labels = self.model.lm_head.weight, tokens[:, 1:].flatten()
        if old is None or advantages is None:
            return K.linear_token_logprobs(hidden, weight, labels)
        loss, _ = K.linear_ppo_loss(hidden, weight, labels, old, advantages)
        return loss


def main() -> None:
    """Train, and print the mean reward of each step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, bos_token_id=0, eos_token_id=None, pad_token_id=0)  # fmt: skip
    policy = PolicyLoss(LlamaForCausalLM(config))
    policy, optimizer = accelerator.prepare(policy, torch.optim.AdamW(policy.parameters(), lr=1e-2))
    torch.manual_seed(accelerator.process_index)
    for step in range(steps):
        prompts = torch.zeros(PROMPTS, 1, dtype=torch.int64, device=accelerator.device)
        model = accelerator.unwrap_model(policy).model
        tokens = model.generate(prompts, max_new_tokens=LENGTH, do_sample=True, top_k=0, attention_mask=prompts + 1)
        rewards = (tokens[:, 1:] < VOCAB // 2).float().flatten()  # of each token, which is its advantage here
        with torch.no_grad():
            old = policy(tokens)
        advantages = K.whiten(rewards)
        for _ in range(4):
            with accelerator.autocast():
                loss = policy(tokens, old, advantages)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        mean = accelerator.gather(rewards).mean()
        accelerator.print(f"step {step:2}  reward {mean:.3f}  loss {loss:.4f}")


if __name__ == "__main__":
    main()
