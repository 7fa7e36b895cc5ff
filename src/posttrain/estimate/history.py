"""What earlier stages in the store took: seconds, tokens, memory and lengths by their records."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean, median
from typing import Any

from posttrain.engine.fingerprint import plain
from posttrain.engine.graph import named
from posttrain.engine.record import Artifact
from posttrain.engine.store import Store
from posttrain.engine.work import METRICS

MOST = 5
"""Runs that an estimate goes by, the newest ones."""
LENGTH = ("steps", "epochs")
"""Settings that say how long a stage goes on."""
ALIKE = 1.02
"""Most by which the sizes of two models differ that count as one."""
WARM = 2
"""Steps at the beginning that tell nothing of the others."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The stage that something is to be known of."""

    name: str
    kind: str
    config: Mapping[str, Any]
    domains: frozenset[str]
    """Fingerprints of its domains."""
    weights: float
    """Bytes of its model as it is saved; 0 without one."""
    device: str
    host: str


class Past:
    """The artifacts of a store, looked at as far as they are asked for."""

    def __init__(self, store: Store) -> None:
        self._of_kind: dict[str, list[Made]] = {}
        self._store = store

    def made(self, kind: str) -> list[Made]:
        """Those of a kind, newest first."""
        if kind not in self._of_kind:
            found = [
                a for a in self._every if a.kind == kind and number(a.provenance.get("seconds"))
            ]
            self._of_kind[kind] = [Made(artifact=a, past=self) for a in reversed(found)]
        return self._of_kind[kind]

    def artifact(self, fingerprint: str) -> Artifact | None:
        """That of a fingerprint, if it is there."""
        return self._by_fingerprint.get(fingerprint)

    @cached_property
    def _every(self) -> list[Artifact]:
        return self._store.list()

    @cached_property
    def _by_fingerprint(self) -> dict[str, Artifact]:
        return {artifact.fingerprint: artifact for artifact in self._every}

    def like(self, wanted: Wanted) -> Like | None:
        """The earlier stages of that kind and size on this machine which are most like it: those
        that differ in their length alone, or else those with most settings in common. None where
        there is none."""
        same = [made for made in self.made(wanted.kind) if made.fits(wanted)]
        if not same:
            return None
        ranks = {made.artifact.fingerprint: made.rank(wanted) for made in same}
        highest = max(ranks.values())
        nearest = [m for m in same if ranks[m.artifact.fingerprint] == highest][:MOST]
        return Like(made=nearest, exact=highest[0])


