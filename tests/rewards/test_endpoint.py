"""Judges behind an endpoint, asked of a real server on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain import judges
from posttrain.engine.errors import ConfigError, StageError
from posttrain.rewards import endpoint as module
from posttrain.rewards.comparisons import fill
from posttrain.rewards.endpoint import (
    ReplyCache,
)
from posttrain.rewards.grading import EndpointComparison, Grader
from posttrain.rewards.spec import VerifierSpec
from posttrain.suites.build import build_domain
from posttrain.suites.domain import Domain, Table, domain_node

from .conftest import Answer, Server, batch, tools


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


def test_a_reply_that_cannot_be_read_is_asked_for_again(server: Server, tmp_path: Path) -> None:
    server.reply = lambda prompt, n: (200, "hm" if n < 3 else "Grade: 4")
    judge = judges.llm(server.url, "m")
    assert Grader(judge, tools(server, tmp_path)).score(batch("p")) == [0.4]
    prompts = [body["messages"][0]["content"] for body in server.seen]
    assert prompts[1] == prompts[2] == prompts[0] + module.REMINDER


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


def test_a_template_has_to_ask_for_what_is_read() -> None:
    with pytest.raises(ConfigError, match="'Grade:' stands in it nowhere"):
        judges.llm("http://h", "m", template="How good is {response} to {prompt}?")
    with pytest.raises(ConfigError, match="'1: yes' stands in it nowhere"):
        judges.llm("http://h", "m", rubric=True, template="{prompt} {response} {rubric} Grade: N")
    with pytest.raises(ConfigError, match="'Better:' stands in it nowhere"):
        judges.compare("http://h", "m", template="{a} or {b}?")
