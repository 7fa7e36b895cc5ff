"""The rollouts of an rl stage as data: what it sampled, step by step, for the stages after it.

It is also the stage's memory of what it has sampled: a resumed stage reads it back up to its step
checkpoint, so that whoever goes by earlier rollouts goes on as if nothing had happened.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posttrain.stages.rollouts import Scored

FILE = "rollouts.jsonl"
KEPT = ("id", "domain", "prompt", "answer", "mode")
"""What a row keeps of its problem."""


class RolloutLog:
    """Appends every step's rollouts to rollouts.jsonl of the stage's artifact."""

    def __init__(self, out: Path) -> None:
        self.path = out / FILE

    def resume(self, step: int) -> Iterator[list[dict[str, Any]]]:
        """Keep the rows of the first `step` steps, drop later ones; yields the rows by step."""
        if not self.path.exists():
            return
        rows: list[list[dict[str, Any]]] = [[] for _ in range(step)]
        with self.path.open(encoding="utf-8") as lines:
            # The last line may have been cut off where the stage was killed.
            for row in map(json.loads, (line for line in lines if line.endswith("\n"))):
                if row["step"] < step:
                    rows[row["step"]].append(row)
        with self.path.open("w", encoding="utf-8") as file:
            for row in (row for found in rows for row in found):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        yield from rows

    def write(
        self,
        step: int,
        scored: Scored,
        *,
        model: str,
        temperature: float,
        judged: bool,
        segments: int = 1,
    ) -> list[dict[str, Any]]:
        """Append the rows of 0-based `step` and return them; where other judges than the verifier
        were asked (`judged`) each has its score as well. The rows of chains of several `segments`
        have the number of their chain in the step and of their segment in the chain."""
        rows = rollout_rows(scored, model=model, temperature=temperature)
        rows = [row | {"step": step} for row in rows]
        if segments > 1:
            places = (divmod(number, segments) for number in range(len(rows)))
            rows = [
                row | {"chain": chain, "segment": segment}
                for row, (chain, segment) in zip(rows, places, strict=True)
            ]
        if judged:
            scores = scored.reward_B.tolist()
            rows = [row | {"score": score} for row, score in zip(rows, scores, strict=True)]
        with self.path.open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return rows


def rollout_rows(scored: Scored, *, model: str, temperature: float) -> list[dict[str, Any]]:
    """One row per response: its problem, what was said and how it was judged."""
    lengths = scored.rollouts.response_len_B.tolist()
    finished, rewards = scored.rollouts.finished_B.tolist(), scored.verified_B.tolist()
    return [
        {
            key: problem[key]
            for key in ("id", "domain", "prompt", "answer", "mode")
            if key in problem
        }
        | ({"prompt": problem["asked"]} if "asked" in problem else {})
        | {
            "response": text,
            "reward": reward,
            "finished": whole,
            "model": model,
            "temperature": temperature,
            "num_tokens": length,
        }
        for problem, text, reward, whole, length in zip(
            scored.problems,
            scored.texts,
            rewards,
            finished,
            lengths,
            strict=True,
        )
    ]
