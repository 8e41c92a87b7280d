"""The command line: layers, flags, folders, resume, and what each mistake is told."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ppomax.cli import main
from ppomax.command.options import RUN_FLAGS, Options
from ppomax.config import ConfigError, TrainConfig
from ppomax.config.mapping import undot
from ppomax.config.stages import SftConfig

from tests.engine.tiny import SMALL, tiny_assets
from tests.engine.tiny_text import TEXTS, tiny_llama, tiny_tokenizer


def train_options() -> Options[TrainConfig]:
    return Options("train", TrainConfig, RUN_FLAGS)


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A configuration file of a run of seconds, in the working directory."""
    monkeypatch.chdir(tmp_path)
    knobs = {
        **SMALL,
        **tiny_assets(tmp_path / "assets"),
        "run.steps": 2,
        "monitor.samples_every": 1,
        "monitor.sample_prompts": 2,
    }
    Path("job.yaml").write_text(yaml.safe_dump(undot(knobs)))
    return Path("job.yaml")


@pytest.fixture
def no_pictures(monkeypatch):
    """Spare the time of drawing a report that the test does not look at."""
    monkeypatch.setattr("ppomax.reporting.plots._picture", lambda draw, size: "")


def refused(capsys, *argv: str) -> str:
    """The one line that a mistake gives; the exit status is 2."""
    assert main(list(argv)) == 2
    err = capsys.readouterr().err
    assert err.startswith("ppomax: error: ")
    assert err.count("\n") == 1
    return err


# ---- flags ----------------------------------------------------------------------------------------------------------


def test_flags_win_over_file_over_preset_over_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("kl: {coef: 0.2}\nloss: {ent_coef: 0.3}\n")
    config = train_options().parse(["--preset", "vanilla", "--config", str(file), "--kl.coef", "0.7", "--steps=9"])
    assert (config.preset, config.kl.coef, config.loss.ent_coef) == ("vanilla", 0.7, 0.3)
    assert config.reward.standardize == "none"  # from the preset
    assert config.run.steps == 9
    assert config.advantage.lam == TrainConfig().advantage.lam


def test_short_flags_are_the_knobs_they_stand_for():
    config = train_options().parse(["--out", "x", "--seed", "3", "--resume", "--steps", "4"])
    assert (config.run.out, config.run.seed, config.run.resume, config.run.steps) == ("x", 3, True, 4)


@pytest.mark.parametrize("word", ["None", "null"])
def test_null_may_be_written_as_in_the_help(word):
    assert train_options().parse([f"--reward.clip={word}"]).reward.clip is None


def test_a_section_given_in_part_keeps_the_stage_s_own_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: m\ndata: d\nrun: {seed: 5}\noptim: {lr: 1.0e-3}\n")
    config = Options("sft", SftConfig, RUN_FLAGS).parse(["--config", str(file)])
    assert (config.run.seed, config.run.steps) == (5, SftConfig("m", "d").run.steps)
    assert (config.optim.lr, config.optim.schedule) == (1e-3, "cosine")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--kl.coeff", "1"], "did you mean --kl.coef?"),
        (["--clip_low", "1"], "did you mean --loss.clip_low?"),
        (["--kl.coef", "much"], "kl.coef must be a number, got 'much'"),
        (["--kl.coef", "-1"], "kl.coef must be 0 or more"),
        (["--kl.estimator", "k9"], "kl.estimator must be one of k1, k2, k3, abs"),
        (["--preset", "vanila"], "did you mean vanilla?"),
        (["--config", "nope.yaml"], "no file nope.yaml"),
        (["stray"], "stray"),
        (["--steps"], "expected one argument"),
    ],
)
def test_a_wrong_flag_is_named(argv, said):
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
        train_options().parse(argv)


