"""Judges as inputs of a stage: the stages that they ask, and that they fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.engine.errors import ConfigError
from posttrain.judges import Judge, models
from posttrain.language.builder import Builder
from posttrain.language.handles import Stage
from posttrain.rewards.judge_spec import check_domains, check_use, walk, walk_domain


def judge_edges(build: Builder, stage: str, field: str, judge: object) -> dict[str, str]:
    """The edges `judges.NAME` of the stages that a judge asks.

    Raises ConfigError for what is no judge, and for a stage that cannot be asked so.
    """
    if not isinstance(judge, Judge):
        raise ConfigError(
            f"stage {stage!r}: {field} = {judge!r} is no judge; it takes what posttrain.judges "
            "makes, such as judges.verifier() or judges.scalar(reward_model)"
        )
    spec, stages = judge.to_config()
    scored = {part["model"] for part in walk(spec) if part["judge"] == "scalar"}
    return {
        edge: build.model(stage, edge, asked, scores=edge in scored)
        for edge, asked in stages.items()
    }


def check_judge(build: Builder, stage: Stage, field: str, domains: Sequence[str]) -> None:
    """Refuse a judge, from the recipe or from --set, that the stage cannot ask."""
    node = build.nodes[stage.name]
    spec, where = node.config[field], f"stage {stage.name!r} ({stage.kind}), field {field!r}"
    if spec is None:
        return
    check_use(spec, stage.kind, where=where)
    check_domains(spec, tuple(domains), where=where)
    check_rubrics(build, spec, domains, where=where)
    for edge in models(spec):
        if edge not in node.inputs:
            choices = [e for e in node.inputs if e.startswith("judges.")]
            raise ConfigError(
                f"{where}: it asks {edge!r}, which is no input of the stage; inputs: "
                f"{', '.join(choices) or 'none'}; name the judge in the recipe"
            )


def check_rubrics(
    build: Builder, spec: Mapping[str, Any], domains: Sequence[str], *, where: str
) -> None:
    """Refuse a judge that reads the rubrics of rows in a domain whose rows have none."""
    for domain in domains:
        source = build.suite.domains[domain].source
        reads = any(part.get("rubric") is True for part in walk_domain(spec, domain))
        if reads and getattr(source, "rubric", None) is None:
            raise ConfigError(
                f"{where}: judges.llm(rubric=True) grades by the criteria of each row, and the "
                f"rows of domain {domain!r} have none; name their column with rubric = ... in the "
                "suite, or give the judge a rubric as a text"
            )
