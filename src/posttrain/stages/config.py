"""The check of a stage's settings against those of its kind.

The settings themselves are in `stages/settings/`; the table of kinds names them (`kinds.py`).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from posttrain.engine.errors import ConfigError
from posttrain.stages.kinds import kind_of


def build_config(kind: str, stage: str, values: Mapping[str, Any]) -> BaseModel:
    """The checked settings of a stage; ConfigError names stage, field, value and choices."""
    config: type[BaseModel] = kind_of(kind).settings_class()
    try:
        built = config(**values)
    except ValidationError as error:
        raise ConfigError(_explain(error, config, kind, stage)) from None
    for field, given in values.items():
        taken = getattr(built, field)
        # pydantic makes a number of True and of "3"; nobody who writes that means it.
        if isinstance(given, bool | str) and type(taken) in (int, float):
            raise ConfigError(
                f"stage {stage!r} ({kind}), field {field!r}: {given!r} is no number; write "
                f"{taken!r} without quotes"
                if isinstance(given, str)
                else f"stage {stage!r} ({kind}), field {field!r}: {given!r} is no number"
            )
    return built


def _explain(error: ValidationError, config: type[BaseModel], kind: str, stage: str) -> str:
    lines = []
    # A misspelt setting may be the reason why another one is missing.
    for problem in sorted(error.errors(), key=lambda one: one["type"] != "extra_forbidden"):
        field = ".".join(map(str, problem["loc"]))
        where = f"stage {stage!r} ({kind})" + (f", field {field!r}" if field else "")
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(field, config.model_fields, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            choices = ", ".join(config.model_fields)
            lines.append(f"{where}: unknown option; {hint}choices: {choices}")
        elif problem["type"] == "missing":
            lines.append(f"{where}: a value is needed, for example {field}=100")
        elif problem["type"] == "value_error":
            lines.append(f"{where}: {problem['ctx']['error']}")
        else:
            lines.append(f"{where}: {problem['input']!r} is not allowed: {problem['msg']}")
    return "\n".join(lines)
