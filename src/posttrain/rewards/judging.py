"""Judges at work: the JSON form of `posttrain.judges` applied to a batch of responses.

    panel = Panel(spec, {key_of(leaf): judge for each leaf that needs a model or a verifier})
    scores = panel.score(batch, at)

Combinations and what reads only text are computed here; every other leaf is a `Judge` that the
stage provides (`posttrain.stages.judging.make_judge`). Each leaf is asked once per batch, however
often it occurs. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from posttrain.engine.errors import ConfigError, StageError
from posttrain.rewards import combine, penalties
from posttrain.rewards.judge_spec import Spec, parts_of, walk
from posttrain.schedules import Schedule, is_schedule, parse_schedule

At = Callable[[Schedule], float]
"""The value of a schedule at the present step."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Responses to be judged, one entry of every list per response."""

    problems: Sequence[Mapping[str, Any]]
    """The problem that it answers: id, domain, prompt, answer, maybe mode and rubric."""
    texts: Sequence[str]
    group: Sequence[int]
    """Which prompt of the batch it answers; responses of one group stand together or apart."""
    finished: Sequence[bool]
    """Whether it ended by itself, not at the length limit."""
    num_tokens: Sequence[int]
    """Response tokens, the stop token included."""
    verdicts: Sequence[float] | None = None
    """The domain verifier's scores where they are known already."""

    def __len__(self) -> int:
        return len(self.texts)

    def rows(self, index: Sequence[int]) -> Batch:
        """The responses at `index`."""
        return Batch(
            problems=[self.problems[i] for i in index],
            texts=[self.texts[i] for i in index],
            group=[self.group[i] for i in index],
            finished=[self.finished[i] for i in index],
            num_tokens=[self.num_tokens[i] for i in index],
            verdicts=None if self.verdicts is None else [self.verdicts[i] for i in index],
        )


class Judge(Protocol):
    """Whatever scores responses."""

    def score(self, batch: Batch) -> list[float]:
        """One number per response of the batch, higher is better.

        Raises StageError or ConfigError where it cannot be asked, or its answer cannot be read.
        """
        ...


def key_of(spec: Mapping[str, Any]) -> str:
    """The name of a judge among the leaves of a panel: its JSON form in one spelling."""
    return json.dumps(spec, sort_keys=True, ensure_ascii=False)


TEXT = ("constant", "finished", "format", "language", "length", "repetition")
"""Kinds that are computed from the batch alone."""
COMBINED = ("sum", "gate", "lexicographic", "normalised", "whitened", "by_domain")


def leaves(spec: Mapping[str, Any]) -> dict[str, Spec]:
    """Key to JSON form of every judge in it that a stage has to provide."""
    found = (part for part in walk(spec) if part["judge"] not in (*TEXT, *COMBINED))
    return {key_of(part): part for part in found}


def parts_to_ask(spec: Mapping[str, Any], batch: Batch, num_rows: int) -> list[list[int]]:
    """The rows of a batch in parts of `num_rows` or a few more, each group in one of them.

    All in one part where the judge has to see all at once: whitened scores, and people.
    """
    if any(part["judge"] in ("whitened", "human") for part in walk(spec)):
        return [list(range(len(batch)))]
    groups: dict[int, list[int]] = {}
    for row, group in enumerate(batch.group):
        groups.setdefault(group, []).append(row)
    parts: list[list[int]] = [[]]
    for rows in groups.values():
        if len(parts[-1]) >= num_rows:
            parts.append([])
        parts[-1] += rows
    return parts


