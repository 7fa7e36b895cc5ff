"""`sweep`: a recipe with several values of its settings and several seeds, as one plan and one
table."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.text import Text

from posttrain.commands import io
from posttrain.commands.io import console, emit, plain_table
from posttrain.commands.report import check_report_path
from posttrain.commands.run import (
    ACTION_STYLES,
    choose,
    count,
    data_of,
    make,
    planned,
    remember_names,
    show_data,
    stages_of,
    summary,
    warn,
    warnings_of,
)
from posttrain.commands.variants import Axis, Variants, build_variants, read_axes, read_seeds
from posttrain.engine.atomic import guarded
from posttrain.engine.errors import StageError, Waiting
from posttrain.engine.graph import Graph
from posttrain.engine.planner import PlanRow
from posttrain.engine.planner import plan as plan_graph
from posttrain.engine.store import Store
from posttrain.report.gather import facts_of
from posttrain.report.live import LiveView
from posttrain.report.scores import split_words
from posttrain.report.sweep import (
    ACCURACY,
    NORM,
    Outcome,
    Run,
    Sweep,
    difference_text,
    gathered,
    outcome,
    settings_json,
    spread_text,
)
from posttrain.report.wording import duration
from posttrain.stages.kinds import shown_kind

MOST_COLUMNS = 6
"""Measures shown in a terminal; of more, those of single domains are left to the report."""
AxisOption = Annotated[
    list[str] | None,
    typer.Option(
        "--axis",
        metavar="KEY=VALUE,VALUE",
        help="A setting, or a parameter of the recipe, with its values; repeatable.",
    ),
]


def sweep(
    recipe: io.RecipeName,
    axis: AxisOption = None,
    seeds: Annotated[
        str, typer.Option("--seeds", metavar="N,N", help="Seeds of every combination.")
    ] = "0",
    settings: io.Settings = None,
    suite: io.SuiteName = None,
    store: io.StorePath = io.DEFAULT_STORE,
    split: Annotated[
        Literal["validation", "heldout"] | None,
        typer.Option("--split", help="Problems that evaluations ask. Default: validation."),
    ] = None,
    only_plan: Annotated[
        bool, typer.Option("--plan", help="Only tell what would be made, and why.")
    ] = False,
    jobs: io.Jobs = None,
    device: io.Device = "auto",
    compile: io.Compile = False,
    memory: io.Memory = None,
    report: io.ReportPath = Path("sweep.html"),
    no_report: io.NoReport = False,
    as_json: io.Json = False,
) -> None:
    """Run a recipe with every combination of some values, over seeds, and compare.

    It is one plan: what several combinations share is made once.
    """
    began = time.monotonic()
    out = console(as_json=as_json)
    if not no_report and not only_plan:
        check_report_path(report)
    axes, seed_list = read_axes(axis or (), settings or ()), read_seeds(seeds)
    place = Store(store)
    given: dict[str, Any] = {"settings": settings or (), "suite": suite, "split": split}
    variants = build_variants(recipe, store=place, axes=axes, seeds=seed_list, **given)
    rows = plan_graph(variants.loaded.graph, place)
    summary(out, variants.loaded, rows, place, _what(variants, rows))
    tables = show_data(out, variants.loaded, rows, place)
    if only_plan:
        _show_plan(out, variants, rows, tables, as_json=as_json)
        return
    loaded = variants.loaded
    remember_names(place, loaded, rows)
    view = LiveView(rows, loaded.graph, out)
    failure: StageError | Waiting | None = None
    how = choose(rows, loaded, jobs=jobs, device=device, compile=compile, memory=memory)
    try:
        make(loaded, place, view, how)
    except (StageError, Waiting) as error:
        # What else could be made is there; the table says what is not.
        failure = error
    stages = stages_of(rows, view)
    statuses = {stage["name"]: stage["status"] for stage in stages}
    warnings = warnings_of(loaded, rows, view)
    warn(out, gathered(warnings))
    found = _collect(variants, axes, seed_list, place, view, statuses)
    made = outcome(found)
    _show(out, found, made)
    commands = _commands(recipe, variants, found, settings or (), suite)
    if made.best is not None and found.split == "validation":
        command = commands[made.best.setting].replace(".split=validation", ".split=heldout")
        out.print(Text(f"the best on held-out problems: {command}"), soft_wrap=True)
    if not no_report:
        _write_page(report, variants, found, made, place, commands, gathered(warnings))
        out.print(Text(f"report: {report.absolute()}"), soft_wrap=True)
    seconds = time.monotonic() - began
    told = count(list(statuses.values()))
    out.print(Text(f"{loaded.name}: {told} in {duration(seconds)}", "bold"))
    if as_json:
        end = {"seconds": round(seconds, 3), "stages": stages, "warnings": warnings}
        end["data"] = data_of(loaded, rows, place)
        emit(_json(variants, found, made) | end)
    if failure is not None:
        raise failure


def _collect(
    variants: Variants,
    axes: Sequence[Axis],
    seeds: Sequence[int],
    store: Store,
    view: LiveView,
    statuses: Mapping[str, str],
) -> Sweep:
    """What became of every variant; `statuses` says what became of every stage."""
    graph = variants.loaded.graph
    prints = graph.fingerprints()
    runs = []
    for variant in variants.variants:
        artifact = store.find(prints[variant.target])
        runs.append(
            Run(
                setting=variant.setting,
                seed=variant.seed,
                stage=variant.target,
                fingerprint=prints[variant.target],
                status=statuses[variant.target],
                why="" if artifact else _why(variant.target, view, graph),
                artifact=artifact,
            )
        )
    return Sweep(
        recipe=variants.loaded.name,
        suite=variants.loaded.suite,
        split=_split_of(graph),
        axes={axis.key: axis.values for axis in axes},
        seeds=seeds,
        settings=variants.settings,
        runs=runs,
    )


def _why(target: str, view: LiveView, graph: Graph) -> str:
    """What kept a target from being made: the first of its stages that failed or waits."""
    names = [name for name in graph.order() if name in {target, *graph.ancestors(target)}]
    for state, words in (("failed", "failed"), ("needs input", "waits")):
        for name in names:
            stage = view.stages[name]
            if stage.state == state:
                return f"{name} {words}: {stage.reason.splitlines()[0] if stage.reason else ''}"
    return view.stages[target].reason


def _split_of(graph: Graph) -> str | None:
    """The split of the problems that the targets ask; None where they are no evaluations."""
    targets = [graph.nodes[name] for name in graph.targets]
    found = {
        str(node.config["split"])
        for node in targets
        if "scores" in shown_kind(node.kind).makes and "split" in node.config
    }
    return " and ".join(sorted(found)) or None


# -- what is shown ---------------------------------------------------------------------------------


def _what(variants: Variants, rows: Sequence[PlanRow]) -> str:
    """What is made, in a few words."""
    split = _split_of(variants.loaded.graph)
    asked = f"{split_words(split)} problems" if split else ""
    runs = f"{len(variants.variants)} runs in one plan"
    return f"{asked}: {runs}, {len(rows)} stages instead of {variants.wanted}".removeprefix(": ")


def _show_plan(
    out: Console,
    variants: Variants,
    rows: Sequence[PlanRow],
    tables: Sequence[Mapping[str, Any]],
    *,
    as_json: bool,
) -> None:
    if as_json:
        emit(
            {
                "recipe": variants.loaded.name,
                "split": _split_of(variants.loaded.graph),
                "wanted": variants.wanted,
                "variants": [
                    {
                        "setting": dict(variants.settings[variant.setting]),
                        "seed": variant.seed,
                        "stages": list(variant.keys.values()),
                    }
                    for variant in variants.variants
                ],
                "stages": planned(rows),
                "warnings": warnings_of(variants.loaded, rows),
                "data": tables,
            }
        )
        return
    needed = Counter(key for variant in variants.variants for key in variant.keys.values())
    table = plain_table("stage", "kind", "runs", "", "reason")
    for row in rows:
        style = ACTION_STYLES[row.action]
        cells = (row.name, row.kind, str(needed[row.name]), row.action, row.reason)
        table.add_row(*(Text(cell, style) for cell in cells))
    out.print(table)
    warn(out, gathered(warnings_of(variants.loaded, rows)))


def _show(out: Console, found: Sweep, made: Outcome) -> None:
    """The table, and what has to be known to read it."""
    metric = made.metric
    names = [found.words(row.setting) or "all seeds" for row in made.rows]
    table = plain_table("setting")
    # So that long values are not folded into a column of letters.
    table.columns[0].min_width = min(max(map(len, names)), 36)
    shown = made.units
    if len(shown) > MOST_COLUMNS:
        shown = {key: unit for key, unit in shown.items() if NORM in key or ACCURACY in key}
        shown = {metric: made.units[metric]} | shown if metric else shown
    for measure in shown:
        table.add_column(made.title(measure), justify="right", overflow="fold")
        if measure == metric and len(made.rows) > 1:
            table.add_column("Δ to the first", justify="right", overflow="fold")
    for row in made.rows:
        style = "bold green" if row.best else ""
        cells = [Text(names[row.setting] + ("  best mean" if row.best else ""), style)]
        for measure, unit in shown.items():
            cells.append(Text(spread_text(row.measures.get(measure), unit), style))
            if measure == metric and len(made.rows) > 1:
                value, interval = difference_text(row.difference, unit)
                cells.append(Text(f"{value}  {interval}".rstrip()))
        table.add_row(*cells)
    out.print()
    out.print(table)
    if len(shown) < len(made.units):
        out.print(Text(f"{len(made.units) - len(shown)} more columns in the report", "dim"))
    for note in made.notes:
        out.print(Text(note, "dim"), soft_wrap=True)
    for caution in made.cautions:
        out.print(Text(caution, "yellow"), soft_wrap=True)


def _commands(
    recipe: str, variants: Variants, found: Sweep, settings: Sequence[str], suite: str | None
) -> list[str]:
    """For each setting the command that makes it by itself, but for the seed."""
    nodes = variants.loaded.graph.nodes
    splits = {
        name: f"{name}.split={nodes[key].config['split']}"
        for variant in variants.variants
        for name, key in variant.keys.items()
        if "scores" in shown_kind(nodes[key].kind).makes and "split" in nodes[key].config
    }
    given = {text.partition("=")[0].strip() for text in settings}
    asked = [text for name, text in splits.items() if f"{name}.split" not in given]
    made = []
    for setting in found.settings:
        words = ["posttrain", "run", recipe]
        for text in (*settings, *(f"{key}={value}" for key, value in setting.items()), *asked):
            words += ["--set", text]
        words += ["--suite", suite] if suite else []
        made.append(shlex.join(words))
    return made


def _json(variants: Variants, found: Sweep, made: Outcome) -> dict[str, Any]:
    return {
        "recipe": found.recipe,
        "suite": found.suite,
        "split": found.split,
        "axes": {key: list(values) for key, values in found.axes.items()},
        "seeds": list(found.seeds),
        "metric": made.metric,
        "best": None if made.best is None else dict(found.settings[made.best.setting]),
        "settings": settings_json(found, made),
        "notes": list(made.notes),
        "cautions": list(made.cautions),
        "wanted": variants.wanted,
    }


def _write_page(
    path: Path,
    variants: Variants,
    found: Sweep,
    made: Outcome,
    store: Store,
    commands: Sequence[str],
    warnings: Sequence[Mapping[str, Any]],
) -> None:
    from posttrain.report.sweep_page import Shared, Stage, write_sweep_page

    graph = variants.loaded.graph
    prints = graph.fingerprints()
    names: dict[str, list[str]] = {}
    for variant in variants.variants:
        for name, key in variant.keys.items():
            names.setdefault(name, []).append(key)
    shared = [
        Shared(
            name=name,
            kind=graph.nodes[keys[0]].kind,
            different=len(set(keys)),
            wanted=len(keys),
        )
        for name, keys in names.items()
    ]
    # A stage that several variants share is that of the first.
    stages: dict[str, Stage] = {}
    for variant in variants.variants:
        for name, key in variant.keys.items():
            artifact = None if key in stages else store.find(prints[key])
            if artifact is not None:
                stages[key] = Stage(
                    name=name,
                    setting=variant.setting,
                    seed=variant.seed,
                    facts=facts_of(artifact),
                )
    with guarded(path.absolute().parent, "writing the report"):
        write_sweep_page(
            path,
            sweep=found,
            made=made,
            shared=shared,
            stages=list(stages.values()),
            commands=commands,
            warnings=warnings,
            source=variants.loaded.path.read_text(encoding="utf-8"),
        )
