"""Rebuild the embedded default from raw labelled reviews, by the stages that a user's own models go through.

    split rows -> tokenizer -> language model on the train part -> fine-tuning on openings of snippets = policy
    -> its samples -> reward model on train pairs (the language model's first blocks), centred on the samples
    -> judge on the classifier part -> held-out figures -> model card
Everything that a stage reads or writes lies in `<out>/work`; a stage whose model is there is not run again.
`<out>/default` is what ships. Same data, seed, machine and threads give the same result.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from ppomax.assets.classifier import SentimentClassifier
from ppomax.config import OptimConfig, RunConfig
from ppomax.config.stages import BuildDefaultConfig, RewardModelConfig, SftConfig
from ppomax.data import Text, load_pairs, load_prompts, load_texts
from ppomax.default import texts as files
from ppomax.default.classifier import train_classifier, with_written, written_rows
from ppomax.default.model_card import model_card
from ppomax.models import RewardModel, load_policy, load_reward_model, load_tokenizer, use_threads
from ppomax.rollout import Sampling, decode
from ppomax.saving.lock import claimed
from ppomax.saving.model_folder import save_model
from ppomax.stages.reward_model import centre_scores, evaluate_pairs, score_texts, train_reward_model
from ppomax.stages.sft import mean_nll, train_sft

log = logging.getLogger(__name__)

LIMIT_BYTES = 15_000_000


def build_default(config: BuildDefaultConfig) -> Path:
    """Run every stage and return `<out>/default`. Raises DataError for unusable data, ValueError if the result is too
    large."""
    with claimed(Path(config.out), config):
        return _build(config)


def _build(config: BuildDefaultConfig) -> Path:
    use_threads(config.threads)
    work, out = Path(config.out) / "work", Path(config.out) / "default"
    work.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    parts = files.read_parts(Path(config.data), config.seed)
    _write_inputs(parts, work, config)
    _timed(seconds, "language model", _language_model, work, config)
    _timed(seconds, "fine-tuning", _fine_tune, work, config)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    tokenizer = load_tokenizer(work / "init")
    _ship(load_policy(work / "sft" / "policy"), tokenizer, out / "policy")
    files.write_rows(out / "prompts.jsonl", files.prompt_rows())
    files.write_rows(out / "held_out_prompts.jsonl", files.held_out_prompt_rows())
    texts = _timed(seconds, "sampling", _sample, out, tokenizer, config)
    _timed(seconds, "reward model", _reward_model, work, config)
    reward_model = load_reward_model(work / "reward_model" / "reward_model", torch.bfloat16)
    whole = load_reward_model(reward_model.model, torch.float32)
    centre_scores(whole, lambda: score_texts(whole, texts), unit_std=True)
    _ship(reward_model.model, tokenizer, out / "reward_model")
    judge = _timed(seconds, "judge", _judge, parts["classifier"], out)
    figures = _timed(seconds, "held-out figures", _held_out_figures, out, parts["held_out"], texts, judge, config)
    (out / "figures.json").write_text(json.dumps(figures | {"seconds": seconds}, indent=1) + "\n", encoding="utf-8")
    (out / "MODEL_CARD.md").write_text(model_card(config, parts, figures, seconds), encoding="utf-8")
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    if size > LIMIT_BYTES:
        raise ValueError(
            f"build_default: {out} has {size} bytes, the limit is {LIMIT_BYTES}; make hidden_size or layers smaller"
        )
    log.info("%s: %.1f MB, %.0f s", out, size / 1e6, sum(seconds.values()))
    return out


def _timed(seconds: dict[str, float], name: str, stage: Any, *arguments: Any) -> Any:
    log.info("stage: %s", name)
    began = time.perf_counter()
    result = stage(*arguments)
    seconds[name] = round(time.perf_counter() - began, 1)
    return result


def _write_inputs(parts: dict[str, files.Part], work: Path, config: BuildDefaultConfig) -> None:
    train, held_out = parts["train"], parts["held_out"]
    files.write_rows(work / "lm.jsonl", files.lm_rows(train))
    files.write_rows(work / "sft.jsonl", files.sft_rows(train, config.seed))
    files.write_rows(work / "sft_held_out.jsonl", files.sft_rows(held_out, config.seed))
    files.write_rows(work / "pairs.jsonl", files.pair_rows(train, config.seed))
    for name, rows in files.eval_pair_sets(held_out, config.seed).items():
        files.write_rows(work / f"pairs_held_out_{name}.jsonl", rows)
    if (work / "init" / "config.json").is_file():
        return
    tokenizer = files.train_tokenizer([row["text"] for row in files.lm_rows(train)], config.vocab_size)
    torch.manual_seed(config.seed)
    heads = config.hidden_size // 32
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.hidden_size * 7 // 3,
            num_hidden_layers=config.layers,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 3),
            head_dim=32,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    save_model(model, tokenizer, work / "init")


def _shared(work: Path, name: str, steps: int, lr: float, config: BuildDefaultConfig) -> dict[str, Any]:
    """Knobs that the three training stages set alike."""
    resume = (work / name / "checkpoints").is_dir()
    return {
        "autocast": True,
        "attention": "eager",
        "impl": config.impl,
        "eval_every": 100 if steps < 1000 else 500,
        "optim": OptimConfig(lr=lr, schedule="cosine", weight_decay=0.1, warmup=0.04, min_ratio=0.05),
        "run": RunConfig(steps, config.seed, str(work / name), resume=resume, checkpoint_every=500, keep_checkpoints=1),
    }


def _language_model(work: Path, config: BuildDefaultConfig) -> None:
    if (work / "lm" / "policy").is_dir():
        return
    train_sft(
        SftConfig(
            model=str(work / "init"),
            data=str(work / "lm.jsonl"),
            eval_data=str(work / "sft_held_out.jsonl"),
            max_tokens=128,
            batch_tokens=1024,
            **_shared(work, "lm", config.lm_steps, 2e-3, config),
        )
    )


def _fine_tune(work: Path, config: BuildDefaultConfig) -> None:
    if (work / "sft" / "policy").is_dir():
        return
    train_sft(
        SftConfig(
            model=str(work / "lm" / "policy"),
            data=str(work / "sft.jsonl"),
            eval_data=str(work / "sft_held_out.jsonl"),
            max_tokens=128,
            batch_tokens=1024,
            **_shared(work, "sft", config.sft_steps, 5e-4, config),
        )
    )


def _reward_model(work: Path, config: BuildDefaultConfig) -> None:
    if (work / "reward_model" / "reward_model").is_dir():
        return
    train_reward_model(
        RewardModelConfig(
            model=str(work / "lm" / "policy"),
            data=str(work / "pairs.jsonl"),
            eval_data=str(work / "pairs_held_out_snippets.jsonl"),
            layers=config.reward_layers,
            max_tokens=1024,
            bad_rows="drop",
            lm_coef=0.2,
            batch_tokens=1024,
            **_shared(work, "reward_model", config.reward_steps, 5e-4, config),
        )
    )


def _ship(model: Any, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Save in bfloat16; what was already rounded stays as it is."""
    save_model(model.to(torch.bfloat16), tokenizer, path)


