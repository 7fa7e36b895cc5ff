"""Judges behind an endpoint: the questions, and how a score is read out of a reply."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from posttrain.engine.errors import ConfigError, StageError
from posttrain.rewards.comparisons import fill, question
from posttrain.rewards.endpoint import SHOWN, Endpoint, Question
from posttrain.rewards.judge_kinds import CompareEndpoint, Llm
from posttrain.rewards.judging import Responses, comparisons, win_shares
from posttrain.rewards.spec import checked_rubric

GRADE = """You grade an answer.

[Question]
{prompt}

[Answer to grade]
{response}
{extra}
Grade it from 0 (useless) to {best} (perfect). Reason briefly, then end with one line: Grade: N"""
REFERENCE = "\n[Correct answer, for comparison]\n{answer}\n"
GUIDE = "\n[What to look at]\n{rubric}\n"
CRITERIA = """You check an answer against criteria.

[Question]
{prompt}

[Answer to check]
{response}
{extra}
[Criteria]
{criteria}

Decide for each criterion by itself. End with one line per criterion, its number and yes or no, such
as: 1: yes"""
WHICH = """You compare two answers to one question.

[Question]
{prompt}

[Answer 1]
{a}

[Answer 2]
{b}

Which answer is better? Reason briefly, then end with one line: Better: 1 or Better: 2"""

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_VERDICT = re.compile(r"^\W*(\d+)\W+(yes|no)\b", re.IGNORECASE | re.MULTILINE)
_BETTER = re.compile(r"\b([12])\b")

Row = Mapping[str, Any]


class Grader:
    """`judges.llm`: a grade for each response, or the weighted share of its row's criteria."""

    def __init__(self, judge: Llm, tools: Any) -> None:
        self.judge = judge
        self.endpoint: Endpoint = tools.endpoint(url=judge.url, model=judge.model, key=judge.key)

    def score(self, responses: Responses) -> list[float]:
        """Scores in [0, 1]. Raises ConfigError for a row without a rubric, else as `Endpoint`."""
        by_row = self.judge.rubric is True
        rubrics = [criteria(p) if by_row else [] for p in responses.problems]
        rows = list(zip(responses.problems, responses.texts, rubrics, strict=True))
        best = self.judge.best
        return self.endpoint.ask(
            [
                Question(
                    self._question(problem, text, rubric),
                    partial(met, rubric=rubric) if by_row else partial(grade, best=best),
                )
                for problem, text, rubric in rows
            ]
        )

    def _question(self, problem: Row, text: str, rubric: Sequence[Row]) -> str:
        judge, lines = self.judge, _numbered(rubric)
        guide = lines or (judge.rubric or "")
        values = {"prompt": problem["prompt"], "response": text, "answer": problem["answer"] or ""}
        values |= {"rubric": guide, "criteria": lines, "best": f"{judge.best:g}"}
        if judge.template is not None:
            return fill(judge.template, values)
        extra = REFERENCE if judge.reference else ""
        extra += GUIDE if guide and not lines else ""
        return fill(CRITERIA if lines else GRADE, values | {"extra": fill(extra, values)})


class EndpointComparison:
    """`judges.compare` with an endpoint: shares of wins within each group."""

    def __init__(self, judge: CompareEndpoint, tools: Any) -> None:
        self.judge = judge
        self.endpoint: Endpoint = tools.endpoint(url=judge.url, model=judge.model, key=judge.key)

    def score(self, responses: Responses) -> list[float]:
        """Shares in [0, 1]; 0.5 for a response that is alone in its group."""
        template = WHICH if self.judge.template is None else self.judge.template
        asked = comparisons(responses.group, pairing=self.judge.pairing, swap=self.judge.swap)
        problems, texts = responses.problems, responses.texts
        wins = self.endpoint.ask(
            [
                Question(question(template, problems[a], texts[a], texts[b]), better)
                for a, b in asked
            ]
        )
        return win_shares(len(responses), asked, wins)


def criteria(problem: Row) -> list[Row]:
    """The checked `rubric` of a problem row. Raises ConfigError, naming the problem, where it is
    missing or of another form than `checked_rubric` takes."""
    where = f"judge llm: problem {problem.get('id')} of domain {problem.get('domain')}"
    if "rubric" not in problem:
        raise ConfigError(
            f"{where}: it has no rubric; name the column of the criteria with rubric = ... in the "
            "suite"
        )
    try:
        return list(checked_rubric(problem["rubric"]))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _numbered(rubric: Sequence[Row]) -> str:
    return "\n".join(f"{i + 1}: {entry['criterion']}" for i, entry in enumerate(rubric))


def grade(reply: str, best: float) -> float:
    """The reply's last number over `best`. Raises StageError without one, or one outside."""
    numbers = _NUMBER.findall(reply)
    if not numbers or not 0 <= float(numbers[-1]) <= best:
        raise StageError(f"judge llm: no grade from 0 to {best:g} at the end of {_tail(reply)}")
    return float(numbers[-1]) / best


def met(reply: str, rubric: Sequence[Row]) -> float:
    """Weight of the criteria that the reply says yes to, over the weight of all.

    The last word on a criterion counts. Raises StageError where one has none.
    """
    said = {int(number): word.lower() == "yes" for number, word in _VERDICT.findall(reply)}
    missing = [i + 1 for i in range(len(rubric)) if i + 1 not in said]
    if missing:
        raise StageError(f"judge llm: no verdict on criterion {missing[0]} in {_tail(reply)}")
    weights = [float(entry.get("weight", 1.0)) for entry in rubric]
    return sum(w for i, w in enumerate(weights) if said[i + 1]) / sum(weights)


def better(reply: str) -> float:
    """1.0 where the reply ends with answer 1 as the better one, 0.0 with 2; else StageError."""
    found = _BETTER.findall(reply)
    if not found:
        raise StageError(f"judge compare: neither 1 nor 2 in {_tail(reply)}")
    return float(found[-1] == "1")


def _tail(reply: str) -> str:
    return f"the reply {reply[-SHOWN:]!r}"
