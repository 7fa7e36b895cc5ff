"""Judges behind an endpoint, asked of a real server on this machine."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from posttrain import judges
from posttrain.engine.errors import ConfigError, StageError
from posttrain.rewards import endpoint as module
from posttrain.rewards.comparisons import fill
from posttrain.rewards.endpoint import (
    CONCURRENCY,
    RETRIES,
    TIMEOUT,
    Endpoint,
    Question,
    ReplyCache,
)
from posttrain.rewards.grading import EndpointComparison, Grader
from posttrain.rewards.judging import Responses
from posttrain.rewards.spec import VerifierSpec
from posttrain.rewards.verdicts import better, grade
from posttrain.suites.build import build_domain
from posttrain.suites.domain import Domain, Table, domain_node

Answer = tuple[int, str]


class Server:
    """Answers what `reply(prompt, n)` says to the n-th request: (status, text)."""

    def __init__(self) -> None:
        self.reply: Callable[[str, int], Answer] = lambda prompt, n: (200, "Grade: 5")
        self.seen: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.together = self.most = 0
        self.headers: dict[str, str] = {}
        self.reason = "stop"
        self.drip = 0.0
        lock, server = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.seen.append(body)
                    server.keys.append(self.headers["Authorization"])
                    number = len(server.seen)
                    server.together += 1
                    server.most = max(server.most, server.together)
                status, text = server.reply(body["messages"][0]["content"], number)
                content = {
                    "choices": [{"message": {"content": text}, "finish_reason": server.reason}]
                }
                raw = text if status == 299 else json.dumps(content)
                with lock:
                    server.together -= 1
                self.send_response(200 if status == 299 else status)
                for name, value in server.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(OSError):
                    for part in raw if server.drip else [raw]:
                        time.sleep(server.drip)
                        self.wfile.write(part.encode())

            def log_message(self, *words: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)
        self.thread.start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(module, "FIRST_WAIT", 0.01)
    for name in (CONCURRENCY, TIMEOUT, RETRIES):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def ask(server: Server, path: Path, key: str | None = None) -> Endpoint:
    return Endpoint(url=server.url, model="m", key=key, cache=ReplyCache(path / "replies.jsonl"))


def tools(server: Server, path: Path) -> Any:
    """What a stage gives to the judges that ask endpoints."""
    cache = ReplyCache(path / "replies.jsonl")

    def endpoint(judge: Any) -> Endpoint:
        asked = {name: getattr(judge, name) for name in ("url", "model", "key", "max_tokens")}
        return Endpoint(**asked, cache=cache)

    return SimpleNamespace(endpoint=endpoint)


def batch(*texts: str, **columns: Any) -> Responses:
    problem = {"id": "1", "domain": "d", "prompt": "1+1={x}", "answer": "2"} | columns
    count = len(texts)
    return Responses(
        problems=[problem] * count,
        texts=texts,
        group=[0] * count,
        finished=[True] * count,
        num_tokens=[1] * count,
    )


def test_grades_are_shares_of_the_best_one(server: Server, tmp_path: Path) -> None:
    server.reply = lambda prompt, n: (
        200,
        f"3 of 4 look fine. Grade: {'8' if '2!' in prompt else '0'}",
    )
    judge = judges.llm(server.url, "m", reference=True, rubric="be brief")
    grader = Grader(judge, tools(server, tmp_path))
    assert grader.score(batch("2!", "no", "2!")) == [0.8, 0, 0.8]
    assert len(server.seen) == 2, "equal questions are asked once"
    body = next(body for body in server.seen if "2!" in body["messages"][0]["content"])
    assert (body["model"], body["temperature"]) == ("m", 0)
    assert all(part in body["messages"][0]["content"] for part in ("1+1={x}", "\n2\n", "be brief"))
    assert server.keys == [None, None]


def test_a_template_replaces_the_question(server: Server, tmp_path: Path) -> None:
    template = "{prompt} -> {response}, not {answer}. Grade: N"
    with pytest.raises(ConfigError, match="shows"):
        judges.llm(server.url, "m", template=template)
    judge = judges.llm(server.url, "m", reference=True, template=template, best=5)
    assert Grader(judge, tools(server, tmp_path)).score(batch("{answer}")) == [1]
    assert server.seen[0]["messages"][0]["content"] == "1+1={x} -> {answer}, not 2. Grade: N"


def test_a_rubric_of_the_row_is_a_weighted_share(server: Server, tmp_path: Path) -> None:
    rubric = [{"criterion": "is right", "weight": 3}, {"criterion": "is kind"}]
    server.reply = lambda prompt, n: (200, "1: no\nOn a second thought\n1: yes\n2. No")
    judge = judges.llm(server.url, "m", rubric=True)
    grader = Grader(judge, tools(server, tmp_path))
    assert grader.score(batch("2", rubric=rubric)) == [0.75]
    assert "1: is right\n2: is kind" in server.seen[0]["messages"][0]["content"]
    for wrong in (None, [], [{"weight": 1}], [{"criterion": "x", "weight": 0}]):
        with pytest.raises(ConfigError, match="problem 1 of domain d"):
            grader.score(batch("2", rubric=wrong))


@pytest.mark.parametrize("verifier", ["exact", "python:own.py:verify"])
def test_the_criteria_of_a_table_reach_the_endpoint(
    server: Server, tmp_path: Path, run_stage: Any, models: Any, verifier: str
) -> None:
    """From the suite's column to the score of each rollout, whatever the verifier; a criterion
    without a weight has weight 1."""
    path, own = tmp_path / "d", tmp_path / "own.py"
    path.mkdir()
    own.write_text("def verify(response, problem):\n    return 0.0\n")
    rows = [
        {
            "prompt": f"ask {i}",
            "answer": str(i),
            "points": [{"criterion": f"says {i}", "weight": 3}, {"criterion": "is kind"}],
        }
        for i in range(60)
    ]
    table = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(table)
    source = Table(train="rows.jsonl", rubric="points")
    domain = Domain(name="d", source=source, verifier=VerifierSpec(name=verifier))
    node = domain_node(domain, tmp_path)
    build_domain(node.config, node.runtime, path, node.data)
    (path / "record.json").write_text(
        json.dumps({"format": 1, "name": "d", "kind": "domain", "fingerprint": "1" * 64})
    )
    server.reply = lambda prompt, n: (200, "1: yes\n2: no")
    judge = judges.llm(server.url, "m", rubric=True)
    sampling = {"prompts_per_step": 2, "group_size": 2, "max_new_tokens": 3}
    edges = {"start": models["start"], "domains.d": str(path)}
    ran = run_stage("rl", {"steps": 1, "reward": judge.to_json()} | sampling, edges)
    found = [json.loads(line) for line in (ran.out / "rollouts.jsonl").read_text().splitlines()]
    assert [row["score"] for row in found] == [0.75] * 4
    number = found[0]["prompt"].removeprefix("ask ")
    asked = [body["messages"][0]["content"] for body in server.seen]
    assert any(f"1: says {number}\n2: is kind" in text for text in asked)


@pytest.mark.parametrize(
    "points", [[], "is kind", [{"weight": 1}], [{"criterion": "x", "weight": 0}]]
)
def test_a_bad_rubric_is_told_with_its_line(tmp_path: Path, points: Any) -> None:
    row = {"prompt": "ask", "answer": "1", "points": points}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    source = Table(train="rows.jsonl", rubric="points")
    domain = Domain(name="d", source=source, verifier=VerifierSpec(name="exact"))
    with pytest.raises(ConfigError, match=r"line 1: column 'points': .*rubric"):
        domain_node(domain, tmp_path)


@pytest.mark.parametrize(
    ("pairing", "swap", "questions", "shares"),
    [
        ("all", True, 6, [1, 0, 0.5]),
        ("all", False, 3, [1, 0, 0.5]),
        ("circular", False, 3, [1, 0, 0.5]),
    ],
)
def test_comparisons_are_win_shares(
    server: Server, tmp_path: Path, pairing: str, swap: bool, questions: int, shares: list[float]
) -> None:
    """c > m > a in the alphabet's own order; the server prefers the later word."""

    def reply(prompt: str, n: int) -> Answer:
        first, second = prompt.removesuffix(" Better: N").split(" or ")
        return 200, f"Better: {1 if first > second else 2}"

    server.reply = reply
    judge = judges.compare(
        server.url, "m", pairing=pairing, swap=swap, template="{a} or {b} Better: N"
    )
    found = EndpointComparison(judge, tools(server, tmp_path)).score(batch("x", "a", "m"))
    assert found == pytest.approx(shares)
    assert len(server.seen) == questions


