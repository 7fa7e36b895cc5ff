"""select: the conditions on a rollout and the pool that they come from, by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from posttrain.engine.errors import ConfigError
from posttrain.stages.config import build_config

Rows = Sequence[Mapping[str, Any]]


def rollout(text: str, reward: float = 1.0, **changes: Any) -> dict[str, Any]:
    row = {"id": "1", "domain": "d", "prompt": "p", "answer": "a", "finished": True}
    return row | {"response": text, "reward": reward, "num_tokens": len(text) + 1} | changes


ROWS = [
    rollout("abc", 1.0, score=0.2, step=0),
    rollout("été", 0.5, score=0.9, step=1),
    rollout("a b a b a", 0.0, score=-1.0, step=2),
    rollout("abcdefgh", 1.0, score=0.9, step=3),
    rollout("other", 0.0, id="2", score=0.4, step=3),
    rollout("cut", 1.0, id="2", score=5.0, step=3, finished=False),
]


@pytest.fixture
def select(run_stage: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    def run(*stages: Rows, **settings: Any) -> Any:
        inputs = {}
        for number, rows in enumerate(stages or [ROWS]):
            folder = tmp_path / f"rollouts-{len(list(tmp_path.iterdir()))}"
            folder.mkdir()
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / "rollouts.jsonl").write_text(text)
            inputs["rollouts" if len(stages) < 2 else f"rollouts.{number}"] = str(folder)
        return run_stage("select", settings, inputs)

    return run


def demos(ran: Any) -> list[str]:
    lines = (ran.out / "data.jsonl").read_text().splitlines()
    return [json.loads(line)["demo"] for line in lines]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"how": "all"}, ["abc", "été", "a b a b a", "abcdefgh", "other"]),
        ({"how": {"kind": "all", "max_per_prompt": 2}}, ["abc", "été", "other"]),
        ({"how": {"kind": "all", "success": True}}, ["abc", "abcdefgh"]),
        ({"how": {"kind": "all", "success": False}}, ["été", "a b a b a", "other"]),
        ({"how": "all", "min_tokens": 5}, ["a b a b a", "abcdefgh", "other"]),
        ({"how": "all", "max_tokens": 4}, ["abc", "été"]),
        ({"how": "all", "language": "[a-z ]"}, ["abc", "a b a b a", "abcdefgh", "other"]),
        (
            {"how": "all", "max_repetition": {"share": 0.3, "n": 2}},
            ["abc", "été", "abcdefgh", "other"],
        ),
        ({"how": "all", "max_repetition": {"share": 0.3}}, ["abc", "été", "abcdefgh", "other"]),
        (
            {"how": "all", "max_repetition": {"share": 0.34}},
            ["abc", "été", "a b a b a", "abcdefgh", "other"],
        ),
        ({"how": "all", "first_step": 1, "last_step": 2}, ["été", "a b a b a"]),
        ({"how": "all", "last_step": 0}, ["abc"]),
        ({"how": "all", "first_step": 3}, ["abcdefgh", "other"]),
        ({"how": "best"}, ["abc", "abcdefgh"]),
        ({"how": {"kind": "best", "by": "score"}}, ["été", "abcdefgh", "other"]),
        ({"how": {"kind": "best", "by": "score", "max_per_prompt": 1}}, ["été", "other"]),
        ({"how": {"kind": "top_share", "share": 0.4}}, ["abc", "abcdefgh"]),
        (
            {"how": {"kind": "top_share", "share": 0.5, "by": "score"}},
            ["été", "abcdefgh", "other"],
        ),
        (
            {"how": {"kind": "top_share", "share": 0.5, "by": "score", "success": False}},
            ["été", "other"],
        ),
        (
            {"how": {"kind": "top_share", "share": 0.5, "by": "score", "max_per_prompt": 1}},
            ["été", "other"],
        ),
        ({"how": "correct", "min_tokens": 5}, ["abcdefgh"]),
        ({"how": "shortest_correct", "min_tokens": 5}, ["abcdefgh"]),
    ],
)
def test_conditions_by_hand(
    select: Callable[..., Any], settings: dict[str, Any], expected: list[str]
) -> None:
    """Five finished responses. Of `a b a b a` one of three trigrams (a b a) and two of four bigrams
    stood there before: shares 1/3 and 1/2. The best 40 % of five by reward are the two with 1; the
    best half by score are three: .9, .9, .4."""
    assert demos(select(**settings)) == expected


def test_several_stages_are_one_pool(select: Callable[..., Any]) -> None:
    """The best of a prompt is the best of all rounds; the same response counts once."""
    second = [rollout("abc", 1.0), rollout("new", 1.0, id="2")]
    assert demos(select(ROWS[:2], second, how="correct")) == ["abc", "new"]
    assert demos(select(ROWS[1:2], second, [rollout("x", 1.0, id="3")])) == ["abc", "new", "x"]


def test_modes_are_not_compared(select: Callable[..., Any]) -> None:
    rows = [rollout("one", mode="think"), rollout("two words", mode="no_think")]
    assert demos(select(rows, how="shortest_correct")) == ["one", "two words"]


def test_thoughts_are_stripped(select: Callable[..., Any]) -> None:
    rows = [rollout("<think>so</think>\n42", mode="think"), rollout("7", id="2")]
    ran = select(rows, strip_thought=True)
    kept = [json.loads(line) for line in (ran.out / "data.jsonl").read_text().splitlines()]
    assert [(row["demo"], row.get("mode")) for row in kept] == [("42", "no_think"), ("7", None)]
    plain = select(rows)
    assert demos(plain) == ["<think>so</think>\n42", "7"]


def test_what_the_rollouts_lack_is_an_error(select: Callable[..., Any]) -> None:
    bare = [rollout("abc")]
    with pytest.raises(ConfigError, match=r"have no score; put r.score\(rollouts"):
        select(bare, how={"kind": "best", "by": "score"})
    with pytest.raises(ConfigError, match="these have no step, leave both out"):
        select(bare, first_step=1)
    with pytest.raises(ConfigError, match=r"no rollout is of a step from 9 to inf.* steps 0 to 3"):
        select(ROWS, first_step=9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"how": "top_share"}, "'how.share': a value is needed"),
        ({"how": {"kind": "correct", "share": 0.1}}, "'how.share': unknown option"),
        ({"how": {"kind": "correct", "by": "score"}}, "'how.by': unknown option"),
        ({"how": {"kind": "correct", "success": True}}, "'how.success': unknown option"),
        ({"how": {"kind": "shortest_correct", "max_per_prompt": None}}, "unknown option"),
        ({"how": "some"}, "choices: .*top_share"),
        ({"max_repetition": {"n": 2}}, "'max_repetition.share': a value is needed"),
        ({"language": "[a"}, "no regular expression"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens = 5 is above max_tokens = 4"),
        ({"first_step": 5, "last_step": 4}, "first_step = 5 is above last_step = 4"),
    ],
)
def test_settings_that_say_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config("select", "mine", settings)
