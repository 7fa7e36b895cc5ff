"""Domains and suites as a user or the package declares them, and a domain's identity in the graph.

Everything here runs at plan time: it reads the user's files and imports nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from posttrain.engine.errors import ConfigError
from posttrain.engine.fingerprint import file_digest, plain
from posttrain.engine.hashes import HashFile
from posttrain.rewards.formats import find_format
from posttrain.rewards.gym import check_params
from posttrain.rewards.spec import UNVERIFIED, NodeParts, resolve_verifier
from posttrain.rewards.spec import VerifierSpec as VerifierSpec
from posttrain.suites.checked import ROWS, Tables, checked_facts
from posttrain.suites.data_table import DataTable as DataTable
from posttrain.suites.location import Location, parse_location
from posttrain.suites.messages import check_system, fact_parts
from posttrain.suites.preferences import Preferences as Preferences

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

    A table is a file (`posttrain.suites.location.KINDS`), a folder written by datasets'
    save_to_disk (`folder#split`), or `hub:owner/name[:config]@commit#split`.
    """

    train: str
    validation: str | int | None = None
    """Without it 10 % of the problems in `train` validate, chosen by the hash of the prompt; 0 for
    a domain without that split."""
    heldout: str | int | None = None
    """Without it 15 % of the problems in `train` are held out, chosen by the hash of the prompt; 0
    for a domain without that split."""
    prompt: str = "prompt"
    """Column of the problem: a text, or a list of messages."""
    answer: str = "answer"
    """Column of the reference answer. Without a verifier there need not be one."""
    messages: str | None = None
    """Column of whole conversations, in place of `prompt`: lists of messages. What the assistant
    says at the end is the demonstration."""
    system: str | None = None
    """The system message of every problem that has none of its own."""
    system_column: str | None = None
    """Column of each row's own; an empty cell means none."""
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
        return {split: text for split, text in given.items() if isinstance(text, str)}

    def without(self) -> list[str]:
        """The splits that there are not to be."""
        given = {"validation": self.validation, "heldout": self.heldout}
        return [split for split, number in given.items() if isinstance(number, int)]

    @property
    def demonstrated(self) -> bool:
        """Whether its rows have demonstrations."""
        return self.demo is not None or self.messages is not None

    def columns(self) -> dict[str, str | None]:
        """Field -> column. Of the later ones only those that are named: a domain without them keeps
        the identity that it had before they came."""
        first = {"prompt": self.prompt, "answer": self.answer, "demo": self.demo, "id": self.id}
        names = ("thought", "direct", "rubric", "messages", "system", "system_column")
        later = {name: getattr(self, name) for name in names}
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
        where = f"domain {domain_name(self.name)}"
        parts = {"source": (Procedural, Table), "verifier": (VerifierSpec,)}
        for part, kinds in parts.items():
            found = getattr(self, part)
            if not isinstance(found, kinds):
                names = " or ".join(kind.__name__ for kind in kinds)
                raise ConfigError(f"{where}: {part} is {found!r}; it has to be a {names}")
            _check_types(found, f"{where}: {part}")

    @property
    def verified(self) -> bool:
        """Whether a verifier judges the responses."""
        return self.verifier.name != UNVERIFIED

    def has_split(self, split: str) -> bool:
        """Whether there are problems in a split."""
        return isinstance(self.source, Procedural) or split not in self.source.without()


