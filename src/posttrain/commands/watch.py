"""`watch`: what the stages of a store do at this moment, from another terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from posttrain.commands import io
from posttrain.commands.io import console, emit
from posttrain.engine.errors import StoreError
from posttrain.engine.record import SHORT
from posttrain.engine.store import Store
from posttrain.report.live import PLAIN_SECONDS
from posttrain.report.watching import Watched, finished, in_work

REFRESH_SECONDS = 2.0
MOST_FINISHED = 5
"""Of the stages that are finished, how many of the newest are listed."""


def watch(
    stage: Annotated[
        str | None,
        typer.Argument(metavar="[STAGE]", help="One stage only. Default: those that run."),
    ] = None,
    store: io.StorePath = io.DEFAULT_STORE,
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on until the run ends, or until Ctrl-C.")
    ] = False,
    as_json: io.Json = False,
) -> None:
    """Watch a run from another terminal: progress, small curves, newest samples."""
    place = Store(store)
    out = console(as_json=as_json)
    if not follow:
        detailed, others = seen(place, stage)
        _show(out, place, detailed, others, as_json=as_json)
        return
    try:
        _follow(out, place, stage, as_json=as_json)
    except KeyboardInterrupt:
        # That is how one stops to watch.
        return


def _follow(out: Console, place: Store, stage: str | None, *, as_json: bool) -> None:
    """Show anew every few seconds. A terminal is drawn over; elsewhere it is text, less often."""
    # It draws curves, which `--help` has no use for.
    from posttrain.report.watch_view import watch_view

    drawn = out.is_terminal and not as_json
    live = Live(console=out, auto_refresh=False, vertical_overflow="crop") if drawn else None
    seconds = REFRESH_SECONDS if drawn or as_json else PLAIN_SECONDS
    with live or nullcontext():
        for detailed, others in _moments(place, stage, seconds):
            if live is None:
                _show(out, place, detailed, others, as_json=as_json)
            else:
                live.update(watch_view(detailed, others), refresh=True)


def _moments(
    place: Store, stage: str | None, seconds: float
) -> Iterator[tuple[list[Watched], list[Watched]]]:
    """What is there to see, every `seconds`, until the run (or the stage) has ended."""
    ran = False
    while True:
        # Before looking: what ends meanwhile is seen once more.
        used = place.used()
        detailed, others = seen(place, stage)
        running = any(one.state == "running" for one in (*detailed, *others))
        ran = ran or running
        yield detailed, others
        if stage is not None and not running and (ran or not used):
            return
        if stage is None and ran and not used:
            return
        time.sleep(seconds)


def seen(place: Store, stage: str | None) -> tuple[list[Watched], list[Watched]]:
    """The stages of which all is shown, and those that have a line each.

    Without a name all that runs is shown, or else the newest that has finished. Raises StoreError
    for a name of nothing.
    """
    at_work = in_work(place)
    if stage is not None:
        return [_named(place, at_work, stage)], []
    running = [one for one in at_work if one.state == "running"]
    stopped = [one for one in at_work if one.state != "running"]
    newest = [finished(artifact) for artifact in place.list()[-MOST_FINISHED:]]
    # Of an evaluation there are no curves.
    trained = [one for one in newest if one.curves][-1:]
    detailed = running or trained
    return detailed, [one for one in (*newest, *stopped) if one not in detailed]


def _named(place: Store, at_work: list[Watched], name: str) -> Watched:
    """The stage of that name: one that runs, else what is finished, else what was stopped."""
    fitting = [
        one
        for one in at_work
        if name in (one.name, one.facts.label)
        or (4 <= len(name) <= SHORT and one.facts.fingerprint.startswith(name))
    ]
    running = [one for one in fitting if one.state == "running"]
    if running:
        return running[0]
    try:
        return finished(place.resolve(name))
    except StoreError:
        if not fitting:
            raise
        return fitting[0]


def _show(
    out: Console,
    place: Store,
    detailed: list[Watched],
    others: list[Watched],
    *,
    as_json: bool,
) -> None:
    if as_json:
        stages = [one.told() for one in (*detailed, *others)]
        emit({"store": str(place.root), "running": place.used(), "stages": stages})
    elif detailed or others:
        from posttrain.report.watch_view import watch_view

        out.print(watch_view(detailed, others))
    else:
        out.print(Text(f"there is nothing in {place.root} yet"), soft_wrap=True)
