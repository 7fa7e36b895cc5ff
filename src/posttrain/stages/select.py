"""Choose among rollouts what is worth imitating: rejection sampling's second half."""

from __future__ import annotations

import json
from typing import Any

from posttrain.engine.errors import ConfigError
from posttrain.stages.batches import kept
from posttrain.stages.context import Context
from posttrain.stages.rollouts import write_jsonl
from posttrain.stages.settings.data import Select


def run(config: Select, ctx: Context) -> dict[str, float]:
    """Write data.jsonl, rows of prompt and demo, from the rollouts of a `sample` stage."""
    lines = (ctx.inputs["rollouts"] / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()
    rollouts = [json.loads(line) for line in lines]
    by_problem: dict[tuple[str, str, str | None], list[dict[str, Any]]] = {}
    for row in rollouts:
        # A response that was cut at the length limit is no example to follow.
        if row["finished"]:
            by_problem.setdefault((row["domain"], row["id"], row.get("mode")), []).append(row)
    chosen = [row for rows in by_problem.values() for row in choose(config, rows)]
    if not chosen:
        raise ConfigError(
            f"stage {ctx.name!r}: how = {config.how!r} keeps none of {len(rollouts)} rollouts; "
            "sample from a better model, raise k, or use how = 'best' where the verifier gives "
            "part scores"
        )
    write_jsonl(
        ctx.out / "data.jsonl",
        (
            kept(row, "id", "domain", "prompt", "mode", "reward") | {"demo": row["response"]}
            for row in chosen
        ),
    )
    return {"rows": len(chosen), "kept_share": len(chosen) / len(rollouts)}


def choose(config: Select, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one problem that stay: distinct responses, at most `max_per_prompt`."""
    distinct = list({row["response"]: row for row in rows}.values())
    if config.how == "best":
        best = max((row["reward"] for row in distinct), default=0.0)
        ties = [row for row in distinct if row["reward"] == best and best > 0]
        return ties[: config.max_per_prompt]
    correct = [row for row in distinct if row["reward"] >= 1.0]
    if config.how == "shortest_correct":
        correct.sort(key=lambda row: len(row["response"]))
        return correct[:1]
    return correct[: config.max_per_prompt]
