"""report.html: one self-contained page about an artifact and everything it descends from.

It loads nothing from anywhere: style sheet and plots are inside, and there are no scripts. All text
that comes from models, data or settings is escaped.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from posttrain.engine.record import Artifact
from posttrain.engine.store import Store
from posttrain.report import scores, views, wording
from posttrain.report.curves import Panel, in_sentence, sections
from posttrain.report.gather import (
    EVALUATION,
    TRANSCRIPTS,
    StageFacts,
    domain_colours,
    gather,
    read_json,
)
from posttrain.report.lineage import lineage_svg
from posttrain.report.svg import dash_array

LAYOUT = 2
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
    environment.globals |= {"wording": wording, "scores": scores, "dash_array": dash_array}
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
    """Everything the templates draw."""
    colours = domain_colours(list(stages))
    evaluation = read_json(artifact, EVALUATION)
    texts = read_json(artifact, TRANSCRIPTS)
    names = {edge: source["name"] for edge, source in artifact.inputs.items()}
    figures = Figures()
    return {
        "stages": stages,
        "colours": colours,
        "evaluation": evaluation,
        "names": names,
        "matrix": evaluation and scores.forgetting(evaluation),
        "notes": scores.notes(evaluation) if evaluation else [],
        "verdict": scores.verdict(evaluation) if evaluation else "",
        "score_plots": figures.scores(evaluation) if evaluation else {},
        "curves": [
            (section, figures.curves(section.panels), figures.curves(section.folded))
            for section in sections(stages, colours)
        ],
        "lineage": Markup(lineage_svg(stages, colours)),
        "transcripts": views.transcripts(texts, evaluation, names) if evaluation and texts else {},
        "settings": views.settings(stages),
        "timings": views.timings(stages),
        "runs": views.runs(stages),
    }


@dataclass
class Figures:
    """Draws plots and numbers them, so that their ids differ."""

    count: int = field(default=0)

    def curves(self, panels: Sequence[Panel]) -> list[tuple[Panel, Markup]]:
        """Each panel with its drawing."""
        from posttrain.report.plots import curve_plot  # half a second, and only for this page

        return [(panel, Markup(curve_plot(panel, prefix=self._prefix()))) for panel in panels]

    def scores(self, evaluation: Mapping[str, Any]) -> dict[str, Markup]:
        """One drawing per decoding."""
        from posttrain.report.plots import score_plot

        found = {}
        for decoding, title in scores.DECODING_NAMES.items():
            rows = {
                name: {
                    model: scores.decoded(row, decoding)[model]
                    for model in ("init", "teacher", "student")
                }
                | {"constant": row["constant"]["value"]}
                for name, row in evaluation["domains"].items()
            }
            drawing = score_plot(rows, title=f"Accuracy per domain, {title}", prefix=self._prefix())
            found[title] = Markup(drawing)
        return found

    def _prefix(self) -> str:
        self.count += 1
        return f"f{self.count}"
