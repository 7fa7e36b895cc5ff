"""`run` and `plan`."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from posttrain.commands.output import console, emit
from posttrain.commands.report import check_report_path, write_report_of
from posttrain.engine.errors import Interrupted, PosttrainError
from posttrain.engine.planner import PlanRow
from posttrain.engine.planner import plan as plan_graph
from posttrain.engine.provenance import Provenance, capture
from posttrain.engine.record import Artifact
from posttrain.engine.runner import Event, usable_cores
from posttrain.engine.runner import run as run_graph
from posttrain.engine.store import Store
from posttrain.language.loader import Loaded, load_recipe
from posttrain.report.live import LiveView
from posttrain.report.terminal import evaluation_table
from posttrain.report.wording import duration
from posttrain.stages.worker import COMPILE, DEVICE, EXECUTE, PRELOAD

if TYPE_CHECKING:  # it imports torch
    from posttrain.backends.device import Device

PACKAGES = (
    "posttrain",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "reasoning-gym",
    "math-verify",
)
"""Distributions whose versions go into every record."""

ACTION_STYLES = {"cached": "dim", "run": "green", "waits": "yellow", "blocked": "yellow"}


@dataclass(frozen=True, kw_only=True)
class Request:
    """The words of a command that names a recipe."""

    recipe: str
    store: Path
    settings: Sequence[str] = ()
    suite: str | None = None
    seed: int | None = None

    def load(self) -> tuple[Store, Loaded]:
        """The store and the recipe's graph."""
        store = Store(self.store)
        loaded = load_recipe(
            self.recipe, store=store, settings=self.settings, suite=self.suite, seed=self.seed
        )
        return store, loaded


@dataclass(kw_only=True)
class Outcome:
    """What became of every stage, gathered from the events of a run."""

    rows: Sequence[PlanRow]
    status: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)

    def update(self, event: Event) -> None:
        """Take in one event."""
        states = {"cached": "cached", "finished": "ran", "failed": "failed", "waits": "waits"}
        if event.kind in states:
            self.status[event.name] = states[event.kind]
            self.seconds[event.name] = event.seconds
            if "path" in event.payload:
                self.paths[event.name] = event.payload["path"]

    def stages(self) -> list[dict[str, Any]]:
        """One object per stage. A stage that was never reached is "blocked"."""
        found = []
        for row in self.rows:
            seconds = self.seconds.get(row.name)
            if row.artifact is not None:
                seconds = row.artifact.provenance.get("seconds")
            found.append(
                {
                    "name": row.name,
                    "kind": row.kind,
                    "status": self.status.get(row.name, "blocked"),
                    "seconds": None if seconds is None else round(seconds, 3),
                    "artifact": self.paths.get(row.name),
                }
            )
        return found


def run(
    request: Request,
    *,
    jobs: int | None,
    device: Device = "auto",
    compile: bool = False,
    report: Path | None,
    as_json: bool,
) -> PosttrainError | None:
    """Make what the recipe asks for, show it, write the report; returns what went wrong, if so.

    With `as_json` the outcome is printed even of a run in which a stage failed.
    """
    began = time.monotonic()
    out = console(as_json=as_json)
    if report is not None:
        check_report_path(report)
    store, loaded = request.load()
    rows = plan_graph(loaded.graph, store)
    _summary(out, loaded, rows, store)
    outcome = Outcome(rows=rows)
    failure = None
    try:
        how = choose(rows, loaded, jobs=jobs, device=device, compile=compile)
        _make(loaded, store, rows, outcome, how=how, out=out)
    except Interrupted:
        raise
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped. What was finished is kept in {store.root}. To go on, run the same command "
            "again."
        ) from None
    except PosttrainError as error:
        if not as_json:
            raise
        failure = error
    target = None if failure else store.find(loaded.graph.fingerprints()[loaded.graph.target])
    evaluation = None if target is None else read_evaluation(target)
    if evaluation is not None:
        out.print()
        out.print(evaluation_table(evaluation))
    if target is not None and report is not None:
        ran = "ran" in outcome.status.values()
        written = write_report_of(
            report,
            store=store,
            artifact=target,
            loaded=loaded,
            seconds=time.monotonic() - began if ran else None,
            anew=ran,
        )
        state = "" if written else " (unchanged)"
        out.print(Text(f"report: {report.absolute()}{state}"), soft_wrap=True)
    seconds = time.monotonic() - began
    out.print(Text(f"{loaded.name}: {_count(outcome)} in {duration(seconds)}", "bold"))
    if as_json:
        result: dict[str, Any] = {
            "recipe": loaded.name,
            "seed": loaded.seed,
            "seconds": round(seconds, 3),
            "stages": outcome.stages(),
        }
        if evaluation is not None:
            result["evaluation"] = evaluation_summary(evaluation)
        emit(result)
    return failure


