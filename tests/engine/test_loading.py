"""Checkpoints into partitions: equal to from_pretrained, within a bound of host memory, and each
thing that can be wrong with the files named."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ppomax.models.partitioned import LoadingError, prepare, tensor_files
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[2]
RANKS = 2
WITHIN = 0.15
"""Between planned and measured peaks."""


def llama(tied: bool = False, **knobs) -> LlamaForCausalLM:
    torch.manual_seed(3)
    small = dict(vocab_size=101, hidden_size=36, intermediate_size=50, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=10)  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**small, "tie_word_embeddings": tied, **knobs}))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """Small checkpoints in several shards (`untied`), with tied weights, of another family; one that lost a shard."""
    folder = tmp_path_factory.mktemp("checkpoints")
    llama().save_pretrained(folder / "untied", max_shard_size="20KB")
    llama(tied=True).save_pretrained(folder / "tied", max_shard_size="20KB")
    torch.manual_seed(4)
    GPT2LMHeadModel(GPT2Config(vocab_size=67, n_embd=24, n_layer=2, n_head=3)).save_pretrained(folder / "gpt2")
    llama().save_pretrained(folder / "lost", max_shard_size="20KB")
    sorted((folder / "lost").glob("*.safetensors"))[1].unlink()
    return folder


def on_ranks(folder: Path, out: Path, *cases: str) -> list[dict]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)]
    command += ["-m", "tests.engine.loading_driver", str(folder), str(out), *cases]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def test_partitions_hold_what_from_pretrained_loads_and_train_like_it(checkpoints, tmp_path):
    """And, since it is one launch: what two ranks hold under each ZeRO stage is what was planned."""
    cases = ("equal", "missing_shard", "planned", "as_whole", "planned_hpz")
    for rank in on_ranks(checkpoints, tmp_path / "out.json", *cases):
        planned = rank["planned"] | rank["planned_hpz"]
        assert len(planned) == 15
        off = {what: ratio for what, ratio in planned.items() if not 1 - WITHIN < ratio < 1 + WITHIN}
        assert not off, off
        assert max(rank["as_whole"].values()) < 1e-5, rank["as_whole"]
        assert len(rank["as_whole"]) == 3
        assert set(rank["equal"]) == {"untied", "tied", "gpt2"}
        assert max(rank["equal"].values()) < 1e-5, rank["equal"]
        assert "model-00002-of-" in rank["missing_shard"]
        assert "is missing" in rank["missing_shard"]


@pytest.mark.slow
def test_cuts_of_the_full_scale_configs_train_under_zero_3_with_offload(tmp_path):
    from ppomax.config import config_names

    first, second = on_ranks(tmp_path, tmp_path / "out.json", "configs")
    assert first == second
    assert set(first["configs"]) == set(config_names())
    assert all(0 < norm < 1e3 for norm in first["configs"].values())


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["60MB", "10GB"])
def test_a_rank_holds_its_part_and_little_more(checkpoints, tmp_path, shard):
    """Against the bound of 1.5 x (model bytes / ranks) + 2 GB, with the size of one tensor in place of the 2 GB."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("untied", "tied", "gpt2", "lost"):
        (folder / name).symlink_to(checkpoints / name)
    large = dict(vocab_size=8000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=6, head_dim=64)
    llama(num_attention_heads=16, **large).save_pretrained(folder / "large", max_shard_size=shard)
    for rank in on_ranks(folder, tmp_path / "out.json", "host_memory"):
        memory = rank["host_memory"]
        assert memory["bytes"] > 300e6
        assert memory["grown"] <= 1.5 * memory["bytes"] / RANKS + memory["largest"], memory


def test_casts_and_leftovers_are_said(checkpoints, caplog):
    with caplog.at_level(logging.INFO, logger="ppomax.models.partitioned"):
        model, places = prepare(checkpoints / "untied", torch.bfloat16, "sequence_classification", new_head=True)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert "cast from F32 to bfloat16" in caplog.text
    assert "1 tensors are not part of LlamaForSequenceClassification: lm_head.weight" in caplog.text
    assert [name for name, source in places.items() if source is None] == ["score.weight"]


def test_what_is_wrong_with_the_files_is_named(checkpoints, tmp_path):
    with pytest.raises(LoadingError, match=r"model-00002-of-\d+\.safetensors is missing"):
        prepare(checkpoints / "lost", torch.float32)
    with pytest.raises(LoadingError, match=r"no tensor for score\.weight"):
        prepare(checkpoints / "untied", torch.float32, "sequence_classification")
    with pytest.raises(LoadingError, match=r"neither model\.safetensors nor"):
        tensor_files(tmp_path)

    llama().save_pretrained(tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(LoadingError, match="cut short"):
        prepare(tmp_path / "cut", torch.float32)

    llama().save_pretrained(tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    with pytest.raises(LoadingError, match=r"is \(101, 36\) in model\.safetensors, LlamaForCausalLM wants \(100, 36\)"):
        prepare(tmp_path / "other", torch.float32)

    llama().save_pretrained(tmp_path / "index", max_shard_size="20KB")
    index = tmp_path / "index" / "model.safetensors.index.json"
    placed = json.loads(index.read_text())
    files = sorted(set(placed["weight_map"].values()))
    placed["weight_map"]["model.norm.weight"] = next(f for f in files if f != placed["weight_map"]["model.norm.weight"])
    index.write_text(json.dumps(placed))
    with pytest.raises(LoadingError, match=r"places model\.norm\.weight in .* which does not hold it"):
        prepare(tmp_path / "index", torch.float32)
