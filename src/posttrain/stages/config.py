"""The register of all kinds of stages: their settings, their versions, and the check of both.

The settings themselves are in `stages/settings/`, one room per kind.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from posttrain.engine.errors import ConfigError
from posttrain.stages.settings.data import (
    Comparisons,
    Dedup,
    Filter,
    Mix,
    Profile,
    Sample,
    Score,
    Select,
)
from posttrain.stages.settings.distill import Distill
from posttrain.stages.settings.models import Best, DomainData, Evaluate, ExternalModel, Merge
from posttrain.stages.settings.preference import DpoStage, Pairs, RewardModel
from posttrain.stages.settings.rl import Rl
from posttrain.stages.settings.supervised import Pretrain, Sft

CONFIGS: dict[str, type[BaseModel]] = {
    "domain": DomainData,
    "model": ExternalModel,
    "pretrain": Pretrain,
    "sft": Sft,
    "dpo": DpoStage,
    "reward_model": RewardModel,
    "rl": Rl,
    "distill": Distill,
    "merge": Merge,
    "evaluate": Evaluate,
    "sample": Sample,
    "score": Score,
    "select": Select,
    "pairs": Pairs,
    "profile": Profile,
    "filter": Filter,
    "mix": Mix,
    "dedup": Dedup,
    "comparisons": Comparisons,
    "best": Best,
}

# Raised by hand when a change makes a stage give other numbers for the same settings.
VERSIONS: dict[str, int] = dict.fromkeys(CONFIGS, 1)


def build_config(kind: str, stage: str, values: Mapping[str, Any]) -> BaseModel:
    """The checked settings of a stage; ConfigError names stage, field, value and choices."""
    config = CONFIGS[kind]
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
