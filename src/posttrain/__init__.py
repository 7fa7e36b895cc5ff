"""posttrain: a whole LLM post-training recipe as one short file."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain import judges, schedules
    from posttrain.algorithms import LoRA
    from posttrain.language.handles import Stage
    from posttrain.recipe import Recipe
    from posttrain.suites.domain import (
        DataTable,
        Domain,
        Preferences,
        Procedural,
        Suite,
        Table,
        VerifierSpec,
    )

__version__ = "0.1.0"

__all__ = [
    "DataTable",
    "Domain",
    "LoRA",
    "Preferences",
    "Procedural",
    "Recipe",
    "Stage",
    "Suite",
    "Table",
    "VerifierSpec",
    "judges",
    "schedules",
]

_MODULES = ("judges", "schedules")
"""Modules that a recipe uses by name."""
_HOMES = {
    "LoRA": "posttrain.algorithms",
    "Recipe": "posttrain.recipe",
    "Stage": "posttrain.language.handles",
    **dict.fromkeys(
        ("DataTable", "Domain", "Preferences", "Procedural", "Suite", "Table", "VerifierSpec"),
        "posttrain.suites.domain",
    ),
}


def __getattr__(name: str) -> Any:
    # Imported on first use: `posttrain --help` has no need of pydantic.
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_MODULES, *_HOMES]
