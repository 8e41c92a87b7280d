"""One process of plain torch and any ZeRO stage on one or two ranks are the same run; a rank that dies ends the job,
which then goes on to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ppomax.config import ConfigError, ShardingConfig
from ppomax.sharding import zero_config, zero_engine

from tests.engine import rank_driver as driver
from tests.engine.rank_cases import Cases
from tests.engine.tiny import tiny_assets

pytest.importorskip("deepspeed")

ROOT = Path(__file__).parents[2]
CLOSE = 1e-5
"""Of losses, KL, norms (relative above 1) and weights after five float32 steps: the order of sums differs."""
BFLOAT16 = 0.05
"""The same with weights and gradients in bfloat16, whose sums differ by their rounding."""
BETWEEN = 1e-4
"""Of losses after going on with another number of ranks."""


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "engine"), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def start(*words: str, ranks: int = 0, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """The driver under torchrun, or alone with 0 ranks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *options] if ranks else []
    return subprocess.Popen(
        [sys.executable, *torchrun, "-m", "tests.engine.rank_driver", *words],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen[str], limit: float = 400, *, well: bool = True) -> str:
    """What it printed, once it has ended, `well` or by an error."""
    try:
        said = process.communicate(timeout=limit)[0]
    finally:
        process.kill()
    assert (process.returncode == 0) == well, said[-6000:]
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sharded")
    (root / "names.json").write_text(json.dumps(tiny_assets(root)), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def plain(folder) -> dict[str, Any]:
    """One process of plain torch."""
    engine = driver.engine_of(driver.config_of(folder, None))
    out: dict[str, Any] = {"metrics": driver.steps(engine), "state": driver.state_of(engine)}
    engine.save(folder / "plain")
    out["next"] = driver.steps(engine, driver.NEXT)
    return out


@pytest.fixture(scope="module")
def launches(folder, plain) -> dict[str, Cases]:
    """Of two ranks, and of one rank under ZeRO; both at once."""
    two, one = start("two", str(folder), ranks=2), start("one", str(folder))
    ended(two)
    ended(one)
    return {name: Cases(folder / f"{name}.json") for name in ("one", "two")}


@pytest.fixture(scope="module")
def on_two(launches) -> Cases:
    return launches["two"]


@pytest.fixture(scope="module")
def on_one(launches) -> Cases:
    return launches["one"]


def assert_same_run(got: dict[str, Any], want: dict[str, Any], tolerance: float = CLOSE) -> None:
    for step, (a, b) in enumerate(zip(got["metrics"], want["metrics"], strict=True)):
        assert a.keys() == b.keys()
        far = {k: (a[k], b[k]) for k in a if abs(a[k] - b[k]) > tolerance * max(1.0, abs(b[k]))}
        assert not far, f"step {step + 1}: {far}"
    assert got["state"].keys() == want["state"].keys()
    far_off = {
        name: worst
        for name, x in want["state"].items()
        if (worst := max(abs(p - q) for p, q in zip(x, got["state"][name], strict=True))) > tolerance
    }
    assert not far_off


def losses(rows: list[dict[str, float]]) -> list[float]:
    return [row[key] for row in rows for key in ("loss/policy_avg", "loss/value_avg", "objective/kl_per_token")]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_with_one_rank_is_plain_torch(on_one, plain, stage: int) -> None:
    assert_same_run(on_one[f"zero {stage}"], plain)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_are_one_process(on_two, plain, stage: int) -> None:
    """Odd counts, uneven lengths, ptx, whitening, adaptive KL: nothing tells how many ranks there were."""
    assert on_two["world"] == 2
    assert [row["episode"] for row in on_two[f"zero {stage}"]["metrics"]] == [8, 15, 23, 28, 36]
    assert_same_run(on_two[f"zero {stage}"], plain)


SHARDED = ["tied", "recomputed", "hydra", "text reward", "our kernels", "adapter critic", "exact"]


@pytest.mark.parametrize("name", SHARDED)
def test_two_ranks_are_one_process_in_every_mode(on_two, folder, name: str) -> None:
    """And where they run blocks again in the backward, one that does not is still the same."""
    assert_same_run(on_two[name], alone(folder, name))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_sharded_checkpoint_resumes_to_the_bit(on_two, stage: int) -> None:
    assert on_two[f"resumed {stage}"]["equal"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_save_beside_training_is_the_one_of_its_start(on_two, stage: int) -> None:
    assert on_two.on_all(f"beside {stage}") == [True, True]


def test_the_doctor_sees_all_ranks_and_the_folder_that_they_share(on_two) -> None:
    found = {name: (state, words) for name, state, words in on_two["doctor"]}
    assert found["ranks"][0] == "ok"
    assert found["ranks"][1].startswith("2, all see")
    assert "GB/s" in found["exchange"][1]


def test_a_rank_holds_the_trunk_states_of_its_own_sequences(on_two) -> None:
    """And of one short one, which stands in."""
    for held, own in on_two["trunk"]:
        assert own <= held <= own + 12


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_each_rank_writes_and_reads_its_share_of_a_checkpoint(on_two, stage: int) -> None:
    shares = on_two[f"dealt {stage}"]
    assert sum(shares["written"]) == pytest.approx(1)
    assert shares["written"] == pytest.approx([0.5, 0.5], abs=0.05)
    assert shares["read"] == pytest.approx([0.5, 0.5], abs=0.05)


@pytest.mark.parametrize("stage", [1, 3])
def test_two_ranks_to_one(on_two, folder, stage: int) -> None:
    engine = driver.engine_of(driver.config_of(folder, None))
    engine.restore(folder / f"zero-{stage}")
    got = driver.steps(engine, driver.NEXT)
    assert losses(got) == pytest.approx(losses(on_two[f"resumed {stage}"]["next"]), abs=BETWEEN)


def test_one_rank_to_two(on_two, plain) -> None:
    assert losses(on_two["from one process"]) == pytest.approx(losses(plain["next"]), abs=BETWEEN)


def test_weights_are_gathered_once_for_a_rollout(on_two) -> None:
    """Inside the phase no hook is left that could gather or release a weight as tokens are decoded."""
    found = on_two["gathered"]
    assert found["inside"] == [0, True]
    assert found["before"] == found["after"]
    assert found["before"][0] > 0
    assert not found["before"][1]


def test_cut_policy_is_exported_in_shards(on_two) -> None:
    assert on_two["export"]["equal"]
    assert on_two["export"]["files"] > 3


def test_cut_adapters_are_exported_layer_by_layer(on_two) -> None:
    found = on_two["lora export"]
    assert max(found["gaps"]) < CLOSE
    assert found["adapters"] == found["trained"] > 0
    assert found["whole"] < 2 * found["largest"] < found["all"] / 3


@pytest.mark.parametrize("case", ["one prompt", "one prompt, exact", "one prompt, cut"])
def test_fewer_prompts_than_ranks(on_two, case) -> None:
    assert all(row["rollout/length"] >= 1 for row in on_two[case])
    assert on_two[case][0]["val/num_eos_tokens"] <= 1


def test_nan_on_one_rank_skips_the_step_on_all(on_two) -> None:
    skipped = on_two["nan"]["skipped"]
    assert skipped[0] == skipped[1] == on_two["nan"]["in metrics"] == 1
    assert abs(on_two["nan"]["after"]) < 10


@pytest.mark.parametrize(
    ("attempt", "wanted"),
    [
        ("batch", "batch.minibatch_size=3 cannot be shared evenly by 2 ranks"),
        ("mismatch", "rank 1 was started otherwise than rank 0: policy_optim.lr is 0.002 there and 0.001"),
        ("file", "sets zero_optimization.stage=1, which contradicts ours"),
        ("hpz", "sharding.hpz=3 ranks are to hold the weights among them, and there are 2 in all"),
        ("int8", "sharding.quantized_weights needs a GPU"),
        ("missing shard", "policy_optim-00002-of-00002.safetensors is missing or cut short"),
        ("disk", "MB needed, 0 MB free"),
    ],
)
def test_bad_input_is_named_on_every_rank(on_two, attempt: str, wanted: str) -> None:
    said = on_two.on_all(f"refused: {attempt}")
    assert len(said) == 2
    assert all(wanted in words for words in said), said


@pytest.fixture(scope="module")
def on_two_more(folder) -> Cases:
    ended(start("more", str(folder), ranks=2))
    return Cases(folder / "more.json")


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in driver.MORE if not case.startswith("bfloat16")])
def test_every_variant_is_one_process(on_two_more, folder, case: str) -> None:
    """Modes, offloading, frozen models cut or not, hpZ's second copies."""
    assert_same_run(on_two_more[case], alone(folder, case[:-2]))


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in driver.MORE if case.startswith("bfloat16")])
def test_bfloat16_is_one_process_to_its_own_rounding(on_two_more, folder, case: str) -> None:
    """Of the first update: later weights differ by bfloat16's rounding, and with them drawn tokens and clipped ratios.

    A ratio at the edge of the clip range gives its whole gradient or none, so a second minibatch would tell nothing."""
    first, same = (run["metrics"][0] for run in (on_two_more[case], alone(folder, case[:-2])))
    assert losses([first]) == pytest.approx(losses([same]), rel=BFLOAT16, abs=BFLOAT16)
    assert first["policy/grad_norm"] == pytest.approx(same["policy/grad_norm"], rel=BFLOAT16)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["resumed 2", "resumed 3", "resumed hpz", "followed 2", "followed 3", "ahead 2", "ahead 3"]
)
def test_16_bit_weights_second_copies_references_and_buffers_under_way_resume_to_the_bit(
    on_two_more, case: str
) -> None:
    assert on_two_more.on_all(case) == [True, True]


