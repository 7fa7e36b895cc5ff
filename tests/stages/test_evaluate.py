"""evaluation.json and transcripts.json: what is in them, and that every setting counts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from posttrain.engine.errors import ConfigError
from posttrain.rewards.verifiers import load_verifier
from posttrain.stages.config import build_config
from posttrain.stages.evaluate import best_constant

BASE: dict[str, Any] = {
    "num_problems": 10,
    "samples": 3,
    "max_new_tokens": 6,
    "bootstrap": 200,
    "transcripts": 2,
    "routes": {"short": "first"},
}


@pytest.fixture
def evaluate(
    run_stage: Callable[..., Any], models: Mapping[str, str], domains: Mapping[str, str]
) -> Callable[..., tuple[dict[str, Any], dict[str, Any]]]:
    """Run evaluate; returns evaluation.json and transcripts.json."""

    def run(**changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        inputs = {"student": models["two"], "init": models["start"]}
        inputs |= {"teachers.first": models["one"], **domains}
        ran = run_stage("evaluate", BASE | changes, inputs)
        assert [line["step"] for line in ran.lines] == [1, 2, 3]
        result = json.loads((ran.out / "evaluation.json").read_text())
        assert ran.metrics["student/short"] == result["domains"]["short"]["student"]["value"]
        return result, json.loads((ran.out / "transcripts.json").read_text())

    return run


def test_all_models_answer_all_domains(evaluate: Callable[..., Any]) -> None:
    result, _ = evaluate()
    assert set(result["domains"]) == {"short", "words"}
    assert set(result["models"]) == {"student", "init", "teachers.first"}
    assert (result["split"], result["samples"]) == ("heldout", 3)
    short, words = result["domains"]["short"], result["domains"]["words"]
    assert short["num_problems"] == 10
    for column in ("student", "init", "teacher"):
        value = short[column]
        assert 0 <= value["low"] <= value["value"] <= value["high"] <= 1
        assert value["low"] < value["high"]
    assert words["teacher"] is None
    assert words["note"] == "no teacher"


def test_models_answer_the_same_problems_with_the_same_random_numbers(
    run_stage: Callable[..., Any], models: Mapping[str, str], domains: Mapping[str, str]
) -> None:
    """A student that is its teacher scores what the teacher scores."""
    inputs = {"student": models["one"], "init": models["start"], "teachers.first": models["one"]}
    ran = run_stage("evaluate", BASE, {**inputs, **domains})
    result = json.loads((ran.out / "evaluation.json").read_text())
    assert result["models"]["student"] == result["models"]["teachers.first"]
    assert result["domains"]["short"]["student"] == result["domains"]["short"]["teacher"]


def test_transcripts_show_what_was_said_and_scored(
    evaluate: Callable[..., Any], domains: Mapping[str, str]
) -> None:
    _, transcripts = evaluate()
    for name in ("short", "words"):
        judge = load_verifier(Path(domains[f"domains.{name}"]))
        held = [
            json.loads(line)
            for line in Path(domains[f"domains.{name}"], "heldout.jsonl").read_text().splitlines()
        ]
        assert [shown["prompt"] for shown in transcripts[name]] == [p["prompt"] for p in held[:2]]
        for shown, problem in zip(transcripts[name], held, strict=False):
            assert set(shown["responses"]) == {"student", "init", "teachers.first"}
            for said in shown["responses"].values():
                for decoding in ("sampled", "greedy"):
                    # A response cut at the length limit scores 0 whatever it says.
                    expected = judge.score(said[decoding], problem)
                    assert said[f"{decoding}_score"] in (0.0, expected)


SETTINGS: list[dict[str, Any]] = [
    {"seed": 1},
    {"split": "validation"},
    {"num_problems": 8},
    {"samples": 2},
    {"max_new_tokens": 3},
    {"bootstrap": 300},
    {"transcripts": 1},
]


def test_every_setting_changes_the_result(evaluate: Callable[..., Any]) -> None:
    results = [evaluate(**changes) for changes in ({}, *SETTINGS)]
    texts = {json.dumps(pair, sort_keys=True) for pair in results}
    assert len(texts) == len(results)
    assert json.dumps(evaluate(), sort_keys=True) in texts, "two evaluations differ"
    assert len(evaluate(transcripts=0)[1]["short"]) == 0


def test_fewer_problems_than_asked_for_are_all_of_them(
    evaluate: Callable[..., Any], domains: Mapping[str, str]
) -> None:
    result, _ = evaluate(num_problems=10_000)
    path = Path(domains["domains.short"], "heldout.jsonl")
    assert result["domains"]["short"]["num_problems"] == len(path.read_text().splitlines())


def test_a_shared_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="split"):
        build_config("evaluate", "evaluation", BASE | {"split": "train"})


class Judges:
    """A pool with one domain and one rule."""

    def __init__(self, score: Callable[[str, Mapping[str, Any]], float]) -> None:
        self.score = score

    def submit(self, domain: str, texts: list[str], problems: list[Any]) -> Future[list[float]]:
        assert domain == "mine"
        done: Future[list[float]] = Future()
        done.set_result([self.score(t, p) for t, p in zip(texts, problems, strict=True)])
        return done


def problems_of(answers: list[str]) -> list[dict[str, Any]]:
    return [{"answer": text, "demo": None, "domain": "mine"} for text in answers]


def test_the_best_constant_is_the_most_frequent_answer() -> None:
    problems = problems_of(["a", "b", "a", "c", "a", "b"])
    exact: Any = Judges(lambda response, problem: float(response == problem["answer"]))
    best = best_constant(problems, {"student": ["b"] * 6}, exact)
    assert best == {"value": 0.5, "response": "a"}


def test_the_best_constant_may_be_what_a_model_says() -> None:
    """A phrase that no reference answer holds, but that the verifier takes for every problem."""
    lenient: Any = Judges(lambda text, problem: float(text in ("any", problem["answer"])))
    problems = problems_of([str(i) for i in range(40)])
    said = {"init": ["none"] * 40, "student": ["any"] * 3 + ["none"] * 37}
    best = best_constant(problems, said, lenient)
    assert best == {"value": 1.0, "response": "any"}
