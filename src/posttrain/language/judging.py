"""Judges as inputs of a stage: the stages that they ask, and that they fit."""

from __future__ import annotations

from collections.abc import Sequence

from posttrain.engine.errors import ConfigError
from posttrain.language.builder import Builder
from posttrain.language.handles import Stage
from posttrain.rewards.judge_base import ByDomain, Judge
from posttrain.rewards.judge_fields import EDGE
from posttrain.rewards.judge_kinds import Llm, Scalar, parse_judge


def judge_edges(build: Builder, stage: str, field: str, judge: object) -> dict[str, str]:
    """The edges `judges.NAME` of the stages that a judge asks.

    Raises ConfigError for what is no judge, and for a stage that cannot be asked so.
    """
    if not isinstance(judge, Judge):
        raise ConfigError(
            f"stage {stage!r}: {field} = {judge!r} is no judge; it takes what posttrain.judges "
            "makes, such as judges.verifier() or judges.scalar(reward_model)"
        )
    scored = {part.edge for part in judge.walk() if isinstance(part, Scalar)}
    return {
        edge: build.model(stage, edge, asked, scores=edge in scored)
        for edge, asked in judge.stages.items()
    }


def check_judge(build: Builder, stage: Stage, field: str, domains: Sequence[str]) -> None:
    """Refuse a judge, from the recipe or from --set, that the stage cannot ask."""
    node = build.nodes[stage.name]
    if node.config[field] is None:
        return
    judge, where = parse_judge(node.config[field]), f"stage {stage.name!r} ({stage.kind})"
    check_problems(build, judge, domains, where=f"{where}, field {field!r}")
    missing = [part.edge for part in judge.walk() if part.edge not in (None, *node.inputs)]
    if missing:
        choices = [edge for edge in node.inputs if edge.startswith(EDGE)]
        raise ConfigError(
            f"{where}, field {field!r}: it asks {missing[0]!r}, which is no input of the stage; "
            f"inputs: {', '.join(choices) or 'none'}; name the judge in the recipe"
        )


def check_problems(build: Builder, judge: Judge, domains: Sequence[str], *, where: str) -> None:
    """Refuse a judge that has nothing to say about the problems of a domain: a `by_domain` without
    it, or a judge that reads the rubrics of rows that have none."""
    for part in judge.walk():
        if isinstance(part, ByDomain):
            part.check(domains, where=where)
    for domain in domains:
        source = build.suite.domains[domain].source
        asked = judge.walk(domain)
        reads = any(isinstance(part, Llm) and part.rubric is True for part in asked)
        if reads and getattr(source, "rubric", None) is None:
            raise ConfigError(
                f"{where}: judges.llm(rubric=True) grades by the criteria of each row, and the "
                f"rows of domain {domain!r} have none; name their column with rubric = ... in the "
                "suite, or give the judge a rubric as a text"
            )
