"""models/files.py: a model's folder is what its configuration says, whole, and holds no code; or it is refused by name,
whichever reader opens it."""

import json
import logging
import shutil

import pytest
import torch
from ppomax.models import load_policy, load_reward_model, load_tokenizer, make_critic, make_reward_model, pick_device
from ppomax.models.files import LoadingError, model_config, model_folder
from ppomax.models.partitioned import prepare
from ppomax.models.sources import use_threads
from ppomax.planning.plan import shape_of
from ppomax.saving.model_folder import save_model
from safetensors.torch import load_file, save_file

from .tiny import tiny_policy, tiny_reward, tiny_tokenizer


def partitioned(path, kind="causal_lm"):
    return prepare(path, torch.float32, kind)


READERS = {
    "policy": load_policy,
    "policy, in parts": partitioned,
    "reward model": load_reward_model,
    "reward model, in parts": lambda path: partitioned(path, "sequence_classification"),
    "critic": make_critic,
}
POLICY = [name for name in READERS if name.startswith("policy")]
SCORER = [name for name in READERS if not name.startswith("policy")]


@pytest.fixture
def folder(tmp_path):
    """A policy and a reward model, in files of one tensor or two."""
    save_model(tiny_policy(), tiny_tokenizer(), tmp_path / "policy")
    save_model(tiny_reward(), tiny_tokenizer(), tmp_path / "reward")
    return tmp_path


def edit(path, change):
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def edit_config(path, **knobs):
    found = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**found, **knobs}))


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", POLICY)
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.embed_tokens.weight"])
def test_a_missing_weight_is_never_drawn(folder, reader, name):
    edit(folder / "policy", lambda weights: weights.pop(name))
    with pytest.raises(LoadingError, match=f"no tensor for {name} of LlamaForCausalLM"):
        READERS[reader](folder / "policy")


@pytest.mark.parametrize("reader", SCORER)
def test_a_scorer_without_its_head_is_refused(folder, reader):
    edit(folder / "reward", lambda weights: weights.pop("score.weight"))
    with pytest.raises(LoadingError, match=r"no tensor for score\.weight"):
        READERS[reader](folder / "reward")


@pytest.mark.parametrize("reader", SCORER)
@pytest.mark.parametrize("name", ["v_head.weight", "value_head.weight", "v_head.summary.weight"])
def test_a_head_of_another_name_is_to_be_renamed(folder, reader, name):
    edit(folder / "reward", lambda weights: weights.update({name: weights.pop("score.weight")}))
    with pytest.raises(LoadingError, match=rf"{name} \(1, 32\) is there; .* save it as score\.weight"):
        READERS[reader](folder / "reward")


@pytest.mark.parametrize("reader", ["reward model", "reward model, in parts"])
def test_a_language_model_is_no_reward_model(folder, reader):
    edit_config(folder / "policy", num_labels=1, id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0})
    with pytest.raises(LoadingError, match="train one by `ppomax reward-model --model"):
        READERS[reader](folder / "policy")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("reader", POLICY)
def test_a_reward_model_is_no_policy(tmp_path, reader, tied):
    save_model(make_reward_model(tiny_policy(tied=tied)), None, tmp_path / "reward")
    with pytest.raises(LoadingError, match="reward model"):
        READERS[reader](tmp_path / "reward")


@pytest.mark.parametrize(("reader", "which"), [*((r, "policy") for r in POLICY), *((r, "reward") for r in SCORER)])
def test_a_weight_without_a_place_or_of_another_shape_is_refused(folder, reader, which):
    kept = shutil.copytree(folder / which, folder / "kept")
    edit(folder / which, lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}))
    with pytest.raises(LoadingError, match=r"has no place for model\.layers\.0\.self_attn\.q_proj\.bias"):
        READERS[reader](folder / which)
    edit(kept, lambda w: w.update({"model.norm.weight": torch.ones(30)}))
    with pytest.raises(LoadingError, match=r"model\.norm\.weight is \(30,\) in model\.safetensors, .* wants \(32,\)"):
        READERS[reader](kept)


def test_the_other_kind_s_head_is_left_out_and_said(folder, caplog):
    edit(folder / "policy", lambda w: w.update({"v_head.summary.weight": torch.zeros(1, 32)}))
    edit(folder / "reward", lambda w: w.update({"lm_head.weight": torch.zeros(64, 32)}))
    with caplog.at_level(logging.WARNING):
        load_policy(folder / "policy")
        load_reward_model(folder / "reward")
    assert "not part of LlamaForCausalLM: v_head.summary.weight" in caplog.text
    assert "not part of LlamaForSequenceClassification: lm_head.weight" in caplog.text


