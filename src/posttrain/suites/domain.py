"""Domains and suites as a user or the package declares them, and a domain's identity in the graph.

Everything here runs at plan time: it reads the user's files and imports nothing heavy.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from posttrain.engine.errors import ConfigError
from posttrain.engine.fingerprint import file_digest, plain
from posttrain.engine.hashes import HashFile
from posttrain.rewards.formats import find_format
from posttrain.rewards.gym import check_params
from posttrain.rewards.spec import NodeParts, resolve_verifier
from posttrain.rewards.spec import VerifierSpec as VerifierSpec
from posttrain.suites.split import place_rows, require_all_splits
from posttrain.suites.tables import (
    Columns,
    Location,
    check_schema,
    columns_of,
    parse_location,
    read_rows,
)

_NAME = re.compile(r"[a-z0-9_]+")


def domain_name(name: str, *, where: str = "domain") -> str:
    """Returns the name. Raises ConfigError unless it is made of a-z, 0-9 and _."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"{where}: the name {name!r} may only hold the characters a-z, 0-9 and _, because it "
            "becomes part of file names, metric names and stage names"
        )
    return name


@dataclass(frozen=True, kw_only=True)
class Procedural:
    """Problems made by a reasoning-gym dataset: no download, as many as are wanted."""

    dataset: str
    """Name of the reasoning-gym dataset, e.g. chain_sum."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """Its parameters, without seed and size."""
    format: str = "plain"
    """How prompts and answers are written: plain, or a format of the built-in domains."""
    num_train: int
    num_validation: int
    num_heldout: int
    seed: int = 0
    """Chooses the problems. The splits stay disjoint whatever the seed."""

    def counts(self) -> dict[str, int]:
        """Split -> number of problems wanted."""
        return {
            "train": self.num_train,
            "validation": self.num_validation,
            "heldout": self.num_heldout,
        }


@dataclass(frozen=True, kw_only=True)
class Table:
    """A user's own problems, in one to three tables.

    A table is a .jsonl or .parquet file, a folder written by datasets' save_to_disk
    (`folder#split`), or `hub:owner/name[:config]@commit#split`.
    """

    train: str
    validation: str | None = None
    """Without it 10 % of the problems in `train` validate, chosen by the hash of the prompt."""
    heldout: str | None = None
    """Without it 15 % of the problems in `train` are held out, chosen by the hash of the prompt."""
    prompt: str = "prompt"
    """Column of the problem text."""
    answer: str = "answer"
    """Column of the reference answer."""
    demo: str | None = None
    """Column of a full demonstration response, for supervised stages."""
    id: str | None = None
    """Column of a unique name per problem; without it the hash of the prompt names it."""
    thought: str | None = None
    """Column of the steps that lead to the answer, for demonstrations in the mode think."""
    direct: str | None = None
    """Column of the answer without its steps, for demonstrations in both modes; without it that of
    `demo`."""
    rubric: str | None = None
    """Column of a list of {"criterion": text, "weight": number}: what `judges.llm(rubric=True)`
    looks at in a response to the row."""

    def tables(self) -> dict[str, str]:
        """Split -> location, for the tables that are given."""
        given = {"train": self.train, "validation": self.validation, "heldout": self.heldout}
        return {split: text for split, text in given.items() if text is not None}

    def columns(self) -> dict[str, str | None]:
        """Field -> column. Of the later ones only those that are named: a domain without them keeps
        the identity that it had before they came."""
        first = {"prompt": self.prompt, "answer": self.answer, "demo": self.demo, "id": self.id}
        later = {"thought": self.thought, "direct": self.direct, "rubric": self.rubric}
        return first | {field: column for field, column in later.items() if column is not None}


@dataclass(frozen=True, kw_only=True)
class Domain:
    """One kind of problem: where the problems come from and who judges the responses."""

    name: str
    source: Procedural | Table
    verifier: VerifierSpec
    oracle: str | None = None
    """`python:<file.py>:<function>`: the hidden quality of a response (`rewards/oracle.py`), a
    function as that of a python verifier; without it the verifier and the style decide."""

    def __post_init__(self) -> None:
        domain_name(self.name)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A named set of domains, keyed by their names."""

    name: str
    domains: Mapping[str, Domain]

    def __post_init__(self) -> None:
        domain_name(self.name, where="suite")
        if not self.domains:
            raise ConfigError(f"suite {self.name}: it has no domain; a suite needs at least one")
        for key, domain in self.domains.items():
            if not isinstance(domain, Domain):
                raise ConfigError(f"suite {self.name}: domains[{key!r}] is {domain!r}, no Domain")
            if key != domain.name:
                raise ConfigError(
                    f"suite {self.name}: the domain {domain.name!r} stands under the key {key!r}; "
                    "use its name as the key"
                )