def alone(folder: Path, name: str) -> dict[str, Any]:
    """A variant in one process, where there is nothing to offload and no memory to save."""
    knobs, parts = driver.knobs_of(folder, name), driver.VARIANTS[name][1]
    kept = {k: v for k, v in knobs.items() if not k.startswith("sharding__") and k not in driver.AGAIN}
    engine = driver.engine_of(driver.config_of(folder, None, **kept), **{role: make() for role, make in parts.items()})
    return {"metrics": driver.steps(engine, (8, 7)), "state": driver.state_of(engine)}


# ---- faults ---------------------------------------------------------------------------------------------------------


def weights_of(run: Path) -> list[bytes]:
    """Of the last checkpoint, file by file: each rank has written its own."""
    last = run / "checkpoints" / "step-000004"
    return [path.read_bytes() for path in sorted(last.glob("*.safetensors")) if not path.name.startswith("rng")]


def steps_of(run: Path) -> list[int]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["step"] for row in rows if row["step"]]


@pytest.mark.slow
def test_killed_rank_is_named_and_torchrun_goes_on_to_the_bit(on_two, folder) -> None:
    said = ended(start("job", str(folder), "restarted", "update", ranks=2, options=("--max-restarts=1",)))
    assert "rank: 1" in said  # torchrun's words: it is quicker than our own watch
    assert weights_of(folder / "restarted") == weights_of(folder / "alone")
    assert steps_of(folder / "restarted") == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["rollout", "update", "save"])
