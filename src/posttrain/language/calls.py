"""What a misspelt or incomplete call in a recipe is told: the nearest name, and how it is written.

Python's own message for these names a method of ours and no way on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from posttrain import algorithms
from posttrain.engine.errors import ConfigError, choices_text
from posttrain.rewards.judge_base import explain

C = TypeVar("C", bound=type)


def checked_calls(cls: C) -> C:
    """A class whose public methods raise ConfigError for arguments that they do not take."""
    for name in dir(cls):
        method = getattr(cls, name)
        if not name.startswith("_") and inspect.isfunction(method):
            setattr(cls, name, _checked(name, method))
    return cls


def _checked(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(method)

    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            signature.bind(self, *args, **kwargs)
        except TypeError:
            problem = _problem(signature, args, kwargs)
            raise ConfigError(
                f"r.{name}: {problem}; it is written {_usage(name, signature)}"
            ) from None
        return method(self, *args, **kwargs)

    return call


def _problem(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Why a call does not fit."""
    parameters = list(signature.parameters.values())[1:]
    known = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    placed = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(args) > len(placed):
        by_name = ", ".join(name for name in known if name not in placed)
        return f"it is given {len(args)} values without a name; write the names of {by_name}"
    twice = [name for name in placed[: len(args)] if name in kwargs]
    if twice:
        return f"{twice[0]} is given twice"
    takes_more = any(p.kind is p.VAR_KEYWORD for p in parameters)
    unknown = [name for name in kwargs if name not in known]
    if unknown and not takes_more:
        return f"unknown option {unknown[0]!r}; {choices_text(unknown[0], known)}"
    given = {*placed[: len(args)], *kwargs}
    missing = [
        p.name
        for p in parameters
        if p.default is p.empty and p.name in known and p.name not in given
    ]
    return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"


def _usage(name: str, signature: inspect.Signature) -> str:
    """How a verb is called: `r.sft(start=..., data=..., [aux=..., name=...], SETTING=...)`."""
    needed, free, more = [], [], []
    for p in list(signature.parameters.values())[1:]:
        if p.kind is p.VAR_KEYWORD:
            more.append("SETTING=...")
        elif p.default is not p.empty:
            free.append(f"{p.name}=...")
        else:
            needed.append(p.name if p.kind is p.POSITIONAL_OR_KEYWORD else f"{p.name}=...")
    optional = [f"[{', '.join(free)}]"] if free else []
    return f"r.{name}({', '.join([*needed, *optional, *more])})"


def not_allowed(error: Any) -> str:
    """What pydantic's ValidationError says of the fields of an algorithm, such as KL(coef=-1)."""
    fields = getattr(getattr(algorithms, error.title, None), "model_fields", ())
    return explain(error, error.title, fields)
