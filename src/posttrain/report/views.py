"""What the page says besides scores and curves, as plain values for its templates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.report.gather import StageFacts
from posttrain.report.scores import DECODING_NAMES, DECODINGS, Evaluation
from posttrain.report.wording import clock, number, size

RIGHT, PARTLY, WRONG = "right", "partly right", "wrong"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One response to a problem."""

    decoding: str
    text: str
    verdict: str
    score: float


@dataclass(frozen=True, kw_only=True)
class Speaker:
    """A model and what it answered."""

    role: str
    name: str
    answers: list[Answer]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A problem and what init, teacher and student answered."""

    prompt: str
    answer: str
    speakers: list[Speaker]


def transcripts(
    texts: Mapping[str, Sequence[Mapping[str, Any]]],
    evaluation: Evaluation,
    names: Mapping[str, str],
) -> dict[str, list[Problem]]:
    """Domain -> its problems, from transcripts.json; other domains' teachers are left out.

    `names` maps the edges of the evaluation to the names of the stages.
    """
    found = {}
    for domain, rows in texts.items():
        roles = {"init": "init"}
        if domain in evaluation["routes"]:
            roles[f"teachers.{evaluation['routes'][domain]}"] = "teacher"
        roles["student"] = "student"
        found[domain] = [
            Problem(
                prompt=row["prompt"],
                answer=row["answer"],
                speakers=[
                    Speaker(role=role, name=names[edge], answers=_answers(row["responses"][edge]))
                    for edge, role in roles.items()
                    if edge in row["responses"]
                ],
            )
            for row in rows
        ]
    return {domain: rows for domain, rows in found.items() if rows}


def _answers(response: Mapping[str, Any]) -> list[Answer]:
    return [
        Answer(
            decoding=DECODING_NAMES[decoding],
            text=response[decoding],
            score=(score := float(response[f"{decoding}_score"])),
            verdict=RIGHT if score >= 1 else WRONG if score <= 0 else PARTLY,
        )
        for decoding in DECODINGS
    ]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One stage's settings, inputs and results, as texts."""

    name: str
    kind: str
    label: str
    fingerprint: str
    inputs: dict[str, str]
    config: dict[str, str]
    data: dict[str, str]
    metrics: dict[str, str]
    files: dict[str, str]


def settings(stages: Sequence[StageFacts]) -> list[Settings]:
    """Every stage's, in the order of the lineage."""
    return [
        Settings(
            name=stage.name,
            kind=stage.kind,
            label=stage.label,
            fingerprint=str(stage.record["fingerprint"]),
            inputs=dict(stage.edges),
            config=flat(stage.config),
            data={key: str(value) for key, value in stage.record["payload"]["data"].items()},
            metrics={key: number(value) for key, value in stage.metrics.items()},
            files={name: size(int(e["bytes"])) for name, e in stage.record["files"].items()},
        )
        for stage in stages
    ]


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings under dotted names, values as JSON."""
    found: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            found[f"{prefix}{key}"] = text
    return found


@dataclass(frozen=True, kw_only=True)
class Timing:
    """When and how long a stage ran."""

    name: str
    kind: str
    label: str
    seconds: str
    share: float
    """Of the longest stage, for a bar."""
    threads: str
    started: str
    """When the run that made it started."""
    resumed: str


def timings(stages: Sequence[StageFacts]) -> list[Timing]:
    """Every stage's, in the order of the lineage."""
    longest = max((stage.seconds for stage in stages), default=0.0) or 1.0
    return [
        Timing(
            name=stage.name,
            kind=stage.kind,
            label=stage.label,
            seconds=clock(stage.seconds) if stage.seconds >= 10 else f"{stage.seconds:.1f} s",
            share=stage.seconds / longest,
            threads=number(stage.provenance.get("threads")),
            started=moment(stage.provenance.get("started")),
            resumed=str(stage.provenance.get("resumed_at_step") or ""),
        )
        for stage in stages
    ]


def runs(stages: Sequence[StageFacts]) -> list[dict[str, Any]]:
    """The distinct runs that made the stages, newest first, with what each recorded.

    Stages that came from earlier runs were made by the code of those runs.
    """
    found: dict[str, dict[str, Any]] = {}
    for stage in stages:
        facts = {
            key: value
            for key, value in stage.provenance.items()
            if key not in ("seconds", "threads", "resumed_at_step")
        }
        key = json.dumps(facts, sort_keys=True)
        run = found.setdefault(key, facts | {"stages": [], "when": moment(facts.get("started"))})
        run["stages"].append(stage.name)
    return sorted(found.values(), key=lambda run: str(run.get("started", "")), reverse=True)


def moment(text: Any) -> str:
    """An ISO 8601 time to the minute: "2026-10-03 09:14 UTC"."""
    if not text:
        return ""
    date, _, rest = str(text).partition("T")
    zone = " UTC" if rest.endswith(("+00:00", "Z")) else ""
    return f"{date} {rest[:5]}{zone}"