def test_killed_job_ends_soon_and_resumes_to_the_bit(on_two, folder, moment: str) -> None:
    """Without a launcher that looks after its workers: two processes with the variables set, as under srun."""
    name = f"killed-{moment}"
    victim = 0 if moment == "save" else 1
    both = bare_ranks(folder, name, moment)
    both[victim].wait(timeout=200)
    died = time.monotonic()
    said = both[1 - victim].communicate(timeout=100)[0]
    assert time.monotonic() - died <= 60
    assert both[1 - victim].returncode != 0
    assert f"rank {victim}" in said
    ended(start("job", str(folder), name, "never", "--resume", ranks=2))
    assert weights_of(folder / name) == weights_of(folder / "alone")
    assert steps_of(folder / name) == [1, 2, 3, 4]


def bare_ranks(folder: Path, name: str, moment: str) -> list[subprocess.Popen[str]]:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(23000 + os.getpid() % 5000), "WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.engine.rank_driver", "job", str(folder), name, moment],
            cwd=ROOT,
            env={**environment(), **address, "RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for r in (0, 1)
    ]


@pytest.mark.slow
def test_sigterm_on_one_rank_checkpoints_all(on_two, folder) -> None:
    said = ended(start("job", str(folder), "termed", "term-update", ranks=2), well=False)
    assert "stopped after step" in said
    assert not (folder / "termed" / "policy").exists()
    ended(start("job", str(folder), "termed", "never", "--resume", ranks=2))
    assert weights_of(folder / "termed") == weights_of(folder / "alone")


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_job_within_the_timeout(on_two, folder) -> None:
    """It goes on giving signs of life, so that only the exchange which it does not come to can tell."""
    source = (
        "import os, time\ndef f(p, r):\n    time.sleep(1e6 * (os.environ['RANK'] == '1'))\n    return [0.0] * len(r)\n"
    )
    (folder / "hang.py").write_text(source, encoding="utf-8")
    flags = (f"--reward.function={folder / 'hang.py'}:f", "--model.critic=policy", "--sharding.timeout=15")
    began = time.monotonic()
    said = ended(start("job", str(folder), "hangs", "never", *flags, ranks=2), well=False)
    assert "waited sharding.timeout for another rank" in said
    assert time.monotonic() - began < 15 + 60


