"""The samples of training stages, `samples.jsonl`: what they are, and reading them again.

A stage writes some rows every few steps (`stages/samples.py`): texts, such as a prompt and a
response, and numbers, such as a reward, each by a name. What reads them knows no kinds of stages.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.engine.errors import ConfigError

SAMPLES = "samples.jsonl"
"""The file in the artifact, and meanwhile in the work directory."""
EVERY = "POSTTRAIN_SAMPLES"
"""The variable that says every how many steps; 0 is never."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One row."""

    step: int
    """Steps done when it was taken."""
    domain: str
    texts: Mapping[str, str]
    """Name -> text: prompt, response, ..."""
    numbers: Mapping[str, float]
    """Name -> number: reward, advantage, ..."""


def given_every(environment: Mapping[str, str]) -> int | None:
    """Every how many steps samples are to be taken, None where nobody says. Raises ConfigError for
    what is no number of steps."""
    text = environment.get(EVERY)
    if text is None or text == "":
        return None
    try:
        every = int(text)
    except ValueError:
        every = -1
    if every < 0:
        raise ConfigError(
            f"{EVERY}={text!r} is no number of steps; give a whole number, such as 50 for samples "
            "every 50 steps, or 0 for none"
        )
    return every


def parse_samples(content: bytes) -> list[Sample]:
    """The samples of a file, oldest first. Lines that are none are left out: the last one of a
    running stage may be half written, and a store may come from a stranger."""
    found = []
    for line in content.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if _is_sample(row):
            texts, numbers = row["texts"], row["numbers"]
            fields = {"step": row["step"], "domain": row.get("domain", "")}
            found.append(Sample(texts=texts, numbers=numbers, **fields))
    return found


def _is_sample(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("step"), int)
        and isinstance(row.get("domain", ""), str)
        and isinstance(row.get("texts"), dict)
        and all(isinstance(text, str) for text in row["texts"].values())
        and isinstance(row.get("numbers"), dict)
        and all(
            isinstance(value, int | float) and math.isfinite(value)
            for value in row["numbers"].values()
        )
    )


def snapshots(samples: Sequence[Sample], most: int) -> list[tuple[int, list[Sample]]]:
    """Step and samples of at most `most` steps, newest first: the last one, the first one, and
    others evenly between them."""
    by_step: dict[int, list[Sample]] = {}
    for sample in samples:
        by_step.setdefault(sample.step, []).append(sample)
    steps = sorted(by_step)
    if len(steps) > most:
        gap = (len(steps) - 1) / (most - 1) if most > 1 else 0
        steps = [steps[round(place * gap)] for place in range(most)] if gap else steps[-1:]
    return [(step, by_step[step]) for step in reversed(steps)]
