"""Data of a user's own that is no domain, taken in from outside: preferences, and rows to imitate."""

from __future__ import annotations

from typing import Any

from posttrain.engine.process import Job
from posttrain.stages.context import Context
from posttrain.suites.data_table import build_data_table
from posttrain.suites.preferences import build_preferences


def run_preferences(job: Job, ctx: Context) -> dict[str, Any]:
    """Write pairs.jsonl; returns what `build_preferences` counts."""
    return build_preferences(job.config, job.runtime, ctx.out, job.data)


def run_table(job: Job, ctx: Context) -> dict[str, Any]:
    """Write data.jsonl; returns what `build_data_table` counts."""
    return build_data_table(job.config, job.runtime, ctx.out, job.data)
