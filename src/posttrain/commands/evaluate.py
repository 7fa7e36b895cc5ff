"""`eval`: scores of a model on the tasks of lm-eval, kept as an artifact."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.text import Text

from posttrain.commands import io
from posttrain.commands.io import console, emit, plain_table
from posttrain.commands.run import choose, make, summary
from posttrain.commands.tracking import sinks_of
from posttrain.engine.errors import ConfigError, StageError
from posttrain.engine.planner import plan as plan_graph
from posttrain.engine.record import Artifact
from posttrain.engine.store import Store
from posttrain.engine.unfinished import is_place
from posttrain.report.benchmarks import read_benchmarks
from posttrain.report.live import LiveView
from posttrain.report.wording import DASH, duration, number
from posttrain.stages.kinds import kinds_making, shown_kind
from posttrain.stages.step_checkpoint import step_model

if TYPE_CHECKING:  # it imports pydantic
    from posttrain.language.loader import Loaded


def eval(
    artifact: io.ArtifactName,
    tasks: Annotated[
        str,
        typer.Option("--tasks", metavar="NAMES", help="Tasks of lm-eval, or .yaml files of them."),
    ],
    include: Annotated[
        Path | None,
        typer.Option("--include", metavar="DIR", help="A directory with tasks of your own."),
    ] = None,
    fewshot: Annotated[
        int | None, typer.Option("--fewshot", min=0, help="Solved examples before each question.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Only the first problems of each task.")
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Ask without the model's chat template.")
    ] = False,
    system: Annotated[str, typer.Option("--system", help="A system message.")] = "",
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="Longest response.")
    ] = None,
    precision: Annotated[
        Literal["float32", "bfloat16"], typer.Option("--precision", help="In which models compute.")
    ] = "float32",
    seed: io.Seed = None,
    device: io.Device = "auto",
    memory: io.Memory = None,
    store: io.StorePath = io.DEFAULT_STORE,
    as_json: io.Json = False,
) -> None:
    r"""Score a model on tasks of lm-eval, such as gsm8k,ifeval. The scores are kept in the store.

    The card of the model, reports and `compare` read them.
    Needs `pip install 'posttrain\[eval]'`.
    """
    # It imports pydantic.
    from posttrain.language.loader import Loaded
    from posttrain.language.scoring import scoring_graph
    from posttrain.stages.harness import find_tasks

    began = time.monotonic()
    place = Store(store)
    model = the_model(place, artifact)
    asked = [name.strip() for name in tasks.split(",") if name.strip()]
    if not asked:
        raise ConfigError("--tasks names no task; give names of lm-eval's, such as gsm8k,ifeval")
    found = find_tasks(asked, include)
    values = {"tasks": list(found.names), "fewshot": fewshot, "limit": limit, "system": system}
    values |= {"chat_template": not plain, "max_new_tokens": max_new_tokens}
    values |= {"precision": precision, "seed": seed or 0}
    loaded = Loaded(
        name=f"eval {model.label}",
        path=model.path,
        graph=scoring_graph(model, values, tasks_digest=found.digest, include=found.include),
        suite=f"lm-eval {found.version}",
        seed=seed or 0,
        settings={},
        sources=(),
    )
    out = console(as_json=as_json)
    made, was_there = score(loaded, place, out, device=device, memory=memory)
    scores, seconds = read_benchmarks(made), time.monotonic() - began
    if as_json:
        emit(
            {"artifact": made.label, "path": str(made.path), "model": model.label}
            | {"cached": was_there, "seconds": round(seconds, 3), **scores}
        )
        return
    show(out, scores["tasks"])
    out.print(Text(f"{made.label}: {duration(seconds)}", "bold"))


def the_model(store: Store, text: str) -> Artifact:
    """The artifact meant by `text`. Raises ConfigError for one that writes no responses."""
    model = step_model(store, text) if is_place(text) else store.resolve(text)
    if "model" not in shown_kind(model.kind).makes:
        raise ConfigError(
            f"{model.label} is of kind {model.kind}, not a model; kinds that are: "
            f"{', '.join(kinds_making('model'))}"
        )
    return model


def score(
    loaded: Loaded,
    store: Store,
    out: Console,
    *,
    device: Literal["auto", "cpu", "cuda"],
    memory: str | None,
) -> tuple[Artifact, bool]:
    """Run the stage unless it is there; the artifact, and whether it was there."""
    graph = loaded.graph
    rows = plan_graph(graph, store)
    summary(out, loaded, rows, store, ", ".join(graph.nodes[graph.target].config["tasks"]))
    view = LiveView(rows, graph, out)
    how = choose(rows, loaded, jobs=1, device=device, compile=False, memory=memory)
    make(loaded, store, view, how, sinks_of(loaded, store, ()))
    made = store.find(graph.fingerprints()[graph.target])
    if made is None:
        raise StageError(f"{graph.target} is not in the store; run the same command again")
    return made, rows[-1].action == "cached"


def show(out: Console, tasks: Mapping[str, Mapping[str, Any]]) -> None:
    """The scores as a table."""
    table = plain_table("task", "metric", "score", "± s.e.", "problems", "examples")
    for column in table.columns[2:]:
        column.justify = "right"
    for name, task in tasks.items():
        rows: Sequence[tuple[str, Mapping[str, Any]]] = list(task["metrics"].items())
        for place, (metric, value) in enumerate(rows):
            error = DASH if value["stderr"] is None else number(value["stderr"])
            counts = [task["problems"], task["fewshot"]] if place == 0 else ["", ""]
            table.add_row(
                Text(name if place == 0 else "", "bold"),
                Text(metric),
                number(value["value"]),
                error,
                *(DASH if count is None else str(count) for count in counts),
            )
    out.print(table)
