"""Evaluations side by side: the accuracies of several models on the same problems."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from posttrain.engine.errors import StoreError
from posttrain.engine.graph import with_role
from posttrain.engine.record import Artifact
from posttrain.engine.store import Store
from posttrain.report.candidates import view_of, views
from posttrain.report.gather import EVALUATION, read_evaluation, scores_of
from posttrain.report.scores import Evaluation

UNPAIRED = (
    "Evaluations keep no score per problem, hence the differences are unpaired: each interval is "
    "made of both 95 % intervals as if they were independent, and is usually wider "
    "than a paired one."
)
Value = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Column:
    """One model's accuracies at temperature 1, per domain."""

    artifact: str
    """Label of what is compared."""
    domains: Mapping[str, Value]
    """{"value"}, with {"low", "high"} where an interval is known."""
    evaluation: str
    """Label of the evaluation that has them."""
    student: str | None = None
    """Which of its students, where there are several."""
    norm: float | None = None


@dataclass(frozen=True, kw_only=True)
class Side:
    """Columns that are over the same problems."""

    split: str
    columns: Sequence[Column]

    @property
    def domains(self) -> list[str]:
        """All domains that one of the columns has."""
        return list(dict.fromkeys(name for column in self.columns for name in column.domains))

    def reference(self, column: Column) -> Column | None:
        """What a column is compared with: that of the first artifact, of the same student if it has
        it. None for the columns of the first artifact itself."""
        first = [one for one in self.columns if one.artifact == self.columns[0].artifact]
        if column in first:
            return None
        return next((one for one in first if one.student == column.student), first[0])


def problems_of(evaluation: Artifact) -> str:
    """What decides which problems an evaluation asked, as a text that is equal where they are."""
    config = evaluation.config
    domains = {
        edge: source["fingerprint"]
        for edge, source in with_role(evaluation.inputs, "domains").items()
    }
    asked = {key: config.get(key) for key in ("split", "num_problems", "modes", "on_long")}
    return json.dumps([domains, asked], sort_keys=True)


def sides_of_evaluations(evaluations: Sequence[Artifact]) -> list[Side]:
    """The students of some evaluations, those over the same problems side by side."""
    columns = []
    for artifact in evaluations:
        of_students = views(_evaluation(artifact))
        for name, view in of_students.items():
            column = Column(
                artifact=artifact.label,
                domains={domain: row["student"] for domain, row in view["domains"].items()},
                evaluation=artifact.label,
                student=name if len(of_students) > 1 else None,
                norm=view["norm"],
            )
            columns.append((artifact, column))
    return _side_by_side(columns)


def _evaluation(artifact: Artifact) -> Evaluation:
    found = read_evaluation(artifact)
    if found is None:
        raise StoreError(f"{artifact.label} has no {EVALUATION}; run its recipe again")
    return found


def sides_of_models(store: Store, models: Sequence[Artifact]) -> list[Side]:
    """What the evaluations in the store say of some models, those over the same problems side by
    side; of several about the same model the newest."""
    columns = []
    for model in models:
        for found in scores_of(store, model):
            artifact = store.find(found["fingerprint"])
            assert artifact is not None
            evaluation, edge = found["evaluation"], found["model"]
            view, own = view_of(evaluation, edge)
            column = Column(
                artifact=model.label,
                # Of a teacher there are means and no intervals.
                domains={
                    domain: view["domains"][domain].get(own) or {"value": row["sampled"]}
                    for domain, row in evaluation["models"][edge].items()
                },
                norm=view["norm"] if own == "student" else None,
                evaluation=artifact.label,
            )
            columns.append((artifact, column))
    return _side_by_side(columns)


def _side_by_side(columns: Sequence[tuple[Artifact, Column]]) -> list[Side]:
    """The columns of some evaluations, those over the same problems together; of several about the
    same model the last."""
    groups: dict[str, dict[tuple[str, str | None], Column]] = {}
    splits: dict[str, str] = {}
    for evaluation, column in columns:
        key = problems_of(evaluation)
        splits[key] = str(evaluation.config["split"])
        groups.setdefault(key, {})[column.artifact, column.student] = column
    return [Side(split=splits[key], columns=list(group.values())) for key, group in groups.items()]


def unpaired(first: Value, other: Value) -> dict[str, float]:
    """`other` - `first`, with an interval where both have one: each side reaches as far as the root
    of the sum of the squares of what makes it larger in the two (Newcombe, 1998)."""
    value = other["value"] - first["value"]
    if not ("low" in first and "low" in other):
        return {"value": value}
    down = math.hypot(other["value"] - other["low"], first["high"] - first["value"])
    up = math.hypot(other["high"] - other["value"], first["value"] - first["low"])
    return {"value": value, "low": value - down, "high": value + up}