def _check_types(declared: Any, where: str) -> None:
    """Raise ConfigError for a field whose value is of another type: dataclasses take any."""
    for name, kind in get_type_hints(type(declared)).items():
        value = getattr(declared, name)
        try:
            TypeAdapter(kind).validate_python(value, strict=True)
        except ValidationError as error:
            said = error.errors(include_url=False)[0]["msg"]
            raise ConfigError(f"{where}: {name} is {value!r}: {said}") from None


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A named set of domains, and of data that is no domain, each keyed by its name."""

    name: str
    domains: Mapping[str, Domain] = field(default_factory=dict)
    preferences: Mapping[str, Preferences] = field(default_factory=dict)
    """What `r.preferences(NAME)` finds."""
    tables: Mapping[str, DataTable] = field(default_factory=dict)
    """What `r.table(NAME)` finds."""

    def __post_init__(self) -> None:
        domain_name(self.name, where="suite")
        parts = {"domains": self.domains, "preferences": self.preferences, "tables": self.tables}
        if not any(parts.values()):
            raise ConfigError(
                f"suite {self.name}: it has no domain, preferences or tables; a suite needs one"
            )
        known: dict[str, str] = {}
        for part, names in parts.items():
            for name in names:
                domain_name(name, where=f"suite {self.name}: {part}")
                if known.setdefault(name, part) != part:
                    raise ConfigError(
                        f"suite {self.name}: {name!r} is a name in {known[name]} and in {part}; "
                        "rows are told apart by it, so give each its own"
                    )
        for part, kind in {"preferences": Preferences, "tables": DataTable}.items():
            for name, found in parts[part].items():
                if not isinstance(found, kind):
                    raise ConfigError(
                        f"suite {self.name}: {part}[{name!r}] is {found!r}, no {kind.__name__}"
                    )
        for key, domain in self.domains.items():
            if not isinstance(domain, Domain):
                raise ConfigError(f"suite {self.name}: domains[{key!r}] is {domain!r}, no Domain")
            if key != domain.name:
                raise ConfigError(
                    f"suite {self.name}: the domain {domain.name!r} stands under the key {key!r}; "
                    "use its name as the key"
                )


def domain_node(
    domain: Domain,
    base_dir: Path,
    hash_file: HashFile = file_digest,
    cache: Path | None = None,
) -> NodeParts:
    """Checks a domain as far as that is possible without computing: the parts of its graph node, of
    kind "domain". In `runtime` are also "files", where each split's table lies, and "facts", what
    there is to tell of its rows (`posttrain.suites.checked`).

    Local tables are checked row by row, those of the Hub when the domain is built. Relative paths
    are relative to `base_dir`. `hash_file` gives the sha256 of a table, and `cache` is a directory
    that remembers which tables were checked: those of a store need not be read again.

    Raises:
        ConfigError: a file, column, row, dataset, parameter, format or verifier is wrong.
    """
    where = f"domain {domain.name}"
    verifier = resolve_verifier(_spec(domain, where), base_dir, where=f"{where}: verifier")
    data: dict[str, str] = {}
    runtime: dict[str, Any] = {}
    if isinstance(domain.source, Procedural):
        source = _procedural_identity(domain.source, where)
    else:
        locations = _locations(domain.source, base_dir, where)
        source = _table_identity(domain.source, locations)
        if domain.verifier.kind == "reasoning_gym":
            # Generated problems say it with their source.
            verifier.config["libraries"] = {"reasoning-gym": version_of("reasoning-gym")}
        data = {
            split: place.digest(hash_file)
            for split, place in locations.items()
            if place.path is not None
        }
        tables = Tables(
            domain=domain.name, source=source, verifier=verifier.config["name"], places=locations
        )
        runtime["files"] = {split: place.text for split, place in locations.items()}
        runtime |= fact_parts(checked_facts(tables, data, cache))
    config = {"domain": domain.name, "source": source, "verifier": verifier.config}
    data |= verifier.data
    runtime |= verifier.runtime
    if domain.oracle is not None:
        oracle = _resolve_oracle(domain.oracle, base_dir, f"{where}: oracle")
        config["oracle"] = oracle.config["name"]
        data |= {key.replace("verifier", "oracle", 1): sha for key, sha in oracle.data.items()}
        runtime |= {
            key.replace("verifier", "oracle", 1): value for key, value in oracle.runtime.items()
        }
    return NodeParts(config=plain(config, at=where), data=data, runtime=runtime)


def _locations(source: Table, base_dir: Path, where: str) -> dict[str, Location]:
    for split in ("validation", "heldout"):
        number = getattr(source, split)
        if isinstance(number, int) and (number != 0 or isinstance(number, bool)):
            raise ConfigError(
                f"{where}: {split} = {number!r}; it takes a table of its own, or 0 for a domain "
                "without that split"
            )
    check_system(source, where)
    if source.messages is not None and source.prompt != "prompt":
        raise ConfigError(
            f"{where}: prompt = {source.prompt!r} is not read beside messages = "
            f"{source.messages!r}, whose conversations begin with the prompt; leave one out"
        )
    return {
        split: parse_location(text, base_dir, where=f"{where}: {split}")
        for split, text in source.tables().items()
    }


def _resolve_oracle(oracle: str, base_dir: Path, where: str) -> NodeParts:
    """The user's oracle, a function as that of a python verifier."""
    if not oracle.startswith("python:"):
        raise ConfigError(
            f"{where}: {oracle!r} has to be written 'python:<file.py>:<function>', for example "
            "'python:taste.py:quality'"
        )
    return resolve_verifier(VerifierSpec(name=oracle), base_dir, where=where)


def _spec(domain: Domain, where: str) -> VerifierSpec:
    """The domain's verifier; a reasoning-gym one inherits the source's format and parameters."""
    spec, source = domain.verifier, domain.source
    if isinstance(source, Procedural) and not domain.verified:
        raise ConfigError(
            f'{where}: verifier = "none" is for tables of your own; the problems of a '
            f"reasoning-gym dataset have answers to be judged by, so leave verifier out"
        )
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
    """What identifies tables beside their bytes: the columns, how rows are read, and the reference
    of a Hub table."""
    tables = {
        split: place.text if place.path is None else place.kind
        for split, place in locations.items()
    }
    found = {"kind": "table", "rows": ROWS, "tables": tables} | source.columns()
    return found | ({"without": source.without()} if source.without() else {})


def shares_problem(shares: Mapping[str, float], domains: Sequence[str]) -> str:
    """What is wrong with shares of a batch that are to name exactly these domains, or ""."""
    for name in shares:
        if name not in domains:
            return f"{name!r} is not one of the domains; choices: {', '.join(domains)}"
    for name in domains:
        if shares and name not in shares:
            return f"it gives no share to domain {name!r}; write {name!r}: 0 to leave it out"
    return ""
