"""What each rank of a sharded test runs; test_sharded.py starts it once for many cases and reads the verdicts.

torchrun --nproc_per_node 2 -m tests.engine.rank_driver two FOLDER     every case of two ranks, one after another
python -m tests.engine.rank_driver one FOLDER                          ZeRO with a single rank
torchrun --max-restarts 1 ... -m tests.engine.rank_driver job FOLDER NAME MOMENT    `ppomax train`, killed once
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ppomax import cli
from ppomax.config import TrainConfig, load_config
from ppomax.config.launcher import restarts
from ppomax.data import Text
from ppomax.engine import Engine
from ppomax.saving.export_policy import export_policy
from ppomax.saving.folder import CheckpointError
from ppomax.sharding import ranks
from ppomax.sharding.settle import agreed_config
from ppomax.stages import doctor
from ppomax.stages.ppo import train_ppo
from transformers import AutoModelForCausalLM

from tests.engine.copying_sampler import Copy
from tests.engine.rank_cases import Kept, keep, tried
from tests.engine.stage_cases import stages
from tests.engine.tiny import SMALL, prompts, small_config, tiny_engine, tiny_policy, tiny_tokenizer

PARTITION_ALL = {
    "zero_optimization": {
        "stage3_param_persistence_threshold": 0,
        "reduce_bucket_size": 100_000,
        "allgather_bucket_size": 100_000,
    }
}
"""DeepSpeed keeps small parameters whole, and all of a tiny model's are small: cut them too."""
COUNTS = (8, 7, 8, 5, 8)
"""Prompts in each of five steps; odd ones too."""

NEXT = (7,)
"""And in what comes after a checkpoint."""
OWN = ("time/", "perf/", "rollout/prefill", "rollout/slot", "rollout/cache", "rollout/planned", "rollout/decode")
"""Metrics of one rank's own work."""

# ---- engines --------------------------------------------------------------------------------------------------------


def config_of(folder: Path, stage: int | None, **knobs: object) -> TrainConfig:
    """All that can depend on ranks: whitening, ptx, the adaptive KL controller, tight micro-batches."""
    named: dict[str, object] = {"batch__micro_tokens": 40, "advantage__whiten": True}
    named |= {"ptx__coef": 0.1, "ptx__batch_size": 3, "kl__controller": "adaptive"}
    if stage in (1, 2, 3):
        extra = folder / "deepspeed.json"
        extra.write_text(json.dumps(PARTITION_ALL), encoding="utf-8")
        named["sharding__deepspeed"] = str(extra)
    return small_config(sharding__zero_stage=stage, **{**named, **knobs})


def texts(count: int) -> list[Text]:
    return [Text(p, 1) for p in prompts(count, seed=9)]


def engine_of(config: TrainConfig, **parts: Any) -> Engine:
    return tiny_engine(config, texts=texts, **parts)


def steps(engine: Engine, counts: tuple[int, ...] = COUNTS) -> list[dict[str, float]]:
    """Metrics of steps whose prompts are a function of the engine's state alone; times left out."""
    rows = [engine.step(prompts(count, seed=engine.buffers)).metrics for count in counts]
    return [{k: v for k, v in row.items() if not k.startswith(OWN)} for row in rows]


def state_of(engine: Engine) -> dict[str, list[float]]:
    """Every trained weight and all optimiser state of policy and critic."""
    out = {}
    for role in ("policy", "critic"):
        for part in getattr(engine, role).lazy():
            out.update({f"{role}.{name}": x.get().flatten().tolist() for name, x in part.items()})
    return out


OF_A_MINIBATCH = {"advantage__over": "minibatch", "advantage__clip": 0.5, "loss__ent_coef": 0.01,
                  "loss__ent_target": 2.0, "loss__ratio_to": "reference", "batch__kl_stop": 10.0}  # fmt: skip
"""What a whole minibatch decides, whichever rank holds its sequences."""
FOLLOWED: dict[str, object] = {"kl__refresh_every": 1, "kl__estimator": "vocabulary", "reward__standardize": "return",
                               "rollout__temperature": 0.8}  # fmt: skip
