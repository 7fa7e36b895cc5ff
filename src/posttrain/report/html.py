"""report.html: one self-contained page about an artifact and everything it descends from.

It loads nothing from anywhere: style sheet and plots are inside, and there are no scripts. All text
that comes from models, data or settings is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from posttrain.engine.atomic import human_bytes, write_whole
from posttrain.engine.record import Artifact
from posttrain.engine.store import Store
from posttrain.report import plots, scores, wording
from posttrain.report.curves import in_sentence, sections
from posttrain.report.gather import (
    EVALUATION,
    TRANSCRIPTS,
    StageFacts,
    domain_colours,
    gather,
    read_json,
)
from posttrain.report.lineage import lineage_svg

LAYOUT = 3
"""Raised by hand when the page changes, so that older pages are written again."""
OF_A_STAGE = (
    *("seconds", "threads", "resumed_at_step", "tokens", "origin"),
    *("peak_memory", "peak_memory_of_a_child", "peak_memory_of_device"),
)
"""Facts of the provenance that differ between the stages of one run."""
_HERE = Path(__file__).parent
_HEAD_BYTES = 2000
"""The meta tags stand within them."""


def write_report(
    path: Path,
    *,
    store: Store,
    artifact: Artifact,
    recipe: str,
    seed: int,
    seconds: float | None = None,
    source: str = "",
    warnings: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write the page about `artifact` to `path` (its folder is made if missing); returns `path`.

    `recipe` and `seed` are what was run, `seconds` how long that took if it is known (the sum over
    the stages is shown otherwise), `source` the text of the recipe, `warnings` what is to be told
    about it, {"stage", "text"} each; those of the stages are in their records. The file appears
    whole or not at all. Raises StoreError when a record of the lineage is damaged.
    """
    stages = gather(store, artifact)
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"wording": wording, "scores": scores, "plots": plots}
    helpers = (human_bytes, in_sentence, mark, moment, runs_of, speakers_of)
    environment.globals |= {helper.__name__: helper for helper in helpers}
    page = environment.get_template("report.html").render(
        style=Markup((_HERE / "report.css").read_text(encoding="utf-8")),
        tag=_tag(artifact.fingerprint),
        artifact=artifact,
        recipe=recipe,
        seed=seed,
        seconds=sum(stage.seconds for stage in stages) if seconds is None else seconds,
        wall=seconds is not None,
        source=source,
        warnings=[*warnings, *_warnings(stages)],
        **_content(stages, artifact),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page.encode("utf-8"))
    return path


def _warnings(stages: Sequence[StageFacts]) -> list[dict[str, str]]:
    return [{"stage": stage.name, "text": text} for stage in stages for text in stage.warnings]


def report_is_current(path: Path, fingerprint: str) -> bool:
    """Whether `path` is a page of this layout about the artifact with that fingerprint."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return False
    return _tag(fingerprint).encode() in head


def _tag(fingerprint: str) -> Markup:
    return Markup('<meta name="posttrain-artifact" content="{}" data-layout="{}">').format(
        fingerprint, LAYOUT
    )


def _content(stages: Sequence[StageFacts], artifact: Artifact) -> dict[str, Any]:
    """What the templates draw."""
    colours = domain_colours(stages)
    evaluation = read_json(artifact, EVALUATION)
    texts = read_json(artifact, TRANSCRIPTS) if evaluation else None
    return {
        "stages": stages,
        "colours": colours,
        "evaluation": evaluation,
        "names": {edge: source["name"] for edge, source in artifact.inputs.items()},
        "matrix": evaluation and scores.forgetting(evaluation),
        "curves": sections(stages, colours),
        "lineage": Markup(lineage_svg(stages, colours)),
        "transcripts": {domain: rows for domain, rows in (texts or {}).items() if rows},
    }


# -- what the templates call -----------------------------------------------------------------------


def speakers_of(domain: str, routes: Mapping[str, str]) -> dict[str, str]:
    """The models whose answers in a domain are shown: edge of the evaluation -> role.

    `routes` maps a domain to its teacher's name; other domains' teachers are left out.
    """
    teacher = {f"teachers.{routes[domain]}": "teacher"} if domain in routes else {}
    return {"init": "init", **teacher, "student": "student"}


def mark(score: float) -> Literal["right", "partly right", "wrong"]:
    """What a verifier's score says of a response."""
    return "right" if score >= 1 else "wrong" if score <= 0 else "partly right"


def runs_of(stages: Sequence[StageFacts]) -> list[dict[str, Any]]:
    """The distinct runs that made the stages, newest first, with what each recorded.

    Stages that came from earlier runs were made by the code of those runs.
    """
    found: dict[str, dict[str, Any]] = {}
    for stage in stages:
        facts = {key: value for key, value in stage.provenance.items() if key not in OF_A_STAGE}
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
