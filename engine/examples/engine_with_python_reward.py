"""An engine with a reward of one's own: the policy that ships with ppomax, paid for short words.

    python engine/examples/engine_with_python_reward.py [--steps 3]

Give `policy` any causal language model of transformers (a path, a hub name or a model), `reward` any function of
prompts and responses, and the configuration whatever `ppomax train --help` names."""

import argparse
import sys

import ppomax
from ppomax.assets import shipped


def short_words(prompts: list[str], responses: list[str]) -> list[float]:
    """One score for each response: minus the mean length of its words."""
    return [-sum(map(len, r.split())) / max(1, len(r.split())) for r in responses]


def main() -> list[float]:
    """Train, print a line a step, and return the mean scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    steps = parser.parse_args().steps
    config = ppomax.load_config(
        overrides={
            "model.critic": "policy",  # a function has no weights that a critic could start from
            "ptx.coef": 0.0,  # no language-model term, so no texts are needed
            "batch.rollout_size": 32,
            "rollout.max_new_tokens": 16,
            "run.steps": steps,
        }
    )
    engine = ppomax.Engine(str(shipped("policy")), None, None, short_words, config)
    prompts = ["the film", "this movie is", "the story", "the acting seems"] * 8
    means = []
    for step in range(steps):
        metrics, scores = engine.step(prompts)
        means.append(float(scores.mean()))
        print(f"step {step}  score {means[-1]:+.3f}  kl {metrics['objective/kl_per_token']:.4f}  "
              f"{metrics['perf/tokens_per_second']:.0f} tokens/s", file=sys.stdout)  # fmt: skip
    _, scores = engine.preview(prompts[:4])
    print("held-out preview:", [round(float(s), 2) for s in scores])
    return means


if __name__ == "__main__":
    main()
