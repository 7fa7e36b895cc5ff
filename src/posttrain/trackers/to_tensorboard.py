"""TensorBoard: event files in the store, written without torch and without TensorFlow."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.engine.text import in_markdown
from posttrain.trackers.base import About, Cell


class TensorBoard:
    """A `Tracker`. `tensorboard --logdir posttrain-store/trackers/tensorboard` shows all runs."""

    def begin(self, about: About) -> None:
        """See `Tracker.begin`. A run that goes on gets one more file in the same folder."""
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = Path(about.directory) / "tensorboard" / about.name
        folder.mkdir(parents=True, exist_ok=True)
        self.writer: Any = EventFileWriter(str(folder), flush_secs=5)
        config = json.dumps(about.config, indent=1, sort_keys=True, default=str)
        # Four spaces make it code.
        self._text("config", "".join(f"    {line}\n" for line in config.splitlines()), 0)

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker.metrics`."""
        from tensorboard.plugins.scalar.summary import scalar_pb

        for name, value in values.items():
            self._add(scalar_pb(f"{stage}/{name}", value), step)

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], step: int
    ) -> None:
        """See `Tracker.table`."""
        cells = [
            columns,
            ["---"] * len(columns),
            *([_cell(value) for value in row] for row in rows),
        ]
        self._text(name, "\n".join(f"| {' | '.join(row)} |" for row in cells), step)

    def finish(self) -> None:
        """See `Tracker.finish`."""
        self.writer.close()

    def _text(self, name: str, text: str, step: int) -> None:
        from tensorboard.plugins.text.summary import text_pb

        self._add(text_pb(name, text), step)

    def _add(self, summary: Any, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self.writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))


def _cell(value: Cell) -> str:
    if isinstance(value, str):
        return in_markdown(value)
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
