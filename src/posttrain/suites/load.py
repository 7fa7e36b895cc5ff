"""Finds a suite: a shipped name, a .toml file, or a .py file that defines `suite() -> Suite`.

    name = "mine"
    [domains.algebra]
    train = "algebra.jsonl"      # or .csv, .parquet, ..., "hub:owner/name@commit#split"
    prompt = "question"          # columns
    answer = "answer"
    verifier = "math"            # its options are further keys
    [domains.sums]
    dataset = "chain_sum"        # a reasoning-gym dataset
    params = { max_terms = 3 }
    num_train = 2000
    num_validation = 100
    num_heldout = 200
    [preferences.helpful]
    data = "pairs.jsonl"         # prompt, chosen, rejected
    [tables.chat]
    data = "chat.jsonl"          # rows to imitate
    messages = "messages"

Relative paths are relative to the suite file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from posttrain.engine.errors import ConfigError, choices_text, said_by
from posttrain.engine.parsing import Unreadable, parse_toml
from posttrain.rewards.python_file import line_in, load_file
from posttrain.rewards.spec import OPTIONS, VerifierSpec, parse_verifier
from posttrain.suites.domain import (
    DataTable,
    Domain,
    Preferences,
    Procedural,
    Suite,
    Table,
    domain_name,
)

SHIPPED: Mapping[str, Path] = {
    name: Path(__file__).with_name(f"{name}.toml") for name in ("core", "words")
}
"""Shipped suite -> its file."""

_TYPES = {"params": dict, "seed": int}
_TYPES |= {f"num_{split}": int for split in ("train", "validation", "heldout")}


WORDS = {str: "a text", int: "a whole number", dict: "a table of parameters"}


def suite_file(spec: str, base: Path | None = None) -> Path:
    """The file that a suite called `spec` would be in, see `load_suite`."""
    return SHIPPED.get(spec) or (base or Path()).joinpath(spec).absolute()


def load_suite(spec: str, base: Path | None = None) -> tuple[Suite, Path]:
    """The suite called `spec` and the directory that its relative paths start from.

    `base`: the directory that a relative `spec` starts from; the current one by default.

    Raises:
        ConfigError: unknown name, missing file, or anything wrong in it; names file and field.
    """
    path = suite_file(spec, base)
    if path.suffix not in (".toml", ".py"):
        files = [path.with_name(path.name + end) for end in (".toml", ".py")]
        there = next((f"did you mean {spec + f.suffix!r}? " for f in files if f.is_file()), "")
        raise ConfigError(
            f"suite: unknown suite {spec!r}; {there}{choices_text(spec, SHIPPED)}, "
            "or a path to a .toml or .py file"
        )
    if not path.is_file():
        beside = [file.name for file in path.parent.glob(f"*{path.suffix}")]
        raise ConfigError(
            f"suite: file {path} does not exist; "
            f"{choices_text(path.name, beside, label='such files in that directory')}"
        )
    suite = _from_toml(path) if path.suffix == ".toml" else _from_python(path)
    return suite, path.parent


def _from_python(path: Path) -> Suite:
    module = load_file(path, name=f"posttrain_suite_{path.stem}", what="suite")
    if not callable(getattr(module, "suite", None)):
        raise ConfigError(f"{path}: it defines no function suite() that returns a Suite")
    try:
        suite = module.suite()
    except ConfigError as error:
        # What a Suite, a Domain or a Table says of its values.
        raise ConfigError(f"{path}: {error}") from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        line = line_in(error, str(path)) or _defined_in(module.suite)
        raise ConfigError(f"{path}: suite() raised {said_by(error)}{line}") from error
    if not isinstance(suite, Suite):
        raise ConfigError(
            f"{path}: suite() returned a {type(suite).__name__}; it has to return a "
            "posttrain.suites.domain.Suite"
        )
    return suite


def _defined_in(function: Any) -> str:
    """Where a function of the user's own begins, in the form of `line_in`."""
    code = getattr(function, "__code__", None)
    return "" if code is None else f" (line {code.co_firstlineno})"


def _from_toml(path: Path) -> Suite:
    try:
        content = parse_toml(path.read_bytes())
    except Unreadable as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from error
    for key in content:
        if key not in ("name", *_PARTS):
            raise ConfigError(
                f"{path}: unknown key {key!r}; {choices_text(key, ['name', *_PARTS])}"
            )
    parts: dict[str, dict[str, Any]] = {}
    for part, make in _PARTS.items():
        tables = content.get(part, {})
        if not isinstance(tables, dict) or not all(isinstance(t, dict) for t in tables.values()):
            raise ConfigError(f"{path}: {part} has to hold tables, written [{part}.algebra]")
        parts[part] = {
            key: make(key, table, f"{path}: {part}.{key}") for key, table in tables.items()
        }
    if not any(parts.values()):
        raise ConfigError(
            f"{path}: it has no [domains.<name>] table, and none of [preferences.<name>] or "
            "[tables.<name>]; a suite needs at least one"
        )
    name = domain_name(content.get("name", path.stem), where=f"{path}: name")
    return Suite(name=name, **parts)


