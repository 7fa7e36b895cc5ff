"""Servers that are busy, slow, strange or hostile, and what is sent to them: keys and urls."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from posttrain import judges
from posttrain.engine.errors import ConfigError, StageError
from posttrain.rewards import endpoint as module
from posttrain.rewards.endpoint import (
    CONCURRENCY,
    RETRIES,
    TIMEOUT,
    Question,
)
from posttrain.rewards.grading import Grader
from posttrain.rewards.verdicts import better, grade

from .conftest import Server, ask, batch, tools


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
