"""Stages: what they compute, that they learn, and that a stopped run goes on to the bit."""

import json
import math
import os
import signal

import pytest
import torch
from ppomax.config import OptimConfig, RunConfig
from ppomax.config.mapping import ConfigError
from ppomax.data import Pair, Text
from ppomax.models import head_of, load_policy, load_reward_model, make_reward_model
from ppomax.recipe.batch import pack
from ppomax.saving import dealt
from ppomax.saving.folder import CheckpointError
from ppomax.saving.model_folder import save_model
from ppomax.stages import supervised_loop as loop
from ppomax.stages.reward_model import (
    RewardModelConfig,
    RewardTrainee,
    centre_scores,
    evaluate_pairs,
    pair_loss,
    score_texts,
    train_reward_model,
)
from ppomax.stages.sft import SftConfig, batch_nll, mean_nll, train_sft
from ppomax.stages.signals import Stopped
from ppomax.stages.supervised_loop import BatchOrder, Task, run_loop
from safetensors.torch import load_file

from .tiny_text import TEXTS, tiny_llama, tiny_tokenizer

CLOSE = 1e-5
GOOD = ["warm", "funny", "moving", "good"]
BAD = ["dull", "slow", "bad", "long"]


def rows_to(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def start(tmp_path):
    """A tiny policy on disk."""
    return str(save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "start"))


@pytest.fixture
def pairs_file(tmp_path):
    return rows_to(
        tmp_path / "pairs.jsonl",
        [{"prompt": "the film is", "chosen": f" {good}", "rejected": f" {bad} ."} for good in GOOD for bad in BAD],
    )


