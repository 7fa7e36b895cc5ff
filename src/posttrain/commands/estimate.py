"""`plan --estimate`: the machine that is asked about, the calibration where one is needed, and how
an estimate is shown."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.text import Text

from posttrain.backends.given_memory import given_memory, machine_memory, memory_size
from posttrain.commands.io import plain_table
from posttrain.engine.atomic import human_bytes
from posttrain.engine.errors import ConfigError
from posttrain.engine.graph import Graph
from posttrain.engine.planner import PlanRow
from posttrain.engine.runner import usable_cores
from posttrain.engine.store import Store
from posttrain.report.wording import DASH, duration, number

if TYPE_CHECKING:  # pydantic stands behind them
    from posttrain.estimate.about import Estimate, Machine
    from posttrain.estimate.rates import Rates, Setting

CALIBRATION_SECONDS = 25.0
"""What measuring this machine may take, all models together; 30 with imports."""
STAGE_SHARE = {"cpu": 3 / 4, "cuda": 9 / 10}
"""The share of the memory that one stage may take where nobody says it (`backends/memory.py`)."""


def machine_of(
    *, jobs: int | None, device: Literal["auto", "cpu", "cuda"], memory: str | None
) -> Machine:
    """The machine that stages would run on. Imports torch where CUDA is to be looked for.

    Raises ConfigError for a device that is not there and for a memory that is no number of bytes.
    """
    given = given_memory() if memory is None else memory_size(memory, "--memory")
    name, total = "cpu", machine_memory()
    if device != "cpu" and (device == "cuda" or _has_card()):
        import torch

        from posttrain.backends.device import choose_device, device_name

        chosen = choose_device(device)
        name = device_name(chosen)
        if chosen.type == "cuda":
            total = int(torch.cuda.mem_get_info(chosen)[1])
    on_card = name.startswith("cuda")
    return _machine(jobs or (1 if on_card else usable_cores()), name, given, total)


def known_machine(jobs: int, device: str, memory: int | None) -> Machine:
    """The machine that a run has chosen; of a card no more is known here than its name, so that
    nothing of it is too small."""
    total = machine_memory() if device == "cpu" else sys.maxsize
    return _machine(jobs, device, memory, total)


def _machine(jobs: int, device: str, given: int | None, total: int) -> Machine:
    from posttrain.estimate.about import Machine

    return Machine(
        jobs=jobs,
        cores=usable_cores(),
        total=total,
        memory=given or int(STAGE_SHARE[device.partition(" ")[0]] * total),
        given=given is not None,
        device=device,
    )


def _has_card() -> bool:
    """Whether the system shows an NVIDIA card, so that it is worth asking torch."""
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists()


def estimate_of(
    graph: Graph, rows: Sequence[PlanRow], store: Store, machine: Machine, *, measure: bool
) -> Estimate:
    """The estimate of a plan. With `measure` this machine is calibrated where no earlier run tells
    how long a stage takes, and problems are made to see how long they are."""
    from posttrain.estimate.about import disk_free, estimate

    how = measured if measure else None
    return estimate(graph, rows, store, machine, free=disk_free(store.root), measure=how)


def measured(settings: Sequence[Setting]) -> dict[str, Rates]:
    """The rates of these settings, by key; they are remembered."""
    from posttrain.estimate.calibration import measure
    from posttrain.estimate.rates import keep_rates

    found = {}
    for setting in settings:
        found[setting.key] = measure(setting, seconds=CALIBRATION_SECONDS / len(settings))
        keep_rates({setting.key: found[setting.key]})
    return found


def told(estimate: Estimate) -> dict[str, Any]:
    """The estimate as JSON data."""
    from posttrain.estimate.fits import what_does_not_fit

    machine, (peak, at_once) = estimate.machine, estimate.peak
    return {
        "stages": [stage.told() for stage in estimate.stages],
        "totals": {
            "seconds": round(estimate.seconds, 1),
            "seconds_of_stages": round(sum(s.seconds or 0.0 for s in estimate.stages), 1),
            "unknown": estimate.unknown,
            "sampled": round(sum(stage.sampled for stage in estimate.stages)),
            "learned": round(sum(stage.learned for stage in estimate.stages)),
            "scored": round(sum(stage.scored for stage in estimate.stages)),
            "memory": peak,
            "memory_of": at_once,
            "disk": estimate.disk,
            "disk_kept": estimate.kept,
        },
        "critical_path": [
            {"stage": name, "beside": estimate.times.beside(name)}
            for name in estimate.times.critical
        ],
        "machine": {
            "jobs": machine.jobs,
            "cores": machine.cores,
            "device": machine.device,
            "memory": machine.total,
            "memory_of_a_stage": machine.memory,
            "disk_free": estimate.free,
        },
        "does_not_fit": what_does_not_fit(estimate),
    }


def show(out: Console, estimate: Estimate) -> None:
    """The estimate for people."""
    if not estimate.stages:
        out.print(Text("nothing to run: everything is in the store", "dim"))
        return
    columns = ("stage", "params", "sampled", "learned", "scored")
    table = plain_table(*columns, "learner", "sampler", "teachers", "peak", "disk", "time")
    for column in table.columns:
        column.no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    for stage in estimate.stages:
        memory = stage.memory
        sizes = (memory.learner, memory.sampler, memory.readers, stage.peak, stage.disk.kept)
        table.add_row(
            stage.name,
            number(stage.parameters) if stage.parameters else "",
            *(_count(value) for value in (stage.sampled, stage.learned, stage.scored)),
            *(human_bytes(size) if size else "" for size in sizes),
            DASH if stage.seconds is None else duration(stage.seconds),
        )
    out.print()
    out.print(table)
    out.print()
    _show_sources(out, estimate)
    _show_totals(out, estimate)


def _count(value: float) -> str:
    return number(round(value)) if value else ""


def _show_sources(out: Console, estimate: Estimate) -> None:
    """How the numbers were found, the stages of one answer together."""
    by_answer: dict[tuple[str, ...], list[str]] = {}
    for stage in estimate.stages:
        by_answer.setdefault(tuple(stage.found), []).append(stage.name)
    table = plain_table("found", "for", show_header=False)
    for answer, names in by_answer.items():
        if answer:
            table.add_row(Text("; ".join(answer), "dim"), Text(", ".join(names), "dim"))
    if table.row_count:
        out.print(table)
        out.print()


def _show_totals(out: Console, estimate: Estimate) -> None:
    from posttrain.estimate.fits import what_does_not_fit

    machine = estimate.machine
    stages = sum(stage.seconds or 0.0 for stage in estimate.stages)
    at_once = "1 stage at a time" if machine.jobs == 1 else f"up to {machine.jobs} stages at once"
    text = f"time {duration(estimate.seconds)} with {at_once}; {duration(stages)} of all stages"
    out.print(Text(text, "bold"), soft_wrap=True)
    if estimate.unknown:
        names = ", ".join(estimate.unknown)
        out.print(Text(f"not in it, as their time is not known: {names}", "yellow"), soft_wrap=True)
    path = (_beside(name, estimate.times.beside(name)) for name in estimate.times.critical)
    out.print(Text(f"the end waits for {' → '.join(path)}"), soft_wrap=True)
    peak, together = estimate.peak
    text = f"memory {human_bytes(peak)} at most ({', '.join(together)})"
    out.print(Text(f"{text} of {human_bytes(machine.total)}"), soft_wrap=True)
    kept = f"disk {human_bytes(estimate.disk)} at most, {human_bytes(estimate.kept)} of it kept"
    out.print(Text(f"{kept}; {human_bytes(estimate.free)} are free"), soft_wrap=True)
    for text in what_does_not_fit(estimate):
        out.print(Text.assemble(("does not fit  ", "bold red"), text), soft_wrap=True)


def _beside(name: str, others: Sequence[str]) -> str:
    return f"{name} (beside {', '.join(others)})" if others else name


def refuse_alone(**given: object) -> None:
    """Raise ConfigError for options of `plan` that only an estimate reads."""
    for name, value in given.items():
        if value not in (None, "auto"):
            raise ConfigError(
                f"--{name} says on what the stages would run, which only an estimate reads; add "
                "--estimate, or leave it out"
            )


def facts_by_fingerprint(
    estimate: Estimate, rows: Sequence[PlanRow]
) -> Mapping[str, Mapping[str, Any]]:
    """The estimates of stages for their records, by fingerprint."""
    prints = {row.name: row.fingerprint for row in rows}
    return {prints[stage.name]: {"estimate": stage.facts()} for stage in estimate.stages}
