"""The shape of the package: imports point one way, third-party ones have their place, and files,
functions and class hierarchies stay small."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import posttrain

ROOT = Path(posttrain.__file__).parent

# Unit -> the units it may import. A unit is a package, or a module that stands for itself.
ALLOWED: dict[str, set[str]] = {
    "engine": set(),
    "losses": set(),
    "rl": {"losses"},
    "modes": {"engine"},
    "hints": {"engine"},