def test_both_orders_cancel_a_preference_for_the_first(server: Server, tmp_path: Path) -> None:
    server.reply = lambda prompt, n: (200, "Better: 1")
    fixed = judges.compare(server.url, "m", swap=False)
    both = judges.compare(server.url, "m", swap=True)
    asked = tools(server, tmp_path)
    assert EndpointComparison(fixed, asked).score(batch("p", "q")) == [1, 0]
    assert EndpointComparison(both, asked).score(batch("p", "q")) == [0.5, 0.5]
    assert EndpointComparison(both, asked).score(batch("alone")) == [0.5]


def test_a_resumed_stage_asks_nothing_twice(server: Server, tmp_path: Path) -> None:
    judge = judges.llm(server.url, "m")
    server.reply = lambda prompt, n: (200, f"Grade: {n}")
    first = Grader(judge, tools(server, tmp_path)).score(batch("p", "q"))
    file = tmp_path / "replies.jsonl"
    file.write_bytes(file.read_bytes() + b'{"request": "cut o')
    again = Grader(judge, tools(server, tmp_path))
    assert again.score(batch("p", "q")) == first
    assert len(server.seen) == 2
    assert again.score(batch("p", "new"))[0] == first[0]
    assert len(ReplyCache(file)._known) == 3, "what was cut off is gone, what came later is whole"


