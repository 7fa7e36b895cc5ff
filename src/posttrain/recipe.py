"""The recipe language: calls that build a graph of stages. Building runs nothing.

    def recipe(r: Recipe):
        s = r.sft(start=r.model("my-base"), data=r.demos(r.domains), steps=500)
        teachers = {d: r.rl(start=s, prompts=r.prompts(d), steps=200) for d in r.domains}
        student = r.distill(start=s, teachers=teachers, prompts=r.prompts(r.domains), steps=100)
        return r.evaluate(student, teachers=teachers, init=s)

Every stage takes any setting of its kind by name (`stages/config.py` lists them) and `name=`, which
is what people see and what `--set NAME.FIELD=VALUE` refers to.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from posttrain.engine.errors import ConfigError, GraphError
from posttrain.engine.fingerprint import file_digest
from posttrain.engine.graph import Graph, Node
from posttrain.engine.store import Store
from posttrain.external import External, find_external, token_conflict
from posttrain.stages.config import CONFIGS, VERSIONS, build_config
from posttrain.suites.domain import Suite, Table, domain_node

MODEL_KINDS = ("model", "pretrain", "sft", "dpo", "rl", "distill")


@dataclass(frozen=True)
class Stage:
    """A handle on a stage of the recipe: what it makes is not there yet."""

    name: str
    kind: str


@dataclass(frozen=True)
class Prompts:
    """The training prompts of some domains."""

    domains: tuple[str, ...]


@dataclass(frozen=True)
class Demos:
    """The training prompts of some domains with demonstrations of good responses."""

    domains: tuple[str, ...]


SELF = "self"
"""As a teacher: the student's own start, to hold a domain where it is."""