def resolve(spec: Mapping[str, Any], at: At | None) -> Spec:
    """The same judge with each schedule replaced by its value, the first one where `at` is None."""

    def now(value: Any) -> Any:
        if is_schedule(value):
            value = parse_schedule(value)
            return value.possible_values()[0] if at is None else at(value)
        if isinstance(value, Mapping):
            return {name: now(part) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return [now(part) for part in value]
        return value

    resolved: Spec = now(spec)
    return resolved


class Panel:
    """A judge with all of its parts ready to be asked."""

    def __init__(self, spec: Mapping[str, Any], judges: Mapping[str, Judge]) -> None:
        """`judges`: `key_of` each of the `leaves(spec)` to what scores for it."""
        self.spec = dict(spec)
        self.judges = dict(judges)

    def score(self, batch: Batch, at: At | None = None) -> list[float]:
        """The scores of the batch; `at` gives the weights' schedules their present values."""
        return self.detail(batch, at)[0]

    def detail(
        self, batch: Batch, at: At | None = None
    ) -> tuple[list[float], dict[str, list[float]]]:
        """The scores, and those of each judge inside that was asked for all responses, by label.

        A label is the kind, or `kind.NAME` where a stage answers; a second judge of the same label
        is left out.
        """
        known: dict[str, list[float]] = {}
        scores = self._score(resolve(self.spec, at), batch, known)
        parts: dict[str, list[float]] = {}
        for part in walk(resolve(self.spec, at)):
            if part["judge"] not in COMBINED and key_of(part) in known:
                parts.setdefault(_label(part), known[key_of(part)])
        return scores, parts

    def _score(self, spec: Spec, batch: Batch, known: dict[str, list[float]]) -> list[float]:
        """`known`: scores of this very batch by the judge's key."""
        key = key_of(spec)
        if key not in known:
            known[key] = self._ask(spec, batch, known)
        return known[key]

    def _ask(self, spec: Spec, batch: Batch, known: dict[str, list[float]]) -> list[float]:
        kind = spec["judge"]
        if kind == "by_domain":
            return self._by_domain(spec, batch)
        if kind == "gate":
            return self._gate(spec, batch, known)
        parts = [self._score(part, batch, known) for part in parts_of(spec)]
        if kind in TEXT:
            return _from_text(spec, batch, parts)
        if kind == "sum":
            return combine.weighted_sum([term["weight"] for term in spec["terms"]], parts)
        if kind == "lexicographic":
            return combine.lexicographic(*parts, batch.group)
        if kind == "normalised":
            return combine.normalised(parts, batch.group)
        if kind == "whitened":
            return combine.whitened(parts[0])
        return _checked(self.judges[key_of(spec)].score(batch), batch, kind)

    def _gate(self, spec: Spec, batch: Batch, known: dict[str, list[float]]) -> list[float]:
        """A branch that no response takes is not asked."""
        condition = self._score(spec["condition"], batch, known)
        low = [value < spec["below"] for value in condition]
        skipped = [0.0] * len(batch)
        then = self._score(spec["then"], batch, known) if any(low) else skipped
        otherwise = skipped if all(low) else self._score(spec["otherwise"], batch, known)
        return combine.gated(condition, spec["below"], then, otherwise)

    def _by_domain(self, spec: Spec, batch: Batch) -> list[float]:
        rows: dict[str, list[int]] = {}
        for row, problem in enumerate(batch.problems):
            rows.setdefault(problem["domain"], []).append(row)
        scores = [0.0] * len(batch)
        for domain, index in rows.items():
            if domain not in spec["domains"]:
                raise ConfigError(
                    f"judge by_domain: it has none for domain {domain!r}; it has judges for "
                    f"{', '.join(spec['domains'])}"
                )
            found = self._score(spec["domains"][domain], batch.rows(index), {})
            for row, value in zip(index, found, strict=True):
                scores[row] = value
        return scores


def _from_text(spec: Spec, batch: Batch, parts: list[list[float]]) -> list[float]:
    kind = spec["judge"]
    if kind == "constant":
        return [float(spec["value"])] * len(batch)
    if kind == "finished":
        return [float(ended) for ended in batch.finished]
    if kind == "length":
        return penalties.length(spec, batch.num_tokens, batch.group, parts[0] if parts else None)
    function: Callable[..., float] = {
        "format": penalties.has_format,
        "language": penalties.language_share,
        "repetition": penalties.repeated_share,
    }[kind]
    given = {name: value for name, value in spec.items() if name != "judge"}
    return [function(text, **given) for text in batch.texts]


def _checked(scores: list[float], batch: Batch, kind: str) -> list[float]:
    bad = [score for score in scores if score != score]
    if len(scores) != len(batch) or bad:
        raise StageError(
            f"judge {kind}: it gave {len(scores)} scores for {len(batch)} responses, "
            f"{len(bad)} of them not a number"
        )
    return scores


def _label(spec: Spec) -> str:
    asks = spec["judge"] in ("scalar", "compare")
    return f"{spec['judge']}.{spec['model'].partition('.')[2]}" if asks else spec["judge"]
