"""report.html: one self-contained page about an artifact and everything it descends from.

It loads nothing from anywhere: style sheet and plots are inside, and there are no scripts. All text
that comes from models, data or settings is escaped.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from posttrain.engine.record import Artifact
from posttrain.engine.store import Store
from posttrain.report import plots, scores, views, wording
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
) -> Path:
    """Write the page about `artifact` to `path` (its folder is made if missing); returns `path`.

    `recipe` and `seed` are what was run, `seconds` how long that took if it is known (the sum over
    the stages is shown otherwise), `source` the text of the recipe. The file appears whole or not
    at all. Raises StoreError when a record of the lineage is damaged.
    """
    stages = gather(store, artifact)
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"wording": wording, "scores": scores, "views": views, "plots": plots}
    environment.globals["in_sentence"] = in_sentence
    page = environment.get_template("report.html").render(
        style=Markup((_HERE / "report.css").read_text(encoding="utf-8")),
        tag=_tag(artifact.fingerprint),
        artifact=artifact,
        recipe=recipe,
        seed=seed,
        seconds=sum(stage.seconds for stage in stages) if seconds is None else seconds,
        wall=seconds is not None,
        source=source,
        **_content(stages, artifact),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        part.write_text(page, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


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
