"""Problems that train a judge: which of two responses, whose rewards are known, is the better one.

A model that learns them, by `sft` or `rl`, can be asked by `judges.compare`, and a policy that
learns them beside its own domains by `judges.itself` (the critic that Kimi K2, arXiv 2507.20534,
refines on verifiable rollouts; DeepSeek V4's actor that is its own judge).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from posttrain.engine.errors import ConfigError
from posttrain.rewards.grading import fill

QUESTION = "c {prompt}|{a}|{b}"
"""What a model is asked: short, so that one of 128 positions can read it."""
VERDICTS = ("1", "2")
"""What it answers: the better response is a, or b."""


def question(template: str | None, problem: Mapping[str, Any], a: str, b: str) -> str:
    """The text of one comparison; None is `QUESTION`."""
    values = {"prompt": problem["prompt"], "answer": str(problem["answer"]), "a": a, "b": b}
    return fill(QUESTION if template is None else template, values)


def build_comparisons(
    rollouts: Iterable[Mapping[str, Any]],
    *,
    template: str | None = None,
    max_per_prompt: int = 2,
    min_margin: float = 0.0,
) -> list[dict[str, Any]]:
    """Training problems out of the rows of a rollouts.jsonl: id, domain, prompt, answer, demo.

    Of one problem's distinct finished responses the n-th best goes against the n-th worst while
    their rewards differ by more than `min_margin`. Which stands first follows from a hash, about
    as often the better as the worse. The answer, 1 or 2, suits an exact verifier.

    Raises ConfigError where no two responses differ in their rewards.
    """
    found: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row in rollouts:
        if row["finished"]:
            of_problem = found.setdefault((row["domain"], row["id"]), {})
            of_problem.setdefault(row["response"], row)
    problems = []
    for (domain, problem_id), rows in found.items():
        best = sorted(rows.values(), key=lambda row: -row["reward"])[:max_per_prompt]
        worst = sorted(rows.values(), key=lambda row: row["reward"])
        for good, bad in zip(best, worst, strict=False):
            if good["reward"] - bad["reward"] <= min_margin:
                break
            texts = [str(good["response"]), str(bad["response"])]
            digest = hashlib.sha256(json.dumps([domain, problem_id, *texts]).encode()).digest()
            second = digest[0] % 2 == 1
            a, b = texts[::-1] if second else texts
            answer = VERDICTS[second]
            problems.append(
                {
                    "id": f"{domain}-{problem_id}-{digest.hex()[:8]}",
                    "domain": domain,
                    "prompt": question(template, good, a, b),
                    "answer": answer,
                    "demo": answer,
                }
            )
    if not problems:
        raise ConfigError(
            f"no two responses to one of {len(found)} problems differ in their rewards by more "
            f"than {min_margin:g}, so there is nothing to compare; sample more responses per "
            "prompt, or from a model that is sometimes right"
        )
    return problems
