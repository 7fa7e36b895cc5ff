"""Data of a user's own that is no domain: preferences, and rows to imitate, taken in."""

from __future__ import annotations

from posttrain.engine.process import Job
from posttrain.stages.context import Context
from posttrain.suites.data_table import TABLE
from posttrain.suites.preferences import PREFERENCES


def run_preferences(job: Job, ctx: Context) -> dict[str, int]:
    """Write pairs.jsonl; returns what was counted."""
    return PREFERENCES.build(job.config, job.runtime, ctx.out, job.data)


def run_table(job: Job, ctx: Context) -> dict[str, int]:
    """Write data.jsonl; returns what was counted."""
    return TABLE.build(job.config, job.runtime, ctx.out, job.data)
