"""The graph of `posttrain eval`: a model of the store, and the stage that scores it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.engine.graph import Graph, Node
from posttrain.engine.record import Artifact
from posttrain.stages.config import build_config
from posttrain.stages.kinds import KINDS

KIND = "harness"


def scoring_graph(
    model: Artifact, settings: Mapping[str, Any], *, tasks_digest: str, include: str
) -> Graph:
    """A graph whose target scores `model` on tasks of lm-eval.

    `settings` are those of the kind `harness`; `tasks_digest` identifies what is asked, and
    `include` is the directory of tasks of the user's own, or empty. Raises ConfigError for settings
    that are none.
    """
    name = f"{model.name}.eval"
    config = build_config(KIND, name, settings)
    source = Node(
        name=model.name,
        kind=model.kind,
        fingerprint=model.fingerprint,
        runtime={"missing": f"{model.label} is no longer in the store"},
    )
    scores = Node(
        name=name,
        kind=KIND,
        version=KINDS[KIND].version,
        config=config.to_json(),
        identity=config.to_json(defaults=False),
        inputs={"model": source.name},
        data={"tasks": tasks_digest},
        runtime={"include": include},
    )
    return Graph(nodes={source.name: source, name: scores}, target=name)
