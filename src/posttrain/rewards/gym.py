"""The verifier `reasoning_gym:<name>`: a compact response is turned back into reasoning-gym's own
answer notation and scored by the dataset's own `score_answer`.

Dataset names and parameter names are checked at plan time without importing the library (which
takes over a second): they are read from its source text.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.engine.errors import ConfigError, StageError, choices_text
from posttrain.rewards.formats import TextFormat

FULL_SCORE = 0.999
"""Scores from here on count as solved; below, reasoning-gym gives part marks for near misses."""

SLOW = (
    "countdown",
    "intermediate_integration",
    "polynomial_multiplication",
    "puzzle24",
    "simple_integration",
)
"""Datasets whose `score_answer` takes longer than 200 microseconds for its own answers (up to two
milliseconds, by sympy). The others were measured below that, most of them below 50."""

_NAME = re.compile(r"^DATASET_NAME\s*(?::\s*str\s*)?=\s*[\"']([^\"']+)[\"']", re.MULTILINE)
_REGISTERED = re.compile(r"\bregister_dataset\(\s*\w+,\s*\w+,\s*(\w+)")
_EVALUATES = re.compile(r"\b(?:eval|parse_expr|sympify)\(")
_CODE = re.compile(r"__|\blambda\b|\b(?:" + "|".join(dir(builtins)) + r")\s*\(")


@functools.cache
def gym_datasets() -> dict[str, Path]:
    """Names of the installed reasoning-gym datasets -> the source file of each. Imports nothing.

    Raises:
        ConfigError: reasoning-gym is not installed.
    """
    spec = importlib.util.find_spec("reasoning_gym")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "reasoning-gym is not installed; procedural domains and reasoning_gym:<name> verifiers "
            "need it: pip install 'reasoning-gym>=0.1.25,<0.2'"
        )
    found: dict[str, Path] = {}
    for file in sorted(Path(spec.submodule_search_locations[0]).rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        if "register_dataset(" in text:
            found.update(dict.fromkeys(_NAME.findall(text), file))
    return found


def check_params(name: str, params: Mapping[str, Any], *, where: str) -> None:
    """Raises ConfigError for a dataset that the installed reasoning-gym does not have, or a
    parameter that the dataset's config class does not.

    `seed` and `size` are refused too: the domain itself sets them.
    """
    known = gym_datasets()
    if name not in known:
        raise ConfigError(
            f"{where}: reasoning-gym has no dataset {name!r}; {choices_text(name, known)}"
        )
    fields = _config_fields(known[name]) - {"seed", "size"}
    for key in params:
        if key in ("seed", "size"):
            raise ConfigError(
                f"{where}: params.{key} is set by the domain; "
                "use its fields seed, num_train, num_validation and num_heldout"
            )
        if key not in fields:
            raise ConfigError(
                f"{where}: params.{key} is not a parameter of reasoning-gym's {name}; "
                f"{choices_text(key, fields)}"
            )


@functools.cache
def _config_fields(file: Path) -> frozenset[str]:
    """Field names of the config class that the file hands to `register_dataset`."""
    text = file.read_text(encoding="utf-8")
    classes = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}
    registered = _REGISTERED.search(text)
    if registered is None or registered[1] not in classes:
        raise ConfigError(
            f"{file}: no config class stands beside register_dataset; this version of "
            "reasoning-gym is not supported, install 'reasoning-gym>=0.1.25,<0.2'"
        )
    return frozenset(
        item.target.id
        for item in classes[registered[1]].body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    )


@dataclass(frozen=True, kw_only=True)
class GymVerifier:
    """Scores by a reasoning-gym dataset's own `score_answer`; build it with `gym_verifier`."""

    name: str
    dataset: Any
    """The reasoning-gym dataset object that owns `score_answer`."""
    format: TextFormat
    partial: bool
    guarded: bool
    """True where the dataset's module evaluates text as Python or sympy code."""

    def score(self, response: str, problem: Mapping[str, Any]) -> float:
        """1.0 for a solved problem, else 0.0; with `partial` the dataset's own value in [0, 1].

        A response that the format cannot read scores 0. So does one that makes `score_answer`
        raise, but only if the problem's own answer still scores: otherwise the problem is broken.

        Raises:
            StageError: the problem lacks what `score_answer` needs.
        """
        entry = _entry(problem)
        try:
            answer = self.format.answer(response)
        except ValueError:
            return 0.0
        # `score_answer` would evaluate it: a response must not run code here.
        if self.guarded and _CODE.search(answer):
            return 0.0
        try:
            value = float(self.dataset.score_answer(answer, entry))
        except Exception:
            self.check(problem)
            return 0.0
        if not self.partial:
            return 1.0 if value >= FULL_SCORE else 0.0
        return min(1.0, max(0.0, value))

    def check(self, problem: Mapping[str, Any]) -> None:
        """Raises StageError unless the problem's own answer gets the full score."""
        entry = _entry(problem)
        try:
            value = float(self.dataset.score_answer(entry["answer"], entry))
        except Exception as error:
            raise StageError(
                f"problem {problem['id']}: reasoning-gym's score_answer of {self.name} fails on "
                f"the problem's own answer {entry['answer']!r} ({type(error).__name__}: {error}); "
                "a row needs the columns of a reasoning-gym entry, 'metadata' among them"
            ) from error
        if value < FULL_SCORE:
            raise StageError(
                f"problem {problem['id']}: reasoning-gym's score_answer of {self.name} gives "
                f"its own answer {entry['answer']!r} only {value:g}; the row is no entry of "
                f"{self.name}, or its entries do not survive being stored as JSON"
            )


def _entry(problem: Mapping[str, Any]) -> dict[str, Any]:
    """A problem's reasoning-gym entry: `meta.entry`, or one made of a user's columns."""
    meta = problem["meta"]
    if "entry" in meta:
        return dict(meta["entry"])
    return {
        "question": problem["prompt"],
        "answer": problem["answer"],
        "metadata": meta.get("metadata", {}),
    }


def create_gym(name: str, params: Mapping[str, Any], *, seed: int, size: int, where: str) -> Any:
    """A reasoning-gym dataset object; `params` go to its config class.

    Raises:
        ConfigError: unknown name or parameter, or a value that the dataset refuses.
    """
    check_params(name, params, where=where)
    from reasoning_gym import create_dataset

    try:
        return create_dataset(name, seed=seed, size=size, **params)
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{where}: reasoning-gym's {name} refuses params {dict(params)}: {error}"
        ) from error


def gym_verifier(
    name: str, *, format: TextFormat, params: Mapping[str, Any], partial: bool
) -> GymVerifier:
    """The verifier of dataset `name`. Raises ConfigError for an unknown name or parameter."""
    # For its `score_answer`; its one problem is never asked.
    dataset = create_gym(name, params, seed=0, size=1, where=f"verifier reasoning_gym:{name}")
    source = gym_datasets()[name].read_text(encoding="utf-8")
    return GymVerifier(
        name=name,
        dataset=dataset,
        format=format,
        partial=partial,
        guarded=bool(_EVALUATES.search(source)),
    )
