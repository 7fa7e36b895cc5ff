"""The estimate of a run: what each stage that is to run will take, and all of them together."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from posttrain.engine.graph import Graph
from posttrain.engine.planner import PlanRow
from posttrain.engine.store import Store
from posttrain.estimate.costs import RUN_SECONDS, overhead, seconds_of_part
from posttrain.estimate.history import Past
from posttrain.estimate.lengths import Texts
from posttrain.estimate.memory import Disk, Memory, disk_of, memory_of, of_loading
from posttrain.estimate.parts import Work
from posttrain.estimate.rates import Rates, Setting, read_rates
from posttrain.estimate.shapes import Model
from posttrain.estimate.timetable import Timetable, timetable
from posttrain.estimate.view import StageView, World
from posttrain.stages.kinds import shown_kind

SAMPLING_SHARE = {"cpu": 4, "cuda": 2}
"""Which part of its memory sampling may take, as `backends/memory.py` has it."""

Measure = Callable[[Sequence[Setting]], Mapping[str, Rates]]
"""Measures rates of settings that are not known yet, by key."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """On what a run is to be made."""

    jobs: int
    cores: int
    total: int
    """Bytes of memory that there are: of the machine, or of the device where models compute."""
    memory: int
    """Bytes that one stage may take of it."""
    given: bool = False
    """Whether somebody has said so."""
    device: str = "cpu"
    """As records have it: `cpu`, or `cuda` with the name of the card."""

    @property
    def sampling(self) -> int:
        """Bytes that caches of sampling may take."""
        return self.memory if self.given else self.total // SAMPLING_SHARE[self.kind]

    @property
    def kind(self) -> str:
        """cpu or cuda."""
        return self.device.partition(" ")[0]


@dataclass(frozen=True, kw_only=True)
class StageEstimate:
    """What one stage will take."""

    name: str
    kind: str
    parameters: int | None
    """Of its model; None without one."""
    sampled: float
    learned: float
    scored: float
    tokens: float
    """Those that the stage itself counts."""
    memory: Memory
    peak: int
    """Bytes of memory, with the process."""
    disk: Disk
    narrow: int | None
    """What it would take in bfloat16; None where it fits as it is."""
    precision: str
    lora: bool
    may_adapt: bool
    """Whether it learns an adapter, and whether its kind can."""
    seconds: float | None
    """None where nothing tells how fast this machine is."""
    found: Sequence[str]
    """How these numbers were found."""

    def facts(self) -> dict[str, Any]:
        """As JSON data, for the record of the stage."""
        return {
            "seconds": None if self.seconds is None else round(self.seconds, 3),
            "tokens": round(self.tokens),
            "peak_memory": self.peak,
            "disk": self.disk.kept,
            "found": list(self.found),
        }

    def told(self) -> dict[str, Any]:
        """As JSON data, for people's programs."""
        memory = {name: getattr(self.memory, name) for name in ("learner", "sampler", "readers")}
        return {
            "name": self.name,
            "kind": self.kind,
            "parameters": self.parameters,
            "sampled": round(self.sampled),
            "learned": round(self.learned),
            "scored": round(self.scored),
            "memory": memory | {"peak": self.peak},
            "disk": asdict(self.disk),
            "seconds": None if self.seconds is None else round(self.seconds, 1),
            "found": list(self.found),
        }


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run will take."""

    stages: Sequence[StageEstimate]
    machine: Machine
    times: Timetable
    """Stages whose seconds are not known take none in it."""
    free: int
    """Bytes that are free on the disk of the store."""

    @property
    def seconds(self) -> float:
        """From start to end, where all stages are known."""
        return self.times.seconds

    @property
    def unknown(self) -> list[str]:
        """Stages whose seconds are not known."""
        return [stage.name for stage in self.stages if stage.seconds is None]

    @property
    def kept(self) -> int:
        """Bytes that the run leaves on the disk."""
        return sum(stage.disk.kept for stage in self.stages)

    @property
    def disk(self) -> int:
        """The most bytes on the disk at once: all that is kept, and step checkpoints meanwhile."""
        meanwhile = {stage.name: float(stage.disk.meanwhile) for stage in self.stages}
        return self.kept + int(self.times.most(meanwhile)[0])

    @property
    def peak(self) -> tuple[int, list[str]]:
        """The most memory that stages at work at once take, and which they are."""
        total, names = self.times.most({stage.name: float(stage.peak) for stage in self.stages})
        return int(total), names


@dataclass(kw_only=True)
class _Counted:
    """A stage whose work is counted."""

    view: StageView
    work: Work | None
    left: float
    """The share of its steps that is to be made."""
    threads: int
    models: dict[str, Model | None] = field(default_factory=dict)

    def settings(self, device: str) -> dict[str, Setting]:
        """What rates are needed for its parts, by edge."""
        precision = str(self.view.config.get("precision", "float32"))
        return {
            edge: Setting.of(model, precision=precision, threads=self.threads, device=device)
            for edge, model in self.models.items()
            if model is not None
        }


def estimate(
    graph: Graph,
    rows: Sequence[PlanRow],
    store: Store,
    machine: Machine,
    *,
    free: int,
    measure: Measure | None = None,
) -> Estimate:
    """What the stages that are to run will take.

    Without `measure` nothing is computed for it: seconds come from earlier runs in the store and
    from rates that are known, and lengths from data that is there.
    """
    world = World(
        graph=graph,
        rows={row.name: row for row in rows},
        past=Past(store),
        texts=Texts(make=measure is not None),
        device=machine.device,
        host=platform.node(),
    )
    first: dict[str, str] = {}
    for row in rows:
        first.setdefault(row.fingerprint, row.name)
    todo = [
        r for r in rows if r.action in ("run", "needs input") and first[r.fingerprint] == r.name
    ]
    counted = [_count(world, row, machine) for row in todo]
    rates = _rates(counted, machine, measure)
    stages = [_estimated(one, rates, machine) for one in counted]
    stages[:1] = [_begun(stage) for stage in stages[:1]]
    world.texts.remember()
    times = timetable(
        graph.order(),
        {name: list(graph.nodes[name].inputs.values()) for name in graph.order()},
        {stage.name: stage.seconds or 0.0 for stage in stages},
        jobs=machine.jobs,
    )
    return Estimate(stages=stages, machine=machine, times=times, free=free)


def _count(world: World, row: PlanRow, machine: Machine) -> _Counted:
    view = StageView(world, row.name)
    place = shown_kind(row.kind).work
    work: Work | None = None
    if place:
        try:
            work = resolve_name(place)(view)
        except Exception as error:  # it may be a user's own, and the stage runs without it
            view.note(f"its work cannot be counted ({type(error).__name__}: {error})")
    threads = max(1, machine.cores // min(machine.jobs, world.graph.width(row.name)))
    one = _Counted(view=view, work=work, left=1.0, threads=threads)
    if work is None:
        if not place:
            view.note("its kind does not say what it computes")
        return one
    one.models = {part.edge: view.model(part.edge) for part in work.parts}
    done = row.reason.removeprefix("resumes at step ")
    if done != row.reason and done.isdigit() and work.steps:
        one.left = max(0.0, 1 - int(done) / work.steps)
        view.note(f"the {round(work.steps - int(done))} steps that are left")
    return one


def _rates(
    counted: Sequence[_Counted], machine: Machine, measure: Measure | None
) -> dict[str, Rates]:
    """Those that are known, and those that are measured for stages without an earlier run."""
    known = read_rates()
    if measure is None:
        return known
    wanted = {
        setting.key: setting
        for one in counted
        if one.view.like is None
        for setting in one.settings(machine.kind).values()
        if setting.key not in known
    }
    return known | dict(measure(list(wanted.values()))) if wanted else known


def _estimated(one: _Counted, rates: Mapping[str, Rates], machine: Machine) -> StageEstimate:
    view, work = one.view, one.work or Work()
    like = view.like
    tokens = work.counted
    if like is not None:
        tokens = like.tokens(work.steps) or tokens
    own = view.model("")
    limits = {"budget_bytes": machine.memory, "sampling": machine.sampling}
    memory = memory_of(work, view.model, view.config, **limits)
    if own is not None and not work.parts:
        memory = of_loading(own)
    narrow = None
    if memory is not None and memory.peak > machine.memory:
        halved = {**view.config, "precision": "bfloat16"}
        less = memory_of(work, view.model, halved, **limits)
        narrow = None if less is None else less.peak
    if memory is None:
        view.note("memory unknown: the sizes of a model are not known yet")
        memory = Memory(peak=0)
    peak = memory.peak
    if like is not None and (found := like.memory()) is not None and like.exact:
        peak = found
    seconds = _seconds(one, rates, machine, tokens)
    return StageEstimate(
        name=view.name,
        kind=view.node.kind,
        parameters=None if own is None else own.parameters,
        sampled=work.tokens("sample") * one.left,
        learned=work.tokens("learn") * one.left,
        scored=work.tokens("score") * one.left,
        tokens=tokens,
        memory=memory,
        peak=peak,
        disk=disk_of(work, own, view.config, memory),
        narrow=narrow,
        precision=str(view.config.get("precision", "")),
        lora=bool(view.config.get("lora")),
        may_adapt="lora" in view.config,
        seconds=seconds,
        found=tuple(view.notes),
    )


def _begun(first: StageEstimate) -> StageEstimate:
    """The first stage of a run waits until what stages import is there; an earlier run of it did
    so too."""
    by_runs = any(text.startswith("from ") for text in first.found[:1])
    if first.seconds is None or by_runs:
        return first
    return replace(first, seconds=first.seconds + RUN_SECONDS)


def _seconds(
    one: _Counted, rates: Mapping[str, Rates], machine: Machine, tokens: float
) -> float | None:
    """By earlier runs, else by the rates of the machine, else None."""
    view, work = one.view, one.work
    if view.like is not None:
        view.notes.insert(0, view.like.said)
        return one.left * view.like.seconds(0.0 if work is None else work.steps, tokens)
    if work is None:
        return None
    settings = one.settings(machine.kind)
    total = 0.0
    for part in work.parts:
        model = one.models[part.edge]
        found = rates.get(settings[part.edge].key) if model is not None else None
        if model is None or found is None:
            view.note("seconds unknown: no earlier run, and this machine was not measured")
            return None
        total += seconds_of_part(part, model, found, threads=one.threads)
    if work.parts:
        view.notes.insert(0, "calibrated")
    loaded = sum(4.0 * model.parameters for model in one.models.values() if model is not None)
    sources = [view.model(edge) for edge in view.inputs] if work.saves and not work.parts else []
    loaded += sum(model.bytes for model in sources if model is not None)
    own = view.model("")
    if own is not None and not work.parts and not work.saves:
        # What comes from outside is loaded once, to see that it can be.
        loaded += own.bytes
    saved = float(own.bytes) if work.saves and own is not None else 0.0
    return one.left * total + overhead(work, loaded + saved)


def disk_free(path: Path) -> int:
    """Bytes that are free where a directory is or is to be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