AGAIN = {"model__gradient_checkpointing": True}
VARIANTS: dict[str, tuple[dict[str, object], dict[str, Any]]] = {
    "tied": ({**OF_A_MINIBATCH, "batch__epochs": 2}, {"policy": lambda: tiny_policy(tied=True)}),
    "recomputed": ({**AGAIN, "rollout__top_k": 6}, {}),
    "hydra": (
        {
            "model__train": "hydra",
            "model__trained_layers": 1,
            "model__critic": "policy",
            "batch__epochs": 2,
            **AGAIN,
            "rollout__top_p": 0.9,
        },
        {},
    ),
    "lora": ({"model__train": "lora", **AGAIN}, {}),
    "whole critic": ({"model__critic": "policy", "sharding__frozen": "whole"}, {}),
    "offloaded": ({"sharding__offload_optimizer": True, "sharding__offload_param": True}, {}),
    "hpz": ({"sharding__hpz": 2}, {}),
    "optimiser offloaded": ({"sharding__offload_optimizer": True}, {}),
    "frozen offloaded": ({"sharding__frozen": "offloaded"}, {}),
    "bfloat16": ({"model__dtype": "bfloat16", "batch__minibatch_size": 8}, {}),
    "text reward": (
        {"reward__tokenizer": lambda folder: own_tokenizer(folder), "model__critic": "policy"},
        {"tokenizer": tiny_tokenizer},
    ),
    "adapter critic": (
        {"model__train": "lora", "model__critic": "policy", "model__critic_train": "lora", "batch__epochs": 2, **AGAIN},
        {},
    ),
    "reference refreshed": (FOLLOWED, {}),
    "branch refreshed": (
        {**FOLLOWED, "model__train": "hydra", "model__trained_layers": 1, "model__critic": "policy"},
        {},
    ),
    "own sampler": ({}, {"sampler": Copy}),
    "own sampler, lora": ({"model__train": "lora"}, {"sampler": Copy}),
    "our kernels": ({"impl": "auto", "advantage__bootstrap_truncated": True}, {}),
    "exact": ({"impl": "auto", "rollout__exact": True, "rollout__temperature": 0.8}, {}),
}
STAGES = {"optimiser offloaded": (1, 2), "frozen offloaded": (2,), "bfloat16": (0, 1, 2, 3),
          "our kernels": (0, 3), "adapter critic": (0, 1), "reference refreshed": (1, 2, 3),
          "own sampler": (2, 3), "exact": (0, 1, 2)}  # fmt: skip
"""Of ZeRO in which a variant is tried by `more`; the others under 3."""


def own_tokenizer(folder: Path) -> str:
    """A folder of this rank's with the tokenizer of a reward model that reads text."""
    path = folder / f"tokenizer-{ranks.rank()}"
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def knobs_of(folder: Path, name: str) -> dict[str, object]:
    """A variant's knobs; one that is a function is asked with the folder."""
    return {knob: value(folder) if callable(value) else value for knob, value in VARIANTS[name][0].items()}


def variant(folder: Path, name: str, stage: int | None) -> dict[str, Any]:
    knobs, parts = knobs_of(folder, name), VARIANTS[name][1]
    engine = engine_of(config_of(folder, stage, **knobs), **{role: make() for role, make in parts.items()})
    return {"metrics": steps(engine, (8, 7)), "state": state_of(engine)}


# ---- cases of two ranks ---------------------------------------------------------------------------------------------


def two(folder: Path) -> dict[str, Kept]:
    out = {"world": tried(ranks.world_size)}
    for stage in (0, 1, 2, 3):
        engine = engine_of(config_of(folder, stage))
        out[f"zero {stage}"] = tried(left_alone, engine)
        out[f"beside {stage}"] = tried(saved_beside, engine, folder / f"beside-{stage}")
        out[f"resumed {stage}"] = tried(resumed, engine, folder / f"zero-{stage}")
        out[f"dealt {stage}"] = tried(dealt_out, engine, folder / f"zero-{stage}")
    out["from one process"] = tried(from_one_process, engine, folder)
    out["export"] = tried(exported, engine, folder / "export")
    out["lora export"] = tried(lora_exported, folder)
    out["gathered"] = tried(gathered, engine)
    out["one prompt"] = tried(steps, engine, (1,))
    for name, knobs in {"exact": VARIANTS["exact"][0], "cut": {"rollout__top_k": 6}}.items():
        out[f"one prompt, {name}"] = tried(steps, engine_of(config_of(folder, 0, **knobs)), (1,))
    out["nan"] = tried(nan_on_one_rank, engine)
    out |= {name: tried(variant, folder, name, 3) for name in ("tied", "recomputed", "hydra", "text reward")}
    out["trunk"] = tried(trunk_states, folder)
    out["doctor"] = tried(doctor.examine, folder / "doctor")
    out |= {name: tried(variant, folder, name, 2) for name in ("our kernels", "adapter critic", "exact")}
    out |= {f"refused: {name}": tried(words_of, attempt) for name, attempt in attempts(folder).items()}
    out["alone"] = tried(job_alone, folder)
    return out


