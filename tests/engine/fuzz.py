"""Wrong input by the thousand, each through the command line: knobs, data files, model folders, reward functions.

    python -m tests.engine.fuzz KIND [PART OF PARTS]       KIND: knobs, data, models, rewards; prints what was wrong
Each case is a run of one step on models of 60 kB. It may go well, or end in one line that names what is wrong and exit
status 2. A traceback, the words for a bug of ours, or any other end is a fault; so is a run that hangs."""

# ruff: noqa: E501  (tables of wrong values)
import contextlib
import io
import json
import logging
import math
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ppomax.cli import main as ppomax
from ppomax.config import TrainConfig, to_dict
from ppomax.config.mapping import flat
from safetensors.torch import load_file, save_file

from tests.engine.tiny import SMALL, tiny_assets

SECONDS = 60


class Case(NamedTuple):
    """One run: what is prepared in an empty working folder, and the words after `ppomax`."""

    name: str
    prepare: Callable[[Path], object]
    argv: list[str]
    must_fail: bool = False


def base(assets: Path) -> dict[str, object]:
    named = {key: str(value) for key, value in json.loads((assets / "names.json").read_text()).items()}
    return {**SMALL, **named, "run.steps": 1, "monitor.tensorboard": False, "run.ignore_plan": True}


def words(knobs: dict[str, Any]) -> list[str]:
    return [f"--{key}={'null' if value is None else value}" for key, value in knobs.items()]


def nothing(folder: Path) -> None:
    pass


# ---- knobs ----------------------------------------------------------------------------------------------------------

LONG = ("steps", "epochs", "pool", "samples_per_prompt", "rollout_size", "minibatch_size", "max_new_tokens",
        "pretrain_steps", "lora_rank", "sample_prompts")  # fmt: skip
"""More of these is more work, and no mistake."""


def values_for(key: str, value: Any) -> list[Any]:
    wrong: list[Any] = ["nan", "inf", "-inf", "", "x", "null", "[]", "{}", "-1", "0", "1", "1.5", "true", "1e400"]
    return wrong if key.endswith(LONG) else [*wrong, "1e9", "-1e9", "1e-300", "999999999999999999999"]


def knob_cases(assets: Path) -> Iterator[Case]:
    knobs = flat(to_dict(TrainConfig()))
    for key, value in knobs.items():
        if key in ("run.out", "run.resume"):
            continue
        for wrong in values_for(key, value):
            infinite = wrong in ("inf", "-inf", "nan") and not isinstance(value, str | None)
            yield Case(
                f"{key}={wrong}", nothing, ["train", *words({**base(assets), key: wrong}), "--out", "run"], infinite
            )
    generator = random.Random(0)
    keys = [k for k in knobs if not k.startswith(("run.out", "run.resume"))]
    for i in range(600):
        chosen = {k: generator.choice(values_for(k, knobs[k])) for k in generator.sample(keys, 3)}
        yield Case(f"three knobs {i}: {chosen}", nothing, ["train", *words({**base(assets), **chosen}), "--out", "run"])
    for i, text in enumerate(("", "[", "- a", "a: b", "run: 3", "run: [1]", "kl: {coef: {a: 1}}", "\x00", "run: !!python/object:os.system x",
                              "&a [*a]", "preset: nope", "seed: 1")):  # fmt: skip
        yield Case(f"a file {i}", lambda folder, text=text: (folder / "c.yaml").write_text(text),
                   ["train", "--config", "c.yaml", *words(base(assets)), "--out", "run"])  # fmt: skip


# ---- data -----------------------------------------------------------------------------------------------------------

STRINGS = ["", " ", "w5", "w5 </s> w6", "<s> w5", "x\ud800", "\x00", "w5 " * 500, "é", "<pad>", "</s>"]
VALUES: list[Any] = [*STRINGS, None, 3, 1.5, True, [], {}, [[]], ["w5"], [{"role": "user"}], [{"role": "user", "content": "w5"}],
                     [{"role": "user", "content": None}], [{"content": "w5"}], [{"role": 3, "content": "w5"}], math.nan, math.inf]  # fmt: skip
