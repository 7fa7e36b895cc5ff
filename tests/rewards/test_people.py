"""People as the judge: the file, what is missing in it, what is wrong in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from posttrain import judges
from posttrain.engine.errors import ConfigError, Waiting
from posttrain.rewards.judging import Responses
from posttrain.rewards.people import FILE, HumanJudge, Pair

TEXTS = ("bad", "good", "best", "alone", "same", "same")


def tools(work: Path, out: Path) -> Any:
    """What a stage gives to the judges that ask people."""
    return SimpleNamespace(ctx=SimpleNamespace(work=work, out=out))


@pytest.fixture
def batch() -> Responses:
    problems = [{"id": str(i), "domain": "d", "prompt": f"p{i}", "answer": ""} for i in range(3)]
    group = [0, 0, 0, 1, 2, 2]
    return Responses(
        problems=[problems[i] for i in group],
        texts=TEXTS,
        group=group,
        finished=[True] * 6,
        num_tokens=[1] * 6,
    )


@pytest.fixture
def people(tmp_path: Path) -> HumanJudge:
    (tmp_path / "out").mkdir()
    return HumanJudge(judges.human(), tools(tmp_path, tmp_path / "out"))


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        change(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def prefer_longer(row: dict[str, Any]) -> None:
    ranks = {"bad": 0, "good": 1, "best": 2}
    row["preferred"] = "a" if ranks[row["a"]] > ranks[row["b"]] else "b"
    row["strength"] = 3


def test_the_file_is_written_filled_in_and_kept(
    people: HumanJudge, batch: Responses, tmp_path: Path
) -> None:
    path = tmp_path / FILE
    with pytest.raises(Waiting, match=r"3 of 3 comparisons in .*comparisons\.jsonl") as caught:
        people.score(batch)
    assert caught.value.file == path
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {frozenset((row["a"], row["b"])) for row in rows} == {
        frozenset(pair) for pair in (("bad", "good"), ("good", "best"), ("best", "bad"))
    }
    for row in rows:
        assert list(row) == ["id", "domain", "prompt", "a", "b", "preferred", "strength"]
        assert (row["id"], row["prompt"]) == ("0", "p0")
        assert (row["preferred"], row["strength"]) == ("", None)
    edit(path, prefer_longer)
    assert people.score(batch) == [0, 0.5, 1, 0.5, 0.5, 0.5]
    assert (tmp_path / "out" / FILE).read_text() == path.read_text()


def test_what_is_missing_is_counted(people: HumanJudge, batch: Responses, tmp_path: Path) -> None:
    with pytest.raises(Waiting):
        people.score(batch)
    path = tmp_path / FILE
    edit(path, lambda row: row.update(preferred="tie") if row["a"] == "best" else None)
    edit(path, lambda row: row.update(preferred="tie") if row["b"] == "best" else None)
    with pytest.raises(Waiting, match="1 of 3 comparisons"):
        people.score(batch)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if "tie" in line))
    with pytest.raises(Waiting, match="1 of 3 comparisons"):
        people.score(batch)
    assert not (tmp_path / "out" / FILE).exists()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("preferred", "A", "line 2: preferred = 'A'; it has to be one of a, b, tie"),
        ("strength", 5, "line 2: strength = 5; it has to be 1, 2, 3 or 4"),
        ("strength", 2.0, "line 2: strength = 2.0"),
        ("a", "another", "line 2: this stage does not ask about these responses to problem 0"),
    ],
)
def test_a_wrong_line_is_named(
    people: HumanJudge, batch: Responses, tmp_path: Path, field: str, value: Any, message: str
) -> None:
    with pytest.raises(Waiting):
        people.score(batch)
    path = tmp_path / FILE
    edit(path, prefer_longer)
    lines = path.read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | {field: value})
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError) as caught:
        people.score(batch)
    assert message in str(caught.value)


def test_lines_that_are_no_objects_are_named(
    people: HumanJudge, batch: Responses, tmp_path: Path
) -> None:
    with pytest.raises(Waiting):
        people.score(batch)
    path = tmp_path / FILE
    for line, message in (("nonsense", "line 1: it is no JSON"), ('{"id": 1}', "no 'domain'")):
        path.write_text(line + "\n")
        with pytest.raises(ConfigError, match=message):
            people.score(batch)
    edit_twice = {"id": "0", "domain": "d", "prompt": "p0", "a": "bad", "b": "good"}
    rows = [edit_twice | {"preferred": "a"}, edit_twice | {"preferred": "b"}]
    other = [row | {"a": row["b"], "b": row["a"]} for row in rows]
    messages = set()
    for pair in (rows, other):
        path.write_text("\n".join(map(json.dumps, pair)))
        with pytest.raises(ConfigError) as caught:
            people.score(batch)
        messages.add(str(caught.value).partition(": ")[2][:20])
    # One of the two orders is the one that the file has.
    assert messages == {"problem 0 has the sa", "this stage does not "}


def test_the_file_may_lie_elsewhere(
    batch: Responses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    people = HumanJudge(judges.human("to/rate.jsonl"), tools(tmp_path / "work", tmp_path / "work"))
    with pytest.raises(Waiting, match=r"to/rate\.jsonl"):
        people.score(batch)
    assert (tmp_path / "to" / "rate.jsonl").exists()


def test_which_side_a_response_is_on_tells_nothing(tmp_path: Path) -> None:
    """About half of the first ones are a, and it is the same whichever comes first."""
    judge = judges.human()
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    problems = [{"id": str(i), "domain": "d", "prompt": "p"} for i in range(200)]
    here = [Pair(problem=p, first="u", second="v") for p in problems]
    there = [Pair(problem=p, first="v", second="u") for p in problems]
    for place, pairs in (("x", here), ("y", there)):
        with pytest.raises(Waiting):
            HumanJudge(judge, tools(tmp_path / place, tmp_path / place)).prefer(pairs)
    text = (tmp_path / "x" / FILE).read_text()
    assert text == (tmp_path / "y" / FILE).read_text()
    assert 70 < text.count('"a": "u"') < 130
    edit(tmp_path / "x" / FILE, lambda row: row.update(preferred="b", strength=1))
    found = HumanJudge(judge, tools(tmp_path / "x", tmp_path)).prefer(here)
    shown = [json.loads(line)["b"] for line in text.splitlines()]
    assert [p.first for p in found] == [float(b == "u") for b in shown]
    assert {p.strength for p in found} == {1}