def _sample(out: Path, tokenizer: PreTrainedTokenizerBase, config: BuildDefaultConfig) -> list[Text]:
    """Prompt + response of the shipped policy, sampled as PPO will."""
    policy = load_policy(out / "policy").eval()
    prompts, _ = load_prompts(out / "prompts.jsonl", tokenizer, 64)
    prompts = (prompts * (config.samples // len(prompts) + 1))[: config.samples]
    sampling = Sampling(48, seed=config.seed, impl=config.impl)
    responses = decode(policy, prompts, range(len(prompts)), sampling, eos_ids=[tokenizer.eos_token_id])
    return [Text(prompt + response, len(prompt)) for prompt, response in zip(prompts, responses.tokens)]


def _judge(part: files.Part, out: Path) -> SentimentClassifier:
    rows = [*part.snippets, *part.reviews]
    judge = train_classifier([row.text for row in rows], [row.label for row in rows], min_documents=4)
    judge = with_written(judge, [row.text for row in part.snippets])
    judge.save(out / "classifier.json")
    return SentimentClassifier.load(out / "classifier.json")


def _held_out_figures(
    out: Path, held_out: files.Part, samples: list[Text], judge: SentimentClassifier, config: BuildDefaultConfig
) -> dict[str, Any]:
    """Figures of what ships (bfloat16 weights, read as float32) on the held-out part and on the policy's own
    samples."""
    work = Path(config.out) / "work"
    tokenizer = load_tokenizer(out / "policy")
    policy, reward_model = load_policy(out / "policy").eval(), load_reward_model(out / "reward_model").eval()
    texts, _ = load_texts(work / "sft_held_out.jsonl", tokenizer, 256)
    figures: dict[str, Any] = {
        "policy_parameters": sum(p.numel() for p in policy.parameters()),
        "reward_model_parameters": sum(p.numel() for p in reward_model.parameters()),
        "policy_nll": mean_nll(policy, texts, 4096, impl=config.impl),
        "judge_accuracy": {
            name: _judge_accuracy(judge, rows)
            for name, rows in (("snippets", held_out.snippets), ("reviews", held_out.reviews))
        },
        "judge_written": written_accuracy(judge, [row.text for row in held_out.snippets]),
        "pairs": {},
    }
    for name in ("snippets", "snippets_cut", "pieces", "reviews"):
        pairs, _ = load_pairs(work / f"pairs_held_out_{name}.jsonl", tokenizer, 1024, bad_rows="drop")
        found = evaluate_pairs(reward_model, pairs, 4096)
        figures["pairs"][name] = {
            key: round(found[key], 4) for key in ("pairs", "accuracy", "rank_loss", "score_gap", "ece")
        }
    return figures | _sample_figures(samples, tokenizer, reward_model, judge)


def _judge_accuracy(judge: SentimentClassifier, rows: list[files.Labelled]) -> float:
    return sum((judge.logit(row.text) > 0) == bool(row.label) for row in rows) / len(rows)


def written_accuracy(judge: SentimentClassifier, texts: list[str]) -> float:
    """How often the judge tells people's texts from spoiled ones."""
    rows, labels = written_rows(texts, 1)
    return sum((judge.written_logit(row) > 0) == bool(label) for row, label in zip(rows, labels)) / len(rows)


def _sample_figures(
    samples: list[Text], tokenizer: PreTrainedTokenizerBase, reward_model: RewardModel, judge: SentimentClassifier
) -> dict[str, Any]:
    scores = score_texts(reward_model, samples)
    words = [str(tokenizer.decode(text.tokens, skip_special_tokens=True)) for text in samples]
    positive = torch.tensor([judge.logit(text) > 0 for text in words])
    lengths = [len(text.tokens) - text.loss_from for text in samples]
    return {
        "samples": {
            "count": len(samples),
            "score_mean": scores.mean().item(),
            "score_std": scores.std().item(),
            "positive_by_judge": positive.float().mean().item(),
            "score_mean_where_judge_positive": scores[positive].mean().item(),
            "score_mean_where_judge_negative": scores[~positive].mean().item(),
            "mean_length": sum(lengths) / len(lengths),
            "finished": sum(text.tokens[-1] == tokenizer.eos_token_id for text in samples) / len(samples),
        }
    }