BYTES = [b"", b"\xff\xfe", b"{", b"[]", b"[1]", b"{}", b"null", b'"w5"', b"\n\n", b'{"prompt": "w5"}\r\n', b"\xef\xbb\xbf{\"prompt\": \"w5\"}",
         b'{"prompt": "w5"', b'{"prompt": NaN}', b"[" * 5000, b'{"prompt": "\\ud800"}', b"PAR1", b"\x1f\x8b\x08"]  # fmt: skip


def line(row: Any) -> bytes:
    return json.dumps(row).encode() + b"\n"


def data_cases(assets: Path) -> Iterator[Case]:
    train = base(assets)

    def file(name: str, content: bytes) -> Callable[[Path], object]:
        return lambda folder: (folder / name).write_bytes(content)

    for i, content in enumerate(BYTES):
        for suffix in (".jsonl", ".json", ".parquet", ".jsonl.gz", ".txt"):
            name = f"p{suffix}"
            yield Case(
                f"bytes {i} as {suffix}",
                file(name, content),
                ["train", *words({**train, "data.prompts": name}), "--out", "run"],
            )
    for i, value in enumerate(VALUES):
        good = line({"prompt": "w5 w6"})
        yield Case(
            f"prompt {i}",
            file("p.jsonl", good + line({"prompt": value})),
            ["train", *words({**train, "data.prompts": "p.jsonl"}), "--out", "run"],
        )
        texts = {**train, "ptx.coef": 0.1, "ptx.texts": "t.jsonl"}
        for column in ("text", "messages", "response"):
            row = {"prompt": "w5", column: value} if column == "response" else {column: value}
            yield Case(
                f"{column} {i}",
                file("t.jsonl", line({"text": "w5 w6"}) + line(row)),
                ["train", *words(texts), "--out", "run"],
            )
        sft = {"model": train["model.policy"], "data": "t.jsonl", "max_tokens": 32, "run.steps": 1}
        yield Case(
            f"sft text {i}",
            file("t.jsonl", line({"text": "w5 w6"}) + line({"text": value})),
            ["sft", *words(sft), "--out", "run"],
        )
        pairs = {"model": train["model.policy"], "data": "t.jsonl", "max_tokens": 32, "run.steps": 1}
        for column in ("chosen", "prompt", "margin", "complete"):
            row = {"prompt": "w5", "chosen": "w6", "rejected": "w7", column: value}
            yield Case(
                f"pair {column} {i}", file("t.jsonl", line(row)), ["reward-model", *words(pairs), "--out", "run"]
            )


# ---- model folders --------------------------------------------------------------------------------------------------