@dataclass(frozen=True, kw_only=True)
class Made:
    """A stage that was made."""

    artifact: Artifact
    past: Past = field(repr=False)

    @property
    def facts(self) -> Mapping[str, Any]:
        """What is known of how it was made."""
        return self.artifact.provenance

    @cached_property
    def lines(self) -> list[Mapping[str, Any]]:
        """Its log; [] without one."""
        if METRICS not in self.artifact.files:
            return []
        try:
            text = (self.artifact.path / METRICS).read_text(encoding="utf-8")
            found = [json.loads(line) for line in text.splitlines()]
        except (OSError, ValueError):
            return []
        steps = [line for line in found if isinstance(line, dict) and number(line.get("step"))]
        return [line for line in steps if number(line.get("seconds"))]

    @cached_property
    def weights(self) -> float:
        """Bytes of its model, or of the first one that it read."""
        inputs = [self.past.artifact(s["fingerprint"]) for s in self.artifact.inputs.values()]
        for artifact in (self.artifact, *inputs):
            found = {} if artifact is None else artifact.files
            size = sum(e["bytes"] for name, e in found.items() if name.endswith(".safetensors"))
            if size:
                return float(size)
        return 0.0

    def fits(self, wanted: Wanted) -> bool:
        """Whether it is of that kind, size and machine."""
        mine, theirs = sorted((self.weights, wanted.weights))
        # A header of some kilobytes belongs to no number.
        alike = theirs <= ALIKE * mine + 50_000
        same = self.facts.get("host") == wanted.host
        same = same and self.facts.get("device", "cpu") == wanted.device
        precision = self.artifact.config.get("precision")
        return alike and same and precision == wanted.config.get("precision")

    def rank(self, wanted: Wanted) -> tuple[bool, bool, int]:
        """How like it is: the same but for its length; the same domains; settings in common."""
        domains = frozenset(
            source["fingerprint"] for source in named(self.artifact.inputs, "domains").values()
        )
        mine = _settings(self.artifact.config)
        theirs = _settings(wanted.config)
        common = sum(mine.get(name) == value for name, value in theirs.items())
        same = domains == wanted.domains
        return same and mine == theirs, same, common

    @cached_property
    def timing(self) -> tuple[float, float, float]:
        """Seconds beside its steps, seconds of a step, and how many it had. Without steps all are
        beside them."""
        total, lines = float(self.facts["seconds"]), self.lines
        if len(lines) < 2 or self.facts.get("resumed_at_step") is not None:
            return total, 0.0, 0.0
        first, last = lines[min(WARM, len(lines) - 2)], lines[-1]
        steps = last["step"] - first["step"]
        if steps <= 0:
            return total, 0.0, 0.0
        each = (last["seconds"] - first["seconds"]) / steps
        return max(0.0, total - each * last["step"]), each, float(last["step"])

    @property
    def steps(self) -> float:
        """How many steps it had; 0 without a log."""
        return float(self.lines[-1]["step"]) if self.lines else 0.0

    def mean(self, metric: str) -> float | None:
        """The mean of a metric over its steps."""
        values = [line[metric] for line in self.lines if isinstance(line.get(metric), int | float)]
        return fmean(values) if values else None


@dataclass(frozen=True, kw_only=True)
class Like:
    """The earlier stages that are most like another one."""

    made: Sequence[Made]
    exact: bool
    """Whether they differ from it in their length alone."""

    @property
    def said(self) -> str:
        """For people."""
        count = len(self.made)
        runs = "1 earlier run" if count == 1 else f"{count} earlier runs"
        return f"from {runs}" if self.exact else f"from {runs} with other settings"

    def seconds(self, steps: float, tokens: float) -> float:
        """What the stage takes by them, with so many steps and tokens."""
        return median(self._seconds(steps, tokens))

    def _seconds(self, steps: float, tokens: float) -> Iterator[float]:
        for made in self.made:
            beside, each, count = made.timing
            processed = number(made.facts.get("tokens"))
            done = each * count
            if self.exact and count and steps:
                yield beside + each * steps
            elif self.exact or not processed:
                yield beside + done
            else:
                # A stage without steps has all of its time beside them.
                yield (beside if done else 0.0) + (done or beside) * tokens / processed

    def tokens(self, steps: float) -> float | None:
        """Tokens that the stage counts with so many steps; None where they tell nothing of it."""
        if not self.exact:
            return None
        found = []
        for made in self.made:
            processed, count = number(made.facts.get("tokens")), made.steps
            if processed:
                found.append(processed * (steps / count if steps and count else 1.0))
        return median(found) if found else None

    def memory(self) -> int | None:
        """The most that one of them took, with its children."""
        return most_memory(made.facts for made in self.made)


def most_memory(facts: Iterable[Mapping[str, Any]]) -> int | None:
    """The most bytes that a stage took by its records; None where none says it."""
    found = [int(number(one.get("peak_memory"))) for one in facts]
    return max(found, default=0) or None


def number(value: Any) -> float:
    """A number above 0 that a record or a log has, else 0: whoever wrote it may be a stranger."""
    usable = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if usable and 0 < value < 1e300 else 0.0


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Those that say how much a step computes."""
    ignored = (*LENGTH, "seed", "lr", "warmup_steps")
    kept: dict[str, Any] = plain({n: v for n, v in config.items() if n not in ignored})
    return kept