def left_alone(engine: Engine) -> dict[str, Any]:
    return {"metrics": steps(engine), "state": state_of(engine)}


def resumed(engine: Engine, path: Path) -> dict[str, Any]:
    """Save, a step, restore, the same step: the same to the bit?"""
    engine.save(path)
    first, state = steps(engine, NEXT), state_of(engine)
    engine.restore(path)
    return {"next": first, "equal": (first, state) == (steps(engine, NEXT), state_of(engine))}


def saved_beside(engine: Engine, path: Path) -> bool:
    """A save that goes on while the weights move: what it holds is the state at its start, to the bit."""
    pending = engine.start_save(path)
    first = (steps(engine, NEXT), state_of(engine))
    while not pending.ready(engine.device):
        time.sleep(0.01)
    pending.finish()
    engine.restore(path)
    return first == (steps(engine, NEXT), state_of(engine))


def dealt_out(engine: Engine, path: Path) -> dict[str, Any]:
    """Each rank's share of the bytes of a checkpoint's tensors that it wrote, and of the numbers that it reads."""
    from ppomax.saving import dealt

    sizes = {p.name: p.stat().st_size for p in path.glob("*-of-00002.safetensors")}
    mine = sum(size for name, size in sizes.items() if f"-{ranks.rank() + 1:05d}-of" in name)
    plain, read, dealt.SMALL = dealt._read, [0], 1  # as large tensors are read
    numbers = sum(x.shape.numel() for role in ("policy", "critic") for d in getattr(engine, role).lazy()
                  for x in d.values())  # fmt: skip

    def counted(*args: Any) -> Any:
        found = plain(*args)
        read[0] += found.numel()
        return found

    dealt._read = counted
    try:
        engine.restore(path)
    finally:
        dealt._read, dealt.SMALL = plain, 1 << 20
    shares = {"written": mine / sum(sizes.values()), "read": read[0] / numbers}
    return {name: ranks.gather_objects(x) for name, x in shares.items()}


def trunk_states(folder: Path) -> list[tuple[int, int]]:
    """(rows of trunk states that a rank holds, those of the sequences that it trains on), by rank; recorded while
    decoding, and computed after it."""
    from ppomax.recipe import rollout

    knobs, _ = VARIANTS["hydra"]
    engine = engine_of(config_of(folder, 2, **knobs))
    given = [*prompts(15, longest=9), prompts(1)[0][:1]]  # the last one's sequence stands in, wherever it lies
    plain, found = rollout.joined, []
    for forget in (False, True):
        rollout.joined = lambda *args, forget=forget: (
            dataclasses.replace(plain(*args), trunk=None) if forget else plain(*args)
        )
        roll = engine.rollout(given)
        own = sum(int(roll.on_host[0].diff()[m].sum()) - len(m) for micros in roll.micro_batches for m in micros)
        found += ranks.gather_objects((len(roll.trunk.states), own))
    rollout.joined = plain
    return found


def from_one_process(engine: Engine, folder: Path) -> list[dict[str, float]]:
    """The steps after a checkpoint that one process of plain torch wrote."""
    engine.restore(folder / "plain")
    return steps(engine, NEXT)


def gathered(engine: Engine) -> dict[str, Any]:
    """Hooks and whole weights inside and outside of a rollout phase."""

    def look() -> tuple[int, bool]:
        module = engine.policy.module
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())
        return hooks, all(p.numel() == p.ds_numel for p in module.parameters())  # type: ignore[attr-defined]

    before = look()
    with engine.policy.gathered():
        inside = look()
    return {"before": before, "inside": inside, "after": look()}


def exported(engine: Engine, path: Path) -> dict[str, Any]:
    """A cut policy written in shards of 8 KB; is it the model that the engine holds?"""
    export_policy(engine, path, shard_bytes=8192)
    held = {name: x.get() for name, x in engine.policy.all_weights().items()}
    if ranks.rank():
        return {}
    model = AutoModelForCausalLM.from_pretrained(path)
    equal = all(torch.equal(p, held[name]) for name, p in model.named_parameters())
    return {"equal": equal, "files": len(list(path.glob("*.safetensors")))}