@dataclass(frozen=True, kw_only=True)
class How:
    """How stages are to be run: what is no part of their identity."""

    jobs: int
    environment: Mapping[str, str] = field(default_factory=dict)
    """Of every stage's process."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """For the records; empty where nothing is to be run."""


def choose(
    rows: Sequence[PlanRow], loaded: Loaded, *, jobs: int | None, device: Device, compile: bool
) -> How:
    """How the stages that are not cached are run; without such stages torch is not imported.

    On CUDA one stage runs at a time by default: they would share the memory of one card. Raises
    ConfigError for a device that is not there, `compile` on the CPU, and a precision that the
    hardware does not compute.
    """
    todo = [loaded.graph.nodes[row.name] for row in rows if row.action != "cached"]
    if not todo:
        return How(jobs=jobs or usable_cores())
    import torch

    from posttrain.backends.device import check_precision, choose_device, device_name

    chosen = choose_device(device, compile=compile)
    for precision in {node.config.get("precision", "float32") for node in todo}:
        check_precision(getattr(torch, precision), chosen)
    environment = {DEVICE: chosen.type} | ({COMPILE: "1"} if compile else {})
    facts = {"device": device_name(chosen), "compile": compile}
    default = 1 if chosen.type == "cuda" else usable_cores()
    return How(jobs=jobs or default, environment=environment, facts=facts)


def _make(
    loaded: Loaded,
    store: Store,
    rows: list[PlanRow],
    outcome: Outcome,
    *,
    how: How,
    out: Console,
) -> None:
    provenance = Provenance()
    if how.facts:
        captured = capture(loaded.sources, packages=PACKAGES, exclude=[store.root])
        provenance = replace(captured, facts={**captured.facts, **how.facts})
    events = run_graph(
        loaded.graph,
        store,
        execute=EXECUTE,
        preload=PRELOAD,
        jobs=how.jobs,
        provenance=provenance,
        environment=how.environment,
    )
    with closing(events), LiveView(rows, loaded.graph, out) as view:
        for event in events:
            outcome.update(event)
            view.update(event)


def read_evaluation(artifact: Artifact) -> Mapping[str, Any] | None:
    """The content of evaluation.json, None for an artifact of another kind."""
    if artifact.kind != "evaluate":
        return None
    content: Mapping[str, Any] = json.loads(artifact.file("evaluation.json").read_bytes())
    return content


def evaluation_summary(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """What `run --json` tells about an evaluation: the domains, Norm, and the same greedily.

    `norm_domains` and `gain` are not there where the evaluation was made before they were kept.
    """
    keys = ("domains", "norm", "norm_low", "norm_high", "min_recovery", "norm_domains", "gain")
    keys += ("greedy",)
    return {key: evaluation[key] for key in keys if key in evaluation}


def plan(request: Request, *, as_json: bool) -> None:
    """Print what `run` would do, and why."""
    out = console(as_json=as_json)
    store, loaded = request.load()
    rows = plan_graph(loaded.graph, store)
    if as_json:
        stages = [
            {
                "name": row.name,
                "kind": row.kind,
                "action": row.action,
                "reason": row.reason,
                "seconds": row.artifact.provenance.get("seconds") if row.artifact else None,
                "artifact": str(row.artifact.path) if row.artifact else None,
                "fingerprint": row.fingerprint,
            }
            for row in rows
        ]
        emit({"recipe": loaded.name, "seed": loaded.seed, "stages": stages})
        return
    _summary(out, loaded, rows, store)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("stage", "kind", "", "reason"):
        table.add_column(column, overflow="fold")
    for row in rows:
        style = ACTION_STYLES[row.action]
        cells = (row.name, row.kind, row.action, row.reason)
        table.add_row(*(Text(cell, style) for cell in cells))
    out.print(table)


def _summary(out: Console, loaded: Loaded, rows: Sequence[PlanRow], store: Store) -> None:
    counts = {action: sum(row.action == action for row in rows) for action in ACTION_STYLES}
    parts = [f"{count} {'to run' if a == 'run' else a}" for a, count in counts.items() if count]
    out.print(
        Text.assemble(
            (loaded.name, "bold"),
            f", suite {loaded.suite}, seed {loaded.seed}: {len(rows)} stages, {', '.join(parts)}",
            (f"  (store {store.root})", "dim"),
        ),
        soft_wrap=True,
    )


def _count(outcome: Outcome) -> str:
    stages = outcome.stages()
    statuses = [stage["status"] for stage in stages]
    if set(statuses) == {"cached"}:
        return f"all {len(stages)} stages cached"
    found = ("ran", "cached", "failed", "waits", "blocked")
    return ", ".join(f"{statuses.count(s)} {s}" for s in found if s in statuses)
