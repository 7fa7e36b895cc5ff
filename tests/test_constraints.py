"""The tested set of packages is whole: what the package needs at run time is pinned."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DECIDE_RESULTS = {"sympy", "latex2sympy2-extended", "pyarrow", "datasets", "pytest-xdist", "trl"}
"""Not direct dependencies, or optional ones, but numbers or tests follow from their versions."""


def plain(name: str) -> str:
    return name.lower().replace("_", "-")


def test_every_direct_dependency_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.partition("==") for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\d.]+", version) for _, _, version in pins)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    direct = {re.split(r"[<>=\[]", needed)[0] for needed in project["dependencies"]}
    needed = {plain(name) for name in direct} | DECIDE_RESULTS
    assert needed - {plain(name) for name, _, _ in pins} == set()
