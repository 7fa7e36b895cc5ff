"""The rollouts of an rl stage as data: what it sampled, step by step, for the stages after it.

It is also the stage's memory of what it has sampled: a resumed stage reads it back up to its step
checkpoint, so that whoever goes by earlier rollouts goes on as if nothing had happened.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from posttrain.engine.jsonl import write_jsonl
from posttrain.rl.batch import Batch
from posttrain.stages.rollout import rollout_rows


class RolloutLog:
    """Appends every step's rollouts to rollouts.jsonl of the stage's artifact."""

    def __init__(self, out: Path) -> None:
        self.path = out / "rollouts.jsonl"

    def resume(self, step: int) -> list[list[dict[str, Any]]]:
        """Keep the rows of the first `step` steps and drop later ones; the rows, by step."""
        if not self.path.exists():
            return []
        rows: list[list[dict[str, Any]]] = [[] for _ in range(step)]
        kept = 0
        with self.path.open("rb") as lines:
            # Steps follow one another. The last line may have been cut off where the stage was
            # killed.
            for line in lines:
                row = json.loads(line) if line.endswith(b"\n") else {"step": step}
                if row["step"] >= step:
                    break
                rows[row["step"]].append(row)
                kept += len(line)
        # Cut off in place: a kill meanwhile loses nothing, and leaves no second file.
        os.truncate(self.path, kept)
        return rows

    def write(
        self, step: int, batch: Batch, *, model: str, temperature: float, judged: bool
    ) -> list[dict[str, Any]]:
        """Append the rows of 0-based `step` and return them; where other judges than the verifier
        were asked (`judged`) each has its reward as its score as well."""
        rows = [
            row | {"step": step}
            for row in rollout_rows(batch, model=model, temperature=temperature)
        ]
        if judged:
            scores = batch["reward_B"].tolist()
            rows = [row | {"score": score} for row, score in zip(rows, scores, strict=True)]
        write_jsonl(self.path, rows, append=True)
        return rows
