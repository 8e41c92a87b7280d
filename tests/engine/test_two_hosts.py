"""The launch lines for several nodes, tried on two hosts made of network namespaces: torchrun, DeepSpeed's host file,
and the Slurm script, which is stopped by its scheduler's signal, put back into the queue and goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from tests.engine.test_sharded import ROOT, ended, environment
from tests.engine.two_hosts import Hosts, two_hosts

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow
KNOBS: dict[str, Any] = {
    "batch": {"rollout_size": 16, "minibatch_size": 8},
    "rollout": {"max_new_tokens": 8},
    "ptx": {"coef": 0.0},
    "critic": {"pretrain_steps": 0},
    "sharding": {"zero_stage": 2},
    "monitor": {"samples_every": 0, "tensorboard": False, "eval_prompts": 0},
    "run": {"steps": 8, "threads": 1, "device": "cpu", "checkpoint_every": 0},
}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[Hosts]:
    folder = tmp_path_factory.mktemp("hosts")
    try:
        with two_hosts(folder) as made:
            yield made
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {error}")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(yaml.safe_dump(KNOBS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def on_one_host(config, tmp_path_factory) -> Path:
    """Two ranks beside each other."""
    out = tmp_path_factory.mktemp("one") / "run"
    words = ["--standalone", "--nproc_per_node", "2", "-m", "ppomax", "train", "--config", str(config)]
    command = ["torchrun", *words, "--run.out", str(out)]
    ended(subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=-1, stderr=subprocess.STDOUT, text=True))
    return out


def assert_same(out: Path, want: Path) -> None:
    found, wanted = (load_file(run / "policy" / "model.safetensors") for run in (out, want))
    assert all((found[name] == x).all() for name, x in wanted.items())


def test_torchrun_on_two_hosts_is_the_run_on_one(hosts, config, on_one_host, tmp_path) -> None:
    out = tmp_path / "run"
    words = ["torchrun", "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_id", "job"]
    words += ["--rdzv_endpoint", f"{hosts.names[0]}:29511", "-m", "ppomax", "train", "--config", str(config)]
    words += ["--run.out", str(out)]
    started = [hosts.run(host, words, environment(), tmp_path / host) for host in hosts.names]
    assert [p.wait(300) for p in started] == [0, 0], (tmp_path / hosts.names[0]).read_text()[-3000:]
    assert_same(out, on_one_host)
    assert json.loads((out / "heartbeat.json").read_text())["host"] in hosts.names


def test_deepspeeds_host_file_is_the_run_on_one(hosts, config, on_one_host, tmp_path) -> None:
    (tmp_path / "hosts").write_text("".join(f"{name} slots=1\n" for name in hosts.names), encoding="utf-8")
    out = tmp_path / "run"
    words = ["deepspeed", "--hostfile", str(tmp_path / "hosts"), "--no_local_rank", "--module", "ppomax", "train"]
    words += ["--config", str(config), "--run.out", str(out)]
    env = hosts.env(environment())
    ended(subprocess.Popen(words, cwd=tmp_path, env=env, stdout=-1, stderr=subprocess.STDOUT, text=True))
    assert_same(out, on_one_host)


def test_slurms_signal_ends_in_a_checkpoint_and_the_queue_goes_on(hosts, config, on_one_host, tmp_path) -> None:
    out = tmp_path / "run"
    slurm = {"SLURM_JOB_NODELIST": "nodes[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7", "GRACE": "60"}
    ours = {"OUT": str(out), "CONFIG": str(config), "GPUS": "1", "PORT": "29512"}
    env = hosts.env({**environment(), **slurm, **ours})
    script = ["bash", str(ROOT / "engine" / "examples" / "slurm.sh")]
    first = subprocess.Popen(script, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until = time.monotonic() + 100
    while not (out / "heartbeat.json").is_file() and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGUSR1)
    said = ended(first, well=False)
    assert (out / "heartbeat.json").is_file(), said[-3000:]
    done = json.loads((out / "heartbeat.json").read_text())["step"]
    assert 1 <= done < KNOBS["run"]["steps"], said[-3000:]
    assert (hosts.folder / "requeued").read_text() == "requeue 7\n"
    again = {**env, "SLURM_RESTART_COUNT": "1"}
    ended(subprocess.Popen(script, env=again, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    assert_same(out, on_one_host)
    assert (hosts.folder / "requeued").read_text() == "requeue 7\n"
