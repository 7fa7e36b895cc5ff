"""The settings of a stage, checked against those of its kind.

The settings themselves are in `stages/settings/`; the table of kinds names them (`kinds.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from posttrain.engine.errors import ConfigError, choices_text, shortened
from posttrain.stages.kinds import kind_of
from posttrain.values import Settings

OTHER_NAMES = {
    "learning_rate": "lr",
    "max_steps": "steps",
    "num_steps": "steps",
    "total_steps": "steps",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "train_batch_size": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "global_batch_size": "batch_size",
    "num_generations": "group_size",
    "rollouts_per_prompt": "group_size",
    "n_samples_per_prompt": "group_size",
    "max_completion_length": "max_new_tokens",
    "max_response_length": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "num_warmup_steps": "warmup_steps",
    "lr_scheduler_type": "lr_decay",
    "loss_type": "loss",
    "dtype": "precision",
    "torch_dtype": "precision",
    "assistant_only_loss": "loss_on",
    "epsilon": "clip_low",
    "epsilon_high": "clip_high",
    "cliprange": "clip_low",
    "beta": "coef",
    "max_norm": "max_grad_norm",
}
"""What other projects call a setting of ours."""


def build_config(kind: str, stage: str, values: Mapping[str, Any]) -> Settings:
    """The checked settings of a stage; ConfigError names stage, field, value and choices."""
    config: type[Settings] = kind_of(kind).settings_class()
    try:
        built = config(**values)
    except ValidationError as error:
        # A misspelt setting may be the reason why another one is missing.
        problems = sorted(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        lines = [f"stage {stage!r} ({kind}){_explain(one, config)}" for one in problems]
        raise ConfigError("\n".join(lines)) from None
    for field, given, taken in _numbers("", values, built):
        advice = f"; write {taken!r} without quotes" if isinstance(given, str) else ""
        raise ConfigError(
            f"stage {stage!r} ({kind}), field {field!r}: {given!r} is no number{advice}"
        )
    return built


def explain_choice(error: ValidationError, choice: type[BaseModel]) -> str:
    """What is wrong with a value of `posttrain.algorithms`, for the person who wrote it."""
    problems = sorted(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    return "\n".join(f"{choice.__name__}{_explain(one, choice)}" for one in problems)


def _numbers(path: str, given: Any, taken: Any) -> Iterator[tuple[str, Any, Any]]:
    """Dotted path, what was given and what was made of it: where pydantic made a number of True or
    of "3", since nobody who writes that means it."""
    if isinstance(given, Mapping):
        for name, part in given.items():
            inner = taken.get(name) if isinstance(taken, dict) else getattr(taken, str(name), None)
            yield from _numbers(f"{path}.{name}" if path else str(name), part, inner)
    elif isinstance(given, bool | str) and type(taken) in (int, float):
        yield path, given, taken


def _explain(problem: ErrorDetails, config: type[BaseModel]) -> str:
    """What pydantic found wrong, for the person who wrote it."""
    field, owner, models = _place(problem["loc"], config)
    where = f", field {field!r}" if field else ""
    context = problem.get("ctx", {})
    if problem["type"] == "extra_forbidden":
        name = field.rpartition(".")[2]
        within = [
            f"{place}.{ours}"
            for ours in dict.fromkeys((name, OTHER_NAMES.get(name)))
            for place, outer in owner.model_fields.items()
            if any(ours in model.model_fields for model in _models(outer.annotation))
        ]
        known = [field for field in owner.model_fields if field != "kind"]
        hint = f"it is a setting of a choice, {' or '.join(within)}; " if within else ""
        if OTHER_NAMES.get(name) in owner.model_fields:
            hint = f"here it is called {OTHER_NAMES[name]!r}; "
        return f"{where}: unknown option; {hint}{choices_text(name, known)}"
    if problem["type"] == "missing":
        return f"{where}: a value is needed; write {field}=..."
    if problem["type"] == "value_error":
        return f"{where}: {context['error']}"
    if problem["type"] == "union_tag_invalid":
        kinds = [kind.strip().strip("'") for kind in context["expected_tags"].split(",")]
        return f"{where}: there is no {context['tag']!r}; {choices_text(context['tag'], kinds)}"
    if problem["type"] == "union_tag_not_found":
        kinds = [kind for model in models for kind in _kinds(model)]
        return f"{where}: {problem['input']!r} does not say its kind; choices: {', '.join(kinds)}"
    said = f"{where}: {shortened(repr(problem['input']))} is not allowed"
    if problem["type"] == "literal_error":
        choices = [text.strip("'") for text in re.split(", | or ", context["expected"])]
        return f"{said}; {choices_text(str(problem['input']), choices)}"
    if problem["type"] in ("model_type", "model_attributes_type") and field:
        name = context["class_name"]
        number = type(problem["input"]) in (int, float)
        return f"{said}; write {field}={name}({problem['input'] if number else '...'})"
    return f"{said}: {problem['msg']}"


def _place(
    loc: Sequence[int | str], config: type[BaseModel]
) -> tuple[str, type[BaseModel], list[type[BaseModel]]]:
    """The dotted path of a place as a recipe writes it, the class that has its last name, and the
    classes that its value may be of.

    pydantic puts the kind of a choice into its places: ("surrogate", "cispo", "clip_high").
    """
    path: list[str] = []
    owner, models = config, [config]
    for part in loc:
        chosen = [model for model in models if part in _kinds(model)]
        if path and chosen:
            models = chosen
            continue
        path.append(str(part))
        owner = models[0] if models else owner
        if models and part in owner.model_fields:
            models = list(_models(owner.model_fields[str(part)].annotation))
    return ".".join(path), owner, models


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The pydantic classes that occur in a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def _kinds(model: type[BaseModel]) -> tuple[Any, ...]:
    """The kind by which a choice is named, as a tuple of one; () for what is no choice."""
    field = model.model_fields.get("kind")
    return () if field is None else get_args(field.annotation)