def sft_config(start, tmp_path, name="run", **changes):
    data = rows_to(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    impl = changes.pop("impl", "ref")
    run = RunConfig(**{"steps": 12, "seed": 3, "out": str(tmp_path / name), "checkpoint_every": 4} | changes)
    return SftConfig(
        model=start,
        data=data,
        eval_data=data,
        batch_tokens=40,
        eval_every=6,
        impl=impl,
        run=run,
        optim=OptimConfig(lr=1e-2, schedule="cosine"),
    )


# ---- batches --------------------------------------------------------------------------------------------------------


def test_every_row_comes_once_an_epoch_within_the_limit():
    lengths = [3, 9, 50, 4, 4, 7, 12, 1, 30, 8]
    order = BatchOrder(lengths, 20, seed=5)
    for _ in range(3):
        epoch = [order.batch(step) for step in range(order._start, order._start + len(order))]
        assert sorted(row for batch in epoch for row in batch) == list(range(len(lengths)))
        assert all(sum(lengths[row] for row in batch) <= 20 or len(batch) == 1 for batch in epoch)
        order.batch(order._start + len(order))


def test_batch_is_a_function_of_seed_and_step():
    lengths = list(range(1, 40))
    one, two, other = BatchOrder(lengths, 50, 1), BatchOrder(lengths, 50, 1), BatchOrder(lengths, 50, 2)
    steps = [0, 3, 40, 90]
    assert [one.batch(s) for s in range(91)][90] == two.batch(90)
    assert [BatchOrder(lengths, 50, 1).batch(s) for s in steps] != [other.batch(s) for s in steps]


# ---- losses ---------------------------------------------------------------------------------------------------------


def test_batch_nll_is_the_models_own_loss_on_each_text():
    model = tiny_llama(50)
    texts = [Text([1, 5, 6, 7, 2], 1), Text([1, 9, 8, 2], 2), Text([1, 4], 1)]
    nll = batch_nll(model, texts, impl="ref")
    want = []
    for text in texts:
        logprobs = model(torch.tensor([text.tokens])).logits[0].log_softmax(-1)
        want += [-logprobs[i - 1, text.tokens[i]] for i in range(text.loss_from, len(text.tokens))]
    assert abs(nll - torch.stack(want).mean()) < CLOSE
    assert abs(batch_nll(model, texts, normalizer=1.0, impl="ref") - torch.stack(want).sum()) < CLOSE
    assert mean_nll(model, texts, 5, impl="ref") == pytest.approx(nll.item(), abs=CLOSE)


def test_pair_loss_is_softplus_of_margin_minus_gap_plus_the_chosen_sides_nll():
    policy = tiny_llama(50)
    trainee = RewardTrainee(make_reward_model(policy), None)
    with torch.no_grad():
        trainee.reward_model.score.weight.mul_(50)
    pairs = [Pair([1, 5], [6, 2], [7, 8, 2], margin=0.3), Pair([1], [9, 2], [4], margin=0.0)]
    loss, metrics = pair_loss(trainee, pairs, margin=0.1, lm_coef=0.0)
    scores = [
        [trainee.reward_model.scores(*pack([p.prompt + side]))[0] for side in (p.chosen, p.rejected)] for p in pairs
    ]
    want = sum(-torch.log(torch.sigmoid(a - b - 0.1 - p.margin)) for (a, b), p in zip(scores, pairs)) / 2
    assert abs(loss - want) < CLOSE
    assert metrics["accuracy"] == sum(a > b for a, b in scores) / 2

    with_head = RewardTrainee(trainee.reward_model, head_of(policy))
    with_lm, _ = pair_loss(with_head, pairs, margin=0.1, lm_coef=0.5, impl="ref")
    nll = batch_nll(policy, [Text([1, 5, 6, 2], 2), Text([1, 9, 2], 1)], impl="ref")
    assert abs(with_lm - want - 0.5 * nll) < CLOSE


@pytest.mark.parametrize("tied", [True, False])
def test_imitation_loss_reaches_trunk_and_head(tmp_path, tied):
    path = save_model(tiny_llama(tied=tied), tiny_tokenizer(), tmp_path / "policy")
    trainee = RewardTrainee.load(RewardModelConfig(model=str(path), data=""))
    loss, _ = pair_loss(trainee, [Pair([1], [9, 2], [4, 2])], margin=0.0, lm_coef=1.0, impl="ref")
    loss.backward()
    missing = [name for name, p in trainee.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert missing == []


# ---- held-out figures and centring ----------------------------------------------------------------------------------


class FixedScores:
    """Stands in for a reward model: the score is the last token's id."""

    class model:
        device = torch.device("cpu")

    @staticmethod
    def scores(tokens, cu_seqlens):
        return tokens[cu_seqlens[1:].long() - 1].float()


def test_held_out_figures_by_hand():
    pairs = [Pair([1], [3], [0]), Pair([1], [0], [1]), Pair([1], [5], [5]), Pair([1], [4], [0])]
    figures = evaluate_pairs(FixedScores(), pairs, 4)
    assert figures["accuracy"] == (1 + 0 + 0.5 + 1) / 4
    gaps = [3, -1, 0, 4]
    assert figures["score_gap"] == sum(gaps) / 4
    assert figures["rank_loss"] == pytest.approx(sum(math.log1p(math.exp(-g)) for g in gaps) / 4, abs=CLOSE)
    confidence = [1 / (1 + math.exp(-abs(g))) for g in gaps]
    right = [1, 0, 0.5, 1]
    bins = {}
    for c, r in zip(confidence, right):
        bins.setdefault(min(9, int((c - 0.5) * 20)), []).append((c, r))
    want = sum(abs(sum(c for c, _ in b) - sum(r for _, r in b)) for b in bins.values()) / 4
    assert figures["ece"] == pytest.approx(want, abs=CLOSE)
    assert sum(figures["histogram"]["chosen"]) == sum(figures["histogram"]["rejected"]) == 4


@pytest.mark.parametrize("unit_std", [False, True])
def test_centring_moves_scores_and_survives_saving(tmp_path, unit_std):
    model = make_reward_model(tiny_llama())
    texts = [Text([1, i, i + 7, 2], 1) for i in range(3, 40)]
    before = score_texts(model, texts)
    centre_scores(model, lambda: score_texts(model, texts), unit_std=unit_std)
    after = score_texts(load_reward_model(save_model(model, tiny_tokenizer(), tmp_path / "m")), texts)
    assert abs(after.mean()) < CLOSE
    want = (before - before.mean()) / (before.std() if unit_std else 1)
    assert (after - want).abs().max() < CLOSE


# ---- the stages -----------------------------------------------------------------------------------------------------


def test_sft_learns_and_writes_a_model_and_metrics(start, tmp_path):
    path = train_sft(sft_config(start, tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    evals = [row["eval_nll"] for row in rows if "eval_nll" in row]
    assert rows[-1]["step"] == 12
    assert len(evals) == 2
    texts = [Text(tiny_tokenizer()(text)["input_ids"] + [2], 1) for text in TEXTS]
    assert mean_nll(load_policy(path), texts, 99, impl="ref") == pytest.approx(evals[-1], abs=CLOSE)
    assert evals[-1] < 0.9 * mean_nll(load_policy(start), texts, 99, impl="ref")


def test_reward_model_learns_its_pairs_and_reports_held_out_figures(start, pairs_file, tmp_path):
    out = tmp_path / "rm"
    centre = rows_to(
        tmp_path / "centre.jsonl", [{"prompt": "the film is", "response": f" {word}"} for word in GOOD + BAD]
    )
    path = train_reward_model(
        RewardModelConfig(
            model=start,
            data=pairs_file,
            eval_data=pairs_file,
            centre_data=centre,
            unit_std=True,
            layers=1,
            batch_tokens=400,
            eval_every=20,
            impl="ref",
            optim=OptimConfig(lr=1e-2, schedule="cosine"),
            run=RunConfig(steps=40, out=str(out)),
        )
    )
    figures = json.loads((out / "held_out.json").read_text())
    assert figures["accuracy"] == 1.0
    assert (out / "held_out.png").read_bytes().startswith(b"\x89PNG")
    model = load_reward_model(path)
    tokenizer = tiny_tokenizer()
    prompt = tokenizer("the film is")["input_ids"]
    texts = [
        Text([*prompt, *tokenizer(f" {word}", add_special_tokens=False)["input_ids"], 2], 1) for word in GOOD + BAD
    ]
    scores = score_texts(model, texts)
    assert abs(scores.mean()) < CLOSE
    assert abs(scores.std() - 1) < CLOSE
    assert scores[:4].min() > scores[4:].max()


def test_autocast_trains_float32_weights(start, tmp_path):
    config = sft_config(start, tmp_path)
    path = train_sft(SftConfig(**{**vars(config), "autocast": True}))
    assert load_file(path / "model.safetensors")["model.norm.weight"].dtype == torch.float32


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("when", ["in a step", "in a save"])
def test_a_killed_run_resumes_to_the_bit(start, tmp_path, monkeypatch, when):
    whole = train_sft(sft_config(start, tmp_path, "whole"))
    saves = 0
    original = dealt.write_file

    def dying_save(*arguments):
        nonlocal saves
        saves += 1
        if saves == 4:  # two files of tensors a checkpoint: inside the second save
            raise _Killed
        return original(*arguments)

    def dying_step(trained, *arguments):
        if trained.steps == 6:
            raise _Killed
        return step(trained, *arguments)

    step = loop._step
    with monkeypatch.context() as patch:
        if when == "in a save":
            patch.setattr(dealt, "write_file", dying_save)
        else:
            patch.setattr(loop, "_step", dying_step)
        with pytest.raises(_Killed):
            train_sft(sft_config(start, tmp_path, "killed"))
    resumed = train_sft(sft_config(start, tmp_path, "killed", resume=True))
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    steps = [
        [json.loads(line)["step"] for line in (p.parent / "metrics.jsonl").read_text().splitlines()]
        for p in (whole, resumed)
    ]
    assert steps[0] == steps[1]


def test_sigterm_checkpoints_and_leaves_and_resume_ends_the_run(start, tmp_path, monkeypatch):
    step = loop._step

    def with_signal(trained, *arguments):
        if trained.steps == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trained, *arguments)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_step", with_signal)
        with pytest.raises(Stopped, match="SIGTERM after step 6; go on with --resume"):
            train_sft(sft_config(start, tmp_path, "stopped"))
    assert signal.getsignal(signal.SIGTERM) is before
    assert (tmp_path / "stopped" / "checkpoints" / "step-000006").is_dir()
    resumed = train_sft(sft_config(start, tmp_path, "stopped", resume=True))
    whole = train_sft(sft_config(start, tmp_path, "whole"))
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_checkpoints_of_another_run_are_not_taken_over(start, tmp_path):
    config = sft_config(start, tmp_path)
    train_sft(config)
    with pytest.raises(CheckpointError, match="holds checkpoints of an earlier run"):
        train_sft(config)
    other = SftConfig(**{**vars(sft_config(start, tmp_path, resume=True)), "batch_tokens": 50})
    with pytest.raises(CheckpointError, match="batch_tokens differs"):
        train_sft(other)


def test_nan_losses_are_skipped_counted_and_stop_the_run(tmp_path, caplog):
    module = torch.nn.Linear(2, 1)
    weight = module.weight.detach().clone()

    steps = iter([0.0, 0.0])

    def loss_of(module, rows, batch):
        return module.weight.sum() * next(steps, math.nan), {}

    config = SftConfig(model="", data="", optim=OptimConfig(lr=0.1), run=RunConfig(steps=20, max_bad_steps=3))
    with pytest.raises(FloatingPointError, match="3 steps in a row"):
        run_loop(module, Task([1, 1], loss_of, lambda module: {}), config, tmp_path)
    assert torch.equal(module.weight, weight)
    assert caplog.text.count("skipped: loss nan") == 3


@pytest.mark.parametrize(
    ("kind", "knob"),
    [(SftConfig, {"max_tokens": 1}), (RewardModelConfig, {"lm_coef": -1.0}), (RewardModelConfig, {"unit_std": True})],
)
def test_senseless_knobs_are_refused(kind, knob):
    with pytest.raises(ConfigError, match=next(iter(knob))):
        kind(model="m", data="d", **knob)
