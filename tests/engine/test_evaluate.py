"""Win / tie / lose: scores, a Python function, and an endpoint that is a local HTTP server."""

import contextlib
import itertools
import json
import math
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from ppomax.cli import main
from ppomax.config.mapping import ConfigError
from ppomax.config.stages import EvaluateConfig
from ppomax.recipe.rewards import RewardError
from ppomax.saving.model_folder import save_model
from ppomax.saving.saved_policy import open_policy
from ppomax.stages.evaluate import run_evaluation
from ppomax.stages.judges import EndpointJudge, JudgeError, both_orders, compare_scores, read_verdict
from ppomax.stages.wilson import wilson

from tests.engine.tiny import small_config, tiny_assets, tiny_engine, tiny_policy, tiny_tokenizer


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Two policies, a reward model and prompts in the working directory; the flags that they make."""
    monkeypatch.chdir(tmp_path)
    tiny_assets(tmp_path)
    save_model(tiny_policy(seed=3), tiny_tokenizer(), tmp_path / "other")
    return {
        "policy": "policy",
        "baseline": "other",
        "prompts": "prompts.jsonl",
        "reward_model": "reward",
        "max_new_tokens": 8,
        "out": "out",
    }


def rows_of(folder="out"):
    return json.loads((Path(folder) / "evaluation.json").read_text())


# ---- the rates ------------------------------------------------------------------------------------------------------


def test_wilson_interval_has_its_published_values():
    # Newcombe 1998, table I, method 3: 81 of 263 gives 0.2553 to 0.3662, 0 of 20 gives 0 to 0.1611
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1.0, 20)[1] == 1.0


def test_the_interval_holds_the_truth_as_often_as_it_says():
    draws = torch.rand(4000, 50, generator=torch.Generator().manual_seed(0)) < 0.7
    inside = sum(low <= 0.7 <= high for low, high in (wilson(float(x), 50) for x in draws.double().mean(1)))
    assert inside / 4000 == pytest.approx(0.95, abs=0.02)


def test_scores_within_the_margin_tie():
    verdicts = [j.verdict for j in compare_scores([1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 1.0, 1.05], tie_margin=0.1)]
    assert verdicts == ["win", "lose", "tie", "tie"]


# ---- reward model and function --------------------------------------------------------------------------------------


def test_a_reward_model_judges_and_swapping_the_sides_swaps_the_outcome(job):
    one = run_evaluation(EvaluateConfig(**job))
    saved = rows_of()
    two = run_evaluation(EvaluateConfig(**{**job, "policy": "other", "baseline": "policy"}))
    assert (one.win, one.tie, one.lose) == (two.lose, two.tie, two.win)
    assert one.win + one.tie + one.lose == len(saved["rows"]) == 12
    for row in saved["rows"]:
        better = row["score_policy"] - row["score_baseline"]
        assert row["verdict"] == ("win" if better > 0 else "lose" if better < 0 else "tie")
    assert saved["win_rate_95"] == pytest.approx(wilson(saved["win_rate"], 12))


def test_a_checkpoint_ties_with_itself(job):
    result = run_evaluation(EvaluateConfig(**{**job, "baseline": "policy"}))
    assert (result.win, result.tie, result.lose, result.win_rate) == (0, 12, 0, 0.5)


def test_the_score_is_the_reward_model_s_own(job):
    from ppomax.models import load_reward_model
    from ppomax.stages.evaluate import answers

    run_evaluation(EvaluateConfig(**job))
    given, _ = answers("policy", EvaluateConfig(**job))
    model = load_reward_model("reward")
    for answer, row in zip(given, rows_of()["rows"], strict=True):
        tokens = torch.tensor(answer.prompt_ids + answer.response_ids)
        score = model.scores(tokens, torch.tensor([0, len(tokens)], dtype=torch.int32))
        assert row["score_policy"] == pytest.approx(float(score.detach()), abs=1e-4)


def test_a_function_judges_as_it_scores(job):
    Path("judge.py").write_text("def words(prompts, responses):\n    return [len(r.split()) for r in responses]\n")
    run_evaluation(EvaluateConfig(**job, judge="function", function="judge.py:words"))
    for row in rows_of()["rows"]:
        assert (row["score_policy"], row["score_baseline"]) == (
            len(row["policy"].split()),
            len(row["baseline"].split()),
        )


def test_the_classifier_judges_whole_texts_and_gives_the_shares_called_positive(job, monkeypatch, tmp_path):
    from ppomax.assets.classifier import SentimentClassifier

    SentimentClassifier(-0.1, {f"w{i}": (1.0, 1.0 if i % 2 else -1.0) for i in range(64)}).save(
        tmp_path / "classifier.json"
    )
    monkeypatch.setattr("ppomax.stages.evaluate.shipped", lambda name: tmp_path / name)
    result = run_evaluation(EvaluateConfig(**job, judge="classifier"))
    classifier, rows = SentimentClassifier.load(tmp_path / "classifier.json"), rows_of()["rows"]
    logits = [classifier.logit(f"{row['prompt']} {row['policy']}".strip()) for row in rows]
    texts = [f"{row['prompt']} {row['policy']}".strip() for row in rows]
    assert [row["score_policy"] for row in rows] == pytest.approx([classifier.score(text) for text in texts])
    assert result.positive is not None
    assert result.positive[0] == pytest.approx(sum(x > 0 for x in logits) / 12)
    assert f"called positive {result.positive[0]:.1%} against" in result.sentence()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise KeyError('x')", "raised KeyError"),
        ("return [1.0]", r"shape \(1,\) for 12 responses"),
        ("return [float('nan')] * 12", "nan"),
        ("return ['a'] * 12", "one number for each"),
    ],
)
def test_a_function_that_fails_is_named(job, body, said):
    Path("judge.py").write_text(f"def bad(prompts, responses):\n    {body}\n")
    with pytest.raises(RewardError, match=said):
        run_evaluation(EvaluateConfig(**job, judge="function", function="judge.py:bad"))


def test_a_run_s_checkpoint_is_read_whole(job):
    engine = tiny_engine(tokenizer=tiny_tokenizer())
    engine.sources["tokenizer"] = "policy"
    with torch.no_grad():
        engine.policy.module.lm_head.weight.mul_(1.5)
    engine.save("run/checkpoints/step-000003")
    model, tokenizer = open_policy("run")
    assert torch.equal(model.lm_head.weight, engine.policy.module.lm_head.weight)
    assert tokenizer.eos_token_id == 2
    assert torch.equal(open_policy("run/checkpoints/step-000003")[0].lm_head.weight, model.lm_head.weight)


def test_a_run_says_its_prompts_and_its_start_where_nothing_is_named(job):
    data = {"prompts": "prompts.jsonl", "eval_prompts": "held_out.jsonl", "max_prompt_tokens": 600, "overlong": "drop"}
    engine = tiny_engine(small_config(**{f"data__{k}": v for k, v in data.items()}), tokenizer=tiny_tokenizer())
    engine.sources |= {"policy": "other", "tokenizer": "policy"}
    engine.save("run/checkpoints/step-000003")
    Path("held_out.jsonl").write_text('{"prompt": "<5><6>"}\n{"prompt": "<7>"}\n')
    job = {k: v for k, v in job.items() if k not in ("prompts", "baseline")} | {"policy": "run"}
    run_evaluation(EvaluateConfig(**job))
    held = rows_of()
    assert (held["config"]["baseline"], held["config"]["prompts"]) == ("other", "held_out.jsonl")
    assert (held["config"]["max_prompt_tokens"], held["config"]["overlong"]) == (600, "drop")
    assert len(held["rows"]) == 2


def test_the_command_prints_the_outcome(job, capsys):
    flags = [f"--{name}={value}" for name, value in job.items()]
    assert main(["evaluate", *flags]) == 0
    said = capsys.readouterr().out
    assert re.search(r"win \d+ +tie \d+ +lose \d+ +win rate \d+\.\d%", said)
    assert "out/evaluation.json" in said
    assert main(["evaluate", "--policy", "./gone", "--baseline", "policy", "--prompts", "prompts.jsonl"]) == 2
    assert "gone" in capsys.readouterr().err


def test_a_judge_without_its_parts_is_refused():
    for knobs in ({"judge": "function"}, {"judge": "endpoint"}, {"judge": "endpoint", "endpoint": "http://x"}):
        with pytest.raises(ConfigError, match="must be given"):
            EvaluateConfig(policy="p", **knobs)


# ---- the endpoint ---------------------------------------------------------------------------------------------------


class Server:
    """A chat endpoint on 127.0.0.1 that answers by `reply(question)`: text, or (status, text)."""

    def __init__(self, reply):
        self.questions, self.headers, lock = [], [], threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler):
                question = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                with lock:
                    self.questions.append(question)
                    self.headers.append(dict(handler.headers) | {"path": handler.path})
                given = reply(question["messages"][0]["content"])
                status, text = given if isinstance(given, tuple) else (200, given)
                body = (
                    json.dumps({"choices": [{"message": {"content": text}}]}).encode()
                    if status == 200
                    else text.encode()
                )
                handler.send_response(status)
                if status == 302:
                    handler.send_header("Location", "http://127.0.0.1:1/elsewhere")
                handler.send_header("Content-Length", str(len(body)))
                handler.end_headers()
                handler.wfile.write(body)

            def log_message(handler, *unused):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *unused):
        self.http.shutdown()
        self.http.server_close()


def sides(question):
    return [re.search(rf"<continuation_{x}>\n(.*?)\n</continuation_{x}>", question, re.S)[1] for x in "ab"]


def longer(question):
    a, b = map(len, sides(question))
    return "VERDICT: " + ("A" if a > b else "B" if b > a else "C")


def ask(server, **options):
    judge = EndpointJudge(server.url, "m", "length", wait=0.01, **options)
    return judge(["p1", "p2", "p3"], ["long one", "x", "same"], ["s", "longer", "emas"])


def test_an_endpoint_judges_each_pair_in_both_orders():
    with Server(longer) as server:
        assert [j.verdict for j in ask(server)] == ["win", "lose", "tie"]
    asked = sorted(tuple(sides(q["messages"][0]["content"])) for q in server.questions)
    assert asked == sorted(
        [("long one", "s"), ("s", "long one"), ("x", "longer"), ("longer", "x"), ("same", "emas"), ("emas", "same")]
    )
    assert all(q["model"] == "m" and "length" in q["messages"][0]["content"] for q in server.questions)
    assert all(h["path"] == "/v1/chat/completions" for h in server.headers)


def test_a_judge_that_always_takes_the_first_place_decides_nothing():
    with Server(lambda question: "VERDICT: A") as server:
        assert [j.verdict for j in ask(server)] == ["tie", "tie", "tie"]


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(job, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    with Server(longer) as server:
        run_evaluation(
            EvaluateConfig(**job, judge="endpoint", endpoint=server.url, endpoint_model="m", api_key_env="JUDGE_KEY")
        )
    assert all(h["Authorization"] == "Bearer sk-secret" for h in server.headers)
    assert "sk-secret" not in Path("out/evaluation.json").read_text()
    assert len(server.questions) == 24
    verdicts = [(row["verdict"], len(row["policy"]) - len(row["baseline"])) for row in rows_of()["rows"]]
    assert all(v == ("win" if gap > 0 else "lose" if gap < 0 else "tie") for v, gap in verdicts)


def test_without_a_key_no_header_is_sent_and_plain_http_far_away_is_refused_with_one():
    with Server(longer) as server:
        ask(server)
    assert not any("Authorization" in h for h in server.headers)
    with pytest.raises(JudgeError, match="travel in clear"):
        EndpointJudge("http://example.org/v1", "m", "c", key="k")
    with pytest.raises(JudgeError, match=r"must be an http\(s\) address"):
        EndpointJudge("ftp://example.org", "m", "c")


def test_a_passing_failure_is_tried_again():
    seen = []

    def flaky(question):
        seen.append(question)
        return (503, "busy") if seen.count(question) < 3 else longer(question)

    with Server(flaky) as server:
        assert [j.verdict for j in ask(server)] == ["win", "lose", "tie"]
    assert len(server.questions) == 18


def test_a_lasting_failure_is_counted_and_an_unreadable_reply_too(caplog):
    def broken(question):
        return (500, "down") if "p1" in question else "no idea" if "p2" in question else longer(question)

    with Server(broken) as server:
        one, two, three = ask(server, retries=1)
    assert [j.verdict for j in (one, two, three)] == [None, None, "tie"]
    assert "500" in one.detail["reply"]
    assert two.detail["reply"] == "no idea"
    assert "2 of 3 prompts were not judged" in caplog.text


@pytest.mark.parametrize(("status", "said"), [(401, "bad key"), (404, "no such model"), (302, "302")])
def test_a_refusal_stops_at_once_and_says_why(status, said):
    with Server(lambda question: (status, said)) as server, pytest.raises(JudgeError, match=f"{status}.*"):
        ask(server)


class Raw:
    """A server on 127.0.0.1 that reads a request's first bytes and then writes `pieces`, `pause` seconds apart."""

    def __init__(self, pieces, pause=0.0):
        self.pieces, self.pause, self.sent = pieces, pause, 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/v1"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._answer, args=(self.socket.accept()[0],), daemon=True).start()

    def _answer(self, client):
        with contextlib.suppress(OSError), client:
            client.recv(65536)
            for piece in self.pieces():
                client.sendall(piece)
                self.sent += len(piece)
                time.sleep(self.pause)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("pieces", "pause", "said"),
    [
        (lambda: [HEAD + b'Content-Length: 500\r\n\r\n{"choices": ['], 0, "cut short|ConnectionReset"),
        (lambda: [b"HTTP/1.1 200 OK"], 0, "RemoteDisconnected|JSONDecodeError|BadStatusLine|ConnectionReset"),
        (lambda: [b"hello\r\n\r\n"], 0, "BadStatusLine|ConnectionReset"),
        (lambda: itertools.chain([HEAD + b"\r\n"], itertools.repeat(b" " * 65536)), 0, "longer than"),
        (lambda: itertools.chain([HEAD + b"\r\n"], itertools.repeat(b" ")), 0.05, "no whole answer within 0.5 s"),
        (lambda: itertools.chain([HEAD], itertools.repeat(b"X")), 0.05, "no whole answer within 0.5 s"),
        (lambda: itertools.repeat(b"", 1000), 0.05, "TimeoutError"),
    ],
    ids=["cut body", "cut head", "no http", "endless body", "dripping body", "dripping head", "silence"],
)
def test_an_answer_that_never_is_whole_is_named_in_time_and_in_little_room(pieces, pause, said):
    server = Raw(pieces, pause)
    judge = EndpointJudge(server.url, "m", "length", timeout=0.5, retries=0)
    (judged,) = judge(["p"], ["a"], ["b"])
    assert judged.verdict is None
    assert re.search(said, judged.detail["reply"]), judged.detail
    assert server.sent < 64 << 20