def domain_node(domain: Domain, base_dir: Path, hash_file: HashFile = file_digest) -> NodeParts:
    """Checks a domain as far as that is possible without computing: the parts of its graph node, of
    kind "domain". In `runtime` is also "files", where each split's table lies.

    JSONL tables are checked row by row, Parquet tables and folders by their schema. Relative paths
    are relative to `base_dir`. `hash_file` gives the sha256 of a table; that of a store need not
    read it again.

    Raises:
        ConfigError: a file, column, row, dataset, parameter, format or verifier is wrong.
    """
    where = f"domain {domain.name}"
    verifier = resolve_verifier(_spec(domain), base_dir, where=f"{where}: verifier")
    data: dict[str, str] = {}
    runtime: dict[str, Any] = {}
    if isinstance(domain.source, Procedural):
        source = _procedural_identity(domain.source, where)
    else:
        locations = {
            split: parse_location(text, base_dir, where=f"{where}: {split}")
            for split, text in domain.source.tables().items()
        }
        source = _table_identity(domain.source, locations)
        _check_tables(locations, columns_of(source, verifier.config["name"]), where)
        data = {
            split: place.digest(hash_file)
            for split, place in locations.items()
            if place.path is not None
        }
        runtime["files"] = {split: place.text for split, place in locations.items()}
    config = {"domain": domain.name, "source": source, "verifier": verifier.config}
    data |= verifier.data
    runtime |= verifier.runtime
    if domain.oracle is not None:
        oracle = _resolve_oracle(domain.oracle, base_dir, f"{where}: oracle")
        config["oracle"] = oracle.config["name"]
        data["oracle"] = oracle.data["verifier"]
        runtime["oracle_file"] = oracle.runtime["verifier_file"]
    return NodeParts(config=plain(config, at=where), data=data, runtime=runtime)


def _resolve_oracle(oracle: str, base_dir: Path, where: str) -> NodeParts:
    """The user's oracle, a function as that of a python verifier."""
    if not oracle.startswith("python:"):
        raise ConfigError(
            f"{where}: {oracle!r} has to be written 'python:<file.py>:<function>', for example "
            "'python:taste.py:quality'"
        )
    return resolve_verifier(VerifierSpec(name=oracle), base_dir, where=where)


def _spec(domain: Domain) -> VerifierSpec:
    """The domain's verifier; a reasoning-gym one inherits the source's format and parameters."""
    spec, source = domain.verifier, domain.source
    if not isinstance(source, Procedural) or spec.kind != "reasoning_gym":
        return spec
    inherited: dict[str, Any] = {"format": source.format}
    if spec.argument == source.dataset:
        inherited["params"] = dict(source.params)
    return VerifierSpec(name=spec.name, options={**inherited, **spec.options})


def _procedural_identity(source: Procedural, where: str) -> dict[str, Any]:
    """What identifies generated problems. Raises ConfigError for what reasoning-gym lacks."""
    check_params(source.dataset, source.params, where=where)
    for split, count in source.counts().items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ConfigError(f"{where}: num_{split} is {count!r}; it has to be at least 1")
    return {
        "kind": "procedural",
        "dataset": source.dataset,
        "params": dict(source.params),
        "format": source.format,
        "format_version": find_format(source.format, where=where).version,
        "counts": source.counts(),
        "seed": source.seed,
        "reasoning_gym": version_of("reasoning-gym"),
    }


def _table_identity(source: Table, locations: Mapping[str, Location]) -> dict[str, Any]:
    """What identifies tables beside their bytes: the columns, and the reference of a Hub table."""
    tables = {
        split: place.text if place.path is None else place.kind
        for split, place in locations.items()
    }
    return {"kind": "table", "tables": tables} | source.columns()


def _check_tables(locations: Mapping[str, Location], columns: Columns, where: str) -> None:
    readable = {}
    for split, place in locations.items():
        at = f"{where}: {split}"
        if place.kind == "jsonl":
            readable[split] = read_rows(place, columns, where=at)
        elif place.kind != "hub":
            check_schema(place, columns, where=at)
    counts = Counter(split for split, _ in place_rows(readable))
    if len(readable) == len(locations):
        require_all_splits(counts, where)


def shares_problem(shares: Mapping[str, float], domains: Sequence[str]) -> str:
    """What is wrong with shares of a batch that are to name exactly these domains, or ""."""
    for name in shares:
        if name not in domains:
            return f"{name!r} is not one of the domains; choices: {', '.join(domains)}"
    for name in domains:
        if shares and name not in shares:
            return f"it gives no share to domain {name!r}; write {name!r}: 0 to leave it out"
    return ""
