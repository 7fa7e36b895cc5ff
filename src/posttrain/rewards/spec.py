"""What a user writes about rewards, checked at plan time without importing anything heavy: the
verifier of a domain, and the rubric of a row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from posttrain.engine.errors import ConfigError, choices_text
from posttrain.engine.fingerprint import file_digest
from posttrain.rewards.formats import find_format
from posttrain.rewards.gym import check_params
from posttrain.rewards.python_file import check_file, data_files

OPTIONS: Mapping[str, Mapping[str, type]] = {
    "math": {},
    "exact": {"case_sensitive": bool, "extract": str},
    "regex": {"pattern": str, "from_answer": bool, "case_sensitive": bool},
    "choice": {},
    "reasoning_gym": {"partial": bool, "format": str, "params": dict},
    "python": {},
    "none": {},
}
"""Verifier kind -> its options and their types."""

MATH_LIBRARIES = ("math-verify", "sympy", "latex2sympy2_extended")
"""What decides which expressions are equal: their versions are part of a domain's identity."""
MATH_VERSION = 2
"""Of the math verifier's own rules; 2: answers that are words are compared as text."""

UNVERIFIED = "none"
"""The verifier of a domain whose responses nobody can check: it has no rewards of its own."""

SPELLINGS: Mapping[str, str] = {kind: kind for kind in OPTIONS} | {
    "reasoning_gym": "reasoning_gym:<name>",
    "python": "python:<file.py>:<function>",
}
"""Verifier kind -> how it is written."""


@dataclass(frozen=True, kw_only=True)
class VerifierSpec:
    """A verifier as the user writes it."""

    name: str
    """math, exact, regex, choice, reasoning_gym:<name>, python:<file.py>:<function> or none."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of that verifier; `OPTIONS` lists them."""

    @property
    def kind(self) -> str:
        """The part of the name before the first colon."""
        return self.name.partition(":")[0]

    @property
    def argument(self) -> str:
        """The part of the name after the first colon; empty where there is none."""
        return self.name.partition(":")[2]


@dataclass(frozen=True, kw_only=True)
class NodeParts:
    """What was declared, checked and in the three parts of a graph node."""

    config: dict[str, Any]
    """Identity: literals only. Of a verifier {"name", "options"}, which `make_verifier` takes."""
    data: dict[str, str]
    """Identity: sha256 of the user's files: "verifier", "oracle", a domain's tables by split;
    of the files that such a file declares "verifier/NAME"."""
    runtime: dict[str, Any]
    """Not identity: where those files lie, such as "verifier_file"; "verifier_data" has those that
    it declares by name, "base_dir" the directory of the suite."""


def parse_verifier(
    text: str, options: Mapping[str, Any] | None = None, *, where: str = "verifier"
) -> VerifierSpec:
    """Checks a verifier's name and options; `where` begins every message (file and field).

    Raises:
        ConfigError: unknown verifier or option, an option of the wrong type or a bad pattern.
    """
    spec = VerifierSpec(name=text, options=dict(options or {}))
    if not isinstance(text, str) or spec.kind not in OPTIONS:
        kind = spec.kind if isinstance(text, str) else str(text)
        hint = choices_text(kind, OPTIONS).partition("choices:")[0]
        raise ConfigError(
            f"{where}: unknown verifier {text!r}; {hint}choices: {', '.join(SPELLINGS.values())}"
        )
    if bool(spec.argument) != (":" in SPELLINGS[spec.kind]):
        raise ConfigError(f"{where}: verifier {text!r} has to be written {SPELLINGS[spec.kind]!r}")
    _check_options(spec, where)
    if spec.kind == "reasoning_gym":
        check_params(spec.argument, spec.options.get("params", {}), where=where)
        if "format" in spec.options:
            find_format(spec.options["format"], where=where)
    if spec.kind == "python":
        split_python(spec, where=where)
    return spec


