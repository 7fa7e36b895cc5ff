"""What the tests of estimates are built of: small graphs, rates in round numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.engine.graph import Graph, Node
from posttrain.engine.planner import plan
from posttrain.engine.store import Store
from posttrain.estimate import rates as rates_of
from posttrain.estimate.about import Estimate, Machine, estimate
from posttrain.estimate.rates import Rates, Setting
from posttrain.stages.config import build_config

GIB = 2**30
ROUND = dict.fromkeys(Rates.__annotations__, 0.0)
"""Rates of a machine for which nothing takes time."""
SIZES = {
    "hidden_size": 16, "num_layers": 1, "num_heads": 1, "head_dim": 16, "intermediate_size": 16,
}  # fmt: skip


def domain_node(name: str = "add", train: int = 100) -> Node:
    """A procedural domain that is not made yet."""
    counts = {"train": train, "validation": 10, "heldout": 20}
    source = {
        "kind": "procedural", "dataset": "chain_sum", "format": "add", "counts": counts, "seed": 0,
        "params": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1},
    }  # fmt: skip
    return Node(name=name, kind="domain", config={"domain": name, "source": source})


def stage(kind: str, name: str, inputs: Mapping[str, str], **settings: Any) -> Node:
    """A stage with checked settings."""
    config = build_config(kind, name, settings).to_json()
    return Node(name=name, kind=kind, config=config, inputs=inputs)


def line(*more: Node, steps: int = 10) -> Graph:
    """A domain, a model from nothing, `more`; the last one is the target."""
    base = stage("pretrain", "base", {"domains.add": "add"}, steps=steps, batch_size=8, **SIZES)
    nodes = [domain_node(), base, *more]
    return Graph(nodes={node.name: node for node in nodes}, target=nodes[-1].name)


def know(machine: Machine, *, threads: int = 1, **rates: float) -> None:
    """Remember rates of the model of `line`, those that are not given 0."""
    from posttrain.estimate.shapes import model_of_pretrain

    setting = Setting.of(
        model_of_pretrain(SIZES), precision="float32", threads=threads, device=machine.kind
    )
    rates_of.keep_rates({setting.key: Rates(**{**ROUND, **rates})})


def estimated(graph: Graph, store: Store, machine: Machine, **how: Any) -> Estimate:
    """The estimate of a graph on a store."""
    how.setdefault("free", 100 * GIB)
    return estimate(graph, plan(graph, store), store, machine, **how)
