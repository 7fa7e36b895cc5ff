"""The graph under construction: its nodes, the settings of --set, the check of every edge."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from posttrain.backends.checkpoint_source import CheckpointSource, find_checkpoint, token_conflict
from posttrain.engine.errors import ConfigError, GraphError, choices_text
from posttrain.engine.fingerprint import digest, file_digest
from posttrain.engine.graph import Graph, Node, edge_name, named, payload, with_role
from posttrain.engine.links import check_links
from posttrain.engine.store import Store
from posttrain.engine.unfinished import is_place
from posttrain.language.handles import Demos, Prompts, Stage, Warned
from posttrain.language.overrides import Overrides
from posttrain.stages.config import build_config
from posttrain.stages.kinds import KINDS, Product, kind_of, kinds_making
from posttrain.stages.step_checkpoint import step_model
from posttrain.suites.domain import Suite, domain_node, shares_problem

DERIVED = {
    "routes": "which model serves which domain",
    "parts": "which source has which weight",
}
"""Settings that a recipe does not name, and what they say."""


class Builder:
    """Collects the stages of one recipe; `posttrain.recipe.Recipe` has the verbs."""

    def __init__(
        self,
        suite: Suite,
        suite_directory: Path,
        *,
        seed: int = 0,
        overrides: Mapping[str, Any] | None = None,
        of_kinds: Mapping[str, Mapping[str, Any]] | None = None,
        store: Store | None = None,
    ) -> None:
        self.suite = suite
        self.seed = seed
        self.directory = suite_directory
        self.store = store
        self.hash_file = file_digest if store is None else store.hashes.digest
        self.nodes: dict[str, Node] = {}
        self.settings: dict[str, Any] = {}
        """Stage to its checked settings."""
        self.external: dict[str, CheckpointSource] = {}
        self.warnings: list[Warned] = []
        self._overrides = Overrides(overrides or {}, of_kinds)

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the suite's domains."""
        return tuple(self.suite.domains)

    def graph(self, target: Stage) -> Graph:
        """The finished graph. Raises ConfigError for a setting that matched no stage."""
        self._overrides.check_used(self.nodes)
        graph = Graph(nodes=self.nodes, target=target.name)
        graph.order()
        return graph

    def stage(
        self,
        kind: str,
        name: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        routes: Mapping[str, str | tuple[str, ...]] | None = None,
        **derived: Any,
    ) -> Stage:
        """Add a stage with its checked settings, overrides included.

        `routes` and the `derived` settings follow from what the recipe passes; nobody sets them.
        """
        if not isinstance(name, str):
            raise ConfigError(f"name = {name!r} of a stage ({kind}) is no text; write name='...'")
        values = dict(settings)
        fields = kind_of(kind).settings_class().model_fields
        if "seed" in fields:
            values = {"seed": self.seed} | values
        values = self._overrides.apply(kind, name, values)
        derived |= {} if routes is None else {"routes": dict(routes)}
        for field in ("routes", *derived):
            if field in values and field in fields:
                raise ConfigError(
                    f"stage {name!r} ({kind}), field {field!r}: {DERIVED[field]} follows from the "
                    "stages that the recipe passes; change those instead"
                )
        values |= derived
        config = self.settings[name] = build_config(kind, name, values)
        stage = self.add(
            Node(
                name=name,
                kind=kind,
                version=kind_of(kind).version,
                config=config.to_json(),
                identity=config.to_json(defaults=False),
                inputs=inputs,
                **self._code(kind),
            )
        )
        self._check_shares(stage)
        return stage

    def warn(self, text: str, stage: str | None = None) -> None:
        """Tell the user something that is no error; the same text once for each stage."""
        warned = Warned(text, stage)
        if warned not in self.warnings:
            self.warnings.append(warned)

    def _code(self, name: str) -> dict[str, Any]:
        """For a kind of another module: the digest of its loop, and where the module is found."""
        if name in KINDS:
            return {}
        kind = kind_of(name)
        try:
            file = kind.file()
        except ImportError as error:
            raise ConfigError(
                f"kind {name!r}: run = {kind.run!r} cannot be imported ({error})"
            ) from None
        return {
            "data": {"code": self.hash_file(file)},
            "runtime": {"import_from": str(kind.folder())},
        }

    def _check_shares(self, stage: Stage) -> None:
        """Refuse shares that do not name the domains of a stage, as far as they are known."""
        inputs = self.nodes[stage.name].inputs
        own_data = _own_data_name(self.nodes.get(inputs.get("data", "")))
        domains = list(named(inputs, "domains").values()) or ([own_data] if own_data else [])
        for shares in self.values(stage.name, "domain_shares") if domains else []:
            problem = shares_problem(shares, domains)
            if problem:
                raise ConfigError(
                    f"stage {stage.name!r} ({stage.kind}), field 'domain_shares': {problem}"
                )

    def told(self, kind: str, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a stage that is not there yet, overrides included, unchecked."""
        return self._overrides.apply(kind, name, settings)

    def values(self, stage: str, field: str) -> list[Any]:
        """The value of a setting, or all at the ends of its schedule. `kl.domains` is a setting of
        a choice; [] where nothing was chosen, or where the stage has no such setting."""
        owner: Any = self.settings[stage]
        *path, name = field.split(".")
        for part in path:
            owner = getattr(owner, part)
        return [] if name not in getattr(type(owner), "model_fields", {}) else owner.possible(name)

    def add(self, node: Node) -> Stage:
        """Add a node. Raises GraphError for a name that is taken."""
        if node.name in self.nodes:
            raise GraphError(
                f"two stages are called {node.name!r} ({self.nodes[node.name].kind} and "
                f"{node.kind}); give one of them another name="
            )
        self.nodes[node.name] = node
        return self.handle(node.name)

    def handle(self, name: str) -> Stage:
        """The handle on a stage, which may be defined further down."""
        node = self.nodes.get(name)
        return Stage(name, node.kind if node else "", self._domains_of(name))

    def _domains_of(self, name: str) -> tuple[str, ...]:
        """Those that a stage reads problems of, else those of the data that it was made from."""
        inputs = self.nodes[name].inputs if name in self.nodes else {}
        own_data = _own_data_name(self.nodes.get(name))
        if own_data:
            return (own_data,)
        own = list(named(inputs, "domains").values())
        for source in with_role(inputs, "rollouts", "data").values():
            own += self._domains_of(source)
        return tuple(dict.fromkeys(own))

    def known(self, domains: str | Iterable[str]) -> tuple[str, ...]:
        """The names of these domains. Raises ConfigError for one that the suite does not have."""
        one = isinstance(domains, str)
        if not one and (isinstance(domains, Mapping) or not isinstance(domains, Iterable)):
            raise ConfigError(
                f"domains = {domains!r}; it takes the name of a domain or several in a list, such "
                f"as r.domains; choices: {', '.join(self.domains)}"
            )
        names = (str(domains),) if one else tuple(domains)
        if not names:
            raise ConfigError(
                f"no domain is given where one is needed; choices: {', '.join(self.domains)}"
            )
        for name in names:
            if name not in self.suite.domains:
                raise ConfigError(
                    f"domain {name!r} is not in suite {self.suite.name!r}; "
                    f"{choices_text(name, self.domains)}"
                )
        return names

    def data(self, stage: str, data: object, allowed: tuple[type, ...]) -> dict[str, str]:
        """The edges of a stage's data; domains get their nodes.

        A stage stands for `Demos` where it makes rows to imitate, and for `Prompts` where it makes
        prompts.
        """
        wanted = {Demos: "r.demos(...)", Prompts: "r.prompts(...)", Stage: "a data stage"}
        given = f"{data.name!r} ({data.kind})" if isinstance(data, Stage) else repr(data)
        choices = " or ".join(wanted[kind] for kind in allowed)
        if isinstance(data, Stage) and Prompts in allowed:
            return self._filtered(stage, data)
        if not isinstance(data, allowed):
            hint = ""
            if isinstance(data, str | Path) and Stage in allowed:
                hint = f"; a table of your own is r.table({str(data)!r})"
            elif isinstance(data, list | tuple | dict) and Stage in allowed:
                hint = "; several are one by r.mix({data: weight, ...})"
            raise ConfigError(f"stage {stage!r}: its data is {given}; it needs {choices}{hint}")
        if isinstance(data, Stage):
            if not data.may_make("rows"):
                raise ConfigError(
                    f"stage {stage!r}: its data is {given}; it needs {wanted[Demos]} or a stage "
                    f"of kind {', '.join(kinds_making('rows'))}"
                )
            return {"data": data.name}
        assert isinstance(data, Demos | Prompts)
        edges = self.domain_edges(stage, data.domains)
        if isinstance(data, Demos):
            self._look_for_demos(stage, data.domains)
        return edges

    def _look_for_demos(self, stage: str, domains: Iterable[str]) -> None:
        """Refuse domains whose tables were read and hold no demonstration, though a column is named
        for them; warn of rows without one."""
        for name in domains:
            facts = self.nodes[name].runtime.get("facts") or {}
            rows = sum(facts.get(split, 0) for split in ("train", "validation", "heldout"))
            if rows and facts.get("no_demo") == rows:
                raise ConfigError(
                    f"stage {stage!r}: domain {name!r} has no demonstration, the column for them "
                    f"is empty in all of its {rows} rows; fill it, name another one in the suite, "
                    "or leave the domain out"
                )
            if missing := facts.get("no_demo"):
                self.warn(
                    f"domain {name}: the demonstration of {missing} of {rows} rows is empty or "
                    "missing; nothing is learned from them"
                )

    def domain_edges(self, stage: str, domains: Iterable[str]) -> dict[str, str]:
        """The edges to these domains of the suite, which get their nodes."""
        for name in domains:
            node = self.nodes.get(name)
            if node is not None and node.kind != "domain":
                raise GraphError(
                    f"the {node.kind} stage {name!r} has the name of a domain that stage "
                    f"{stage!r} needs; give it another name="
                )
            if node is None:
                cache = None if self.store is None else self.store.cache
                pieces = domain_node(
                    self.suite.domains[name], self.directory, self.hash_file, cache
                )
                self.nodes[name] = Node(
                    name=name,
                    kind="domain",
                    version=KINDS["domain"].version,
                    config=pieces.config,
                    data=pieces.data,
                    runtime=pieces.runtime,
                )
        return {edge_name("domains", name): name for name in domains}

    def _filtered(self, stage: str, prompts: Stage) -> dict[str, str]:
        """The edges of prompts that a stage has chosen, and of the domains that they are of."""
        if not prompts.kind or not prompts.may_make("prompts"):
            what = prompts.kind or "not defined yet"
            raise ConfigError(
                f"stage {stage!r}: its prompts are {prompts.name!r} ({what}); it needs "
                "r.prompts(...) or a filter stage that stands above it"
            )
        return {"prompts": prompts.name} | self.domain_edges(stage, prompts.domains)

    def pairs(self, kind: str, stage: str, data: object) -> str:
        """The name of the stage of preferences that another stage learns from."""
        if isinstance(data, Stage) and data.may_make("pairs"):
            return data.name
        given = f"{data.name!r} ({data.kind})" if isinstance(data, Stage) else repr(data)
        place = repr(str(data)) if isinstance(data, str | Path) else "..."
        raise ConfigError(
            f"stage {stage!r} ({kind}): its data is {given}; it needs preferences: "
            f"data=r.preferences({place}) of your own, or data=r.pairs(...) out of rollouts"
        )

    def modes(self, prompts: Prompts | Stage) -> tuple[str, ...]:
        """The modes that these prompts are in."""
        if isinstance(prompts, Prompts):
            return prompts.modes
        return tuple(self.nodes[prompts.name].config["modes"])

    def model(self, stage: str, edge: str, value: object, *, scores: bool = False) -> str:
        """The name of a stage that makes a language model, for the edge `edge`.

        With `scores` it may make a reward model as well.
        """
        products: tuple[Product, ...] = ("model", "reward_model") if scores else ("model",)
        if not isinstance(value, Stage) or not value.may_make(*products):
            raise ConfigError(
                f"stage {stage!r}: {edge} = {value!r} is not a model; it takes a stage of kind "
                f"{', '.join(kinds_making(*products))}"
            )
        return value.name

    def same_vocabulary(
        self, stage: str, start: str, teacher: str, *, role: str = "teacher"
    ) -> None:
        """Refuse outside checkpoints whose tokens differ, before anything is computed."""
        ours, theirs = root_of(self.nodes, start), root_of(self.nodes, teacher)
        if ours == theirs or not (ours in self.external and theirs in self.external):
            return
        conflict = token_conflict(self.external[ours], self.external[theirs])
        if conflict is not None:
            raise ConfigError(
                f"stage {stage!r}: {role} {teacher!r} and student {start!r} differ in their "
                f"{conflict}; a {role} must come from the same tokenizer"
            )

    def adopted(
        self, source: str, base: CheckpointSource | Literal["find", "later"] = "find"
    ) -> CheckpointSource | None:
        """An adopted checkpoint of that name, or the model of a step checkpoint such as
        "student@step"; None if it is neither. `base` as in `find_checkpoint`."""
        if self.store is None or Path(source).is_dir():
            return None
        if is_place(source):
            return self.checkpoint(step_model(self.store, source).path, base)
        found = self.store.named("model", source)
        if not found:
            return None
        check_links(self.store.root, found[0], self.store.hashes)
        # Not what its record says: linked files may have changed since they were adopted.
        return self.checkpoint(found[0].path, base)

    def checkpoint(
        self, source: str | Path, base: CheckpointSource | Literal["find", "later"] = "find"
    ) -> CheckpointSource:
        """The checkpoint of a directory or a Hub id; `base` as in `find_checkpoint`."""
        root = None if self.store is None else self.store.root
        return find_checkpoint(source, self.hash_file, store=root, base=base)

    def external_node(self, name: str, inputs: Mapping[str, str]) -> Node:
        """The node that takes in the checkpoint `external[name]`; `inputs` has the base of an
        adapter.

        Raises ConfigError where a GGUF file is still to be converted, and what that needs is not
        installed.
        """
        external = self.external[name]
        version, gguf = KINDS["model"].version, external.gguf
        if gguf is None:
            return Node(
                name=name,
                kind="model",
                version=version,
                data={"files": external.sha256},
                inputs=inputs,
                runtime={
                    "directory": str(external.directory),
                    "files": list(external.files),
                    "origin": dict(external.origin),
                },
            )
        # What the file becomes is another model than its bytes: another label.
        node = Node(
            name=name,
            kind="model",
            version=version,
            data={"gguf": external.sha256},
            runtime={"gguf": str(gguf), "origin": dict(external.origin)},
        )
        if self.store is None or self.store.find(digest(payload(node, {}))) is None:
            external.check_conversion()
        return node


def _own_data_name(node: Node | None) -> str:
    """What the rows of a user's own table call their domain; "" for any other stage."""
    own = node is not None and node.kind in ("preferences", "table")
    return str(node.config["name"]) if node is not None and own else ""


def root_of(nodes: Mapping[str, Node], name: str) -> str:
    """The stage that a model descends from by its starts; in a cycle any stage of it."""
    passed: set[str] = set()
    while name in nodes and name not in passed and "start" in nodes[name].inputs:
        passed.add(name)
        name = nodes[name].inputs["start"]
    return name