def test_deepspeed_compiles_nothing_on_cpus() -> None:
    """Its build lies behind a lock file that a killed process leaves, for which every later one would wait."""
    library = zero_engine.library()
    from deepspeed.comm.torch import build_shm_op

    assert library.ops.__compatible_ops__["deepspeed_shm_comm"] is False
    assert build_shm_op() is None


@pytest.mark.slow
def test_zero_3_to_plain_to_zero_1_from_the_command_line(folder) -> None:
    """The seam shows in no loss: as in a run of two ranks that was left alone."""
    ended(start("job", str(folder), "three", "never", "--sharding.zero_stage=3", ranks=2))
    ended(start("job", str(folder), "seams", "never", "--sharding.zero_stage=3", "--run.steps=2", ranks=2))
    plain = ("--resume", "--sharding.zero_stage=null", "--run.steps=3")
    alone = start("job", str(folder), "seams", "never", *plain)
    ended(alone)
    ended(start("job", str(folder), "seams", "never", "--resume", "--sharding.zero_stage=1", ranks=2))
    rows = [
        [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("three", "seams")
    ]
    assert steps_of(folder / "seams") == [1, 2, 3, 4]
    logs = [(folder / "seams" / "logs" / f"rank-000{n}.log").read_text(encoding="utf-8") for n in (0, 1)]
    assert all(text.count("resumed from") == 1 for text in logs)
    want, got = ([row for row in run if row["step"]] for run in rows)
    assert losses(got) == pytest.approx(losses(want), abs=BETWEEN)


@pytest.mark.slow
def test_error_on_one_rank_is_printed_once(folder) -> None:
    job = start("job", str(folder), "bad", "never", "--batch.minibatch_size=3", ranks=2)
    said = job.communicate(timeout=200)[0]
    assert job.returncode != 0
    assert said.count("ppomax: error:") == 1
    assert "cannot be shared evenly" in said


# ---- configuration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "wanted"),
    [
        ({"zero_stage": 4}, "sharding.zero_stage"),
        ({"offload_optimizer": True}, "when sharding.offload_optimizer is on"),
        ({"zero_stage": 2, "offload_param": True}, "3 when sharding.offload_param is on"),
        ({"zero_stage": 1, "hpz": 4}, "3 when sharding.hpz is on"),
        ({"deepspeed": "x.json"}, "when sharding.deepspeed names a file"),
        ({"silence": 3}, "sharding.silence"),
    ],
)
def test_impossible_sharding_is_refused(knobs: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        ShardingConfig(**knobs)


@pytest.mark.parametrize(
    ("content", "knob"),
    [
        ("optimizer: {type: Adam}", "policy_optim and critic_optim"),
        ("fp16: {enabled: true}", "model.dtype"),
        ("gradient_clipping: 0.5", "grad_clip"),
        ("zero_optimization: {stage: 2}", "sharding.zero_stage"),
    ],
)
def test_deepspeed_file_may_not_contradict(tmp_path, content: str, knob: str) -> None:
    (tmp_path / "extra.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=f"contradicts ours.*{knob}"):
        zero_config.extra(ShardingConfig(zero_stage=3, deepspeed=str(tmp_path / "extra.yaml")))


def test_deepspeed_file_is_laid_over_ours(tmp_path) -> None:
    import torch

    (tmp_path / "extra.yaml").write_text("zero_optimization: {stage: 3, sub_group_size: 7}\nx: 1", encoding="utf-8")
    config = ShardingConfig(zero_stage=3, hpz=8, offload_param=True, deepspeed=str(tmp_path / "extra.yaml"))
    made = zero_config.trained(config, 3, torch.bfloat16, 0.5)
    zero = made["zero_optimization"]
    assert (zero["stage"], zero["sub_group_size"], zero["zero_hpz_partition_size"]) == (3, 7, 8)
    assert zero["offload_param"]["device"] == "cpu"
    assert made["x"] == 1
    assert made["gradient_clipping"] == 0.5
    assert made["bf16"] == {"enabled": True}
