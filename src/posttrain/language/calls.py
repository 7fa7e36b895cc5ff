"""What a misspelt or incomplete call in a recipe is told: the nearest name, and how it is written.

Python's own message for these names a method of ours and no way on.
"""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from posttrain import algorithms, judges, schedules, values
from posttrain.engine.errors import ConfigError, choices_text
from posttrain.stages.config import explain_choice

C = TypeVar("C", bound=type)

OTHER_NAMES = {"ref_model": "reference", "train_dataset": "data", "dataset": "data"}
"""What other projects call an argument of a verb."""
OTHER_VERBS = {
    **dict.fromkeys(("grpo", "ppo", "rloo", "rlvr", "dapo"), "rl(...)"),
    **dict.fromkeys(("gkd", "mopd", "opd", "distillation"), "distill(...)"),
    **dict.fromkeys(("kto", "ipo", "simpo"), "dpo(..., loss=...)"),
    **dict.fromkeys(("finetune", "train"), "sft(...)"),
    **dict.fromkeys(("generate", "rollout"), "sample(...)"),
    **dict.fromkeys(("rm", "reward"), "reward_model(...)"),
}
"""What other projects call a verb."""


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
        try:
            return method(self, *args, **kwargs)
        except ConfigError as error:
            near = _nearly(signature, kwargs, str(error))
            if near:
                raise ConfigError(near) from None
            raise

    return call


def _nearly(signature: inspect.Signature, kwargs: Mapping[str, Any], said: str) -> str:
    """What is said of a setting that nobody knows, with the argument of the verb it may have meant;
    "" where there is none."""
    known = [p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
    for name in kwargs.keys() - known:
        unknown = f"field {name!r}: unknown option; "
        near = get_close_matches(OTHER_NAMES.get(name, name), known, n=1, cutoff=0.6)
        if unknown in said and near and "did you mean" not in said:
            return said.replace(unknown, f"{unknown}did you mean {near[0]!r}? ")
    return ""


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


def mistaken(path: Path, error: Any) -> str:
    """What a call in the file `path` that a judge, a schedule or an algorithm does not take is
    told; "" for what went wrong elsewhere."""
    choice = getattr(algorithms, getattr(error, "title", ""), None)
    if choice is not None:
        return explain_choice(error, choice)
    if not isinstance(error, TypeError):
        return ""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    if last == values.__file__:
        return str(error)
    called = re.match(r"(\w+)\(\) (.*)", str(error))
    if last != str(path) or called is None:
        return ""
    name, said = called.groups()
    for module in (judges, schedules, algorithms):
        function = getattr(module, name, None)
        if inspect.isfunction(function):
            known = list(inspect.signature(function).parameters)
            call = f"{module.__name__.removeprefix('posttrain.')}.{name}"
            unknown = re.search(r"unexpected keyword argument '(\w+)'", said)
            if unknown:
                return f"{call}: unknown option {unknown[1]!r}; {choices_text(unknown[1], known)}"
            missing = re.findall(r"'(\w+)'", said)
            problem = f"{' and '.join(missing)} missing" if "missing" in said else said
            return f"{call}: {problem}; it takes {', '.join(known)}"
    return ""
