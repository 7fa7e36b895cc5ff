"""pairs: which responses are set against each other, by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from posttrain.engine.errors import ConfigError
from posttrain.stages.config import build_config

RunStage = Callable[..., Any]


def rollout(text: str, reward: float, **changes: Any) -> dict[str, Any]:
    row = {"id": "1", "domain": "d", "prompt": "p", "answer": "a", "finished": True}
    return row | {"response": text, "reward": reward} | changes


STRONG = [
    rollout("half", 0.5),
    rollout("the best", 1.0),
    rollout("wrong", 0.0),
    rollout("the best", 1.0),
    rollout("also wrong", 0.0),
    rollout("as good", 1.0),
    rollout("cut and go", 0.0, finished=False),
    rollout("other", 1.0, id="2"),
    rollout("another", 1.0, id="2"),
    rollout("one", 0.75, domain="e"),
    rollout("none at all", 0.5, domain="e"),
]
WEAK = [
    rollout("half", 0.5),
    rollout("wrong again", 0.0),
    rollout("the best", 1.0),
    rollout("oh", 0.0, id="2", finished=False),
    rollout("nil", 0.25, domain="e"),
    rollout("unasked", 0.0, domain="e", id="9"),
]


@pytest.fixture
def pairs(run_stage: RunStage, tmp_path: Path) -> Callable[..., Any]:
    def run(
        strong: list[dict[str, Any]] = STRONG, weak: list[dict[str, Any]] | None = None, **how: Any
    ) -> Any:
        inputs = {}
        for edge, rows in {"rollouts": strong, "against": weak}.items():
            if rows is not None:
                folder = tmp_path / f"{edge}-{len(list(tmp_path.iterdir()))}"
                folder.mkdir()
                text = "".join(json.dumps(row) + "\n" for row in rows)
                (folder / "rollouts.jsonl").write_text(text)
                inputs[edge] = str(folder)
        if weak is not None:
            how = {"how": "strong_against_weak"} | how
        return run_stage("pairs", how, inputs)

    return run


def texts(ran: Any) -> list[tuple[str, str, str]]:
    rows = [json.loads(line) for line in (ran.out / "pairs.jsonl").read_text().splitlines()]
    return [(row["domain"] + row["id"], row["chosen"], row["rejected"]) for row in rows]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [("d1", "the best", "wrong"), ("e1", "one", "none at all")]),
        (
            {"how": {"kind": "best_against_worst", "max_per_prompt": 2}},
            [
                ("d1", "the best", "wrong"),
                ("d1", "as good", "also wrong"),
                ("e1", "one", "none at all"),
            ],
        ),
        ({"how": {"kind": "best_against_worst", "min_margin": 0.5}}, [("d1", "the best", "wrong")]),
        (
            {
                "how": {"kind": "best_against_worst", "min_margin": 0.25},
                "min_chosen_reward": 1.0,
            },
            [("d1", "the best", "wrong")],
        ),
        ({"max_length_gap": 3}, [("d1", "the best", "wrong")]),
        (
            {"how": {"kind": "best_against_worst", "max_per_prompt": 9}, "max_length_gap": 2},
            None,
        ),
    ],
)
def test_best_against_worst(
    pairs: Callable[..., Any], settings: dict[str, Any], expected: list[Any] | None
) -> None:
    """By reward the responses to d1 are: the best, as good, half, wrong, also wrong (the duplicate
    and the cut one left out), so the n-th pair is the n-th of this list against the n-th of: wrong,
    also wrong, half. The third pair, half against half, is none. d2 has equal rewards."""
    if expected is None:
        with pytest.raises(
            ConfigError, match=r"how = 'best_against_worst' finds no pair .* raise k"
        ):
            pairs(**settings)
    else:
        assert texts(pairs(**settings)) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [("d1", "the best", "wrong again"), ("e1", "one", "nil")]),
        (
            {"how": {"kind": "strong_against_weak", "max_per_prompt": 2}},
            [
                ("d1", "the best", "wrong again"),
                ("d1", "wrong", "the best"),
                ("e1", "one", "nil"),
            ],
        ),
        (
            {"how": {"kind": "strong_against_weak", "max_per_prompt": 2, "min_margin": 0.5}},
            [("d1", "the best", "wrong again"), ("e1", "one", "nil")],
        ),
        (
            {"how": {"kind": "strong_against_weak", "max_per_prompt": 2, "by": "reward"}},
            [("d1", "the best", "wrong again"), ("e1", "one", "nil")],
        ),
        ({"min_chosen_reward": 0.8}, [("d1", "the best", "wrong again")]),
        ({"max_length_gap": 0}, [("e1", "one", "nil")]),
    ],
)
def test_strong_against_weak(
    pairs: Callable[..., Any], settings: dict[str, Any], expected: list[Any]
) -> None:
    """In the order of sampling; half against half is no pair; d2 has no finished weak response,
    and e9 no strong one. Rewards are not looked at unless a filter asks."""
    assert texts(pairs(weak=WEAK, **settings)) == expected


def test_all_pairs_of_a_prompt(pairs: Callable[..., Any]) -> None:
    """K-wise: of five distinct responses to d1 (1/2, 1, 0, 0, 1) eight pairs have unequal rewards,
    the better response first; e1 has one."""
    found = texts(pairs(how="all"))
    assert len(found) == 9
    assert found[:3] == [
        ("d1", "the best", "half"),
        ("d1", "half", "wrong"),
        ("d1", "half", "also wrong"),
    ]
    assert found[-1] == ("e1", "one", "none at all")
    assert len(texts(pairs(how={"kind": "all", "min_margin": 0.75}))) == 4


def test_random_pairs_are_some_of_all(pairs: Callable[..., Any]) -> None:
    """Which pairs depends on the texts alone, not on the order in which they were sampled."""
    every = set(texts(pairs(how="all")))
    some = texts(pairs(how={"kind": "random", "max_per_prompt": 3}))
    assert len(some) == 4 and set(some) < every
    turned = pairs(STRONG[::-1], how={"kind": "random", "max_per_prompt": 3})
    assert set(texts(turned)) == set(some)
    assert some != texts(pairs(how={"kind": "best_against_worst", "max_per_prompt": 3}))[:4]


def test_scores_decide_where_they_are_asked(pairs: Callable[..., Any]) -> None:
    rows = [rollout("one", 1.0, score=-2.0), rollout("two", 0.0, score=3.5)]
    by_score = {"kind": "best_against_worst", "by": "score"}
    ran = pairs(rows, how=by_score)
    assert texts(ran) == [("d1", "two", "one")]
    assert json.loads((ran.out / "pairs.jsonl").read_text())["margin"] == 5.5
    assert texts(pairs(rows)) == [("d1", "one", "two")]
    assert texts(pairs(rows, how=by_score | {"min_margin": 5.5})) == [("d1", "two", "one")]
    with pytest.raises(ConfigError, match="finds no pair"):
        pairs(rows, how=by_score | {"min_margin": 5.6})
    with pytest.raises(ConfigError, match="have no score"):
        pairs(how=by_score)


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [
        ({}, "un deux un deux un deux"),
        ({"chosen_max_tokens": 6}, "été"),
        ({"chosen_language": "[a-z ]", "chosen_max_tokens": 7}, "plain"),
        ({"chosen_max_repetition": {"share": 0.3}}, "été"),
    ],
)
def test_only_the_chosen_response_is_filtered(
    pairs: Callable[..., Any], settings: dict[str, Any], chosen: str
) -> None:
    """The rejected one repeats itself, is long, and has other characters; it may."""
    strong = [
        rollout("un deux un deux un deux", 1.0, num_tokens=24),
        rollout("été", 1.0, num_tokens=4),
        rollout("plain", 1.0, num_tokens=6),
    ]
    weak = [rollout(f"ü ü ü ü ü ü ü {i}", 0.0, num_tokens=16) for i in range(3)]
    assert texts(pairs(strong, weak, **settings))[0][1] == chosen


def test_pools_of_several_stages(
    pairs: Callable[..., Any], run_stage: RunStage, tmp_path: Path
) -> None:
    inputs = {}
    for number, row in enumerate((rollout("bad", 0.0), rollout("good", 1.0))):
        folder = tmp_path / f"pool-{number}"
        folder.mkdir()
        (folder / "rollouts.jsonl").write_text(json.dumps(row) + "\n")
        inputs[f"rollouts.{number}"] = str(folder)
    assert texts(run_stage("pairs", {}, inputs)) == [("d1", "good", "bad")]


def test_rows_and_metrics(pairs: Callable[..., Any]) -> None:
    """Two pairs of three problems; margins 1 and 1/4; gaps 8 - 5 and 3 - 11 characters."""
    ran = pairs()
    rows = [json.loads(line) for line in (ran.out / "pairs.jsonl").read_text().splitlines()]
    assert rows[0] == {
        "id": "1",
        "domain": "d",
        "prompt": "p",
        "chosen": "the best",
        "rejected": "wrong",
        "rewards": [1.0, 0.0],
    }
    assert ran.metrics == {
        "rows": 2,
        "kept_share": pytest.approx(2 / 3),
        "reward_margin": pytest.approx(0.625),
        "length_gap": pytest.approx(-2.5),
    }


def test_no_pair_is_an_error_that_says_what_to_do(pairs: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"'my_pairs': .* no pair among the responses to 1 prob"):
        pairs(STRONG[7:9])
    with pytest.raises(ConfigError, match="no common problem; sample both from the same prompts"):
        pairs(STRONG[:1], WEAK[4:])
    with pytest.raises(ConfigError, match="loosen min_margin"):
        pairs(STRONG, WEAK, max_length_gap=0, min_chosen_reward=1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"how": "best"}, "field 'how': .*'best'.*best_against_worst"),
        ({"how": {"kind": "random", "max_per_prompt": 0}}, "'how.max_per_prompt': 0 is not all"),
        ({"how": {"kind": "all", "min_margin": 0}}, "field 'how.min_margin': 0 is not allowed"),
        ({"min_chosen_reward": 1.5}, "field 'min_chosen_reward': 1.5 is not allowed"),
        ({"max_length": 3}, "did you mean 'max_length_gap'"),
        ({"how": {"kind": "all", "max_per_prompt": 2}}, "'how.max_per_prompt': unknown option"),
        ({"chosen_language": "("}, "no regular expression"),
        ({"chosen_max_tokens": 0}, "field 'chosen_max_tokens': 0 is not allowed"),
        ({"chosen_max_repetition": {"share": 1.0}}, "field 'chosen_max_repetition.share': 1.0 is"),
    ],
)
def test_bad_settings_are_named(settings: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config("pairs", "mine", settings)
