"""What the page says besides scores and curves, as plain values for its templates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from posttrain.report.gather import StageFacts


def speakers(domain: str, routes: Mapping[str, str]) -> dict[str, str]:
    """The models whose answers in a domain are shown: edge of the evaluation -> role.

    `routes` maps a domain to its teacher's name; other domains' teachers are left out.
    """
    teacher = {f"teachers.{routes[domain]}": "teacher"} if domain in routes else {}
    return {"init": "init", **teacher, "student": "student"}


def mark(score: float) -> Literal["right", "partly right", "wrong"]:
    """What a verifier's score says of a response."""
    return "right" if score >= 1 else "wrong" if score <= 0 else "partly right"


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