def test_an_unknown_key_in_a_file_is_named_with_the_nearest(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: m\ndata: d\noptim: {lrr: 1}\n")
    with pytest.raises(ConfigError, match=r"optim\.lrr; did you mean optim\.lr\?"):
        Options("sft", SftConfig, RUN_FLAGS).parse(["--config", str(file)])


def test_a_stage_without_its_model_is_told_so():
    with pytest.raises(ConfigError, match="--model must be given"):
        Options("sft", SftConfig, RUN_FLAGS).parse(["--data", "d"])


def test_help_explains_every_knob_and_imports_no_torch():
    script = (
        "import sys\nfrom ppomax.cli import main\n"
        "try:\n    main(['train', '--help'])\nexcept SystemExit as left:\n    assert left.code == 0\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    words = " ".join(done.stdout.split())
    for flag, doc in [
        ("--kl.coef", "Weight of the token-level KL penalty inside the reward"),
        ("--critic_optim.lr", "Peak learning rate"),
        ("--resume", "newest whole checkpoint"),
        ("--monitor.alarm", "What a collapse alarm does"),
    ]:
        assert flag in words
        assert doc in words


def test_presets_are_listed_and_shown(capsys):
    assert main(["presets"]) == 0
    listed = capsys.readouterr().out
    assert all(f"--preset {name}" in listed for name in ("ppo-max", "paper", "released", "modern", "vanilla"))
    assert main(["presets", "vanilla"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["kl"]["coef"] == 0.0


def test_commands_are_named_and_a_wrong_one_is_refused(capsys):
    assert main([]) == 0
    assert "reward-model" in capsys.readouterr().out
    assert "did you mean train?" in refused(capsys, "trian")


# ---- runs -----------------------------------------------------------------------------------------------------------


def test_train_writes_a_whole_run_and_resumes_without_double_rows(job, capsys):
    assert main(["train", "--config", str(job), "--out", "run"]) == 0
    said = capsys.readouterr().out
    for words in (
        "step 2/2",
        "score (raw, mean)",
        "KL per token",
        "before: ",
        "after:  ",
        "report: run/report.html",
        "policy: run/policy",
    ):
        assert words in said
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "samples.jsonl",
        "scores.jsonl",
        "report.html",
        "policy/config.json",
        "tensorboard",
    ):
        assert (Path("run") / name).exists(), name
    assert main(["train", "--resume", "--out", "run", "--steps", "3"]) == 0
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["step"]] == [1, 2, 3]
    assert "resumed with another run.steps" in capsys.readouterr().out


def test_a_folder_with_a_run_and_a_resume_with_other_knobs_are_refused(no_pictures, job, capsys):
    assert main(["train", "--config", str(job), "--out", "run", "--steps", "1"]) == 0
    capsys.readouterr()
    assert "holds a run already" in refused(capsys, "train", "--config", str(job), "--out", "run")
    told = refused(capsys, "train", "--resume", "--out", "run", "--kl.coef", "0.5", "--seed", "4")
    assert "kl.coef is 0.5 here and 0.05 in the run" in told
    assert "run.seed is 4 here and 0 in the run" in told
    told = refused(capsys, "train", "--config", str(job), "--out", "run", "--run.resume=true", "--kl.coef", "0.5")
    assert "kl.coef is 0.5 here" in told  # asked for by the knob, not the short flag
    assert "no folder nowhere" in refused(capsys, "train", "--resume", "--out", "nowhere")
    assert "--resume needs --out DIR" in refused(capsys, "train", "--resume")


@pytest.mark.parametrize("flags", [["--resume"], ["--config", "job.yaml", "--run.resume=true"]])
def test_a_resume_where_nothing_was_begun_is_refused(job, capsys, flags):
    """A folder that a kill left before the configuration was in it, for one."""
    Path("run").mkdir()
    told = refused(capsys, "train", "--out", "run", *flags)
    assert "run holds no config.yaml, so no run was begun there; leave --resume out" in told


def test_a_run_killed_while_its_models_load_goes_on_as_the_same_job(no_pictures, job, capsys, monkeypatch):
    def killed(*unused):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ppomax.stages.ppo.PpoLoop.__init__", killed)
        assert main(["train", "--config", str(job), "--out", "run", "--seed", "7"]) == 130
    assert sorted(p.name for p in Path("run").iterdir()) == [".lock", "config.yaml"]
    assert main(["train", "--resume", "--out", "run"]) == 0
    assert yaml.safe_load(Path("run/config.yaml").read_text())["run"]["seed"] == 7
    assert main(["train", "--config", str(job), "--out", "alone", "--seed", "7"]) == 0
    assert Path("run/policy/model.safetensors").read_bytes() == Path("alone/policy/model.safetensors").read_bytes()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("at", [1, 2])
def test_an_interrupted_run_says_so_by_its_status_and_the_last_step_is_exported(
    job, capsys, monkeypatch, number, status, at
):
    from ppomax.engine import Engine

    plain, steps = Engine.update, []

    def signalled(engine, experience):
        steps.append(1)
        if len(steps) == at:
            os.kill(os.getpid(), number)
        return plain(engine, experience)

    monkeypatch.setattr(Engine, "update", signalled)
    done = at == 2
    assert main(["train", "--config", str(job), "--out", "run"]) == (0 if done else status)
    said = capsys.readouterr()
    assert "report: run/report.html" in said.out
    assert (Path("run") / "policy").is_dir() == done
    assert ("interrupted; go on with: ppomax train --resume --out run" in said.out) != done
    assert ("stopped after step 1; checkpoint written" in said.err) != done


def test_two_processes_do_not_write_in_one_folder(job, capsys):
    other = [sys.executable, "-c", "import sys, pathlib; from ppomax.saving.lock import claimed\n"
             "with claimed(pathlib.Path('run')): print('mine', flush=True); sys.stdin.read()"]  # fmt: skip
    with subprocess.Popen(other, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "mine\n"
        told = refused(capsys, "train", "--config", str(job), "--out", "run")
        assert f"run is being written by process {process.pid} on " in told
        process.kill()
    assert main(["train", "--config", str(job), "--out", "run", "--steps", "1"]) == 0  # the lock died with its owner


def test_without_out_a_dated_folder_under_runs(no_pictures, job):
    assert main(["train", "--config", str(job), "--steps", "1", "--preset", "vanilla"]) == 0
    (made,) = Path("runs").iterdir()
    assert made.name.endswith("-vanilla")
    assert yaml.safe_load((made / "config.yaml").read_text())["run"]["out"] == str(made)


def test_missing_files_are_one_line_each(job, capsys):
    assert "no such file" in refused(
        capsys, "train", "--config", str(job), "--data.prompts", "gone.jsonl", "--out", "a"
    )
    assert "gone_model" in refused(
        capsys, "train", "--config", str(job), "--model.policy", "./gone_model", "--out", "b"
    )
    assert "data.prompts must be too" in refused(
        capsys, "train", "--config", str(job), "--data.prompts", "None", "--out", "c"
    )
    Path("file").write_text("")
    assert "is a file" in refused(capsys, "train", "--config", str(job), "--out", "file")


def test_debug_shows_where(job, capsys):
    assert main(["train", "--config", "gone.yaml", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.rstrip().splitlines()[-1].startswith("ppomax: error: config: no file gone.yaml")


def test_a_bug_of_ours_is_not_blamed_on_the_input(monkeypatch, capsys):
    def broken(argv):
        raise KeyError("x")

    monkeypatch.setitem(__import__("ppomax.cli", fromlist=["COMMANDS"]).COMMANDS, "report", broken)
    assert main(["report"]) == 1
    assert "KeyError: 'x' (a bug of ppomax" in capsys.readouterr().err


def test_sft_runs_from_flags_and_resumes_from_its_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    from ppomax.saving.model_folder import save_model

    save_model(tiny_llama(), tiny_tokenizer(), Path("model"))
    Path("texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    flags = ["--model", "model", "--data", "texts.jsonl", "--max_tokens", "64", "--batch_tokens", "64"]
    assert main(["sft", *flags, "--out", "run", "--steps", "2"]) == 0
    assert Path("run/policy/model.safetensors").is_file()
    capsys.readouterr()
    assert "max_tokens is 32 here and 64 in the run" in refused(
        capsys, "sft", "--resume", "--out", "run", "--max_tokens", "32"
    )
    assert main(["sft", "--resume", "--out", "run", "--steps", "3"]) == 0


def test_build_default_s_steps_reach_each_of_its_stages(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr("ppomax.default.build.build_default", lambda config: seen.append(config) or Path(config.out))
    assert main(["build-default", "--data", "d", "--steps", "7"]) == 0
    assert (seen[0].lm_steps, seen[0].sft_steps, seen[0].reward_steps) == (7, 7, 7)
    assert seen[0].out.startswith("runs/")
    assert seen[0].out.endswith("-build-default")


@pytest.mark.parametrize(("command", "names"), [("sft", ["paper"]), ("reward-model", ["paper", "released"])])
def test_the_stages_have_presets_of_their_own(command, names):
    from ppomax.command.options import stage_presets
    from ppomax.config.stages import RewardModelConfig

    cls = {"sft": SftConfig, "reward-model": RewardModelConfig}[command]
    assert stage_presets(command) == names
    for name in names:
        config = Options(command, cls, RUN_FLAGS).parse(["--preset", name, "--model", "m", "--data", "d"])
        assert config.optim.lr == pytest.approx({"sft": 9.5e-6, "reward-model": 5e-6}[command])
    with pytest.raises(ConfigError, match=r"unknown preset 'papr'; did you mean paper\?"):
        Options(command, cls, RUN_FLAGS).parse(["--preset", "papr"])


ALWAYS = [
    "--monitor.alarm_baseline_steps",
    "1",
    "--monitor.alarm_window",
    "1",
    "--monitor.alarm_kl",
    "1e-9",
    "--monitor.alarm_entropy",
    "9",
]
"""Any KL and any entropy count as signs, so that the alarm is raised by step 2."""


@pytest.mark.parametrize(("action", "kept"), [("stop", 2), ("rollback", 1)])
def test_the_alarm_ends_a_run_at_its_step_or_at_the_checkpoint_before(no_pictures, job, capsys, action, kept):
    from safetensors.torch import load_file

    argv = [
        "train",
        "--config",
        str(job),
        "--out",
        "run",
        "--steps",
        "4",
        "--run.keep_checkpoints",
        "9",
        "--policy_optim.lr",
        "0.01",
    ]
    assert main([*argv, "--monitor.alarm", action, *ALWAYS]) == 0
    assert f"ended by the collapse alarm ({action})" in capsys.readouterr().out
    rows = [json.loads(line)["step"] for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert max(rows) == 2
    policy = load_file("run/policy/model.safetensors")
    saved = {
        step: load_file(path)
        for step in (1, 2)
        if (path := Path(f"run/checkpoints/step-00000{step}/policy.safetensors")).is_file()
    }
    same = {step: all((policy[name] == weights[name]).all() for name in policy) for step, weights in saved.items()}
    assert same[kept]
    assert sum(same.values()) == 1
    capsys.readouterr()
    assert main(["train", "--resume", "--out", "run"]) == 0  # goes on past the step at which it was told to end
    rows = [json.loads(line)["step"] for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [step for step in rows if step] == list(range(1, max(rows) + 1))


HELP_OF_ALL = """
import contextlib, io, sys
from ppomax.cli import COMMANDS, main
for command in ("", *COMMANDS):
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        main([command, "--help"] if command else ["--help"])
    assert len(shown.getvalue()) > 100, f"{command} --help says nothing"
    for module in ("torch", "transformers", "deepspeed"):
        assert module not in sys.modules, f"ppomax {command} --help imports {module}"
"""


def test_no_help_imports_torch():
    done = subprocess.run([sys.executable, "-c", HELP_OF_ALL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_shipped_policy_is_called_default_in_every_stage(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("texts.jsonl").write_text('{"text": "it is a film"}\n')
    assert main(["sft", "--model", "default", "--data", "texts.jsonl", "--steps", "1", "--out", "sft"]) == 0
    Path("pairs.jsonl").write_text('{"prompt": "it is", "chosen": "good", "rejected": "bad"}\n')
    assert main(["reward-model", "--model", "default", "--data", "pairs.jsonl", "--steps", "1", "--out", "rm"]) == 0
    exported = json.loads(Path("sft/policy/generation_config.json").read_text())
    assert exported["eos_token_id"] == [2]  # what it was taught to end with
