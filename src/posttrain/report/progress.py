"""How far each stage of a run is, computed from the engine's events; knows nothing of drawing."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from posttrain.engine.events import Event
from posttrain.engine.graph import Graph
from posttrain.engine.planner import PlanRow
from posttrain.report.wording import number
from posttrain.stages.kinds import shown_kind

State = Literal["waiting", "running", "done", "cached", "failed", "blocked", "waits"]

WINDOW_SECONDS = 10.0
"""Rates are averages over this long, so that they are steady but still follow a change."""


@dataclass(kw_only=True)
class Progress:
    """One stage: its state, its newest line of metrics, and how fast it goes."""

    name: str
    kind: str
    state: State = "waiting"
    reason: str = ""
    """Why it runs, waits, is blocked or failed."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """The newest line of metrics; after the end, those with the summary over them."""
    seconds: float = 0.0
    """How long it ran, as far as the last event told."""
    began: float | None = None
    """On the monotonic clock, while it runs."""
    window: deque[Mapping[str, Any]] = field(default_factory=deque)

    def update(self, event: Event) -> None:
        """Take in one event of this stage."""
        payload = event.payload
        if event.kind == "started":
            self.state, self.reason = "running", str(payload.get("reason", ""))
            self.began = time.monotonic()
            return
        if event.kind == "progress":
            if "waiting" in payload:
                self.reason = str(payload["waiting"])
                return
            self.metrics, self.seconds = payload, event.seconds
            self.window.append(payload)
            while len(self.window) > 2 and _span(self.window[1], payload) >= WINDOW_SECONDS:
                self.window.popleft()
            return
        self.began = None
        if event.kind == "finished":
            self.state, self.seconds = "done", event.seconds
            self.metrics = {**self.metrics, **payload["metrics"]}
        elif event.kind == "cached":
            self.state, self.reason = "cached", str(payload.get("reason", ""))
        elif event.kind == "failed":
            self.state, self.seconds = "failed", event.seconds
            self.reason = str(payload["error"])
        else:
            self.state, self.reason = event.kind, str(payload["reason"])

    @property
    def elapsed(self) -> float:
        """Seconds it has run in this run."""
        return self.seconds if self.began is None else time.monotonic() - self.began

    @property
    def step(self) -> tuple[int, int] | None:
        """(done, total), once it has told."""
        if "step" not in self.metrics or not self.metrics.get("total"):
            return None
        return int(self.metrics["step"]), int(self.metrics["total"])

    @property
    def share(self) -> float:
        """How much of it is done, in [0, 1]."""
        if self.state in ("done", "cached"):
            return 1.0
        step = self.step
        return 0.0 if step is None else min(1.0, step[0] / step[1])

    @property
    def rate(self) -> float | None:
        """Tokens per second; of late while it runs, over all of it afterwards."""
        return self._per_second("tokens")

    @property
    def left(self) -> float | None:
        """Seconds that the steps still to do take at the present rate."""
        step, rate = self.step, self._per_second("step")
        if step is None or not rate or self.state != "running":
            return None
        since = time.monotonic() - (self.began or 0.0) - self.seconds
        return max(0.0, (step[1] - step[0]) / rate - since)

    @property
    def headline(self) -> str:
        """The metric that matters for its kind: "reward 0.62"."""
        kind, step = shown_kind(self.kind), self.step
        if self.state == "running" and kind.unit != "steps" and step:
            return f"{step[0]} of {step[1]} {kind.unit}"
        for key in kind.headline:
            if self.metrics.get(key) is not None:
                word = "Norm" if key == "norm" else key
                return f"{word} {number(self.metrics[key])}"
        return ""

    def _per_second(self, key: str) -> float | None:
        newest = self.metrics
        if not isinstance(newest.get(key), int | float) or "seconds" not in newest:
            return None
        # A stage's own clock and its counts begin at 0 together, also where it resumes.
        oldest: Mapping[str, Any] = {key: 0, "seconds": 0}
        if self.state == "running" and len(self.window) > 1:
            oldest = self.window[0]
        span = _span(oldest, newest)
        gain = float(newest[key]) - float(oldest.get(key, 0))
        return gain / span if span > 0 and gain > 0 else None


def _span(old: Mapping[str, Any], new: Mapping[str, Any]) -> float:
    return float(new.get("seconds", 0)) - float(old.get("seconds", 0))


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A stage's place in the tree."""

    name: str
    prefix: str
    """Lines that lead to it, such as "│ └ "."""


def tree(rows: list[PlanRow], graph: Graph) -> list[Branch]:
    """Stages under what they start from, depth first; domains are left out.

    A stage without a `start` stands under the model it is about: evaluate under its student, sample
    under its first model, select and pairs under their rollouts.
    """
    names = [row.name for row in rows if row.kind != "domain"]
    children: dict[str | None, list[str]] = {}
    for name in names:
        children.setdefault(_parent(graph, name, names), []).append(name)
    found: list[Branch] = []

    def place(name: str, prefix: str, below: str) -> None:
        found.append(Branch(name=name, prefix=prefix))
        *others, last = children.get(name, [None])
        for child in others:
            place(str(child), f"{below}├ ", f"{below}│ ")
        if last is not None:
            place(last, f"{below}└ ", f"{below}  ")

    for root in children.get(None, []):
        place(root, "", "")
    return found


def _parent(graph: Graph, name: str, names: list[str]) -> str | None:
    inputs = graph.nodes[name].inputs
    for edge in ("start", "student", "rollouts", *inputs):
        if inputs.get(edge) in names:
            return inputs[edge]
    return None
