"""Trackers that tests run in their process: one that fails, one that hangs, one that is whole."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from posttrain.trackers.base import About


class Failing:
    """Fails when it is opened, as one whose server cannot be reached does."""

    def begin(self, about: About) -> None:
        print("much text of a library")
        raise RuntimeError("nobody\nis logged in")


class Hanging:
    """Never comes back."""

    def begin(self, about: About) -> None:
        time.sleep(600)


class Written:
    """Appends every call to told.jsonl."""

    def begin(self, about: About) -> None:
        self.path = Path(about.directory) / "told.jsonl"
        self._add("begin", about.name)

    def metrics(self, *told: Any) -> None:
        self._add("metrics", *told)

    def table(self, *told: Any) -> None:
        self._add("table", *told)

    def finish(self) -> None:
        self._add("finish")

    def _add(self, *told: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(told) + "\n")
