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
            {"max_per_prompt": 2},
            [
                ("d1", "the best", "wrong"),
                ("d1", "as good", "also wrong"),
                ("e1", "one", "none at all"),
            ],
        ),
        ({"min_margin": 0.5}, [("d1", "the best", "wrong")]),
        ({"min_margin": 0.25, "min_chosen_reward": 1.0}, [("d1", "the best", "wrong")]),
        ({"max_length_gap": 3}, [("d1", "the best", "wrong")]),
        ({"max_length_gap": 2, "max_per_prompt": 9}, None),
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
            {"max_per_prompt": 2},
            [
                ("d1", "the best", "wrong again"),
                ("d1", "wrong", "the best"),
                ("e1", "one", "nil"),
            ],
        ),
        (
            {"max_per_prompt": 2, "min_margin": 0.5},
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
        ({"how": "best"}, "field 'how': 'best' is not allowed.*best_against_worst"),
        ({"max_per_prompt": 0}, "field 'max_per_prompt': 0 is not allowed"),
        ({"min_margin": 0}, "field 'min_margin': 0 is not allowed"),
        ({"min_chosen_reward": 1.5}, "field 'min_chosen_reward': 1.5 is not allowed"),
        ({"max_length": 3}, "did you mean 'max_length_gap'"),
    ],
)
def test_bad_settings_are_named(settings: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config("pairs", "mine", settings)