def lora_exported(folder: Path) -> dict[str, Any]:
    """A cut policy with adapters: the most that is whole at a time while it is written, and the folder's logits beside
    the policy's own."""
    import deepspeed

    engine = engine_of(config_of(folder, 3, model__train="lora"))
    steps(engine, (8,))
    with engine.policy.gathered() as policy:
        want = policy(torch.arange(9)[None]).logits
    plain, most = deepspeed.zero.GatheredParameters, [0]

    def counted(params: Any, *args: Any, **named: Any) -> Any:
        most[0] = max(most[0], sum(p.ds_numel for p in params))
        return plain(params, *args, **named)

    deepspeed.zero.GatheredParameters = counted
    try:
        export_policy(engine, folder / "lora-export", shard_bytes=8192)
    finally:
        deepspeed.zero.GatheredParameters = plain
    module = engine.policy.module
    out = {"whole": most[0], "all": sum(p.ds_numel for p in module.parameters())}  # type: ignore[attr-defined]
    out["largest"] = max(p.ds_numel for p in module.parameters())  # type: ignore[attr-defined]
    if ranks.rank() == 0:
        from safetensors.torch import load_file

        merged = AutoModelForCausalLM.from_pretrained(folder / "lora-export")
        adapted = tiny_policy()
        adapted.load_adapter(str(folder / "lora-export" / "adapter"))
        out["gaps"] = [float((m(torch.arange(9)[None]).logits - want).abs().max()) for m in (merged, adapted)]
        adapters = load_file(folder / "lora-export" / "adapter" / "adapter_model.safetensors")
        out["adapters"] = sum(x.numel() for x in adapters.values())
        out["trained"] = sum(p.ds_numel for p in engine.policy.params)  # type: ignore[attr-defined]
    ranks.barrier()
    return out


def nan_on_one_rank(engine: Engine) -> dict[str, Any]:
    """An advantage that is NaN in one sequence, which one rank alone works on: every rank skips that step."""
    experience = engine.experience(engine.rollout(prompts(8, seed=3)))
    bad = experience.advantages.clone()
    bad[0] = float("nan")
    before = engine.health.skipped
    metrics = engine.update(dataclasses.replace(experience, advantages=bad))
    after = steps(engine, (8,))[0]["loss/policy_avg"]
    return {
        "skipped": ranks.gather_objects(engine.health.skipped - before),
        "in metrics": metrics["val/skipped"],
        "after": after,
    }


def attempts(folder: Path) -> dict[str, Callable[[], object]]:
    """Input that cannot be right."""
    contradicting = folder / "contradicting.json"
    contradicting.write_text(json.dumps({"zero_optimization": {"stage": 1}}), encoding="utf-8")
    other = {"policy_optim__lr": 2e-3 if ranks.rank() else 1e-3}
    return {
        "batch": lambda: agreed_config(small_config(batch__rollout_size=8, batch__minibatch_size=3)),
        "mismatch": lambda: agreed_config(small_config(**other)),
        "file": lambda: agreed_config(small_config(sharding__zero_stage=3, sharding__deepspeed=str(contradicting))),
        "hpz": lambda: agreed_config(small_config(sharding__zero_stage=3, sharding__hpz=3)),
        "int8": lambda: agreed_config(small_config(sharding__zero_stage=3, sharding__quantized_weights=True)),
        "missing shard": lambda: without(folder / "zero-0", "policy_optim-00002-of-00002.safetensors"),
        "disk": lambda: onto_a_full_disk(folder),
    }