class Recipe:
    """The builder that a recipe function is given."""

    def __init__(
        self,
        suite: Suite,
        suite_directory: Path,
        *,
        seed: int = 0,
        overrides: Mapping[str, Any] | None = None,
        store: Store | None = None,
    ) -> None:
        self.suite = suite
        self.seed = seed
        self._directory = suite_directory
        self._overrides = dict(overrides or {})
        self._used: set[str] = set()
        self._store = store
        self._hash_file = file_digest if store is None else store.hashes.digest
        self._nodes: dict[str, Node] = {}
        self._external: dict[str, External] = {}

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the suite's domains."""
        return tuple(self.suite.domains)

    def prompts(self, domains: str | Iterable[str]) -> Prompts:
        """The training prompts of one domain or of several."""
        return Prompts(self._known(domains))

    def demos(self, domains: str | Iterable[str]) -> Demos:
        """The demonstrations of one domain or of several.

        Raises ConfigError for a domain that has none.
        """
        known = self._known(domains)
        for name in known:
            source = self.suite.domains[name].source
            if isinstance(source, Table) and source.demo is None:
                raise ConfigError(
                    f"domain {name!r} of suite {self.suite.name!r} has no demonstrations: name "
                    "their column with demo = ... in the suite, or leave the domain out of "
                    "r.demos(...)"
                )
        return Demos(known)

    def model(self, source: str | Path, *, name: str = "base") -> Stage:
        """A checkpoint from outside: a directory, an adopted name or a Hub id."""
        adopted = self._adopted(str(source))
        external = adopted or find_external(source, self._hash_file)
        self._external[name] = external
        node = Node(
            name=name,
            kind="model",
            version=VERSIONS["model"],
            data={"files": external.sha256},
            runtime={"directory": str(external.directory), "files": list(external.files)},
        )
        return self._add(node)

    def stage(self, name: str) -> Stage:
        """A stage by its name, which may be defined further down."""
        node = self._nodes.get(name)
        return Stage(name, node.kind if node else "")

    def pretrain(self, *, data: Demos, name: str = "base", **settings: Any) -> Stage:
        """A tiny model trained from nothing on the documents of some domains."""
        return self._stage("pretrain", name, settings, self._data(name, data, (Demos,)))

    def sft(
        self, *, start: Stage, data: Demos | Stage, name: str = "sft", **settings: Any
    ) -> Stage:
        """Supervised fine-tuning of `start` on demonstrations or on selected rollouts."""
        inputs = {"start": self._model(name, "start", start)}
        return self._stage("sft", name, settings, inputs | self._data(name, data, (Demos, Stage)))

    def dpo(
        self,
        *,
        start: Stage,
        data: Stage,
        reference: Stage | None = None,
        name: str = "dpo",
        **settings: Any,
    ) -> Stage:
        """Training of `start` on preference pairs, relative to `reference` (the start itself)."""
        if data.kind not in ("pairs", ""):
            raise ConfigError(
                f"stage {name!r} (dpo): its data is {data.name!r} ({data.kind}); it needs a pairs "
                "stage: data=r.pairs(...)"
            )
        inputs = {"start": self._model(name, "start", start), "data": data.name}
        if reference is not None:
            inputs["reference"] = self._model(name, "reference", reference)
            self._same_vocabulary(name, start.name, reference.name, role="reference")
        stage = self._stage("dpo", name, settings, inputs)
        if reference is not None and self._nodes[name].config["loss"] == "simpo":
            raise ConfigError(
                f"stage {name!r} (dpo): loss = simpo reads no reference; leave reference= out, or "
                "use another loss"
            )
        return stage

    def rl(self, *, start: Stage, prompts: Prompts, name: str = "rl", **settings: Any) -> Stage:
        """Reinforcement learning of `start` on the verifiable rewards of the prompts' domains."""
        inputs = {"start": self._model(name, "start", start)}
        return self._stage("rl", name, settings, inputs | self._data(name, prompts, (Prompts,)))

    def distill(
        self,
        *,
        start: Stage,
        teachers: Mapping[str, Stage | str],
        prompts: Prompts,
        name: str = "student",
        **settings: Any,
    ) -> Stage:
        """On-policy distillation of each prompt's domain from that domain's teacher into `start`.

        `teachers` maps every domain of `prompts` to a stage, or to "self" for the start itself.
        """
        inputs = {"start": self._model(name, "start", start)}
        inputs |= self._data(name, prompts, (Prompts,))
        routes, edges = self._route(name, prompts.domains, teachers, start)
        for edge in edges.values():
            self._same_vocabulary(name, start.name, edge)
        return self._stage("distill", name, settings, inputs | edges, routes)

    def evaluate(
        self,
        student: Stage,
        *,
        init: Stage,
        teachers: Mapping[str, Stage | str] | None = None,
        domains: Iterable[str] | None = None,
        name: str = "evaluation",
        **settings: Any,
    ) -> Stage:
        """Score student, init and teachers on held-out problems; say what was recovered."""
        inputs = {
            "student": self._model(name, "student", student),
            "init": self._model(name, "init", init),
        }
        known = self._known(self.domains if domains is None else domains)
        inputs |= self._data(name, Prompts(known), (Prompts,))
        routes, edges = self._route(name, known, teachers or {}, init, strict=False)
        return self._stage("evaluate", name, settings, inputs | edges, routes)

    def sample(
        self,
        models: Stage | Mapping[str, Stage],
        *,
        prompts: Prompts,
        name: str = "rollouts",
        **settings: Any,
    ) -> Stage:
        """Scored responses of one model, or of each domain's own model."""
        if isinstance(models, Stage):
            models = dict.fromkeys(prompts.domains, models)
        missing = [domain for domain in prompts.domains if domain not in models]
        if missing:
            raise ConfigError(
                f"stage {name!r} (sample): no model for domain {missing[0]!r}; models are given "
                f"for {', '.join(models) or 'none'}; add models[{missing[0]!r}]"
            )
        edges = {
            f"models.{domain}": self._model(name, f"models.{domain}", models[domain])
            for domain in prompts.domains
        }
        routes = {domain: f"models.{domain}" for domain in prompts.domains}
        inputs = edges | self._data(name, prompts, (Prompts,))
        return self._stage("sample", name, settings, inputs, routes)

    def select(self, rollouts: Stage, *, name: str = "selection", **settings: Any) -> Stage:
        """The rollouts worth imitating, as data for `sft`."""
        return self._stage("select", name, settings, self._rollouts("select", name, rollouts))

    def pairs(
        self, rollouts: Stage, *, against: Stage | None = None, name: str = "pairs", **settings: Any
    ) -> Stage:
        """Preference pairs out of rollouts, as data for `dpo`.

        By reward among the responses to one problem, or with `against` the responses of a strong
        model's stage against those of a weak one's.
        """
        inputs = self._rollouts("pairs", name, rollouts)
        if against is not None:
            inputs["against"] = self._rollouts("pairs", name, against)["rollouts"]
            settings = {"how": "strong_against_weak"} | settings
        stage = self._stage("pairs", name, settings, inputs)
        how = self._nodes[name].config["how"]
        if (how == "strong_against_weak") != (against is not None):
            raise ConfigError(
                f"stage {name!r} (pairs): how = {how} "
                + ("reads no" if against is not None else "needs a")
                + " second stage; write r.pairs(strong, against=weak) for strong_against_weak and "
                "r.pairs(rollouts) for best_against_worst"
            )
        return stage

    def graph(self, target: Stage) -> Graph:
        """The finished graph. Raises ConfigError for a setting that matched no stage."""
        self._all_used()
        graph = Graph(nodes=self._nodes, target=target.name)
        graph.order()
        return graph

    def _stage(
        self,
        kind: str,
        name: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        routes: Mapping[str, str] | None = None,
    ) -> Stage:
        values = dict(settings)
        if "seed" in CONFIGS[kind].model_fields:
            values = {"seed": self.seed} | values
        for key, value in self._overrides.items():
            pattern, _, field = key.rpartition(".")
            # A glob is for those of its stages that have the setting; a name is for that stage.
            known = field in CONFIGS[kind].model_fields or not _is_glob(pattern)
            if known and fnmatchcase(name, pattern):
                self._used.add(key)
                values[field] = value
        if "routes" in values and "routes" in CONFIGS[kind].model_fields:
            raise ConfigError(
                f"stage {name!r} ({kind}), field 'routes': which model serves which domain follows "
                "from the stages that the recipe passes; change those instead"
            )
        if routes is not None:
            values["routes"] = dict(routes)
        config = build_config(kind, name, values)
        return self._add(
            Node(
                name=name,
                kind=kind,
                version=VERSIONS[kind],
                config=config.model_dump(mode="json"),
                inputs=inputs,
            )
        )

    def _all_used(self) -> None:
        unused = [key for key in self._overrides if key not in self._used]
        if not unused:
            return
        pattern, _, field = unused[0].rpartition(".")
        stages = [n for n, node in self._nodes.items() if node.kind not in ("domain", "model")]
        matched = [name for name in stages if fnmatchcase(name, pattern)]
        if matched and _is_glob(pattern):
            fields = {f for n in matched for f in CONFIGS[self._nodes[n].kind].model_fields}
            near = difflib.get_close_matches(field, fields, n=1)
            hint = f" did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"--set {unused[0]}: none of the stages {', '.join(matched)} has a setting "
                f"{field!r};{hint} choices: {', '.join(sorted(fields))}"
            )
        near = difflib.get_close_matches(pattern, stages, n=1)
        hint = f" did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"--set {unused[0]}: no stage of this recipe with settings has that name;{hint} "
            f"stages: {', '.join(stages)}"
        )

    def _add(self, node: Node) -> Stage:
        if node.name in self._nodes:
            raise GraphError(
                f"two stages are called {node.name!r} ({self._nodes[node.name].kind} and "
                f"{node.kind}); give one of them another name="
            )
        self._nodes[node.name] = node
        return Stage(node.name, node.kind)

    def _known(self, domains: str | Iterable[str]) -> tuple[str, ...]:
        names = (domains,) if isinstance(domains, str) else tuple(domains)
        if not names:
            raise ConfigError(
                f"no domain is given where one is needed; choices: {', '.join(self.domains)}"
            )
        for name in names:
            if name not in self.suite.domains:
                near = difflib.get_close_matches(name, self.domains, n=1)
                hint = f" did you mean {near[0]!r}?" if near else ""
                raise ConfigError(
                    f"domain {name!r} is not in suite {self.suite.name!r};{hint} "
                    f"choices: {', '.join(self.domains)}"
                )
        return names

    def _data(self, stage: str, data: object, allowed: tuple[type, ...]) -> dict[str, str]:
        if not isinstance(data, allowed):
            wanted = {Demos: "r.demos(...)", Prompts: "r.prompts(...)", Stage: "a select stage"}
            choices = " or ".join(wanted[kind] for kind in allowed)
            raise ConfigError(f"stage {stage!r}: its data is {data!r}; it needs {choices}")
        if isinstance(data, Stage):
            if data.kind not in ("select", ""):
                raise ConfigError(
                    f"stage {stage!r}: its data is {data.name!r} ({data.kind}); it needs "
                    "r.demos(...) or a select stage"
                )
            return {"data": data.name}
        assert isinstance(data, Demos | Prompts)
        for name in data.domains:
            node = self._nodes.get(name)
            if node is not None and node.kind != "domain":
                raise GraphError(
                    f"the {node.kind} stage {name!r} has the name of a domain that stage "
                    f"{stage!r} needs; give it another name="
                )
            if node is None:
                pieces = domain_node(self.suite.domains[name], self._directory, self._hash_file)
                self._nodes[name] = Node(
                    name=name,
                    kind="domain",
                    version=VERSIONS["domain"],
                    config=pieces.config,
                    data=pieces.data,
                    runtime=pieces.runtime,
                )
        return {f"domains.{name}": name for name in data.domains}

    def _rollouts(self, kind: str, stage: str, rollouts: Stage) -> dict[str, str]:
        if rollouts.kind not in ("sample", ""):
            raise ConfigError(
                f"stage {stage!r} ({kind}): it needs the rollouts of a sample stage, not "
                f"{rollouts.name!r} ({rollouts.kind})"
            )
        return {"rollouts": rollouts.name}

    def _model(self, stage: str, edge: str, value: object) -> str:
        if not isinstance(value, Stage) or value.kind not in (*MODEL_KINDS, ""):
            raise ConfigError(
                f"stage {stage!r}: {edge} = {value!r} is not a model; it takes a stage of kind "
                f"{', '.join(MODEL_KINDS)}"
            )
        return value.name

    def _route(
        self,
        stage: str,
        domains: tuple[str, ...],
        teachers: Mapping[str, Stage | str],
        start: Stage,
        *,
        strict: bool = True,
    ) -> tuple[dict[str, str], dict[str, str]]:
        """Domain to teacher name, and the teachers' edges; strict: every domain needs a teacher."""
        unknown = [domain for domain in teachers if domain not in self.domains]
        if unknown:
            self._known(unknown[0])
        stray = [domain for domain in teachers if domain not in domains]
        if stray and strict:
            raise ConfigError(
                f"stage {stage!r}: teachers[{stray[0]!r}] would never be asked, since its prompts "
                f"are those of {', '.join(domains)}; add the domain to the prompts or leave the "
                "teacher out"
            )
        missing = [domain for domain in domains if domain not in teachers]
        if missing and strict:
            raise ConfigError(
                f"stage {stage!r} (distill): domain {missing[0]!r} has no teacher; teachers are "
                f"given for {', '.join(teachers) or 'none'}; add teachers[{missing[0]!r}] = a "
                f'stage, or "self" to hold the domain where the student starts'
            )
        routes: dict[str, str] = {}
        edges: dict[str, str] = {}
        for domain in domains:
            teacher = teachers.get(domain)
            if teacher is None or (teacher == SELF and not strict):
                continue
            if isinstance(teacher, str):
                if teacher != SELF:
                    raise ConfigError(
                        f"stage {stage!r}: teachers[{domain!r}] = {teacher!r}; it takes a stage or "
                        f'"{SELF}"'
                    )
                name, source = SELF, start
            else:
                name, source = teacher.name, teacher
            routes[domain] = name
            edge = f"teachers.{name}"
            if edges.get(edge, source.name) != source.name:
                raise ConfigError(
                    f"stage {stage!r}: a teacher is called {SELF!r}, which means the student's own "
                    "start; give that stage another name="
                )
            edges[edge] = self._model(stage, f"teachers[{domain!r}]", source)
        return routes, edges

    def _root(self, name: str) -> str:
        """The stage that a model descends from by its starts; in a cycle any stage of it."""
        passed: set[str] = set()
        while name in self._nodes and name not in passed and "start" in self._nodes[name].inputs:
            passed.add(name)
            name = self._nodes[name].inputs["start"]
        return name

    def _same_vocabulary(
        self, stage: str, start: str, teacher: str, *, role: str = "teacher"
    ) -> None:
        """Refuse outside checkpoints whose tokens differ, before anything is computed."""
        ours, theirs = self._root(start), self._root(teacher)
        if ours == theirs or not (ours in self._external and theirs in self._external):
            return
        conflict = token_conflict(self._external[ours], self._external[theirs])
        if conflict is not None:
            raise ConfigError(
                f"stage {stage!r}: {role} {teacher!r} and student {start!r} differ in their "
                f"{conflict}; a {role} must come from the same tokenizer"
            )

    def _adopted(self, source: str) -> External | None:
        if self._store is None or Path(source).is_dir():
            return None
        found = self._store.named("model", source)
        # Not what its record says: linked files may have changed since they were adopted.
        return find_external(found[0].path, self._hash_file) if found else None


def _is_glob(pattern: str) -> bool:
    return any(character in pattern for character in "*?[")
