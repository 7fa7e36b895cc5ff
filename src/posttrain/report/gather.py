"""What a report is made of, read from the store once: every stage of an artifact's lineage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from posttrain.engine import ancestry
from posttrain.engine.errors import ConfigError, StoreError
from posttrain.engine.graph import named
from posttrain.engine.parsing import Unreadable, parse_json
from posttrain.engine.record import Artifact, Recorded, label_of
from posttrain.engine.store import Store
from posttrain.engine.work import METRICS
from posttrain.report.samples import SAMPLES, Sample, parse_samples
from posttrain.report.scores import Evaluation
from posttrain.stages.kinds import Kind, shown_kind

EVALUATION = "evaluation.json"
TRANSCRIPTS = "transcripts.json"
LARGEST = 1e300
"""Numbers of a log beyond it are left out: nothing can be drawn of them."""
COLOURS = 8
"""Colours that the style sheet has; a ninth domain gets the first one again."""


@dataclass(frozen=True, kw_only=True)
class StageFacts(Recorded):
    """One stage of a lineage: its record, and the lines it logged."""

    edges: Mapping[str, str]
    """Edge label -> label of what it descends from directly."""
    lines: list[dict[str, float]] = field(default_factory=list)
    """metrics.jsonl, numbers only; [] where there is none."""
    samples: list[Sample] = field(default_factory=list)
    """samples.jsonl; [] where there is none."""

    @cached_property
    def kind_row(self) -> Kind:
        """What the table of kinds says about its kind."""
        return shown_kind(self.kind)

    @property
    def seconds(self) -> float:
        """How long it took; 0 where that was not recorded."""
        return float(self.provenance.get("seconds") or 0.0)

    @cached_property
    def domains(self) -> dict[str, str]:
        """Domain -> label of the domain artifact it reads."""
        return named(self.edges, "domains")

    @property
    def domain(self) -> str | None:
        """The one domain it is about, None for none or several."""
        return next(iter(self.domains)) if len(self.domains) == 1 else None


def gather(
    store: Store, artifact: Artifact, names: Mapping[str, str] | None = None
) -> list[StageFacts]:
    """The lineage of `artifact`, ancestors first, itself last.

    `names` are those that stages have now, by fingerprint: an artifact may have been made under
    another one. Raises StoreError when the record of an ancestor is damaged.
    """
    return [
        StageFacts(
            record=_renamed(ancestor.record, names or {}),
            edges=_edges(ancestor, names or {}),
            lines=[] if ancestor.artifact is None else _lines(ancestor.artifact),
            samples=[] if ancestor.artifact is None else samples_of(ancestor.artifact),
        )
        for ancestor in ancestry.renamed(store, ancestry.lineage(store, artifact))
    ]


def _renamed(record: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A record with the present names of the stage and its inputs."""
    return {
        **record,
        "name": names.get(record["fingerprint"], record["name"]),
        "inputs": {
            edge: {**source, "name": names.get(source["fingerprint"], source["name"])}
            for edge, source in record["inputs"].items()
        },
    }


def _edges(ancestor: ancestry.Ancestor, names: Mapping[str, str]) -> dict[str, str]:
    inputs = _renamed(ancestor.record, names)["inputs"]
    edges = {edge: label_of(source) for edge, source in inputs.items()}
    # The edge to an adopted history is no input, and keeps the label it has.
    return {edge: edges.get(edge, label) for edge, label in ancestor.edges.items()}


def facts_of(artifact: Artifact) -> StageFacts:
    """One stage by itself."""
    edges = {edge: label_of(source) for edge, source in artifact.inputs.items()}
    return StageFacts(
        record=artifact.record,
        edges=edges,
        lines=_lines(artifact),
        samples=samples_of(artifact),
    )


def samples_of(artifact: Artifact) -> list[Sample]:
    """What it was writing on its way; [] where there is none. Raises StoreError for a file that was
    changed."""
    return parse_samples(artifact.content(SAMPLES)) if SAMPLES in artifact.files else []


def _lines(artifact: Artifact) -> list[dict[str, float]]:
    if METRICS not in artifact.files:
        return []
    lines = artifact.content(METRICS).splitlines()
    return [numbers_of(_parsed(artifact, METRICS, line)) for line in lines]


def numbers_of(line: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a line of metrics."""
    return {
        key: float(value)
        for key, value in line.items()
        if isinstance(value, int | float) and -LARGEST <= value <= LARGEST
    }


def read_evaluation(artifact: Artifact) -> Evaluation | None:
    """What an evaluation found; None for an artifact of another kind. Raises StoreError for a file
    that was changed, or is not as an evaluation writes it."""
    if "scores" not in shown_kind(artifact.kind).makes or EVALUATION not in artifact.files:
        return None
    # pydantic, which takes a moment to import.
    from posttrain.report.form import check_evaluation

    found = _parsed(artifact, EVALUATION, artifact.content(EVALUATION))
    with _named(artifact, EVALUATION):
        check_evaluation(found, artifact.inputs)
    return found


def read_transcripts(artifact: Artifact) -> dict[str, list[dict[str, Any]]]:
    """What the models of an evaluation answered, by domain; {} where that is not kept. Raises
    StoreError as `read_evaluation` does."""
    if TRANSCRIPTS not in artifact.files:
        return {}
    from posttrain.report.form import check_transcripts

    found = _parsed(artifact, TRANSCRIPTS, artifact.content(TRANSCRIPTS))
    with _named(artifact, TRANSCRIPTS):
        check_transcripts(found)
    return found


@contextmanager
def _named(artifact: Artifact, name: str) -> Iterator[None]:
    """Name the file in an error about its form."""
    try:
        yield
    except ConfigError as error:
        raise StoreError(
            f"{artifact.path / name} is not as posttrain writes it ({error}); remove "
            f"{artifact.path} and run the recipe again to make it anew"
        ) from None


def _parsed(artifact: Artifact, name: str, content: bytes) -> dict[str, Any]:
    with _named(artifact, name):
        try:
            found = parse_json(content)
        except Unreadable as error:
            raise ConfigError(str(error)) from None
        if not isinstance(found, dict):
            raise ConfigError("no JSON object")
        return found


def scores_of(store: Store, artifact: Artifact) -> list[dict[str, Any]]:
    """The evaluations in the store that scored this model, oldest first.

    Each as {"name", "fingerprint", "model": its edge there, "evaluation": content of
    evaluation.json}.
    """
    found = []
    for other in store.list():
        edges = [
            edge
            for edge, source in other.inputs.items()
            if source["fingerprint"] == artifact.fingerprint
        ]
        # A damaged one of other models is not in the way.
        evaluation = read_evaluation(other) if edges else None
        if evaluation is not None:
            facts = {"name": other.name, "fingerprint": other.fingerprint}
            found += [
                facts | {"evaluation": evaluation, "model": edge}
                for edge in edges
                if edge in evaluation["models"]
            ]
    return found


def domain_colours(stages: Iterable[StageFacts]) -> dict[str, int]:
    """Domain -> number of its colour, 1 to `COLOURS`, the same everywhere in a report."""
    names = dict.fromkeys(name for stage in stages for name in stage.domains)
    return {name: number % COLOURS + 1 for number, name in enumerate(sorted(names))}
