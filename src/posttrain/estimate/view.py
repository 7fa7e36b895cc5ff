"""What a stage of a graph looks like to the function that counts its work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from posttrain.engine.graph import Graph, Node, named, role_of
from posttrain.engine.planner import PlanRow
from posttrain.engine.record import Artifact
from posttrain.estimate.history import Like, Past, Wanted
from posttrain.estimate.lengths import Characters, Checkpoint, Counter, Lengths, Texts
from posttrain.estimate.parts import Rows
from posttrain.estimate.shapes import (
    Model,
    model_of_directory,
    model_of_gguf,
    model_of_pretrain,
)
from posttrain.stages.config import build_config
from posttrain.stages.kinds import shown_kind

IMITATING = ("pretrain", "sft")
"""Kinds that teach a model to say what demonstrations say."""
SAMPLING = ("distill", "rl")
"""Kinds that log the mean length of what they sample."""
MODELS = ("start", "student", "init", "model", "models", "candidates", "students", "base")
"""Roles of the inputs whose model a stage is about, the first of them first. An adapter from
outside is about its base."""
DEFAULT_LENGTHS = Lengths(prompt=64, response=64, prompt_high=256, response_high=256)
"""Of rows that nobody knows anything of."""


@dataclass(frozen=True, kw_only=True)
class World:
    """What all stages of an estimate share."""

    graph: Graph
    rows: Mapping[str, PlanRow]
    past: Past
    texts: Texts
    device: str
    host: str
    models: dict[str, Model | None] = field(default_factory=dict)
    counters: dict[str, Counter] = field(default_factory=dict)

    def artifact(self, name: str) -> Artifact | None:
        """What the store has of a stage."""
        return self.rows[name].artifact

    def model(self, name: str) -> Model | None:
        """The sizes of what a stage makes, or of what it hands on."""
        if name not in self.models:
            self.models[name] = self._model(name)
        return self.models[name]

    def _model(self, name: str) -> Model | None:
        node, artifact = self.graph.nodes[name], self.artifact(name)
        if not shown_kind(node.kind).is_model():
            return None
        if artifact is not None and (found := model_of_directory(artifact.path)) is not None:
            return found
        if "directory" in node.runtime:
            found = model_of_directory(Path(node.runtime["directory"]))
            if found is not None:
                return found
        if "gguf" in node.runtime:
            return model_of_gguf(Path(node.runtime["gguf"]))
        if node.kind == "pretrain":
            return model_of_pretrain(node.config)
        source = first_model(node.inputs)
        return None if source is None else self.model(source)

    def counter(self, name: str) -> Counter:
        """What counts the tokens of texts for the model of a stage."""
        if name not in self.counters:
            self.counters[name] = self._counter(name)
        return self.counters[name]

    def _counter(self, name: str) -> Counter:
        node = self.graph.nodes[name]
        if node.kind == "pretrain":
            return Characters()
        source = first_model(node.inputs)
        if source is not None:
            return self.counter(source)
        artifact = self.artifact(name)
        if "directory" in node.runtime:
            return Checkpoint(Path(node.runtime["directory"]))
        return Characters() if artifact is None else Checkpoint(artifact.path)


def first_model(inputs: Mapping[str, str]) -> str | None:
    """The stage that the model of these inputs comes from."""
    for role in MODELS:
        for edge, source in inputs.items():
            if role_of(edge) == role:
                return source
    return None


class StageView:
    """A `View` of a stage of a graph."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.node: Node = world.graph.nodes[name]
        self.notes: list[str] = []
        """How numbers were found, in words."""

    @property
    def inputs(self) -> Mapping[str, str]:
        """See `View.inputs`."""
        return self.node.inputs

    @property
    def config(self) -> Mapping[str, Any]:
        """See `View.config`."""
        return self.node.config

    @cached_property
    def settings(self) -> Any:
        """See `View.settings`."""
        kind = shown_kind(self.node.kind)
        if kind.from_outside:
            return self.node.config
        return build_config(self.node.kind, self.name, self.node.config)

    @cached_property
    def like(self) -> Like | None:
        """The earlier stages in the store that are most like this one."""
        world, own = self.world, self.model("")
        fingerprints = world.graph.fingerprints()
        domains = named(self.inputs, "domains").values()
        return world.past.like(
            Wanted(
                name=self.name,
                kind=self.node.kind,
                config=self.node.config,
                domains=frozenset(fingerprints[source] for source in domains),
                weights=0.0 if own is None else float(own.bytes),
                device=world.device,
                host=world.host,
            )
        )

    def note(self, text: str) -> None:
        """Say how a number was found."""
        if text not in self.notes:
            self.notes.append(text)

    def model(self, edge: str) -> Model | None:
        """See `View.model`; of "" the model that the stage itself makes or is about."""
        if edge:
            return self.world.model(self.inputs[edge]) if edge in self.inputs else None
        if shown_kind(self.node.kind).is_model():
            return self.world.model(self.name)
        source = first_model(self.inputs)
        return None if source is None else self.world.model(source)

    def number(self, name: str) -> float:
        """See `View.number`."""
        values = self.settings.possible(name)
        if len(values) > 1:
            self.note(f"{name}: mean of its schedule's ends")
        return fmean(float(value) for value in values)

    def measured(self, metric: str, otherwise: float) -> float:
        """See `View.measured`."""
        found = self._mean(metric)
        if found is None:
            return otherwise
        assert self.like is not None
        self.note(f"{metric} {found:.2g} {self.like.said}")
        return found

    def _mean(self, metric: str) -> float | None:
        values = [made.mean(metric) for made in self.like.made] if self.like is not None else []
        kept = [value for value in values if value is not None]
        return fmean(kept) if kept else None

    # -- rows ------------------------------------------------------------------------------------

    @property
    def counter(self) -> Counter:
        """What counts tokens for the model of this stage."""
        own = shown_kind(self.node.kind).is_model()
        source = self.name if own else first_model(self.inputs)
        return Characters() if source is None else self.world.counter(source)

    def problems(self, split: str) -> Mapping[str, int]:
        """See `View.problems`; of a stage that brings a domain itself, its own."""
        if self.node.kind == "domain":
            return {self.name: self._problems(self.name, split)}
        found = named(self.inputs, "domains")
        return {domain: self._problems(source, split) for domain, source in found.items()}

    def _problems(self, source: str, split: str) -> int:
        artifact, node = self.world.artifact(source), self.world.graph.nodes[source]
        facts = node.runtime.get("facts") or {}
        if artifact is not None:
            facts = artifact.metrics
        counts = node.config.get("source", {}).get("counts", {})
        return int(facts.get(split) or counts.get(split) or 0)

    def prompts(self) -> Rows:
        """See `View.prompts`."""
        domains = named(self.inputs, "domains")
        shares: Mapping[str, Any] = self.config.get("domain_shares") or {}
        usable = all(isinstance(shares.get(name, 0), int | float) for name in domains)
        weights = {n: float(shares.get(n, 0)) if shares and usable else 1.0 for n in domains}
        modes = self.config.get("modes") or ()
        found = {n: self._lengths(source, modes) for n, source in domains.items()}
        every = [(found[n], w) for n, w in weights.items() if w > 0]
        if not every:
            return self._rows_of([(DEFAULT_LENGTHS, 1.0)], 0.0)
        count = sum(self.problems("train").values()) * max(1, len(modes))
        return self._rows_of(every, float(count))

    def _lengths(self, source: str, modes: Sequence[str] = ()) -> Lengths:
        world = self.world
        node, fingerprint = world.graph.nodes[source], world.graph.fingerprints()[source]
        found = world.texts.lengths(
            node, fingerprint, world.artifact(source), self.counter, list(modes)
        )
        if found is not None:
            return found
        self.note(f"{source}: lengths unknown until it is there, taken as 64 and 64 tokens")
        return DEFAULT_LENGTHS

    @staticmethod
    def _rows_of(every: Sequence[tuple[Lengths, float]], count: float) -> Rows:
        total = sum(weight for _, weight in every)
        return Rows(
            count=count,
            prompt=sum(lengths.prompt * w for lengths, w in every) / total,
            response=sum(lengths.response * w for lengths, w in every) / total,
            longest=max(lengths.prompt_high + lengths.response_high for lengths, _ in every),
        )

    def data(self, *roles: str) -> Rows:
        """See `View.data`."""
        sources = [source for edge, source in self.inputs.items() if role_of(edge) in roles]
        if not sources:
            return self.prompts()
        found = [self._data_of(source) for source in sources]
        count = sum(rows for _, rows in found)
        return self._rows_of([(lengths, max(rows, 1.0)) for lengths, rows in found], count)

    def _data_of(self, source: str, depth: int = 0) -> tuple[Lengths, float]:
        """The lengths and the number of the rows that a stage hands on."""
        world, node = self.world, self.world.graph.nodes[source]
        artifact = world.artifact(source)
        if node.kind == "domain":
            return self._lengths(source), float(self._problems(source, "train"))
        lengths = world.texts.lengths(
            node, world.graph.fingerprints()[source], artifact, self.counter
        )
        if artifact is not None and lengths is not None:
            made = artifact.metrics
            return lengths, float(made.get("rows") or made.get("tokens") or 0)
        view = StageView(world, source)
        rows = node.runtime.get("facts", {}).get("rows")
        upstream = [
            self._data_of(s, depth + 1)
            for edge, s in node.inputs.items()
            if role_of(edge) in ("data", "rollouts", "domains", "prompts") and depth < 20
        ]
        asked = view.settings
        most = getattr(asked, "rows", None)
        counted = rows or most or view.sampled_rows() or sum(count for _, count in upstream)
        if not rows and not most:
            self.note(f"rows of {source}: upper bound, all that it could keep")
        known = [lengths for lengths, _ in upstream]
        return (known[0] if known else DEFAULT_LENGTHS), float(counted)

    def sampled_rows(self) -> float:
        """Responses that a stage of this kind leaves behind; 0 for one that samples none."""
        settings, total = self.settings, 0.0
        if self.node.kind == "sample":
            counts = self.problems("train")
            for domain, models in settings.routes.items():
                prompts = min(settings.num_prompts, counts.get(domain) or settings.num_prompts)
                total += settings.k * prompts * len(models)
        if self.node.kind == "rl":
            total = settings.steps * self.number("prompts_per_step") * self.number("group_size")
        return total

    # -- responses -------------------------------------------------------------------------------

    def said(self, edge: str, most: float) -> float:
        """See `View.said`."""
        own = self._mean("response_length")
        if own is not None:
            assert self.like is not None
            self.note(f"responses of {own:.0f} tokens {self.like.said}")
            return min(own, most)
        others = list(self._of_others())
        if others:
            self.note(f"responses of {fmean(others):.0f} tokens from earlier runs on these domains")
            return min(fmean(others), most)
        source = self.inputs.get(edge) or self.name
        if self._imitates(source):
            length = self.prompts().response
            if 0 < length <= most:
                self.note(f"responses of {length:.0f} tokens, as its demonstrations have")
                return length
        self.note(f"upper bound: all responses at max_new_tokens = {most:g}")
        return most

    def _of_others(self) -> Iterator[float]:
        """Mean lengths that earlier stages have logged on the same domains with a model of this
        size."""
        own = self.model("")
        prints = self.world.graph.fingerprints()
        domains = {prints[source] for source in named(self.inputs, "domains").values()}
        for kind in SAMPLING:
            for made in self.world.past.made(kind):
                read = {s["fingerprint"] for s in named(made.artifact.inputs, "domains").values()}
                found = made.mean("response_length")
                alike = own is None or abs(made.weights - own.bytes) <= 0.05 * own.bytes
                if found is not None and read == domains and alike:
                    yield found

    def _imitates(self, source: str) -> bool:
        """Whether a model has learned to say what demonstrations say."""
        nodes = self.world.graph.nodes
        above = [source, *self.world.graph.ancestors(source)]
        return any(nodes[name].kind in IMITATING for name in above)