def words_of(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "nothing was raised"


def without(path: Path, file: str) -> None:
    ranks.barrier()
    if ranks.rank() == 0:
        (path / file).unlink()
    engine_of(config_of(path.parent, 0)).restore(path)


def onto_a_full_disk(folder: Path) -> None:
    from ppomax.saving import folder as files

    plain = files.shutil.disk_usage
    files.shutil.disk_usage = lambda path: plain(path)._replace(free=1000)  # type: ignore[assignment]
    try:
        engine_of(config_of(folder, 0)).save(folder / "no-room")
    finally:
        files.shutil.disk_usage = plain
    raise CheckpointError("the save went through")


MORE = tuple(f"{name} {stage}" for name in VARIANTS for stage in STAGES.get(name, (3,)))
"""Every variant, under each ZeRO stage that it is about."""


RESUMED = ("resumed 2", "resumed 3", "resumed hpz", "followed 2", "followed 3", "ahead 2", "ahead 3")
"""Cases of `more` that tell of a resume."""


def more(folder: Path) -> dict[str, Kept]:
    """And 16-bit weights resumed beside their float32 copies, and hpZ's second copies."""
    out = {case: tried(variant, folder, case[:-2], int(case[-1])) for case in MORE}
    out |= {f"ahead {stage}": tried(resumed_ahead, folder, stage) for stage in (2, 3)}
    out |= {f"followed {stage}": tried(resumed_reference, folder, stage) for stage in (2, 3)}
    out |= {f"resumed {stage}": tried(resumed_bfloat16, folder, stage) for stage in (2, 3)}
    return out | {"resumed hpz": tried(resumed_hpz, folder)}


def resumed_bfloat16(folder: Path, stage: int) -> bool:
    engine = engine_of(config_of(folder, stage, model__dtype="bfloat16"))
    steps(engine, (8,))
    return bool(resumed(engine, folder / f"bfloat16-{stage}")["equal"])


def resumed_reference(folder: Path, stage: int) -> bool:
    engine = engine_of(config_of(folder, stage, **FOLLOWED))
    steps(engine, (8,))
    return bool(resumed(engine, folder / f"followed-{stage}")["equal"])


def resumed_ahead(folder: Path, stage: int) -> bool:
    """With a buffer under way in the checkpoint."""
    config = config_of(folder, stage, rollout__ahead=1, loss__sampler_is_cap=2.0)
    engine = engine_of(config, sampler=Copy())

    def go_on(count: int) -> list[float]:
        found = []
        for _ in range(count):
            at = engine.buffers
            done = engine.step(prompts(8, seed=at), following=prompts(8, seed=at + 1))
            found += [done.metrics["loss/policy_avg"], done.metrics["rollout/logprob_gap_mean"]]
        return found

    go_on(1)
    engine.save(folder / f"ahead-{stage}")
    first, state = go_on(2), state_of(engine)
    engine.restore(folder / f"ahead-{stage}")
    return first[1] > 1e-4 and (first, state) == (go_on(2), state_of(engine))


def resumed_hpz(folder: Path) -> bool:
    engine = engine_of(config_of(folder, 3, sharding__hpz=2))
    second = [p.ds_secondary_tensor is not None for p in engine.policy.params]  # type: ignore[attr-defined]
    assert all(second), "no second copies"
    steps(engine, (8,))
    return bool(resumed(engine, folder / "hpz")["equal"])


# ---- one rank -------------------------------------------------------------------------------------------------------


def one(folder: Path) -> dict[str, Kept]:
    return {f"zero {stage}": tried(left_alone, engine_of(config_of(folder, stage))) for stage in (1, 2, 3)}


# ---- a whole job ----------------------------------------------------------------------------------------------------

MOMENTS: dict[str, tuple[str, str, int]] = {
    "update": ("ppomax.recipe.update", "train_minibatch", 5),
    "rollout": ("ppomax.recipe.rollout", "decode", 4),
    "save": ("ppomax.saving.dealt", "write_file", 9),
    "load": ("ppomax.stages.ppo", "PpoLoop", 1),
}
"""Module, function, and which call of it."""


def job_knobs(folder: Path) -> dict[str, object]:
    """The knobs of a run of four steps under ZeRO-2."""
    names = json.loads((folder / "names.json").read_text(encoding="utf-8"))
    more = {"ptx.coef": 0.1, "ptx.pool": 16, "run.device": "cpu", "run.keep_checkpoints": 9, "sharding.zero_stage": 2}
    return {**SMALL, **names, **more}


def job_alone(folder: Path) -> str:
    return str(train_ppo(load_config(overrides={**job_knobs(folder), "run.out": str(folder / "alone")})))


def job(folder: Path, name: str, moment: str, number: int = signal.SIGKILL, victim: int = 1) -> int:
    """`ppomax train` in `folder`/`name`; one rank sends itself a signal at `moment` of the job's first start."""
    from importlib import import_module

    if moment in MOMENTS and not restarts() and int(os.environ.get("RANK", "0")) == victim:
        module, function, nth = MOMENTS[moment]
        owner, count = import_module(module), [0]
        plain = getattr(owner, function)

        def wrapped(*args: object, **named: object) -> object:
            count[0] += 1
            if count[0] == nth:
                os.kill(os.getpid(), number)
            return plain(*args, **named)

        setattr(owner, function, wrapped)
    words = [f"--{knob}={value}" for knob, value in job_knobs(folder).items() if value is not None]
    status = cli.main(["train", *words, "--out", str(folder / name), *sys.argv[5:]])
    assert "ppomax-watch" not in {thread.name for thread in threading.enumerate()}  # it would abort the exit
    return status


def main(case: str, folder: Path, *rest: str) -> int:
    torch.set_num_threads(1)
    if case == "job":
        number = signal.SIGTERM if rest[1].startswith("term-") else signal.SIGKILL
        return job(folder, rest[0], rest[1].removeprefix("term-"), number, victim=0 if rest[1] == "save" else 1)
    ranks.start("cpu")
    keep(folder / f"{case}.json", {"one": one, "two": two, "more": more, "stages": stages}[case](folder))
    ranks.shut_down()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:]))