def test_no_verdict_at_all_is_an_error(job):
    with Server(lambda question: "hm") as server, pytest.raises(JudgeError, match="none of 12 prompts could be judged"):
        run_evaluation(EvaluateConfig(**job, judge="endpoint", endpoint=server.url, endpoint_model="m"))


def test_an_address_where_nobody_answers_is_named_not_hung_on(job):
    with pytest.raises(JudgeError, match=r"none of 1 prompts could be judged.*refused"):
        run_evaluation(
            EvaluateConfig(
                **{**job, "limit": 1, "retries": 0}, judge="endpoint", endpoint="http://127.0.0.1:9", endpoint_model="m"
            )
        )


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("VERDICT: A", "A"),
        ("I think so.\n**VERDICT: b**", "B"),
        ("c", "C"),
        ("A.", "A"),
        ("A tie, I would say", None),
        ("", None),
        ("VERDICT: A ... on reflection VERDICT: B", "B"),
        ("VERDICT: Neither", None),
    ],
)
def test_verdicts_are_read_from_their_line_alone(reply, verdict):
    assert read_verdict(reply) == verdict


@pytest.mark.parametrize(
    ("first", "swapped", "verdict"),
    [
        ("A", "B", "win"),
        ("B", "A", "lose"),
        ("A", "A", "tie"),
        ("C", "C", "tie"),
        ("A", "C", "win"),
        ("C", "A", "lose"),
        ("A", "?", None),
    ],
)
def test_both_orders_make_one_judgement(first, swapped, verdict):
    assert both_orders(first, swapped).verdict == verdict


def test_rates_leave_out_what_was_not_judged(tmp_path):
    from ppomax.stages.evaluate import Evaluation

    result = Evaluation(win=3, tie=2, lose=1, unjudged=4, path=tmp_path)
    assert result.win_rate == pytest.approx(4 / 6)
    assert "4 not judged" in result.sentence()
    assert math.isclose(result.interval[0], wilson(4 / 6, 6)[0])
