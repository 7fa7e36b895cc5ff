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
from markupsafe import Markup, escape

from posttrain.engine.atomic import human_bytes, remove_parts, write_whole
from posttrain.engine.fingerprint import digest
from posttrain.engine.record import SHORT, Artifact
from posttrain.engine.store import Store
from posttrain.report import candidates, plots, scores, wording
from posttrain.report.benchmarks import benchmarks_of, side_by_side, with_error
from posttrain.report.curves import in_sentence, sections
from posttrain.report.estimates import compared
from posttrain.report.gather import (
    StageFacts,
    domain_colours,
    gather,
    read_evaluation,
    read_transcripts,
)
from posttrain.report.lineage import lineage_svg
from posttrain.report.roles import explained
from posttrain.report.samples import snapshots
from posttrain.report.scores import all_routes

LAYOUT = 5
"""Raised by hand when the page changes, so that older pages are written again."""
OF_A_STAGE = (
    *("seconds", "threads", "resumed_at_step", "tokens", "origin"),
    *("peak_memory", "peak_memory_of_a_child", "peak_memory_of_device"),
    *("processor_seconds", "estimate"),
    "teachers_probed",
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
    names: Mapping[str, str] | None = None,
) -> Path:
    """Write the page about `artifact` to `path` (its folder is made if missing); returns `path`.

    `recipe` and `seed` are what was run, `seconds` how long that took if it is known (the sum over
    the stages is shown otherwise), `source` the text of the recipe, `warnings` what is to be told
    about it, {"stage", "text"} each; those of the stages are in their records. `names` are what
    the recipe calls its stages, by fingerprint. The file appears whole or not at all. Raises
    StoreError when a record of the lineage is damaged.
    """
    stages = gather(store, artifact, names)
    templates = report_templates()
    page = templates.get_template("report.html").render(
        style=style(),
        tag=_tag(artifact.fingerprint, names),
        artifact=artifact,
        recipe=recipe,
        seed=seed,
        seconds=sum(stage.seconds for stage in stages) if seconds is None else seconds,
        wall=seconds is not None,
        unfolded=False,
        source=source,
        warnings=[*warnings, *_warnings(stages)],
        benchmarks=_benchmarks(store, stages),
        **_content(stages, artifact),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_parts(path.parent, path.name)
    write_whole(path, page.encode("utf-8", "backslashreplace"))
    return path


def report_templates() -> Environment:
    """`environment`, with all that the templates of a report call."""
    templates = environment()
    templates.globals |= {"wording": wording, "scores": scores, "plots": plots}
    templates.globals |= {"candidates": candidates}
    helpers = (coded, human_bytes, in_sentence, mark, moment, runs_of, snapshots, speakers_of)
    helpers = (*helpers, with_error)
    templates.globals |= {helper.__name__: helper for helper in helpers}
    return templates


def environment() -> Environment:
    """What fills in the templates of this package; it escapes all text."""
    return Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def style() -> Markup:
    """The style sheet of every page."""
    return Markup((_HERE / "report.css").read_text(encoding="utf-8"))


def _warnings(stages: Sequence[StageFacts]) -> list[dict[str, str]]:
    return [{"stage": stage.name, "text": text} for stage in stages for text in stage.warnings]


def report_is_current(path: Path, fingerprint: str, names: Mapping[str, str] | None = None) -> bool:
    """Whether `path` is a page of this layout about the artifact with that fingerprint, with these
    names of stages."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return False
    return _tag(fingerprint, names).encode() in head


def _tag(fingerprint: str, names: Mapping[str, str] | None) -> Markup:
    called = digest(dict(names or {}))[:SHORT]
    text = '<meta name="posttrain-artifact" content="{}" data-layout="{}" data-names="{}">'
    return Markup(text).format(fingerprint, LAYOUT, called)


def _content(stages: Sequence[StageFacts], artifact: Artifact) -> dict[str, Any]:
    """What the templates draw."""
    colours = domain_colours(stages)
    evaluation = read_evaluation(artifact)
    texts = read_transcripts(artifact) if evaluation else {}
    several = evaluation is not None and candidates.has_several(evaluation)
    forgetting = candidates.forgetting if several else scores.forgetting
    return {
        "stages": stages,
        "colours": colours,
        "evaluation": evaluation,
        "several": several,
        "names": {edge: source["name"] for edge, source in stages[-1].inputs.items()},
        "estimates": compared([(stage.name, stage) for stage in stages]),
        "explained": explained(evaluation, {}, stages) if evaluation else [],
        "matrix": evaluation and forgetting(evaluation),
        "curves": sections(stages, colours),
        "sampled": [stage for stage in stages if stage.samples],
        "lineage": Markup(lineage_svg(stages, colours)),
        "transcripts": {domain: rows for domain, rows in texts.items() if rows},
    }


def _benchmarks(store: Store, stages: Sequence[StageFacts]) -> dict[str, Any] | None:
    """The models of a lineage that were scored on tasks of lm-eval, side by side; None without."""
    models = [stage for stage in stages if benchmarks_of(store, stage)]
    if not models:
        return None
    return {"models": [m.name for m in models], "tables": side_by_side(store, models)}


# -- what the templates call -----------------------------------------------------------------------


def speakers_of(domain: str, evaluation: Mapping[str, Any]) -> dict[str, str]:
    """The models whose answers in a domain are shown: edge of the evaluation -> what it is called.

    Other domains' teachers are left out.
    """
    routes = all_routes(evaluation)
    teacher = {f"teachers.{routes[domain]}": "teacher"} if domain in routes else {}
    if not candidates.has_several(evaluation):
        return {"init": "init", **teacher, "student": "student"}
    found = {c.edge: c.title for c in candidates.columns(evaluation) if c.role != "teacher"}
    last = {edge: title for edge, title in found.items() if edge.startswith("student")}
    return {edge: title for edge, title in found.items() if edge not in last} | teacher | last


def coded(text: str) -> Markup:
    """A sentence whose names, in backticks, become code."""
    parts = text.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if place % 2 else escape(part)
        for place, part in enumerate(parts)
    )


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
