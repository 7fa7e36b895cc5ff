"""Scores of models on the tasks of lm-eval, as `posttrain eval` keeps them: read, and side by side.

In the file of such an artifact:

    lm_eval   its version
    tasks     task or group -> metrics (name -> value, stderr or null), problems, fewshot, version
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.engine.errors import StoreError
from posttrain.engine.parsing import Unreadable, parse_json
from posttrain.engine.record import Artifact, Recorded
from posttrain.engine.store import Store
from posttrain.report.wording import number
from posttrain.stages.kinds import shown_kind

SCORES = "harness.json"


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One artifact of scores of a model."""

    label: str
    asked: str
    """How it was asked, in words: examples, limit, template."""
    tasks: Mapping[str, Mapping[str, Any]]

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Task, metric, score with its standard error, and how it was asked."""
        return [
            (name, metric, with_error(value), self.asked)
            for name, task in self.tasks.items()
            for metric, value in task["metrics"].items()
        ]


def with_error(value: Mapping[str, Any]) -> str:
    """A score with its standard error where that is known."""
    error = value["stderr"]
    return number(value["value"]) + ("" if error is None else f" ± {number(error)}")


def read_benchmarks(artifact: Artifact) -> dict[str, Any]:
    """What the file of such an artifact holds. Raises StoreError where it is not as it was
    written."""
    wrong = StoreError(
        f"{artifact.path / SCORES} is not as posttrain writes it; remove {artifact.path} and run "
        "`posttrain eval` again"
    )
    try:
        found = parse_json(artifact.content(SCORES))
    except Unreadable:
        raise wrong from None
    tasks = found.get("tasks") if isinstance(found, dict) else None
    if not isinstance(tasks, dict) or not all(map(_is_task, tasks.values())):
        raise wrong
    return dict(found)


def _is_task(task: Any) -> bool:
    metrics = task.get("metrics") if isinstance(task, dict) else None
    return isinstance(metrics, dict) and all(
        isinstance(value, dict)
        and isinstance(value.get("value"), int | float)
        and isinstance(value.get("stderr"), int | float | None)
        for value in metrics.values()
    )


def benchmarks_of(store: Store, model: Recorded) -> list[Scored]:
    """The scores of a model in the store, oldest first."""
    found = []
    for other in store.list():
        if "benchmarks" not in shown_kind(other.kind).makes:
            continue
        if other.inputs.get("model", {}).get("fingerprint") == model.fingerprint:
            tasks = read_benchmarks(other)["tasks"]
            found.append(Scored(label=other.label, asked=_asked(other), tasks=tasks))
    return found


def _asked(artifact: Artifact) -> str:
    config = artifact.config
    parts = [] if config.get("fewshot") is None else [f"{config['fewshot']} examples"]
    parts += [] if config.get("limit") is None else [f"first {config['limit']} problems"]
    parts += [] if config.get("chat_template", True) else ["without template"]
    parts += [config["precision"]] if config.get("precision", "float32") != "float32" else []
    return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class SideBySide:
    """Several models on the tasks that were asked of them in the same way."""

    asked: str
    rows: Sequence[tuple[str, str, Sequence[Mapping[str, Any] | None]]]
    """Task, metric, and the value of each model; None where it was not asked that."""


def side_by_side(store: Store, models: Sequence[Recorded]) -> list[SideBySide]:
    """The newest scores of each model on each task, one table for each way of asking."""
    known: dict[str, dict[tuple[str, str], list[Mapping[str, Any] | None]]] = {}
    for place, model in enumerate(models):
        for scored in benchmarks_of(store, model):
            table = known.setdefault(scored.asked, {})
            for name, task in scored.tasks.items():
                for metric, value in task["metrics"].items():
                    table.setdefault((name, metric), [None] * len(models))[place] = value
    return [
        SideBySide(asked=asked, rows=[(*key, values) for key, values in table.items()])
        for asked, table in known.items()
    ]
