"""Checks of a whole recipe, of which a verb sees only the part that stands above it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.engine.errors import ConfigError
from posttrain.engine.graph import Node
from posttrain.stages.kinds import KINDS

MODELS = ("start", "model", "student", "init")
"""Edges to the models that a stage asks in its modes, beside those that begin as below."""
SEVERAL = ("models.", "candidates.")


def check_thinking(nodes: Mapping[str, Node]) -> None:
    """Refuse a stage in modes whose model comes from a base that was made without thinking.

    Of a model from outside its chat template decides, when it is loaded.
    """
    for node in nodes.values():
        modes = node.config.get("modes") or ()
        asked = [source for edge, source in node.inputs.items() if _asked(edge)] if modes else []
        for source in asked:
            base = nodes.get(root_of(nodes, source))
            if base is not None and base.kind == "pretrain" and not base.config["thinking"]:
                raise ConfigError(
                    f"stage {node.name!r} ({node.kind}), field 'modes': {', '.join(modes)} is "
                    f"asked of {source!r}, which comes from {base.name!r}, made without thinking; "
                    "write thinking=True there, or leave mode= out"
                )


def check_strengths(nodes: Mapping[str, Node]) -> None:
    """Refuse a reward model that reads how clear preferences are where nobody said it."""
    for node in nodes.values():
        data = nodes.get(node.inputs.get("data", ""))
        loss = node.config.get("loss")
        margins = loss.get("margins") if isinstance(loss, dict) else None
        if margins != "strength" or data is None or data.kind != "pairs":
            continue
        pairs: Any = KINDS["pairs"].settings_class()(**data.config)
        if not pairs.pairwise:
            raise ConfigError(
                f"stage {node.name!r} ({node.kind}), field 'margins': strength is read from pairs "
                f"whose judge compares two responses, and those of {data.name!r} have none; give "
                "r.pairs a judge=judges.oracle(...), or judges.human() with how = all or random"
            )


def _asked(edge: str) -> bool:
    return edge in MODELS or edge.startswith(SEVERAL)


def root_of(nodes: Mapping[str, Node], name: str) -> str:
    """The stage that a model descends from by its starts; in a cycle any stage of it."""
    passed: set[str] = set()
    while name in nodes and name not in passed and "start" in nodes[name].inputs:
        passed.add(name)
        name = nodes[name].inputs["start"]
    return name
