"""`run` and `plan`."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.text import Text

from posttrain.commands import estimate, io
from posttrain.commands.io import console, emit, plain_table
from posttrain.commands.report import check_report_path, write_report_of
from posttrain.commands.tracking import sinks_of
from posttrain.engine.errors import Interrupted, PosttrainError
from posttrain.engine.planner import PlanRow
from posttrain.engine.planner import plan as plan_graph
from posttrain.engine.provenance import Provenance, capture
from posttrain.engine.record import Artifact
from posttrain.engine.runner import run as run_graph
from posttrain.engine.runner import usable_cores
from posttrain.engine.store import Store
from posttrain.report.estimates import compared, estimates_table
from posttrain.report.gather import read_evaluation
from posttrain.report.live import LiveView
from posttrain.report.samples import EVERY, given_every
from posttrain.report.terminal import evaluation_table, warnings_list
from posttrain.report.wording import duration
from posttrain.stages.kinds import shown_kind
from posttrain.trackers.base import trackers_named
from posttrain.trackers.sink import Sinks

if TYPE_CHECKING:  # it imports pydantic
    from posttrain.language.loader import Loaded

PACKAGES = (
    "posttrain",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "reasoning-gym",
    "math-verify",
    "peft",
    "bitsandbytes",
    "gguf",
    "lm_eval",
)
"""Distributions whose versions go into every record, those that are installed."""

LONGER = re.compile(r"steps: (\d+) -> (\d+)")
"""The reason of a stage of which nothing changed but its length."""
ACTION_STYLES = {"cached": "dim", "run": "green", "needs input": "yellow", "blocked": "yellow"}
STATUS = {"done": "ran", "pending": "blocked"}
"""What became of a stage, in words other than its state; one that was never reached is blocked."""
SUMMARY = (
    *("domains", "norm", "norm_low", "norm_high", "norm_domains"),
    *("min_recovery", "gain", "greedy"),
    *("students", "along", "pairs", "unverified", "judged"),
)
"""What `run --json` tells about an evaluation, where it has that: of one student with its init, or
of several models. `norm_domains` and `gain` are not there where it was made before they were
kept."""


def run(
    recipe: io.RecipeName,
    settings: io.Settings = None,
    suite: io.SuiteName = None,
    store: io.StorePath = io.DEFAULT_STORE,
    jobs: io.Jobs = None,
    device: io.Device = "auto",
    compile: io.Compile = False,
    memory: io.Memory = None,
    seed: io.Seed = None,
    report: io.ReportPath = io.DEFAULT_REPORT,
    no_report: io.NoReport = False,
    log: io.Log = None,
    as_json: io.Json = False,
) -> None:
    """Make what a recipe asks for. What the store has already is not made again."""
    from posttrain.language.loader import load_recipe

    began = time.monotonic()
    out = console(as_json=as_json)
    if not no_report:
        check_report_path(report)
    trackers = trackers_named(log or ())
    place = Store(store)
    loaded = load_recipe(recipe, store=place, settings=settings or (), suite=suite, seed=seed)
    rows = plan_graph(loaded.graph, place)
    summary(out, loaded, rows, place, f"seed {loaded.seed}: {len(rows)} stages")
    remember_names(place, loaded, rows)
    tables = show_data(out, loaded, rows, place)
    view = LiveView(rows, loaded.graph, out)
    sinks = sinks_of(loaded, place, trackers)
    failure = None
    try:
        how = choose(rows, loaded, jobs=jobs, device=device, compile=compile, memory=memory)
        make(loaded, place, view, how, sinks, estimated(loaded, rows, place, how))
    except PosttrainError as error:
        warn(out, warnings_of(loaded, rows, view, sinks))
        # With --json the outcome is printed even of a run in which a stage failed.
        if not as_json or isinstance(error, Interrupted):
            raise
        failure = error
    stages = stages_of(rows, view)
    warnings = warnings_of(loaded, rows, view, sinks)
    statuses = [stage["status"] for stage in stages]
    target = None if failure else place.find(loaded.graph.fingerprints()[loaded.graph.target])
    evaluation = target and read_evaluation(target)
    if failure is None:
        warn(out, warnings)
    if evaluation:
        out.print()
        names = loaded.graph.nodes[loaded.graph.target].inputs
        out.print(evaluation_table(evaluation, names))
    if target is not None and not no_report:
        ran = "ran" in statuses
        written = write_report_of(
            report,
            store=place,
            artifact=target,
            loaded=loaded,
            seconds=time.monotonic() - began if ran else None,
            anew=ran,
        )
        state = "" if written else " (unchanged)"
        out.print(Text(f"report: {report.absolute()}{state}"), soft_wrap=True)
    estimates = compared([] if failure else list(just_made(rows, place).items()))
    if any(row.cells["Time"].estimate is not None for row in estimates):
        out.print()
        out.print(estimates_table(estimates))
    seconds = time.monotonic() - began
    out.print(Text(f"{loaded.name}: {count(statuses)} in {duration(seconds)}", "bold"))
    if as_json:
        result = {"recipe": loaded.name, "seed": loaded.seed, "seconds": round(seconds, 3)}
        result |= {"stages": stages, "warnings": warnings}
        result["data"] = data_now(tables, loaded, rows, place)
        if evaluation:
            result["evaluation"] = {key: evaluation[key] for key in SUMMARY if key in evaluation}
        emit(result)
    if failure is not None:
        raise failure


def stages_of(rows: Sequence[PlanRow], view: LiveView) -> list[dict[str, Any]]:
    """What became of every stage, one object each."""
    found = []
    for row in rows:
        stage = view.stages[row.name]
        seconds = stage.seconds if stage.state not in ("pending", "blocked") else None
        if row.artifact is not None:
            seconds = row.artifact.provenance.get("seconds")
        found.append(
            {
                "name": row.name,
                "kind": row.kind,
                "status": STATUS.get(stage.state, stage.state),
                "seconds": None if seconds is None else round(seconds, 3),
                "artifact": stage.path,
            }
        )
    return found


def just_made(rows: Sequence[PlanRow], store: Store) -> dict[str, Artifact]:
    """The artifacts by stage that were not there when this was planned."""
    found = {row.name: store.find(row.fingerprint) for row in rows if row.artifact is None}
    return {name: artifact for name, artifact in found.items() if artifact is not None}


def remember_names(store: Store, loaded: Loaded, rows: Sequence[PlanRow]) -> None:
    """Leave in the store what this recipe calls the artifacts that are there."""
    store.names.remember(
        (row.fingerprint, row.artifact.name, loaded.graph.nodes[row.name].name)
        for row in rows
        # What was adopted keeps the name that it was given there.
        if row.artifact is not None and "source" not in row.artifact.provenance
    )


@dataclass(frozen=True, kw_only=True)
class How:
    """How stages are to be run: what is no part of their identity."""

    jobs: int
    environment: Mapping[str, str] = field(default_factory=dict)
    """Of every stage's process."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """For the records; empty where nothing is to be run."""


