"""Whether shares of a batch are about the domains that it is drawn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def shares_problem(shares: Mapping[str, float], domains: Sequence[str]) -> str:
    """What is wrong with shares that are to name exactly these domains; empty where nothing is."""
    for name in shares:
        if name not in domains:
            return f"{name!r} is not one of the domains; choices: {', '.join(domains)}"
    for name in domains:
        if shares and name not in shares:
            return f"it gives no share to domain {name!r}; write {name!r}: 0 to leave it out"
    return ""
