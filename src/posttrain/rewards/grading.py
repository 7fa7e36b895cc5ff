"""Judges behind an endpoint: what they are asked. `verdicts` reads what they reply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from posttrain.engine.errors import ConfigError
from posttrain.rewards.comparisons import fill, question
from posttrain.rewards.endpoint import Endpoint, Question
from posttrain.rewards.judge_kinds import CompareEndpoint, Llm
from posttrain.rewards.judging import Responses, comparisons, win_shares
from posttrain.rewards.spec import checked_rubric
from posttrain.rewards.verdicts import better, grade, met

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

Row = Mapping[str, Any]


class Grader:
    """`judges.llm`: a grade for each response, or the weighted share of its row's criteria."""

    def __init__(self, judge: Llm, tools: Any) -> None:
        self.judge = judge
        self.endpoint: Endpoint = tools.endpoint(judge)

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
        self.endpoint: Endpoint = tools.endpoint(judge)

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
