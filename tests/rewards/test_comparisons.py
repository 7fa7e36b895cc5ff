"""Training problems for a judge out of verified rollouts."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain.engine.errors import ConfigError
from posttrain.rewards.comparisons import build_comparisons
from posttrain.rewards.verifiers import ExactVerifier
from posttrain.stages.rows import by_problem


def row(problem: str, response: str, reward: float, **more: Any) -> dict[str, Any]:
    known = {"id": problem, "domain": "d", "prompt": f"p{problem}", "answer": "x"}
    return known | {"response": response, "reward": reward, "finished": True} | more


def test_the_answer_is_the_better_one() -> None:
    rollouts = [row(str(i), text, r) for i in range(100) for text, r in (("no", 0.0), ("yes", 1.0))]
    problems = build_comparisons(by_problem(rollouts))
    assert len(problems) == 100
    for problem in problems:
        better = problem["prompt"].partition("|")[0].split()[0] + " "
        first, second = problem["prompt"].split("|")[1:]
        assert better == "c " and {first, second} == {"no", "yes"}
        assert problem["answer"] == problem["demo"] == ("1" if first == "yes" else "2")
        assert ExactVerifier().score(problem["answer"], problem) == 1
    assert 30 < sum(problem["answer"] == "1" for problem in problems) < 70
    assert len({problem["id"] for problem in problems}) == 100
    assert build_comparisons(by_problem(rollouts)) == problems


def test_pairs_are_best_against_worst_while_they_differ() -> None:
    rollouts = [row("1", text, r) for text, r in (("a", 0.0), ("b", 0.4), ("c", 0.6), ("d", 1.0))]
    rollouts += [row("2", "e", 1.0), row("2", "f", 0.0, finished=False)]
    rollouts += [row("1", "a", 0.0)]
    found = by_problem(rollouts)
    texts = [set(p["prompt"].split("|")[1:]) for p in build_comparisons(found, max_per_prompt=4)]
    assert texts == [{"d", "a"}, {"c", "b"}]
    assert len(build_comparisons(found, max_per_prompt=1)) == 1
    assert len(build_comparisons(found, max_per_prompt=4, min_margin=0.5)) == 1


def test_a_template_and_nothing_to_compare() -> None:
    rollouts = [row("1", "a", 0.0), row("1", "b", 1.0)]
    (problem,) = build_comparisons(by_problem(rollouts), template="{a}?{b}!{answer}")
    assert problem["prompt"] in ("a?b!x", "b?a!x")
    with pytest.raises(ConfigError, match="no two responses to one of 1 problems"):
        build_comparisons(by_problem([row("1", "a", 1.0), row("1", "b", 1.0)]))


def test_responses_in_two_modes_are_not_compared() -> None:
    """A thought that is right and a short answer that is wrong are two problems of one response
    each; within a mode the two are compared."""
    thought = row("1", "<think>4-1=3</think>3", 1.0, mode="think")
    short = row("1", "5", 0.0, mode="no_think")
    with pytest.raises(ConfigError, match="no two responses to one of 2 problems"):
        build_comparisons(by_problem([thought, short]))
    wrong = row("1", "<think>4-1=2</think>2", 0.0, mode="think")
    (problem,) = build_comparisons(by_problem([thought, short, wrong]))
    assert set(problem["prompt"].split("|")[1:]) == {thought["response"], wrong["response"]}
