"""Problems that train a judge: which of two responses, whose rewards are known, is the better one.

A model that learns them, by `sft` or `rl`, can be asked by `judges.compare`, and a policy that
learns them beside its own domains by `judges.itself` (the critic that Kimi K2, arXiv 2507.20534,
refines on verifiable rollouts; DeepSeek V4's actor that is its own judge).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.engine.errors import ConfigError
from posttrain.engine.exact import difference

Row = Mapping[str, Any]
Key = tuple[str, str, str | None]
"""A problem: domain, id, mode."""

QUESTION = "c {prompt}|{a}|{b}"
"""What a model is asked: short, so that one of 128 positions can read it."""
VERDICTS = ("1", "2")
"""What it answers: the better response is a, or b."""


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with {name} replaced; braces in what is filled in mean nothing."""
    return re.sub(r"\{(\w+)\}", lambda m: values.get(m[1], m[0]), template)


def question(template: str | None, problem: Mapping[str, Any], a: str, b: str) -> str:
    """The text of one comparison; None is `QUESTION`."""
    values = {"prompt": problem["prompt"], "answer": problem["answer"] or "", "a": a, "b": b}
    return fill(QUESTION if template is None else template, values)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Two responses to one problem, one of which is known to be the better one."""

    id: str
    problem: Mapping[str, Any]
    a: str
    b: str
    verdict: str
    """One of `VERDICTS`."""


def build_comparisons(
    by_problem: Mapping[Key, Sequence[Row]],
    *,
    template: str | None = None,
    max_per_prompt: int = 2,
    min_margin: float = 0.0,
) -> list[dict[str, Any]]:
    """Problems that train a judge, rows with id, domain, prompt, answer, demo.

    `by_problem` has the distinct finished responses to each problem, rows of a rollouts.jsonl. The
    answer, 1 or 2, says which of the two responses of a `Compared` is better and suits an exact
    verifier. Raises ConfigError where no two responses differ in their rewards.
    """
    found = compared(by_problem, max_per_prompt=max_per_prompt, min_margin=min_margin)
    if not found:
        raise ConfigError(
            f"no two responses to one of {len(by_problem)} problems differ in their rewards by "
            f"more than {min_margin:g}, so there is nothing to compare; sample more responses per "
            "prompt, or from a model that is sometimes right"
        )
    return [
        {
            "id": pair.id,
            "domain": pair.problem["domain"],
            "prompt": question(template, pair.problem, pair.a, pair.b),
            "answer": pair.verdict,
            "demo": pair.verdict,
        }
        for pair in found
    ]


def compared(
    by_problem: Mapping[Key, Sequence[Row]],
    *,
    max_per_prompt: int = 2,
    min_margin: float = 0.0,
) -> list[Compared]:
    """Of each problem's responses the n-th best against the n-th worst, for `max_per_prompt` n.

    While their rewards differ by more than `min_margin`. Which stands first follows from a hash,
    about as often the better as the worse.
    """
    found = []
    for (domain, problem_id, _), rows in by_problem.items():
        # Where nobody verified there is no better response.
        rows = [row for row in rows if row["reward"] is not None]
        best = sorted(rows, key=lambda row: -row["reward"])[:max_per_prompt]
        worst = sorted(rows, key=lambda row: row["reward"])
        for good, bad in zip(best, worst, strict=False):
            if difference(good["reward"], bad["reward"]) <= min_margin:
                break
            texts = [str(good["response"]), str(bad["response"])]
            digest = hashlib.sha256(json.dumps([domain, problem_id, *texts]).encode()).digest()
            second = digest[0] % 2 == 1
            a, b = texts[::-1] if second else texts
            found.append(
                Compared(
                    id=f"{domain}-{problem_id}-{digest.hex()[:8]}",
                    problem=good,
                    a=a,
                    b=b,
                    verdict=VERDICTS[second],
                )
            )
    return found
