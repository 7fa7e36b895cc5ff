"""Trackio: runs in a local SQLite file, or a Space (`TRACKIO_SPACE_ID`). Its calls are W&B's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.trackers.base import About, Cell


class Trackio:
    """A `Tracker`. `posttrain run mopd --log trackio`, then `trackio show --project mopd`."""

    def begin(self, about: About) -> None:
        """See `Tracker.begin`."""
        import trackio

        self.trackio: Any = trackio
        trackio.init(
            project=about.project,
            name=about.name,
            group=about.project,
            config=dict(about.config),
            resume="allow",
            # Of the process of the tracker it would say nothing.
            auto_log_cpu=False,
        )

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker.metrics`."""
        self.trackio.log({f"{stage}/{name}": value for name, value in values.items()}, step=step)

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], step: int
    ) -> None:
        """See `Tracker.table`."""
        data = [list(row) for row in rows]
        self.trackio.log({name: self.trackio.Table(columns=list(columns), data=data)}, step=step)

    def finish(self) -> None:
        """See `Tracker.finish`."""
        self.trackio.finish()