# ---- no code --------------------------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a file was unpickled",))


def with_index(path, file):
    names = list(load_file(path / "model.safetensors"))
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))


@pytest.mark.parametrize("reader", POLICY)
@pytest.mark.parametrize(
    "file", ["pytorch_model.bin", "../policy2/model.safetensors", "/etc/passwd", "sub/model.safetensors"]
)
def test_an_index_leads_to_no_pickle_and_nowhere_else(folder, reader, file):
    import pickle

    shutil.copytree(folder / "policy", folder / "policy2")
    with_index(folder / "policy", file)
    (folder / "policy" / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(LoadingError, match=r"only \.safetensors files of the same folder are read"):
        READERS[reader](folder / "policy")


@pytest.mark.parametrize("reader", POLICY)
def test_pickles_alone_are_no_model(folder, reader):
    import pickle

    (folder / "policy" / "model.safetensors").unlink()
    (folder / "policy" / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(LoadingError, match=r"holds neither model\.safetensors nor"):
        READERS[reader](folder / "policy")


@pytest.mark.parametrize("reader", [*POLICY, "plan"])
@pytest.mark.parametrize(
    "knobs",
    [
        {"attn_implementation": "someone/kernels"},
        {"_attn_implementation": "someone/kernels:f"},
        {"_attn_implementation": {"": "someone/kernels"}},
        {"text_config": {"experts_implementation": "someone/kernels"}},
    ],
)
def test_a_configuration_fetches_no_kernel(folder, reader, knobs):
    edit_config(folder / "policy", **knobs)
    with pytest.raises(ValueError, match="names compiled kernels to be fetched"):
        (shape_of if reader == "plan" else READERS[reader])(str(folder / "policy"))


@pytest.mark.parametrize("reader", POLICY)
def test_quantised_weights_are_refused(folder, reader):
    edit_config(folder / "policy", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(LoadingError, match="quantised weights"):
        READERS[reader](folder / "policy")


# ---- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        '{"model_type": "no_such_model"}',
        '{"model_type": "llama", "hidden_size": "x"}',
        '{"model_type": "llama", "num_attention_heads": 0}',
    ],
)
def test_a_damaged_configuration_is_named(folder, reader, text):
    which = "policy" if reader.startswith("policy") else "reward"
    (folder / which / "config.json").write_text(text)
    with pytest.raises(LoadingError, match=str(folder / which)):
        READERS[reader](folder / which)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_named(folder, name):
    (folder / "policy" / name).write_text('{"a": ')
    with pytest.raises(LoadingError, match="holds no tokenizer"):
        load_tokenizer(folder / "policy")


# ---- paths ----------------------------------------------------------------------------------------------------------


def test_a_wrong_path_is_named_with_the_nearest_folder(folder):
    for wrong in (folder / "polcy", folder / "polcy" / "final"):
        with pytest.raises(FileNotFoundError, match=f"no model folder {wrong} .did you mean {folder / 'policy'}"):
            model_folder(wrong)


def test_a_name_that_no_hub_gives_is_named(folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(folder)
    with pytest.raises(FileNotFoundError, match=r"no model folder polcy \(did you mean policy\?\).*as a hub name"):
        model_folder("polcy")


def test_an_adapter_s_folder_says_what_to_do(folder):
    (folder / "policy" / "model.safetensors").unlink()
    (folder / "policy" / "adapter_config.json").write_text("{}")
    for reader in (load_policy, model_config, partitioned):
        with pytest.raises(LoadingError, match=r"is a PEFT adapter, not a model; merge it into its base first"):
            reader(folder / "policy")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "cpu:x", "meta:-3", ""])
def test_a_device_that_is_not_there_is_named(name):
    with pytest.raises(ValueError, match=f"run.device: '{name}' cannot be used here"):
        pick_device(name)


def test_more_threads_than_cpus_are_refused():
    with pytest.raises(ValueError, match="1000000 were asked for on a machine with"):
        use_threads(1_000_000)


@pytest.mark.parametrize("inside", ["engine.json", "checkpoints/x"])
def test_a_checkpoint_is_named_with_the_command_that_makes_a_model_of_it(tmp_path, inside):
    (tmp_path / inside).parent.mkdir(exist_ok=True)
    (tmp_path / inside).write_text("{}")
    with pytest.raises(LoadingError, match=r"is a checkpoint, or the folder of a run .* `ppomax export .* OUT`"):
        load_policy(tmp_path)
