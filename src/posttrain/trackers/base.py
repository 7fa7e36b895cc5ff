"""What a tracker is, which there are, and what they are told about a run. Imports no tracker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from posttrain.engine.errors import ConfigError, choices_text

Cell = str | float | int | None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of the run, as the table of artifacts shows it."""

    name: str
    kind: str
    version: int
    fingerprint: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Edge -> label (`name-fingerprint[:12]`) of what it reads."""


@dataclass(frozen=True, kw_only=True)
class About:
    """What a run is. The same recipe, settings and seed have the same name, so that a run that was
    stopped goes on in the same run of the tracker."""

    project: str
    """The recipe's name."""
    name: str
    """Recipe and fingerprint of its target: `mopd-3f9ac01d22be`."""
    config: Mapping[str, Any]
    """recipe, suite, seed, and `stages`: name -> kind, fingerprint and settings. JSON."""
    directory: str
    """Where a tracker may keep files: in the store."""
    stages: Sequence[Stage] = ()


class Tracker(Protocol):
    """Something that keeps what a run tells. A method may raise whatever its library raises: the
    run goes on without the tracker.

    Names are the same in all of them: `STAGE/METRIC`, over the steps of that stage.
    """

    def begin(self, about: About) -> None:
        """Open the run of that name, or go on with it."""
        ...

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step of a stage, by the name that they have in its metrics.jsonl."""
        ...

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], step: int
    ) -> None:
        """A table under a name with its stage, in place of the one that had that name before."""
        ...

    def finish(self) -> None:
        """The run has ended, or was stopped."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrackerKind:
    """One of the trackers that can be named."""

    name: str
    """As in `--log NAME`; also that of the extra, and of the package that it needs."""
    place: str
    """Its class, as "module:Class"."""


TRACKERS: Mapping[str, TrackerKind] = {
    name: TrackerKind(name=name, place=f"posttrain.trackers.{module}")
    for name, module in {
        "trackio": "to_trackio:Trackio",
        "wandb": "to_wandb:Wandb",
        "tensorboard": "to_tensorboard:TensorBoard",
    }.items()
}
"""Name -> what it is."""


def trackers_named(names: Sequence[str]) -> list[TrackerKind]:
    """The trackers of these names, each once. Raises ConfigError for a name that there is not, and
    for a tracker whose package is not installed."""
    found = []
    for name in dict.fromkeys(names):
        if name not in TRACKERS:
            raise ConfigError(f"--log {name!r}: no such tracker; {choices_text(name, TRACKERS)}")
        if find_spec(name) is None:
            raise ConfigError(
                f"--log {name}: the package {name} is not installed; pip install "
                f"'posttrain[{name}]'"
            )
        found.append(TRACKERS[name])
    return found


def directory_of(store: Path) -> Path:
    """Where in a store trackers keep their files: what they were told, logs, TensorBoard's."""
    return store / "trackers"