def choose(
    rows: Sequence[PlanRow],
    loaded: Loaded,
    *,
    jobs: int | None,
    device: Literal["auto", "cpu", "cuda"],
    compile: bool,
    memory: str | None = None,
) -> How:
    """How the stages that are not cached are run; without such stages torch is not imported.

    On CUDA one stage runs at a time by default: they would share the memory of one card. Raises
    ConfigError for a device that is not there, `compile` on the CPU, a precision that the hardware
    does not compute, a `memory`, or without it a `POSTTRAIN_MEMORY`, that is no number of bytes,
    and a `POSTTRAIN_SAMPLES` that is no number of steps.
    """
    todo = [loaded.graph.nodes[row.name] for row in rows if row.action != "cached"]
    if not todo:
        return How(jobs=jobs or usable_cores())
    import torch

    from posttrain.backends.device import check_precision, choose_device, device_name
    from posttrain.backends.given_memory import MEMORY, given_memory, memory_size
    from posttrain.stages.worker import COMPILE, DEVICE

    chosen = choose_device(device, compile=compile)
    for precision in {node.config.get("precision", "float32") for node in todo}:
        check_precision(getattr(torch, precision), chosen)
    environment = {DEVICE: chosen.type} | ({COMPILE: "1"} if compile else {})
    facts: dict[str, Any] = {"device": device_name(chosen), "compile": compile}
    size = given_memory() if memory is None else memory_size(memory, "--memory")
    if size is not None:
        environment[MEMORY] = str(size)
        facts["memory"] = size
    if given_every(os.environ) is not None:
        environment[EVERY] = os.environ[EVERY]
    default = 1 if chosen.type == "cuda" else usable_cores()
    return How(jobs=jobs or default, environment=environment, facts=facts)