class Bomb:
    """Leaves a file behind if it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("CODE-WAS-RUN", "w"))


def model_cases(assets: Path) -> Iterator[Case]:
    names = json.loads((assets / "names.json").read_text())

    def edited(role: str, change: Callable[[Path], object]) -> Callable[[Path], object]:
        return lambda folder: (shutil.copytree(names[role], folder / "model"), change(folder / "model"))

    def run(role: str, name: str, change: Callable[[Path], object], must_fail: bool = False) -> Case:
        argv = ["train", *words({**base(assets), role: "model"}), "--out", "run"]
        return Case(f"{role} {name}", edited(role, change), argv, must_fail)

    def knob(key: str, value: Any) -> Callable[[Path], object]:
        def change(folder: Path) -> None:
            found = json.loads((folder / "config.json").read_text())
            found.pop(key, None) if value == "gone" else found.update({key: value})
            (folder / "config.json").write_text(json.dumps(found))

        return change

    def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], object]:
        def edit(folder: Path) -> None:
            found = load_file(folder / "model.safetensors")
            change(found)
            save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

        return edit

    bomb = pickle.dumps(Bomb())
    template = "{{ cycler.__init__.__globals__.os.system('touch CODE-WAS-RUN') }}"
    for role in ("model.policy", "model.reward_model"):
        folder = Path(names[role])
        for key in json.loads((folder / "config.json").read_text()):
            for value in ("gone", None, "x", -1, 0, 3, [], {}, "a/b"):
                yield run(role, f"config {key}={value}", knob(key, value))
        for key in load_file(folder / "model.safetensors"):
            yield run(role, f"without {key}", weights(lambda w, key=key: w.pop(key)), True)
            yield run(
                role,
                f"{key} of another shape",
                weights(lambda w, key=key: w.update({key: w[key][..., :1].clone()})),
                True,
            )
        for file in sorted(p.name for p in folder.iterdir()):
            yield run(role, f"no {file}", lambda f, file=file: (f / file).unlink())
            for content in (b"", b"{", b"[]", b"\x00" * 64, b"\xff" * 9):
                yield run(
                    role,
                    f"{file} is {content[:4]!r}",
                    lambda f, file=file, c=content: (f / file).write_bytes(c),
                )
        for file in ("pytorch_model.bin", "model.safetensors", "model.bin"):
            yield run(
                role,
                f"pickle as {file}",
                lambda f, file=file: ((f / "model.safetensors").unlink(), (f / file).write_bytes(bomb)),
                True,
            )
        for file in ("pytorch_model.bin", "../x.safetensors", "/etc/passwd", "", ".", "model.safetensors/..", 3, None):
            index = {"weight_map": dict.fromkeys(load_file(folder / "model.safetensors"), file)}
            yield run(
                role,
                f"index to {file!r}",
                lambda f, i=index: (
                    (
                        (f / "pytorch_model.bin").write_bytes(bomb),
                        (f / "model.safetensors.index.json").write_text(json.dumps(i)),
                    )
                ),
                True,
            )
        for auto in (
            {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"},
            {"AutoTokenizer": ["evil.Evil", None]},
        ):

            def evil(f: Path, auto: Any = auto) -> None:
                (f / "evil.py").write_text("open('CODE-WAS-RUN', 'w')\nclass Evil: pass\n")
                knob("auto_map", auto)(f)

            yield run(role, f"auto_map {list(auto)}", evil)
        yield run(role, "a template that runs code", lambda f: (f / "chat_template.jinja").write_text(template))


# ---- reward functions -----------------------------------------------------------------------------------------------

BODIES = [
    "return", "return 1", "return 1.0", "return []", "return [1.0]", "return [1.0] * (len(r) + 1)", "return {}", "return 'x'", "return b'x'",
    "return [None] * len(r)", "return ['1'] * len(r)", "return [[1.0]] * len(r)", "return [float('nan')] * len(r)", "return [float('inf')] * len(r)",
    "return [-float('inf')] + [0.0] * (len(r) - 1)", "return [10 ** 400] * len(r)", "return [1e39] * len(r)", "return [1j] * len(r)",
    "return [True] * len(r)", "return range(len(r))", "return (float(len(x)) for x in r)", "return set(range(len(r)))", "return object()",
    "return lambda: 1", "import numpy; return numpy.zeros(len(r))", "import numpy; return numpy.zeros((len(r), 1))",
    "import numpy; return numpy.zeros(len(r), dtype=object)", "import numpy; return numpy.array(['a'] * len(r))", "import torch; return torch.zeros(len(r))",
    "import torch; return torch.zeros(len(r), requires_grad=True)", "import torch; return torch.zeros(len(r), device='meta')",
    "import torch; return torch.zeros(len(r), 2)", "import torch; return torch.zeros(len(r)).to_sparse()", "import torch; return torch.zeros(0)",
    "import sys; sys.exit(0)", "import sys; sys.exit('bye')", "raise SystemExit", "raise ValueError('no')", "raise KeyError(3)", "raise Exception",
    "raise StopIteration", "raise AssertionError", "raise MemoryError", "raise RecursionError", "raise OSError(28, 'full')", "raise FileNotFoundError",
    "raise UnicodeDecodeError('utf-8', b'x', 0, 1, 'bad')", "raise NotImplementedError", "raise type('Odd', (Exception,), {'__str__': lambda s: 1 / 0})()",
    "return f(p, r)", "1 / 0", "p.clear(); r.clear(); return []", "r.append('x'); return [0.0] * len(r)", "del r[0]; return [0.0] * len(r)",
    "import random; random.seed(1); return [random.random() for _ in r]", "import torch; torch.manual_seed(3); return [0.5 * i for i in range(len(r))]",
    "import torch; torch.set_grad_enabled(False); return [0.5 * i for i in range(len(r))]", "import warnings; warnings.warn('x'); return [0.0] * len(r)",
    "print('x' * 10000); return [0.0] * len(r)", "import os; os.chdir('/'); return [0.0] * len(r)", "return [0.0] * len(r)", "return [1e38, -1e38] * (len(r) // 2)",
    "async def g(): return []\n    return g()", "yield 1.0", "assert False, 'x\\ny'",
]  # fmt: skip


def reward_cases(assets: Path) -> Iterator[Case]:
    knobs = {**base(assets), "reward.function": "mine.py:f", "model.critic": "policy", "batch.rollout_size": 8}
    for body in BODIES:
        source = f"def f(p, r):\n    {body}\n"
        yield Case(f"reward {body}", lambda folder, s=source: (folder / "mine.py").write_text(s),
                   ["train", *words(knobs), "--out", "run"])  # fmt: skip


# ---- running them ---------------------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[Path], Iterator[Case]]] = {
    "knobs": knob_cases,
    "data": data_cases,
    "models": model_cases,
    "rewards": reward_cases,
}


class TooLong(BaseException):
    """Raised by the clock."""


def end_of(case: Case, folder: Path) -> str | None:
    """What is wrong with how the case ends; None: nothing."""
    case.prepare(folder)
    here, out, err = Path.cwd(), io.StringIO(), io.StringIO()
    os.chdir(folder)
    grad = torch.is_grad_enabled()

    def late(*unused: object) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status: Any = ppomax(case.argv)
    except TooLong:
        return f"hangs for {SECONDS} s"
    except SystemExit as error:
        status = error.code
    except BaseException as error:
        return f"raises {type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
        os.chdir(here)
        torch.set_grad_enabled(grad)
    said = err.getvalue().strip().splitlines()
    if (folder / "CODE-WAS-RUN").exists():
        return "runs code of a model's folder"
    if "bug of ppomax" in err.getvalue() or "Traceback" in err.getvalue():
        return f"status {status}: {said[-1][:300]}"
    if status not in (0, 2):
        return f"status {status}: {said[-1:]}"
    if status == 2 and not any(words.startswith("ppomax: error: ") and len(words) > 25 for words in said):
        return f"status 2 without a word: {said[-1:]}"
    if status == 0 and case.must_fail:
        return "is accepted"
    return None


def faults_of(kind: str, assets: Path, part: int = 0, parts: int = 1) -> tuple[int, list[str]]:
    """How many cases of this part were run, and what was wrong."""
    count, faults = 0, []
    for number, case in enumerate(KINDS[kind](assets)):
        if number % parts != part:
            continue
        count += 1
        with tempfile.TemporaryDirectory() as folder:
            fault = end_of(case, Path(folder))
        if fault is not None:
            faults.append(f"{case.name}: {fault}")
            print(faults[-1], flush=True)
    return count, faults


def main(kind: str, part: int = 0, parts: int = 1) -> int:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    import ppomax.reporting.plots as plots

    plots._picture = lambda draw, size: ""  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        assets = Path(folder)
        names = tiny_assets(assets)
        (assets / "names.json").write_text(json.dumps(names))
        count, faults = faults_of(kind, assets, part, parts)
    print(f"{kind}: {count} cases, {len(faults)} faults")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(int, sys.argv[2:])))
