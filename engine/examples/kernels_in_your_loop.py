"""A whole PPO trainer on plain torch and the kernels, with nothing of the engine: copy it and go on from there.

    python engine/examples/kernels_in_your_loop.py [--steps 12]
The task: eight tokens, as many of them even as possible, near to where the model started. What the kernels do is
marked; all else is the loop that you have already. Needs torch and ppomax_kernels alone."""

import argparse
import copy

import ppomax_kernels as K
import torch
from torch import Tensor, nn

VOCAB, WIDTH, LENGTH, BATCH, EPOCHS, KL = 64, 48, 8, 64, 4, 0.01


class Model(nn.Module):
    """A causal transformer with a language-model head and a value head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LENGTH + 1, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, 0.0, batch_first=True, norm_first=True) for _ in range(2)
        )
        self.head, self.value = nn.Linear(WIDTH, VOCAB, bias=False), nn.Linear(WIDTH, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> hidden states (B * T, D)."""
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        x = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return x.flatten(0, 1)


@torch.no_grad()
def sample(model: Model, step: int) -> Tensor:
    """(B, T + 1) tokens, the first of them 0. Each row has a random stream of its own."""
    tokens, seeds = torch.zeros(BATCH, 1, dtype=torch.int64), torch.arange(BATCH) + 1000 * step
    for position in range(LENGTH):
        last = model(tokens).view(BATCH, -1, WIDTH)[:, -1]
        token, *_ = K.sample(model.head(last), seeds, torch.full((BATCH,), position))  # kernel: one fused draw a row
        tokens = torch.cat([tokens, token[:, None]], 1)
    return tokens


def main() -> None:
    """Train, and print the mean reward of each step."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--steps", type=int, default=12)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    model = Model()
    reference = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    cu_seqlens = torch.arange(0, BATCH * LENGTH + 1, LENGTH, dtype=torch.int32)
    for step in range(steps):
        tokens = sample(model, step)
        labels, scores = tokens[:, 1:].flatten(), (tokens[:, 1:] % 2 == 0).float().mean(1)
        with torch.no_grad():
            hidden, at_start = model(tokens[:, :-1]), reference(tokens[:, :-1])
            old = K.linear_token_logprobs(hidden, model.head.weight, labels)  # kernel: no (N, V) logits
            ref = K.linear_token_logprobs(at_start, reference.head.weight, labels)
            values = model.value(hidden)[:, 0]
            rewards = K.token_rewards(scores, old, ref, cu_seqlens, kl_coef=KL)  # kernel: KL, score at the last token
            advantages, returns = K.gae(rewards, values, cu_seqlens, gamma=1.0, lam=0.95)  # kernel: packed sequences
            advantages = K.whiten(advantages)  # kernel
        for _ in range(EPOCHS):
            hidden = model(tokens[:, :-1])
            pg_loss, figures = K.linear_ppo_loss(hidden, model.head.weight, labels, old, advantages)  # kernel
            v_loss, _ = K.value_loss(model.value(hidden)[:, 0], values, returns)  # kernel
            optimizer.zero_grad()
            (pg_loss + v_loss).backward()
            optimizer.step()
        print(f"step {step:2}  reward {scores.mean():.3f}  kl {(old - ref).mean():.4f}  clip {figures['clipfrac']:.3f}")


if __name__ == "__main__":
    main()
