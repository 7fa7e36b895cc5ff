"""Data of a user's own that is no domain: preferences, and rows to imitate, taken in."""

from __future__ import annotations

from pathlib import Path

from posttrain.engine.process import Job
from posttrain.engine.store import CACHE
from posttrain.stages.context import Context
from posttrain.suites.data_table import TABLE
from posttrain.suites.preferences import PREFERENCES


def run_preferences(job: Job, ctx: Context) -> dict[str, int]:
    """Write pairs.jsonl; returns what was counted."""
    facts = PREFERENCES.build(job.config, job.runtime, ctx.out, job.data, cache_of(job))
    if facts["contradictions"]:
        what = (
            "responses that have both labels"
            if "desirable" in facts
            else "pairs of responses that are preferred both ways"
        )
        ctx.warn(
            f"{job.name}: contradictions, {what}: {facts['contradictions']}; they teach nothing, "
            "so decide for one side, or leave both out"
        )
    if facts.get("desirable") in (0, facts["rows"]):
        kind = "desirable" if facts["desirable"] else "undesirable"
        ctx.warn(
            f"{job.name}: all {facts['rows']} responses are {kind}, so that nothing tells them "
            "from others; check what the label column says"
        )
    return facts


def run_table(job: Job, ctx: Context) -> dict[str, int]:
    """Write data.jsonl; returns what was counted."""
    return TABLE.build(job.config, job.runtime, ctx.out, job.data, cache_of(job))


def cache_of(job: Job) -> Path:
    """Where the store remembers which tables were found good."""
    return Path(job.hashes).parent / CACHE
