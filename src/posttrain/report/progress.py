"""How far each stage of a run is, computed from the engine's events; knows nothing of drawing."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from posttrain.engine.graph import Graph
from posttrain.engine.planner import PlanRow
from posttrain.engine.runner import Event
from posttrain.report.wording import clock, headline, number
from posttrain.stages.kinds import shown_kind

State = Literal["pending", "running", "done", "cached", "failed", "blocked", "needs input"]
STATES: Mapping[str, State] = {
    "started": "running",
    "finished": "done",
    "cached": "cached",
    "failed": "failed",
    "blocked": "blocked",
    "needs input": "needs input",
}
"""Kind of an event -> the state in which it leaves the stage."""

WINDOW_SECONDS = 10.0
"""Rates are averages over this long, so that they are steady but still follow a change."""


@dataclass(kw_only=True)
class Progress:
    """One stage: its state, its newest line of metrics, and how fast it goes."""

    name: str
    kind: str
    state: State = "pending"
    reason: str = ""
    """Why it runs, is blocked, needs input or failed."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """The newest line of metrics; after the end, those with the summary over them."""
    seconds: float = 0.0
    """How long it ran, as far as the last event told."""
    began: float | None = None
    """On the monotonic clock, while it runs."""
    path: str | None = None
    """Directory of its artifact, once there is one."""
    warnings: list[str] = field(default_factory=list)
    """What it has to tell the user, each text once."""
    window: deque[Mapping[str, Any]] = field(default_factory=deque)
    """Lines of metrics of the last `WINDOW_SECONDS`."""

    def update(self, event: Event) -> None:
        """Take in one event of this stage."""
        payload = event.payload
        if event.kind == "warning":
            self.warnings += [payload["text"]] if payload["text"] not in self.warnings else []
        elif event.kind != "progress":
            self.state, self.seconds = STATES[event.kind], event.seconds
            self.reason = str(payload.get("reason", payload.get("error", "")))
            self.began = time.monotonic() if event.kind == "started" else None
            self.metrics = {**self.metrics, **payload.get("metrics", {})}
            self.path = payload.get("path")
        elif "waiting" in payload:
            self.reason = str(payload["waiting"])
        else:
            self.metrics, self.seconds = payload, event.seconds
            self.window.append(payload)
            while len(self.window) > 2 and _span(self.window[1], payload) >= WINDOW_SECONDS:
                self.window.popleft()

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
        """How much of its steps is done, in [0, 1]."""
        return min(1.0, self.step[0] / self.step[1]) if self.step else 0.0

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
        """The number that matters for its kind: "reward 0.62"."""
        kind = shown_kind(self.kind)
        if self.state == "running" and self.step and kind.unit != "steps":
            return f"{self.step[0]} of {self.step[1]} {kind.unit}"
        return headline(kind, self.metrics)

    @property
    def facts(self) -> str:
        """Everything known about how far it is, on one line."""
        parts = [
            f"{self.step[0]}/{self.step[1]}" if self.step else "",
            self.headline,
            f"{number(round(self.rate))} tokens/s" if self.rate else "",
            clock(self.elapsed),
            "" if self.left is None else f"ETA {clock(self.left)}",
        ]
        return ", ".join(filter(None, parts))

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


def tree(rows: Sequence[PlanRow], graph: Graph) -> dict[str, str]:
    """Stages under what they start from, depth first, each with the lines that lead to it ("│ └ ").

    A stage without a `start` stands under the model it is about: evaluate under its student, sample
    under its first model, select and pairs under their rollouts. Domains are left out.
    """
    names = [row.name for row in rows if "problems" not in shown_kind(row.kind).makes]
    children: dict[str | None, list[str]] = {}
    for name in names:
        inputs = graph.nodes[name].inputs
        edges = [edge for edge in ("start", "student", "rollouts", *inputs) if edge in inputs]
        parent = next((inputs[edge] for edge in edges if inputs[edge] in names), None)
        children.setdefault(parent, []).append(name)
    found: dict[str, str] = {}

    def place(name: str, prefix: str, below: str) -> None:
        found[name] = prefix
        under = children.get(name, [])
        for child in under:
            last = child == under[-1]
            place(child, below + ("└ " if last else "├ "), below + ("  " if last else "│ "))

    for root in children.get(None, []):
        place(root, "", "")
    return found
