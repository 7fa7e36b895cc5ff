"""Weights & Biases. Its own variables hold: WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY, WANDB_DIR."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.trackers.base import About, Cell


class Wandb:
    """A `Tracker`. Every stage has an axis of its own, `STAGE/step`: W&B's own step only grows."""

    def begin(self, about: About) -> None:
        """See `Tracker.begin`."""
        import wandb

        self.wandb: Any = wandb
        self.run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or about.project,
            id=about.name,
            name=about.name,
            group=about.project,
            config=dict(about.config),
            resume="allow",
        )
        for stage in about.stages:
            self.run.define_metric(f"{stage.name}/step", hidden=True)
            self.run.define_metric(f"{stage.name}/*", step_metric=f"{stage.name}/step")

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker.metrics`."""
        named = {f"{stage}/{name}": value for name, value in values.items()}
        self.run.log({f"{stage}/step": step} | named)

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], step: int
    ) -> None:
        """See `Tracker.table`."""
        data = [list(row) for row in rows]
        table = self.wandb.Table(columns=list(columns), data=data, allow_mixed_types=True)
        self.run.log({name: table})

    def finish(self) -> None:
        """See `Tracker.finish`."""
        self.run.finish()
