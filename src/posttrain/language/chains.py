"""Rollouts that are chains of segments: which stages cannot read them."""

from __future__ import annotations

from collections.abc import Mapping

from posttrain.engine.errors import ConfigError
from posttrain.engine.graph import Node

COMPARE = ("score", "pairs", "comparisons")
"""Kinds that set the responses to one problem side by side, each as an answer to its prompt."""


def check_chains(nodes: Mapping[str, Node]) -> None:
    """Raise ConfigError where a stage would compare responses that are segments of chains: these
    answer prompts of their own, and most of them are no answer to the problem."""
    for node in nodes.values():
        for source in node.inputs.values() if node.kind in COMPARE else ():
            segments = nodes[source].config.get("segments", 1) if source in nodes else 1
            if segments > 1:
                raise ConfigError(
                    f"stage {node.name!r} ({node.kind}): {source!r} has segments = {segments}, and "
                    "the segments of a chain are no answers to one prompt; read r.select(...) of "
                    "it, or the rollouts of r.sample(...)"
                )
