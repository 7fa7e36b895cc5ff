"""Names of edges. An edge is a role such as "start", or one of several with a role, "data.0"."""

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


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