def test_a_busy_server_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.reply = lambda prompt, n: ((429, 503, 200)[n - 1], "Grade: 7")
    judge = judges.llm(server.url, "m")
    assert Grader(judge, tools(server, tmp_path)).score(batch("p")) == [0.7]
    assert len(server.seen) == 3


@pytest.mark.parametrize(
    ("header", "waits"),
    [
        ("7", [7, 7]),
        ("99", [30, 30]),
        ("Fri, 1 Jan 2027", [0.01, 0.02]),
        ("\u00b2", [0.01, 0.02]),
        ("9" * 5000, [0.01, 0.02]),
    ],
)
def test_a_busy_server_says_how_long_to_wait(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    header: str,
    waits: list[float],
) -> None:
    """In seconds, never longer than LONGEST_WAIT; a date is not read, and the waits double."""
    slept: list[float] = []

    async def pause(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(module, "pause", pause)
    server.headers = {"Retry-After": header}
    answers = {1: 429, 2: 500}
    server.reply = lambda prompt, n: (answers.get(n, 200), "Grade: 7")
    assert ask(server, tmp_path).ask([Question("how?", lambda reply: 7.0)]) == [7.0]
    assert slept == waits


def test_what_stays_broken_is_told(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RETRIES, "1")
    judge = judges.llm(server.url, "m")
    for reply, kind, message in (
        ((500, "ouch"), StageError, "answered 500 .*ouch.*2 times in a row"),
        ((404, "no model m"), ConfigError, "answered 404 .*the model name 'm'"),
        ((299, "<html>"), StageError, "no chat completion.*<html>"),
        ((200, "well"), StageError, "no grade from 0 to 10 .*'well'"),
        ((200, "Grade: 11"), StageError, "no grade from 0 to 10"),
    ):
        server.reply = lambda prompt, n, reply=reply: reply
        with pytest.raises(kind, match=message):
            Grader(judge, tools(server, tmp_path)).score(batch("p"))
    assert not (tmp_path / "replies.jsonl").exists(), "a bad reply is not kept"
    judge = judges.llm("http://127.0.0.1:9/v1", "m")
    with pytest.raises(StageError, match=r"127\.0\.0\.1:9/v1/chat/completions: it cannot"):
        Grader(judge, tools(server, tmp_path)).score(batch("p"))


def test_a_reply_that_cannot_be_read_is_asked_for_again(server: Server, tmp_path: Path) -> None:
    server.reply = lambda prompt, n: (200, "hm" if n < 3 else "Grade: 4")
    judge = judges.llm(server.url, "m")
    assert Grader(judge, tools(server, tmp_path)).score(batch("p")) == [0.4]
    prompts = [body["messages"][0]["content"] for body in server.seen]
    assert prompts[1] == prompts[2] == prompts[0] + module.REMINDER


def test_a_slow_server_runs_into_the_timeout(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RETRIES, "0")
    monkeypatch.setenv(TIMEOUT, "1")
    release = threading.Event()
    server.reply = lambda prompt, n: (200, f"Grade: 1 {release.wait(10)}")
    with pytest.raises(StageError, match="timed out"):
        Grader(judges.llm(server.url, "m"), tools(server, tmp_path)).score(batch("p"))
    release.set()


def test_requests_at_once_are_limited(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CONCURRENCY, "2")
    pause = threading.Event()
    server.reply = lambda prompt, n: (200, f"{pause.wait(0.05)} Grade: 1")
    texts = [str(n) for n in range(6)]
    Grader(judges.llm(server.url, "m"), tools(server, tmp_path)).score(batch(*texts))
    assert (server.most, len(server.seen)) == (2, 6)
    monkeypatch.setenv(CONCURRENCY, "many")
    with pytest.raises(ConfigError, match=f"{CONCURRENCY}='many'"):
        ask(server, tmp_path)


def test_the_key_comes_from_the_environment(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = judges.llm(server.url, "m", key="MY_KEY")
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(ConfigError, match="environment variable MY_KEY is empty or not set"):
        Grader(judge, tools(server, tmp_path)).score(batch("p"))
    monkeypatch.setenv("MY_KEY", "secret")
    Grader(judge, tools(server, tmp_path)).score(batch("p"))
    assert server.keys == ["Bearer secret"]
    assert "secret" not in (tmp_path / "replies.jsonl").read_text()


def test_what_a_template_is_filled_with_means_nothing() -> None:
    assert fill("{a}{b}{c}", {"a": "{b}", "b": "2"}) == "{b}2{c}"


@pytest.mark.parametrize(
    ("reason", "reply", "said"),
    [
        ("length", "Grade: 4", "its reply was cut at max_tokens = 64"),
        ("stop", "", "its reply is empty"),
        ("stop", "<think>Grade: 4", "no grade from 0 to 10"),
    ],
)
def test_a_cut_or_empty_reply_is_no_verdict(
    server: Server, tmp_path: Path, reason: str, reply: str, said: str
) -> None:
    server.reason, server.reply = reason, lambda prompt, n: (200, reply)
    judge = judges.llm(server.url, "m", max_tokens=64)
    with pytest.raises(StageError, match=f"3 times in a row: .*{said}"):
        Grader(judge, tools(server, tmp_path)).score(batch("p"))
    assert [body["max_tokens"] for body in server.seen] == [64] * 3
    assert not (tmp_path / "replies.jsonl").exists()


def test_a_judge_that_thinks_is_read_after_its_thought(server: Server, tmp_path: Path) -> None:
    server.reply = lambda prompt, n: (200, "<think>Grade: 1?\nGrade: 2</think>\nGrade: 9")
    judge = judges.llm(server.url, "m")
    assert Grader(judge, tools(server, tmp_path)).score(batch("p")) == [0.9]


def test_the_length_of_replies_is_in_the_identity_where_it_is_not_the_default() -> None:
    for make in (judges.llm, judges.compare):
        plain, longer = make("http://h/v1", "m"), make("http://h/v1", "m", max_tokens=2048)
        assert "max_tokens" not in plain.to_json()
        assert longer.to_json()["max_tokens"] == 2048
        assert make("http://h/v1", "m", max_tokens=1024).identity == plain.identity
        assert longer.identity != plain.identity


def test_a_kept_reply_is_checked_by_whoever_reads_it(server: Server, tmp_path: Path) -> None:
    """Two judges put the same question; what one can read is no verdict for the other."""
    asking = ask(server, tmp_path)
    replies = iter(["Grade: 7", "Better: 1", "Grade: 8\nBetter: 2"])
    server.reply = lambda prompt, n: (200, next(replies))
    grades = Question("how?", lambda reply: grade(reply, 10))
    assert asking.ask([grades]) == [0.7]
    assert asking.ask([Question("how?", better)]) == [1]
    assert asking.ask([grades, Question("how?", better)]) == [0.8, 0]
    assert len(server.seen) == 3


def test_a_damaged_line_of_kept_replies_is_asked_again(server: Server, tmp_path: Path) -> None:
    judge = judges.llm(server.url, "m")
    Grader(judge, tools(server, tmp_path)).score(batch("p"))
    file = tmp_path / "replies.jsonl"
    file.write_text("[" * 10_000 + '\n{"request": 1}\nnull\n' + file.read_text())
    assert Grader(judge, tools(server, tmp_path)).score(batch("p", "q")) == [0.5, 0.5]
    assert len(server.seen) == 2


def test_a_reply_that_drips_ends_in_time(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is for the whole reply, however steadily its bytes come."""
    monkeypatch.setenv(RETRIES, "0")
    monkeypatch.setenv(TIMEOUT, "1")
    server.drip = 0.1
    begun = time.monotonic()
    with pytest.raises(StageError, match="timed out: it was not whole after 1 s"):
        Grader(judges.llm(server.url, "m"), tools(server, tmp_path)).score(batch("p"))
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("x" * (4 * 2**20 + 1), "longer than 4 MiB"),
        ("[" * 100_000, "no chat completion"),
        ('{"choices": ' + "1" * 5000 + "}", "no chat completion"),
        ('{"choices": [3]}', "no chat completion"),
        ('{"choices": [{"message": {"content": 7}}]}', "no chat completion"),
    ],
)
def test_a_reply_of_a_hostile_server_is_told_in_words(
    server: Server, tmp_path: Path, body: str, message: str
) -> None:
    server.reply = lambda prompt, n: (299, body)
    with pytest.raises(StageError, match=message) as error:
        Grader(judges.llm(server.url, "m"), tools(server, tmp_path)).score(batch("p"))
    assert len(str(error.value)) < 600


def test_no_redirect_is_followed(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    server.headers = {"Location": server.url + "/stolen"}
    judge = judges.llm(server.url, "m", key="JUDGE_KEY")
    for status in (301, 302, 307, 308):
        server.reply = lambda prompt, n, status=status: (status, "")
        with pytest.raises(ConfigError, match=f"answered {status} and sends to .*stolen"):
            Grader(judge, tools(server, tmp_path)).score(batch("p"))
    assert len(server.seen) == 4, "one request each, to the address that was given"


def test_what_a_server_says_neither_steers_the_terminal_nor_repeats_the_key(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "very-secret")
    server.reply = lambda prompt, n: (401, "\x1b]0;OWNED\x07\u202e wrong key very-secret")
    judge = judges.llm(server.url, "m", key="JUDGE_KEY")
    with pytest.raises(ConfigError, match=r"wrong key \*\*\*") as error:
        Grader(judge, tools(server, tmp_path)).score(batch("p"))
    assert not set(str(error.value)) & set("\x1b\x07\u202e")
    assert "very-secret" not in str(error.value)
    monkeypatch.setenv("JUDGE_KEY", "very\nsecret")
    with pytest.raises(ConfigError, match="JUDGE_KEY holds characters") as error:
        Grader(judge, tools(server, tmp_path)).score(batch("p"))
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://me:geheim@localhost/v1",
        "http://geheim@localhost/v1",
        "http://localhost/v1?key=geheim",
        "http://localhost/v1#geheim",
    ],
)
def test_a_url_with_a_secret_is_refused_and_not_repeated(url: str) -> None:
    for make in (lambda: judges.llm(url, "m"), lambda: judges.compare(url, "m")):
        with pytest.raises(ConfigError, match="password or a query") as error:
            make()
        assert "geheim" not in str(error.value)
    with pytest.raises(ConfigError, match="needs model=") as error:
        judges.compare(url)
    assert "geheim" not in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://localhost",
        "http://",
        "http://[::1",
        "http://localhost:99999/v1",
        "http://localhost:port/v1",
        "http://localhost:0/v1",
        "http://b\u00fccher.example/v1",
        "http://localhost/\u00fc",
        "http://local host/v1",
        "http://localhost/\n",
    ],
)
def test_a_url_that_cannot_be_asked_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="judge llm: url = "):
        judges.llm(url, "m")


@pytest.mark.parametrize(
    "key",
    [
        "sk-abc123",
        "sk_live_51Habc",
        "hf_AbCd1234EfGh5678",
        "AIzaSyA1234567890abcdefghijklmno",
        "4f3a9c",
        "abcdefghij1234567890klmn",
        "ABCDEF0123456789ABCDEF0123456789",
        "two words",
        "",
    ],
)
def test_a_key_in_place_of_a_variables_name_is_refused_and_not_repeated(key: str) -> None:
    with pytest.raises(ConfigError, match="name of the environment variable") as error:
        judges.llm("http://localhost/v1", "m", key=key)
    assert len(key) < 3 or key not in str(error.value)


@pytest.mark.parametrize("key", ["OPENAI_API_KEY", "my_key", "KEY2", "_K", "HF_TOKEN", "hf_key_2"])
def test_names_of_variables_are_taken(key: str) -> None:
    assert judges.llm("http://localhost/v1", "m", key=key).key == key


def test_a_template_has_to_ask_for_what_is_read() -> None:
    with pytest.raises(ConfigError, match="'Grade:' stands in it nowhere"):
        judges.llm("http://h", "m", template="How good is {response} to {prompt}?")
    with pytest.raises(ConfigError, match="'1: yes' stands in it nowhere"):
        judges.llm("http://h", "m", rubric=True, template="{prompt} {response} {rubric} Grade: N")
    with pytest.raises(ConfigError, match="'Better:' stands in it nowhere"):
        judges.compare("http://h", "m", template="{a} or {b}?")
