"""The text of the embedded default's MODEL_CARD.md, filled with the figures that its build measured."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppomax.config.stages import BuildDefaultConfig
    from ppomax.default.texts import Part

CARD = """# The embedded default of ppomax

A small language model that continues short openings with film-review English, a reward model that prefers positive
sentiment, and what is needed to train one against the other. Made to prove the recipe on any machine; of no use beyond
that.

| file | what |
|---|---|
| `policy/` | Llama, {layers} blocks, width {hidden_size}, tied embeddings, {policy_parameters:,} parameters, bfloat16 |
| `reward_model/` | {reward_layers} such blocks and a `score` head, {reward_model_parameters:,} parameters, bfloat16 |
| `prompts.jsonl` | {prompts} openings, written for ppomax |
| `held_out_prompts.jsonl` | {held_out_prompts} more on other subjects, to judge policies by |
| `classifier.json` | the judge: positive? written by a person? plain data, read by `ppomax.assets.classifier` |
| `figures.json` | the figures below |

## Format
One row of tokens: BOS, prompt, response, and EOS if the model stopped by itself (a response cut at the length limit has
none). The tokenizer puts BOS in front and never adds EOS. The score is read at the last response token. Raw data text
(spaces before punctuation, stray double quotes) and tidy text give the same tokens; all text is lower case. Pad is a
token of its own. The score is the head's output plus `config.score_offset`; on the policy's own samples it has mean 0
and standard deviation 1.

## Data and licence
Sentence Polarity Dataset v1.0 (Pang and Lee, ACL 2005) and Sentiment Polarity Dataset v2.0 (Pang and Lee, ACL 2004),
licence CC BY 4.0. No row of them is in this package; the weights were trained on them and ship with this attribution.
Rows were dealt into three parts that never mix:

| part | snippets | reviews | used for |
|---|---|---|---|
| train | {train} | tokenizer, policy, reward model |
| held out | {held_out} | the figures below, nothing else |
| classifier | {classifier} | the judge, nothing else |

## Recipe
`build_default` (seed {seed}, torch threads: {threads}). Byte-level BPE of {vocab_size} tokens. Language modelling on
snippets and pieces of reviews, {lm_steps} steps of 1,024 tokens; fine-tuning on snippets cut after one to five words,
loss on the rest, {sft_steps} steps of 1,024 tokens. Reward model: the language model's first {reward_layers} blocks,
{reward_steps} steps of 1,024 tokens, pairwise softplus loss and 0.2 times the language-model loss on the positive side.
AdamW, cosine schedule. Seconds of this build's stages (those that were read from an earlier run count as 0): {seconds}.

## Held-out figures
| what | figure |
|---|---|
| policy: NLL of the rest of a held-out snippet, nats a token | {nll:.3f} (perplexity {perplexity:.1f}) |
{pair_rows}
| judge: accuracy on held-out snippets / reviews | {judge_snippets:.3f} / {judge_reviews:.3f} |
| judge: people's held-out snippets told from spoiled ones | {judge_written:.3f} |
| {count} samples of the policy (temperature 1, at most 48 tokens): called positive by the judge | {positive:.1%} |
| the same: mean length, share that ends by EOS | {mean_length:.1f}, {finished:.1%} |
| the same: mean score where the judge says positive / negative | {score_positive:+.2f} / {score_negative:+.2f} |
"""

PAIR_NAMES = {
    "snippets": "held-out snippets",
    "snippets_cut": "held-out snippets cut after 12 words",
    "pieces": "pieces of held-out reviews (each has its review's label, which is often wrong for it)",
    "reviews": "held-out reviews (their first 600 words)",
}


def model_card(
    config: BuildDefaultConfig, parts: dict[str, Part], figures: dict[str, Any], seconds: dict[str, float]
) -> str:
    """MODEL_CARD.md as text."""
    from ppomax.default.texts import held_out_prompt_rows, prompt_rows

    samples, judge = figures["samples"], figures["judge_accuracy"]
    counts = {name: f"{len(part.snippets):,} | {len(part.reviews):,}" for name, part in parts.items()}
    pair_rows = "\n".join(
        f"| reward model: pair accuracy on {PAIR_NAMES[name]} ({row['pairs']} pairs) | "
        f"{row['accuracy']:.3f} (ECE {row['ece']:.3f}) |"
        for name, row in figures["pairs"].items()
    )
    return CARD.format(
        **vars(config),
        **counts,
        prompts=len(prompt_rows()),
        held_out_prompts=len(held_out_prompt_rows()),
        pair_rows=pair_rows,
        policy_parameters=figures["policy_parameters"],
        reward_model_parameters=figures["reward_model_parameters"],
        seconds=", ".join(f"{name} {value:.0f}" for name, value in seconds.items()),
        nll=figures["policy_nll"],
        perplexity=math.exp(figures["policy_nll"]),
        judge_snippets=judge["snippets"],
        judge_reviews=judge["reviews"],
        judge_written=figures["judge_written"],
        count=samples["count"],
        positive=samples["positive_by_judge"],
        mean_length=samples["mean_length"],
        finished=samples["finished"],
        score_positive=samples["score_mean_where_judge_positive"],
        score_negative=samples["score_mean_where_judge_negative"],
    )
