"""The graph of stages: nodes joined by named edges, in one deterministic order, each with a content
fingerprint.

The dividing line is drawn here once. `kind`, `version`, the settings, `data` and the fingerprints
of the inputs are identity; `name` and `runtime` (paths, devices) are not, so moving a file or
renaming a stage never makes it run again. Nor does a setting that is added to a kind later: those
that are at their default stay out of `identity`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from typing import Any, TypeVar

from posttrain.engine.errors import GraphError, choices_text
from posttrain.engine.fingerprint import digest, plain

T = TypeVar("T")

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")


def is_stage_name(text: object) -> bool:
    """Whether it can be the name or kind of a stage: a text that can be a directory's name."""
    return isinstance(text, str) and len(text) <= 100 and _NAME.fullmatch(text) is not None


@dataclass(frozen=True, kw_only=True)
class Node:
    """One stage of a graph. Making one runs nothing.

    Raises GraphError for a name or kind that cannot be a directory name.
    """

    name: str
    """What people call it; also the start of its directory name. Not identity."""
    kind: str
    """Which stage code runs it."""
    version: int = 1
    """Version of that code, raised by hand when its numbers change."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """All settings, with a stable serialisation (see `fingerprint.plain`)."""
    identity: Mapping[str, Any] | None = None
    """Those of the settings that are not at their default; None: all are identity."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Edge label -> name of the node it comes from, such as {"start": "base"}."""
    data: Mapping[str, str] = field(default_factory=dict)
    """Label -> sha256 of bytes from outside the graph."""
    runtime: Mapping[str, Any] = field(default_factory=dict)
    """What the stage needs to know but does not change its result. {"missing": message} says that
    an outside file is gone, which blocks the stage unless it is cached; {"origin": facts} says
    where its files are from, for its provenance; {"directory": path} where files from outside are
    now that it links to."""
    fingerprint: str = ""
    """Of an artifact of the store that stands here as it is, whatever it was made of: then nothing
    else of the node is identity."""

    def __post_init__(self) -> None:
        for label, text in (("name", self.name), ("kind", self.kind)):
            if not is_stage_name(text):
                raise GraphError(
                    f"{label} {text!r} of a stage cannot be a directory name; use 1 to 100 "
                    f"letters, digits, '_', '-', '.', '+', not starting with '.', '-' or '+'"
                )


def payload(node: Node, input_fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """The plain JSON object whose digest is the fingerprint of `node`. Raises ConfigError for an
    unstable value."""
    return {
        "kind": node.kind,
        "version": node.version,
        "config": plain(
            node.config if node.identity is None else node.identity,
            at=f"stage {node.name}: config",
        ),
        "data": plain(node.data, at=f"stage {node.name}: data"),
        "inputs": dict(input_fingerprints),
    }


@dataclass(frozen=True, kw_only=True)
class Graph:
    """All nodes by name, and those that are wanted.

    A node's key is what the graph, its plan and its events call it. It is `Node.name` but where
    several nodes of that name stand in one graph (see `joining.py`); records keep `Node.name`.

    Raises GraphError (from every method) for a cycle, and an unknown input or target.
    """

    nodes: Mapping[str, Node]
    target: str
    also: tuple[str, ...] = ()
    """More nodes that are wanted beside `target`."""

    @property
    def targets(self) -> tuple[str, ...]:
        """Everything that is wanted, each once."""
        return tuple(dict.fromkeys((self.target, *self.also)))

    def order(self) -> list[str]:
        """Names of the nodes that the targets depend on and of the targets, inputs first, otherwise
        as they stand in `nodes`."""
        return list(self._order)

    def ancestors(self, name: str) -> frozenset[str]:
        """Names of all nodes `name` depends on, directly or not."""
        return self._ancestors[name]

    def fingerprints(self) -> dict[str, str]:
        """Name -> fingerprint for every node in `order`. Raises ConfigError for a value without
        stable serialisation."""
        return dict(self._fingerprints)

    def payload(self, name: str) -> dict[str, Any]:
        """The payload of one node in `order`: see the function `payload`."""
        node = self.nodes[name]
        return payload(
            node, {edge: self._fingerprints[source] for edge, source in node.inputs.items()}
        )

    def width(self, name: str) -> int:
        """How many nodes in `order` could run at the same time as `name`, itself included.

        It depends on the graph alone, so a share of the machine derived from it does not depend on
        scheduling.
        """
        before = self._ancestors[name]
        return sum(
            other not in before and name not in self._ancestors[other] for other in self._order
        )

    @cached_property
    def _order(self) -> tuple[str, ...]:
        needed = self._needed()
        left = {
            name: set(self.nodes[name].inputs.values()) for name in self.nodes if name in needed
        }
        try:
            # For its check alone: its own order does not keep to that of `nodes`.
            TopologicalSorter(left).prepare()
        except CycleError as error:
            raise GraphError(
                f"the graph has a cycle: {' -> '.join(error.args[1])}; a stage cannot need itself"
            ) from None
        order: list[str] = []
        while left:
            ready = next(name for name, inputs in left.items() if inputs.isdisjoint(left))
            order.append(ready)
            del left[ready]
        return tuple(order)

    @cached_property
    def _ancestors(self) -> dict[str, frozenset[str]]:
        found: dict[str, frozenset[str]] = {}
        for name in self._order:
            inputs = set(self.nodes[name].inputs.values())
            found[name] = frozenset(inputs.union(*(found[source] for source in inputs)))
        return found

    @cached_property
    def _fingerprints(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for name in self._order:
            node = self.nodes[name]
            found[name] = node.fingerprint or digest(
                payload(node, {edge: found[source] for edge, source in node.inputs.items()})
            )
        return found

    def _needed(self) -> set[str]:
        for target in self.targets:
            if target not in self.nodes:
                known = choices_text(target, self.nodes, label="known stages")
                raise GraphError(f"unknown target {target!r}; {known}")
        needed, frontier = set(self.targets), list(self.targets)
        while frontier:
            node = self.nodes[frontier.pop()]
            for edge, source in node.inputs.items():
                if source not in self.nodes:
                    known = choices_text(source, self.nodes, label="known stages")
                    raise GraphError(
                        f"input {edge!r} of stage {node.name!r} is {source!r}, "
                        f"which is not a stage; {known}"
                    )
                if source not in needed:
                    needed.add(source)
                    frontier.append(source)
        return needed


# -- names of edges: a role such as "start", or one of several with a role, "data.0" ---------------


def edge_name(role: str, *names: str) -> str:
    """The edge of that role and name.

    >>> edge_name("domains", "sums")
    'domains.sums'
    """
    return ".".join((role, *names))


def role_of(edge: str) -> str:
    """What an edge is for: "domains" of "domains.sums", "start" of "start"."""
    return edge.partition(".")[0]


def named(inputs: Mapping[str, T], role: str) -> dict[str, T]:
    """Those of the inputs whose edges have that role, by what follows it.

    >>> named({"start": "a", "data.0": "b", "data.1": "c"}, "data")
    {'0': 'b', '1': 'c'}
    """
    prefix = f"{role}."
    return {e.removeprefix(prefix): value for e, value in inputs.items() if e.startswith(prefix)}


def with_role(inputs: Mapping[str, T], *roles: str) -> dict[str, T]:
    """Those of the inputs that have one of these roles, by edge.

    >>> with_role({"start": "a", "data": "b", "data.1": "c"}, "data")
    {'data': 'b', 'data.1': 'c'}
    """
    return {edge: value for edge, value in inputs.items() if role_of(edge) in roles}