def _domain(name: str, table: dict[str, Any], where: str) -> Domain:
    """One [domains.<name>] table; keys that are no field of the source are verifier options."""
    domain_name(name, where=where)
    if ("train" in table) == ("dataset" in table):
        raise ConfigError(
            f'{where}: give either train = "<table>" (your own problems) or '
            'dataset = "<reasoning-gym name>" (generated problems)'
            f"{_instead(table, 'train', 'dataset')}"
        )
    if "messages" in table and "prompt" in table:
        raise ConfigError(
            f"{where}: messages = {table['messages']!r} and prompt = {table['prompt']!r} both say "
            "what is asked; leave one of them out"
        )
    source_type: type[Table] | type[Procedural] = Table if "train" in table else Procedural
    fields = {field.name: field for field in dataclasses.fields(source_type)}
    verifier = table.get("verifier")
    if verifier is None and source_type is Procedural:
        verifier = f"reasoning_gym:{table['dataset']}"
    if not isinstance(verifier, str):
        raise ConfigError(
            f"{where}: verifier is {'missing' if verifier is None else repr(verifier)}; "
            f'write for example verifier = "math", or "none" where nothing can be checked; '
            f"choices: {', '.join(OPTIONS)}"
        )
    own = (*fields, "verifier", "oracle")
    options = {key: value for key, value in table.items() if key not in own}
    spec = VerifierSpec(name=verifier, options=options)
    known = OPTIONS.get(spec.kind)
    for key in options:
        # With an unknown verifier nobody can say which keys are options; parse_verifier reports it.
        if known is not None and key not in known:
            raise ConfigError(
                f"{where}: unknown key {key!r}; "
                f"{choices_text(key, [*own, *known], label='valid keys here')}"
            )
    spec = parse_verifier(verifier, options, where=f"{where}.verifier")
    for key in own:
        wanted = _TYPES.get(key, str)
        if key in ("heldout", "validation") and type(table.get(key)) is int:
            # 0 is a domain without that split; `domain_node` refuses other numbers.
            continue
        if key in table and (not isinstance(table[key], wanted) or isinstance(table[key], bool)):
            split = key in ("heldout", "validation") and "dataset" not in table
            needed = (
                "it is where a table lies, 0 for a domain without that split, or left out for the "
                "share that is always taken of train"
                if split
                else f"it has to be {WORDS[wanted]}"
            )
            raise ConfigError(f"{where}.{key} is {table[key]!r}; {needed}")
    for field in fields.values():
        missing = field.default is field.default_factory is dataclasses.MISSING
        if missing and field.name not in table:
            raise ConfigError(f"{where}: {field.name} is missing; write {field.name} = ...")
    source = source_type(**{key: value for key, value in table.items() if key in fields})
    return Domain(name=name, source=source, verifier=spec, oracle=table.get("oracle"))


def _own_data(
    source_type: type[Preferences] | type[DataTable], name: str, table: dict[str, Any], where: str
) -> Preferences | DataTable:
    """One [preferences.<name>] or [tables.<name>] table."""
    domain_name(name, where=where)
    known = [field.name for field in dataclasses.fields(source_type)]
    for key, value in table.items():
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}; {choices_text(key, known)}")
        if not isinstance(value, str):
            raise ConfigError(f"{where}.{key} is {value!r}; it has to be a text")
    if "data" not in table:
        raise ConfigError(
            f'{where}: data is missing; write data = "pairs.jsonl", or where else the table lies'
            f"{_instead(table, 'data')}"
        )
    try:
        return source_type(**table)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


_PARTS: Mapping[str, Callable[[str, dict[str, Any], str], Any]] = {
    "domains": _domain,
    "preferences": partial(_own_data, Preferences),
    "tables": partial(_own_data, DataTable),
}
"""Part of a suite to what makes one of its tables."""


def _instead(table: Mapping[str, Any], *wanted: str) -> str:
    """` (found: ...)`: what the table holds, with the nearest miss."""
    for key in table:
        hint = choices_text(key, wanted)
        if hint.startswith("did you mean") and key not in wanted:
            return f"; for the key {key!r} {hint.partition('choices')[0].strip()}"
    return f"; keys found: {', '.join(table) or 'none'}"
