"""Which problems an rl step uses: shares of domains, curricula, retirement, repeated draws.

What a draw depends on is recomputed after a kill from what the stage has left behind: its rollouts
say how often a problem was drawn and how it was answered, and every profile made within the stage
is a file of its own. All else follows from (seed, step).
Legend: P problems of a domain, B rows (responses).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from posttrain.engine.atomic import write_whole
from posttrain.engine.errors import ConfigError
from posttrain.rl.advantage import zero_variance
from posttrain.schedules import History
from posttrain.stages.batches import Problem, kept
from posttrain.stages.context import Context
from posttrain.stages.curriculum import Shares, derived_seed, reprofile_due
from posttrain.stages.rollouts import Scored, step_seed
from posttrain.stages.rows import read_rows
from posttrain.stages.scored import chosen_groups, joined
from posttrain.stages.settings.rl import Rl
from posttrain.stages.supply import Supply

PROBLEMS_PER_CALL = 64
"""Problems that are profiled at a time."""
PROFILING = 1 << 20
"""Apart from the numbers of a step's draws."""


class Sample(Protocol):
    """Samples and judges a group of responses to each problem, with a step's other settings."""

    def __call__(self, problems: Sequence[Problem], *, group_size: int, seed: int) -> Scored:
        """The scored responses, group after group; those of a chain stand together."""
        ...


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What a step has sampled, and what of it it learns from."""

    batch: Scored
    """`prompts_per_step` groups; of several draws first those with unequal rewards."""
    sampled: Scored
    """All that was sampled."""
    metrics: dict[str, float]

    @property
    def batch_share(self) -> float:
        """Rows of the batch over rows that were sampled."""
        return len(self.batch.problems) / len(self.sampled.problems)


class Drawing:
    """The problems of an rl stage and what it has learnt about them so far."""

    def __init__(self, config: Rl, ctx: Context) -> None:
        """Reads the problems, and the profile where there is one. Raises ConfigError where that has
        no rate for any problem of a domain."""
        self.out, self.seed = ctx.out, config.seed
        self.supplies = {
            name: Supply(
                ctx.problems(name, "train", config.modes), position=position, seed=config.seed
            )
            for position, name in enumerate(ctx.domains)
        }
        self.shares = Shares(list(self.supplies))
        if "profile" in ctx.inputs:
            self._learn_rates(read_rows(ctx.inputs["profile"] / "profile.jsonl"))
            for name, supply in self.supplies.items():
                if not supply.known:
                    raise ConfigError(
                        f"stage {ctx.name!r} (rl), edge 'profile': it has no pass rate for any "
                        f"problem of domain {name!r}; profile the prompts that the stage draws, in "
                        "the same modes"
                    )

    def resume(
        self, config: Rl, history: History, past: Iterable[Sequence[Mapping[str, Any]]]
    ) -> None:
        """Go through the rollouts of the steps that are done, and forget later profiles."""
        done = 0
        for step, rows in enumerate(past):
            now = config.at(step, config.steps, history)
            if self._profile(step).exists():
                self._learn_rates(read_rows(self._profile(step)))
            self.shares.allocate(now.prompts_per_step, now.domain_shares)
            # The first row of a prompt has it as the problem does, in a chain of segments as well.
            for row in rows[:: now.rows_per_prompt]:
                self.supplies[row["domain"]].mark(row)
            self.observe(now, rows)
            done = step + 1
        for path in self.out.glob(".profile-*.tmp"):
            path.unlink()
        for path in self.out.glob("profile-*.jsonl"):
            if int(path.stem.removeprefix("profile-")) >= done:
                path.unlink()

    def reprofile(
        self, now: Rl, step: int, history: History, sample: Sample
    ) -> tuple[int, dict[str, float]]:
        """Where it is time to, learn anew how often the policy solves what problems; returns the
        number of tokens that this took, and metrics.

        Of a domain with more problems than `reprofile_prompts` a random part is profiled.
        """
        if not now.reprofiles:
            return 0, {}
        if not reprofile_due(now, step, history("reward")):
            return 0, {"profiled": 0.0}
        rows: list[dict[str, Any]] = []
        tokens, size = 0, now.reprofile_samples * now.segments
        for position, supply in enumerate(self.supplies.values()):
            words = (now.seed, step, PROFILING, position)
            problems = supply.some(now.reprofile_prompts, seed=derived_seed(*words))
            for start in range(0, len(problems), PROBLEMS_PER_CALL):
                part = problems[start : start + PROBLEMS_PER_CALL]
                seed = derived_seed(*words, start + 1)
                scored = sample(part, group_size=now.reprofile_samples, seed=seed)
                tokens += scored.rollouts.num_tokens
                rates = _rates(scored.verified_B.tolist(), size)
                rows += [
                    kept(problem, "id", "domain", "mode")
                    | {"rate": rate, "samples": now.reprofile_samples}
                    for problem, rate in zip(part, rates, strict=True)
                ]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_whole(self._profile(step), lines.encode())
        self._learn_rates(rows)
        return tokens, {"profiled": float(len(rows))}

    def draw(self, now: Rl, step: int, sample: Sample) -> Drawn:
        """The rollouts of 0-based `step`: one draw, and more where `dynamic_sampling` asks."""
        wanted = self.shares.allocate(now.prompts_per_step, now.domain_shares)
        missing, parts = wanted, []
        rates: list[float] = []
        metrics = self._open_share(now)
        for number in range(1 + now.dynamic_sampling):
            problems: list[Problem] = []
            for name, count in missing.items():
                taken, known = self.supplies[name].take(now, count, step, number)
                problems += taken
                rates += known
            seed = derived_seed(now.seed, step, number) if number else step_seed(now.seed, step)
            parts.append(sample(problems, group_size=now.group_size, seed=seed))
            missing = _missing(wanted, parts, now.rows_per_prompt)
            if not any(missing.values()):
                break
        sampled = joined(parts)
        batch = sampled
        if len(parts) > 1:
            batch = chosen_groups(sampled, wanted, now.rows_per_prompt)
        if now.dynamic_sampling:
            metrics["draws"] = float(len(parts))
        if now.curriculum != "none":
            metrics["known_rate"] = sum(rates) / len(rates)
        return Drawn(batch=batch, sampled=sampled, metrics=metrics)

    def observe(self, now: Rl, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Take in the rollouts of a step, as the log has them; returns metrics."""
        rates = _rates([row["reward"] for row in rows], now.rows_per_prompt)
        for row, rate in zip(rows[:: now.rows_per_prompt], rates, strict=True):
            supply = self.supplies[row["domain"]]
            if now.update_rates:
                supply.learn(row, rate)
            if now.retire_above is not None:
                supply.retire(row, rate >= now.retire_above)
        for supply in self.supplies.values():
            supply.bring_back()
        if now.retire_above is None:
            return {}
        return {"retired_share": self._share(s.retired_P.sum() for s in self.supplies.values())}

    def _open_share(self, now: Rl) -> dict[str, float]:
        """The share of all problems that the step can draw, where a curriculum decides on it."""
        if now.curriculum == "none":
            return {}
        return {"open_share": self._share(s.open_P(now).sum() for s in self.supplies.values())}

    def _share(self, counts: Iterable[Any]) -> float:
        return float(sum(counts)) / sum(len(s.problems) for s in self.supplies.values())

    def _learn_rates(self, rows: Iterable[Mapping[str, Any]]) -> None:
        for row in rows:
            if row["domain"] in self.supplies:
                self.supplies[row["domain"]].learn(row, row["rate"])

    def _profile(self, step: int) -> Path:
        """The profile that was made before 0-based `step`."""
        return self.out / f"profile-{step}.jsonl"


def _missing(wanted: Mapping[str, int], parts: Sequence[Scored], size: int) -> dict[str, int]:
    """How many groups with unequal rewards each domain is short of what was wanted."""
    missing = dict(wanted)
    for part in parts:
        flat = zero_variance(part.reward_B, part.group_B)[::size].tolist()
        for problem, alike in zip(part.problems[::size], flat, strict=True):
            missing[problem["domain"]] -= not alike
    return missing


def _rates(rewards: Sequence[float], size: int) -> list[float]:
    """The mean of each `size` rewards."""
    return [sum(rewards[i : i + size]) / size for i in range(0, len(rewards), size)]
