"""Rows of text that stages hand on: finding them, and what can be said of one response.

Every file has one JSON object per line. A problem is (domain, id, mode): responses in two modes are
never compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from posttrain.algorithms import Repetition
from posttrain.backends.prompting import CLOSE, in_modes
from posttrain.engine.errors import ConfigError
from posttrain.engine.graph import named
from posttrain.engine.jsonl import read_jsonl
from posttrain.rewards.penalties import repeated_share
from posttrain.stages.context import Context
from posttrain.stages.sampled_ids import without_ids

Row = dict[str, Any]
Pair = dict[str, Any]
"""A row of pairs.jsonl: `prompt` with the responses of both `SIDES`."""
Key = tuple[str, str, str | None]

SIDES = ("chosen", "rejected")


def key_of(row: Mapping[str, Any]) -> Key:
    """The problem that a row is about."""
    return row["domain"], row["id"], row.get("mode")


def pick(row: Mapping[str, Any], *fields: str) -> Row:
    """The named fields of a row, as far as it has them."""
    return {field: row[field] for field in fields if field in row}


def edges(ctx: Context, edge: str) -> list[Path]:
    """The inputs `edge`, `edge.0`, `edge.1` and so on, as far as they are there, in this order."""
    several = named(ctx.inputs, edge)
    one = [ctx.inputs[edge]] if edge in ctx.inputs else []
    return one + [several[number] for number in sorted(several, key=int)]


def read_rollouts(ctx: Context, edge: str = "rollouts") -> list[Row]:
    """The rollouts of all stages under `edge`, one stage after another."""
    return [row for path in edges(ctx, edge) for row in read_jsonl(path / "rollouts.jsonl")]


def read_pairs(ctx: Context) -> dict[str, list[Pair]]:
    """The pairs of the `data` artifact by domain."""
    found: dict[str, list[Pair]] = {}
    for pair in read_jsonl(ctx.inputs["data"] / "pairs.jsonl"):
        found.setdefault(pair["domain"], []).append(pair)
    return dict(sorted(found.items()))


def numbered(by_domain: Mapping[str, Iterable[Pair]]) -> list[Pair]:
    """The pairs of all domains; `row` becomes the number of each among them."""
    pairs = list(chain.from_iterable(by_domain.values()))
    for number, pair in enumerate(pairs):
        pair["row"] = number
    return pairs


def problems_of(ctx: Context, rows: Iterable[Row]) -> list[Row]:
    """The whole problem of each row, in the row's mode: a judge may read any column of it.

    Raises ConfigError for a row whose problem is not among the domain's training problems.
    """
    rows = list(rows)
    known: dict[Key, Row] = {}
    for domain in ctx.domains:
        modes = dict.fromkeys(row.get("mode") for row in rows if row["domain"] == domain)
        problems = ctx.problems(domain, "train")
        for mode in modes:
            found = problems if mode is None else in_modes(problems, [mode])
            known |= {key_of(problem): problem for problem in found}
    missing = next((row for row in rows if key_of(row) not in known), None)
    if missing is not None:
        raise ConfigError(
            f"stage {ctx.name!r}: problem {missing['id']} of its rollouts is no training problem "
            f"of domain {missing['domain']!r}; sample from this suite again"
        )
    return [known[key_of(row)] for row in rows]


def by_problem(rows: Iterable[Row]) -> dict[Key, list[Row]]:
    """Problem to its distinct finished responses, as sampled; problems without one stay.

    A response that was cut at the length limit is no example of anything: it would be learned, or
    unlearned, with an end that it does not have.
    """
    found: dict[Key, dict[str, Row]] = {}
    for row in rows:
        responses = found.setdefault(key_of(row), {})
        if row["finished"]:
            responses.setdefault(row["response"], row)
    return {key: list(responses.values()) for key, responses in found.items()}


def check_values(rows: Iterable[Row], by: str, stage: str) -> None:
    """Raise ConfigError for a response without the value `by`, the reward or the score."""
    for row in rows:
        if row.get(by) is None:
            fix = (
                "set by = 'score'" if "score" in row else "put r.score(rollouts, judge=...) between"
            )
            raise ConfigError(
                f"stage {stage!r}: by = {by!r}, but the rollouts of problem {row['id']} in domain "
                f"{row['domain']!r} have no {by}; {fix}"
            )


def clean(
    row: Mapping[str, Any],
    *,
    max_tokens: int | None,
    language: str | None,
    max_repetition: Repetition | None,
) -> bool:
    """Whether a response is short enough, in the allowed characters only, and not repetitive."""
    text = row["response"]
    if max_tokens is not None and row["num_tokens"] > max_tokens:
        return False
    if language is not None and re.fullmatch(f"(?:{language})*", text) is None:
        return False
    if max_repetition is None:
        return True
    return repeated_share(text, n=max_repetition.n, unit="word") <= max_repetition.share


def without_thought(row: Row) -> Row:
    """The row as one of the mode no_think, without what stands before `</think>`."""
    _, closed, answer = row["response"].rpartition(CLOSE)
    if not closed:
        return row
    return without_ids(row) | {"response": answer.lstrip(), "mode": "no_think"}