def _check_options(spec: VerifierSpec, where: str) -> None:
    known = OPTIONS[spec.kind]
    for key, value in spec.options.items():
        if key not in known:
            raise ConfigError(
                f"{where}: verifier {spec.name!r} has no option {key!r}; "
                f"{choices_text(key, known, label='its options')}"
            )
        if not isinstance(value, known[key]):
            raise ConfigError(
                f"{where}: option {key} of verifier {spec.name!r} is {value!r}; "
                f"it has to be a {known[key].__name__}"
            )
    if spec.kind == "exact" and "extract" in spec.options:
        pattern = spec.options["extract"]
        groups = _compile(pattern, where=f"{where}: option extract").groups
        if groups > 1:
            raise ConfigError(
                f"{where}: option extract: {pattern!r} has {groups} groups, at most 1 may be "
                "captured; write (?:...) for a group that only brackets"
            )
    if spec.kind == "regex":
        if ("pattern" in spec.options) == bool(spec.options.get("from_answer")):
            raise ConfigError(
                f"{where}: verifier 'regex' needs one of pattern = \"...\" (with {{answer}} "
                "where the answer stands) and from_answer = true (the answer is the pattern)"
            )
        if "pattern" in spec.options:
            pattern = spec.options["pattern"].replace("{answer}", "x")
            _compile(pattern, where=f"{where}: option pattern")


def _compile(pattern: str, *, where: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{where}: {pattern!r} is not a regular expression: {error}") from error


def split_python(spec: VerifierSpec, *, where: str) -> tuple[str, str]:
    """File and function of a python verifier. Raises ConfigError for another spelling."""
    file, _, function = spec.argument.rpartition(":")
    if not file.endswith(".py") or not function.isidentifier():
        raise ConfigError(
            f"{where}: verifier {spec.name!r} has to be written 'python:<file.py>:<function>', "
            "for example 'python:grade.py:score'"
        )
    return file, function


def resolve_verifier(spec: VerifierSpec, base_dir: Path, *, where: str = "verifier") -> NodeParts:
    """Checks a verifier wholly and splits it into identity and place. Runs none of the user's code.

    Raises:
        ConfigError: as `parse_verifier`; for a python verifier also what `check_file` refuses.
    """
    spec = parse_verifier(spec.name, spec.options, where=where)
    if spec.kind != "python":
        config: dict[str, Any] = {"name": spec.name, "options": dict(spec.options)}
        if spec.kind == "math":
            config |= {"version": MATH_VERSION, "libraries": _versions(MATH_LIBRARIES, where)}
        return NodeParts(config=config, data={}, runtime={})
    file, function = split_python(spec, where=where)
    path = (base_dir / file).absolute()
    check_file(path, function, where=where, arguments=2)
    read = data_files(path, where=where)
    return NodeParts(
        config={"name": f"python:{function}", "options": {}},
        data={"verifier": file_digest(path)}
        | {f"verifier/{name}": file_digest(place) for name, place in read.items()},
        runtime={"verifier_file": str(path), "base_dir": str(base_dir.absolute())}
        | ({"verifier_data": {name: str(place) for name, place in read.items()}} if read else {}),
    )


def _versions(libraries: Sequence[str], where: str) -> dict[str, str]:
    """Library -> installed version. Raises ConfigError for one that is not installed."""
    try:
        return {name: version_of(name) for name in libraries}
    except PackageNotFoundError as error:
        raise ConfigError(
            f"{where}: {error.name} is not installed, which the math verifier needs: "
            "pip install math-verify"
        ) from None


def is_verified(config: Mapping[str, Any]) -> bool:
    """Whether the domain of this config has a verifier; `config` is the one in domain.json, or its
    part {"name", "options"}."""
    part = config.get("verifier", config)
    return bool(part["name"] != UNVERIFIED)


RUBRIC_FORM = '{"criterion": text, "weight": number above 0}'


def checked_rubric(value: Any) -> list[dict[str, Any]]:
    """The criteria of a row, by which `judges.llm(rubric=True)` grades responses to it.

    Returns the value if it is a list of criteria, with weight 1 where it is absent. Raises
    ConfigError for anything else.
    """
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{value!r} is no rubric; it takes a list of {RUBRIC_FORM}")
    return [_criterion(entry) for entry in value]


def _criterion(entry: Any) -> dict[str, Any]:
    given = entry if isinstance(entry, Mapping) else {}
    text, weight = given.get("criterion"), given.get("weight")
    # Parquet has a null where a row leaves the weight out.
    weight = 1.0 if weight is None else weight
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not isinstance(text, str) or not text.strip() or not number or not 0 < weight < float("inf"):
        raise ConfigError(f"{entry!r} in the rubric is no criterion; it takes {RUBRIC_FORM}")
    return {"criterion": text, "weight": float(weight)}