def estimated(
    loaded: Loaded, rows: Sequence[PlanRow], store: Store, how: How
) -> Mapping[str, Mapping[str, Any]]:
    """What the stages are expected to take by what is known already, for their records, by
    fingerprint: nothing is measured or made for it. A run does not end over its estimate."""
    if not how.facts:
        return {}
    machine = estimate.known_machine(how.jobs, how.facts["device"], how.facts.get("memory"))
    try:
        found = estimate.estimate_of(loaded.graph, rows, store, machine, measure=False)
    except PosttrainError:
        return {}
    return estimate.facts_by_fingerprint(found, rows)


def make(
    loaded: Loaded,
    store: Store,
    view: LiveView,
    how: How,
    sinks: Sinks,
    of_stages: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Run the graph, show it, and tell the trackers. `of_stages` are facts for the records of
    single stages, by fingerprint."""
    from posttrain.stages import worker

    provenance = Provenance()
    if how.facts:
        captured = capture(
            loaded.sources, packages=PACKAGES, exclude=[store.root], texts=loaded.files
        )
        facts = {**captured.facts, **how.facts}
        provenance = replace(captured, facts=facts, of_stages=of_stages or {})
    events = run_graph(
        loaded.graph,
        store,
        execute=worker.EXECUTE,
        preload=worker.preload(loaded.graph.nodes.values()),
        jobs=how.jobs,
        provenance=provenance,
        environment=how.environment,
    )
    # The trackers finish when the last picture stays on the screen.
    with sinks, closing(events), view:
        for event in events:
            view.update(event)
            for text in sinks.take(event):
                view.tell("trackers", text)


def plan(
    recipe: io.RecipeName,
    settings: io.Settings = None,
    suite: io.SuiteName = None,
    store: io.StorePath = io.DEFAULT_STORE,
    seed: io.Seed = None,
    with_estimate: io.Estimate = False,
    jobs: io.Jobs = None,
    device: io.Device = "auto",
    memory: io.Memory = None,
    as_json: io.Json = False,
) -> None:
    """Tell what `run` would do, stage by stage, and why. Runs nothing."""
    from posttrain.language.loader import load_recipe

    out = console(as_json=as_json)
    if not with_estimate:
        estimate.refuse_alone(jobs=jobs, device=device, memory=memory)
    place = Store(store)
    loaded = load_recipe(recipe, store=place, settings=settings or (), suite=suite, seed=seed)
    rows = plan_graph(loaded.graph, place)
    if as_json:
        told = {"recipe": loaded.name, "seed": loaded.seed, "stages": planned(rows)}
        told["warnings"] = warnings_of(loaded, rows)
        if with_estimate:
            machine = estimate.machine_of(jobs=jobs, device=device, memory=memory)
            found = estimate.estimate_of(loaded.graph, rows, place, machine, measure=True)
            told["estimate"] = estimate.told(found)
        emit(told | {"data": data_of(loaded, rows, place)})
        return
    summary(out, loaded, rows, place, f"seed {loaded.seed}: {len(rows)} stages")
    show_data(out, loaded, rows, place)
    table = plain_table("stage", "kind", "", "reason")
    for row in rows:
        style = ACTION_STYLES[row.action]
        cells = (row.name, row.kind, row.action, _reason(row, loaded))
        table.add_row(*(Text(cell, style) for cell in cells))
    out.print(table)
    if with_estimate:
        machine = estimate.machine_of(jobs=jobs, device=device, memory=memory)
        estimate.show(out, estimate.estimate_of(loaded.graph, rows, place, machine, measure=True))
    warn(out, warnings_of(loaded, rows))


def planned(rows: Sequence[PlanRow]) -> list[dict[str, Any]]:
    """What is to become of every stage, one object each."""
    return [
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


def _reason(row: PlanRow, loaded: Loaded) -> str:
    """Why a stage runs; where a finished one is only to be longer, also how to go on from it."""
    longer = LONGER.fullmatch(row.reason)
    if longer is None or "start" not in loaded.graph.nodes[row.name].inputs:
        return row.reason
    more = int(longer[2]) - int(longer[1])
    if more <= 0 or "model" not in shown_kind(row.kind).makes:
        return row.reason
    return (
        f"{row.reason}, from its start; to go on from what is there leave steps at {longer[1]} and "
        f"add r.extend({row.name}, steps={more})"
    )


def warnings_of(
    loaded: Loaded,
    rows: Sequence[PlanRow],
    view: LiveView | None = None,
    sinks: Sinks | None = None,
) -> list[dict[str, Any]]:
    """What is to be told about the recipe, then about its trackers (`sinks`), then about its
    stages: those in the store and, with the `view` of a run, those that ran."""
    found: list[dict[str, Any]] = [{"stage": w.stage, "text": w.text} for w in loaded.warnings]
    found += [{"stage": None, "text": text} for text in (sinks.warnings if sinks else ())]
    for row in rows:
        cached = row.artifact.warnings if row.artifact else ()
        texts = view.stages[row.name].warnings if view else cached
        found += [{"stage": row.name, "text": text} for text in texts]
    return found


def warn(out: Console, warnings: Sequence[Mapping[str, Any]]) -> None:
    """Show warnings, if there are any."""
    if warnings:
        out.print()
        out.print(warnings_list(warnings))


def summary(out: Console, loaded: Loaded, rows: Sequence[PlanRow], store: Store, what: str) -> None:
    """Show in a line `what` is made and how much of it there is."""
    counts = {action: sum(row.action == action for row in rows) for action in ACTION_STYLES}
    parts = [f"{n} {'to run' if a == 'run' else a}" for a, n in counts.items() if n]
    out.print(
        Text.assemble(
            (loaded.name, "bold"),
            f", suite {loaded.suite}, {what}, {', '.join(parts)}",
            (f"  (store {store.root})", "dim"),
        ),
        soft_wrap=True,
    )


def data_now(
    tables: list[dict[str, Any]], loaded: Loaded, rows: Sequence[PlanRow], store: Store
) -> list[dict[str, Any]]:
    """What there is to tell of the tables after a run, where all of it could not be told before."""
    # It reads tables, which `--help` has no use for.
    from posttrain.commands import data

    return tables if data.all_read(tables) else data_of(loaded, rows, store)


def data_of(loaded: Loaded, rows: Sequence[PlanRow], store: Store) -> list[dict[str, Any]]:
    """What there is to tell of the tables that the stages read."""
    # It reads tables, which `--help` has no use for.
    from posttrain.commands import data

    return data.told(loaded.graph, [row.name for row in rows], store)


def show_data(
    out: Console, loaded: Loaded, rows: Sequence[PlanRow], store: Store
) -> list[dict[str, Any]]:
    """Show what there is to tell of the tables; returns it."""
    found = data_of(loaded, rows, store)
    if found:
        from posttrain.commands import data

        out.print(data.shown(found))
    return found


def count(statuses: Sequence[str]) -> str:
    """What became of all stages, in words: "3 ran, 5 cached"."""
    if set(statuses) == {"cached"}:
        return f"all {len(statuses)} stages cached"
    found = ("ran", "cached", "failed", "needs input", "blocked")
    return ", ".join(f"{statuses.count(s)} {s}" for s in found if s in statuses)
