"""Combinations of judges on a batch, and what a panel asks of its leaves."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain import judges, schedules
from posttrain.engine.errors import ConfigError, StageError
from posttrain.rewards.judge_base import z_scores
from posttrain.rewards.judging import Responses, RewardFunction

RESPONSES = Responses(
    problems=[{"id": str(i), "domain": d} for i, d in enumerate(("a", "a", "b", "b"))],
    texts=["one", "two", "three", "four"],
    group=[0, 0, 1, 1],
    finished=[True, False, True, True],
    num_tokens=[3, 6, 9, 12],
)


class Fixed:
    """Says what it was told to, one number per text, and counts the questions."""

    def __init__(self, **scores: float) -> None:
        self.scores = scores
        self.asked = 0

    def score(self, responses: Responses) -> list[float]:
        self.asked += 1
        return [self.scores[text] for text in responses.texts]


VERIFIER = judges.verifier()
ORACLE = judges.oracle()


def reward(judge: judges.Judge, verifier: Any = None, oracle: Any = None) -> RewardFunction:
    return RewardFunction(judge, {VERIFIER.identity: verifier, ORACLE.identity: oracle})


def scores(judge: judges.Judge, verifier: Any = None, oracle: Any = None) -> list[float]:
    return reward(judge, verifier, oracle).score(RESPONSES)[0]


def right() -> Fixed:
    return Fixed(one=1, two=0, three=1, four=1)


def taste() -> Fixed:
    return Fixed(one=-2, two=2, three=4, four=8)


def test_a_sum_weighs_its_terms() -> None:
    judge = VERIFIER - 0.5 * judges.length(budget=6) + 2 * judges.finished()
    assert scores(judge, right()) == pytest.approx([3, 0, 2.75, 2.5])


def test_a_scheduled_weight_has_the_value_of_the_step() -> None:
    weight = schedules.steps({0: 0.0, 10: 3.0})
    judge = VERIFIER + weight * judges.finished()
    asked = reward(judge, right())
    assert asked.score(RESPONSES)[0] == [1, 0, 1, 1]
    at = lambda schedule: schedule.at(12, 20, lambda _: [])  # noqa: E731
    assert asked.score(RESPONSES, at)[0] == [4, 0, 4, 4]
    assert judge.scheduled and not (VERIFIER + 3.0 * judges.finished()).scheduled


def test_a_gate_takes_a_branch_per_row_and_asks_each_judge_once() -> None:
    verifier, oracle = right(), taste()
    judge = judges.gate(VERIFIER, below=0.5, then=judges.constant(-9), otherwise=ORACLE + VERIFIER)
    assert scores(judge, verifier, oracle) == [-1, -9, 5, 9]
    assert (verifier.asked, oracle.asked) == (1, 1)


def test_a_branch_that_no_row_takes_is_not_asked() -> None:
    oracle = taste()
    judge = judges.gate(judges.constant(1), below=0.5, then=ORACLE, otherwise=VERIFIER)
    assert scores(judge, right(), oracle) == [1, 0, 1, 1]
    assert oracle.asked == 0


def test_lexicographic_decides_only_ties() -> None:
    """Group 0 differs under the verifier, group 1 ties at 1: there the oracle is added."""
    judge = judges.lexicographic(VERIFIER, ORACLE)
    assert scores(judge, right(), taste()) == [1, 0, 5, 9]


def test_normalised_adds_z_scores_of_each_group() -> None:
    """Two values apart have z-scores 1 and -1 whatever their distance; equal ones 0."""
    judge = judges.normalised(VERIFIER, ORACLE)
    found = scores(judge, right(), taste())
    assert found == pytest.approx([0, 0, -1, 1], abs=1e-5)


def test_whitened_is_over_the_batch() -> None:
    """-2, 2, 4, 8: mean 3, variance (25 + 1 + 1 + 25) / 4 = 13."""
    found = scores(judges.whitened(ORACLE), oracle=taste())
    assert found == pytest.approx([value / 13**0.5 for value in (-5, -1, 1, 5)], abs=1e-5)
    assert z_scores([2.0, 2.0]) == [0, 0]


def test_answer_shows_a_judge_the_answer_alone() -> None:
    """A thought in other letters, one that never ended, none at all; in a mode and without."""
    texts = ["<think>XX</think>aa", "<think>XX", "aX", "<think>X</think>X", "XX</think>aa"]
    modes = [None, None, None, "high", None]
    responses = Responses(
        problems=[{"domain": "a"} | ({"mode": mode} if mode else {}) for mode in modes],
        texts=texts,
        group=[0] * 5,
        finished=[True] * 5,
        num_tokens=[9] * 5,
    )
    language = judges.language(regex="[a-z<>/]", unit="character")
    asked = reward(judges.answer(language))
    assert asked.score(responses)[0] == [1, 1, 0.5, 0, 1]
    assert asked.score(responses)[1] == {"language": [1, 1, 0.5, 0, 1]}
    whole = reward(language).score(responses)[0]
    assert whole[0] < 1 and whole[1] < 1
    assert reward(judges.answer(judges.format("think"))).score(responses)[0] == [0] * 5
    # A judge inside that goes by modes sees an answer, not one that has yet to come.
    seen: list[Any] = []

    class Looks:
        def score(self, responses: Responses) -> list[float]:
            seen.extend(zip(responses.texts, responses.problems, strict=True))
            return [0.0] * len(responses)

    RewardFunction(judges.answer(ORACLE), {ORACLE.identity: Looks()}).score(responses)
    assert seen[3] == ("X", {"domain": "a"})


def test_by_domain_asks_each_domains_judge_about_its_rows() -> None:
    judge = judges.by_domain({"a": VERIFIER, "b": judges.whitened(ORACLE)})
    found = scores(judge, right(), taste())
    assert found == pytest.approx([1, 0, -1, 1], abs=1e-5)
    with pytest.raises(ConfigError, match="none for domain 'b'"):
        scores(judges.by_domain({"a": VERIFIER}), right())


def test_a_length_cost_may_read_another_judge() -> None:
    judge = judges.length(budget=12, shape="pass_rate")
    assert scores(judge, right()) == pytest.approx([0.125, 0.25, 0.75, 1])


def test_the_parts_of_a_reward_are_told() -> None:
    low = judges.gate(ORACLE, below=9, then=VERIFIER, otherwise=judges.finished())
    judge = VERIFIER - judges.length(budget=6) + low
    total, parts = reward(judge, right(), taste()).score(RESPONSES)
    assert total == pytest.approx([2, 0, 1.5, 1])
    assert parts == {
        "verifier": [1, 0, 1, 1],
        "length": [0, 0, 0.5, 1],
        "oracle": [-2, 2, 4, 8],
    }


def test_parts_within_domains_are_told_together() -> None:
    """Both domains have the verifier and a length cost, of 6 and of 12 tokens; only one a taste."""
    cost = {name: judges.length(budget=budget) for name, budget in (("a", 6), ("b", 12))}
    judge = judges.by_domain({"a": VERIFIER - cost["a"], "b": VERIFIER - cost["b"] + ORACLE})
    total, parts = reward(judge, right(), taste()).score(RESPONSES)
    assert total == [1, 0, 5, 9]
    assert parts == {
        "verifier": [1, 0, 1, 1],
        "length": [0, 0],
        "length.2": [0, 0],
        "oracle": [4, 8],
    }


def test_every_judge_inside_has_a_name_of_its_own() -> None:
    """Of sums, gates, domains and first and second, also where a branch is not taken; a judge that
    occurs twice is one."""
    short, long = judges.format("^.{3}$"), judges.format("e")
    judge = judges.gate(judges.finished(), below=0.5, then=short, otherwise=long) + short
    judge = judge + judges.lexicographic(judges.constant(1), judges.constant(2))
    judge = judge + judges.whitened(judges.by_domain({"a": long, "b": judges.length(budget=6)}))
    made = RewardFunction(judge, {})
    names = ["finished", "format", "format.2", "constant", "constant.2", "length"]
    assert list(made.labels.values()) == names
    _, parts = made.score(RESPONSES)
    assert sorted(parts) == sorted(names)
    assert parts["format"] == [1, 1, 0, 0] and parts["length"] == [0.5, 1]
    done = RESPONSES.select([0, 2, 3])
    assert "format" in made.score(done)[1], "its number does not depend on what is asked"


def test_portions_keep_groups_together() -> None:
    assert reward(VERIFIER).portions(RESPONSES, 1) == [[0, 1], [2, 3]]
    assert reward(VERIFIER).portions(RESPONSES, 3) == [[0, 1, 2, 3]]
    assert reward(judges.whitened(VERIFIER)).portions(RESPONSES, 1) == [[0, 1, 2, 3]]


@pytest.mark.parametrize("value", [[1.0], [1.0, 2.0, 3.0, float("nan")]])
def test_a_judge_that_answers_nonsense_is_an_error(value: list[float]) -> None:
    class Odd:
        def score(self, responses: Responses) -> list[float]:
            return value

    with pytest.raises(StageError, match="judge verifier: it gave"):
        scores(VERIFIER, Odd())
