"""Which problems an rl step uses: shares of domains, curricula, retirement, repeated draws.

What a draw depends on is recomputed after a kill from what the stage has left behind: its rollouts
say how often a problem was drawn and how it was answered, and every profile made within the stage
is a file of its own. All else follows from (seed, step).

Legend: P problems of a domain.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posttrain.algorithms import Band, Gaussian, InTurn, Reprofile
from posttrain.backends.prompting import Problem, asked, asked_key
from posttrain.engine.atomic import write_whole
from posttrain.engine.errors import ConfigError
from posttrain.engine.exact import mean
from posttrain.engine.jsonl import read_jsonl
from posttrain.rl.advantage import zero_variance
from posttrain.rl.batch import Batch, concatenate
from posttrain.rl.seeds import derived_seed, step_seed
from posttrain.schedules import History, plateaus
from posttrain.stages.context import Context
from posttrain.stages.data import DomainShares
from posttrain.stages.rollout_log import RolloutLog
from posttrain.stages.rows import pick
from posttrain.stages.settings.rl import Rl
from posttrain.stages.signs import RlWatch

PROBLEMS_PER_CALL = 64
"""Problems that are profiled at a time."""
PROFILING = 1 << 20
"""Apart from the numbers of a step's draws."""
PLATEAU_GAIN = 0.01
"""Rise of the mean reward below which it counts as a plateau."""

Row = Mapping[str, Any]


class ProblemSampler:
    """The problems of an rl stage and what it has learnt about them so far."""

    def __init__(
        self,
        settings: Rl,
        ctx: Context,
        log: RolloutLog,
        problems: Mapping[str, Sequence[Problem]],
    ) -> None:
        """Of these `problems` by domain. Reads the profile where there is one; raises ConfigError
        where that has no rate for any problem of a domain."""
        self.out, self.log, self.watch = ctx.out, log, RlWatch(ctx)
        self.queues = {
            name: DomainQueue(rows, position=position, seed=settings.seed)
            for position, (name, rows) in enumerate(problems.items())
        }
        self.shares = DomainShares(list(self.queues))
        self.wanted: dict[str, int] = {}
        """Groups of each domain in the batch of this step."""
        self.rates: list[float] = []
        """Known pass rates of the problems drawn in this step."""
        self.open_share = 1.0
        """The share of all problems that the step could draw."""
        if "profile" in ctx.inputs:
            self._set_rates(read_jsonl(ctx.inputs["profile"] / "profile.jsonl"))
            for name, queue in self.queues.items():
                if not queue.known:
                    raise ConfigError(
                        f"stage {ctx.name!r} (rl), edge 'profile': it has no pass rate for any "
                        f"problem of domain {name!r}; profile the prompts that the stage draws, in "
                        "the same modes"
                    )

    def replay(self, settings: Rl, done: int, total: int, history: History) -> None:
        """Go through the rollouts of the steps that are done, and forget later profiles."""
        for step, rows in enumerate(self.log.resume(done)):
            step_settings = settings.at(step, total, history)
            # In the order of the loop: a profile before the draws of its step, rewards after them.
            if self._profile(step).exists():
                self._set_rates(read_jsonl(self._profile(step)))
            # For what it leaves behind: how far each domain is ahead of its share.
            self.shares.allocate(step_settings.prompts_per_step, step_settings.domain_shares)
            # One row of each group.
            for row in rows[:: step_settings.group_size]:
                self.queues[row["domain"]].count_draw(row)
            self.observe(step_settings, rows)
        # A write that a kill cut short; all that is in `out` becomes part of the artifact.
        for path in self.out.glob(".profile-*.tmp"):
            path.unlink()
        for path in self.out.glob("profile-*.jsonl"):
            if int(path.stem.removeprefix("profile-")) >= done:
                path.unlink()

    def draw(self, s: Rl, step: int, earlier: Sequence[Batch]) -> list[Problem]:
        """The problems to sample next for the batch of 0-based `step`; none once it is whole.

        The first draw has `prompts_per_step` problems in the shares of the domains. With
        `dynamic_sampling` later ones make up for groups of the `earlier` draws of the step whose
        rewards are all alike.
        """
        number = len(earlier)
        if number == 0:
            self.wanted = self.shares.allocate(s.prompts_per_step, s.domain_shares)
            self.rates = []
            self.open_share = self._share(q.open_P(s.draw).sum() for q in self.queues.values())
        missing = dict(self.wanted)
        for batch in earlier:
            for problem, alike in _groups(batch, s.group_size):
                missing[problem["domain"]] -= not alike
        # The first draw, and `dynamic_sampling` further ones at most.
        if number > s.draw.dynamic_sampling or not any(missing.values()):
            return []
        problems: list[Problem] = []
        for name, count in missing.items():
            drawn, rates = self.queues[name].draw(s.draw, count, step, number)
            problems += drawn
            self.rates += rates
        return problems

    def seed(self, s: Rl, step: int, number: int) -> int:
        """What the rollouts of draw `number` of a step follow from."""
        return derived_seed(s.seed, step, number) if number else step_seed(s.seed, step)

    def batch(self, s: Rl, draws: Sequence[Batch]) -> Batch:
        """The rollouts to learn from out of the draws of a step: as many groups of each domain as
        are wanted, those with unequal rewards first, in the order in which they were drawn."""
        sampled = concatenate(draws)
        if len(draws) == 1:
            return sampled
        left, chosen = dict(self.wanted), []
        groups = list(_groups(sampled, s.group_size))
        # Groups with unequal rewards before those that are alike, in either the earlier one first.
        for number in sorted(range(len(groups)), key=lambda number: (groups[number][1], number)):
            domain = groups[number][0]["domain"]
            if left[domain] > 0:
                left[domain] -= 1
                chosen.append(number)
        return sampled.select(_rows_of_groups(sorted(chosen), s.group_size))

    def metrics(self, s: Rl, draws: Sequence[Batch]) -> dict[str, float]:
        """What the draws of a step were like."""
        metrics: dict[str, float] = {}
        if not isinstance(s.draw, InTurn):
            metrics["open_share"] = self.open_share
            metrics["known_rate"] = sum(self.rates) / len(self.rates)
        if s.draw.dynamic_sampling:
            metrics["draws"] = float(len(draws))
        return metrics

    def observe(self, s: Rl, rows: Sequence[Row]) -> dict[str, float]:
        """Take in the rollouts of a step, as the log has them; returns metrics."""
        self.watch.observe(s, rows)
        # One per response -> one per problem.
        # What a judge says, where there is no verifier.
        found = [row["score"] if row["reward"] is None else row["reward"] for row in rows]
        rates = _means(found, s.group_size)
        for row, rate in zip(rows[:: s.group_size], rates, strict=True):
            queue = self.queues[row["domain"]]
            if not isinstance(s.draw, InTurn) and s.draw.update_rates:
                queue.set_rate(row, rate)
            if s.draw.retire_above is not None:
                queue.retire(row, rate >= s.draw.retire_above)
        for queue in self.queues.values():
            queue.reset_retired()
        if s.draw.retire_above is None:
            return {}
        return {"retired_share": self._share(q.retired_P.sum() for q in self.queues.values())}

    def to_profile(self, s: Rl, step: int, history: History) -> Iterator[tuple[list[Problem], int]]:
        """Where the policy is to be profiled anew before `step`: problems, some at a time, and the
        seed of their rollouts; nothing elsewhere.

        Of a domain with more problems than `reprofile.prompts` a random part is profiled.
        """
        due = reprofile_of(s)
        if due is None or not reprofile_due(due, step, history("reward")):
            return
        for position, queue in enumerate(self.queues.values()):
            words = (s.seed, step, PROFILING, position)
            problems = queue.subset(due.prompts, seed=derived_seed(*words))
            for start in range(0, len(problems), PROBLEMS_PER_CALL):
                part = problems[start : start + PROBLEMS_PER_CALL]
                yield part, derived_seed(*words, start + 1)

    def take_profile(self, s: Rl, step: int, profiled: Sequence[Batch]) -> int:
        """Go by these rollouts, and keep what they say for a resume; returns how many problems."""
        due = reprofile_of(s)
        if due is None or not profiled:
            return 0
        rows: list[dict[str, Any]] = []
        for batch in profiled:
            # By the verifier, whatever gives the reward; one per response -> one per problem.
            rates = _means(batch["verified_B"].tolist(), due.samples)
            rows += [
                pick(problem, "id", "domain", "mode") | {"rate": rate, "samples": due.samples}
                for problem, rate in zip(batch.problems[:: due.samples], rates, strict=True)
            ]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_whole(self._profile(step), lines.encode())
        self._set_rates(rows)
        return len(rows)

    def _share(self, counts: Iterable[Any]) -> float:
        return float(sum(counts)) / sum(len(queue.problems) for queue in self.queues.values())

    def _set_rates(self, rows: Iterable[Row]) -> None:
        for row in rows:
            if row["domain"] in self.queues:
                self.queues[row["domain"]].set_rate(row, row["rate"])

    def _profile(self, step: int) -> Path:
        """The profile that was made before 0-based `step`."""
        return self.out / f"profile-{step}.jsonl"


class DomainQueue:
    """The problems of one domain, with how often each was drawn and how often it is solved.

    Without a curriculum the least often drawn comes first. Among those that were drawn equally
    often the order is a permutation that follows from the seed and that number, so with none left
    out each pass over the problems is a fresh permutation.
    """

    def __init__(self, problems: Sequence[Problem], *, position: int, seed: int) -> None:
        """`position` is the domain's among those of the stage."""
        self.problems, self.position, self.seed = problems, position, seed
        self.drawn_P = np.zeros(len(problems), dtype=np.int64)
        """How often each was drawn."""
        self.rate_P = np.full(len(problems), np.nan)
        """Its pass rate as far as it is known."""
        self.retired_P = np.zeros(len(problems), dtype=bool)
        self._step_P = np.zeros(len(problems), dtype=bool)
        """Drawn in this step, where draws are weighted."""
        self._ranks: dict[int, np.ndarray] = {}
        self._row = {_whole(problem): row for row, problem in enumerate(problems)}
        self._named: dict[tuple[str, str | None], list[int]] = {}
        for row, problem in enumerate(problems):
            self._named.setdefault((problem["id"], problem.get("mode")), []).append(row)
            if "mode" in problem:
                self._named.setdefault((problem["id"], None), []).append(row)

    @property
    def known(self) -> bool:
        """Whether any pass rate is known."""
        return not bool(np.isnan(self.rate_P).all())

    def open_P(self, how: InTurn | Band | Gaussian) -> np.ndarray:
        """bool: the problems that can be drawn that way, one at least."""
        if isinstance(how, Band):
            fit_P = in_band(self.rate_P, how.low, how.high)
        elif isinstance(how, Gaussian):
            fit_P = ~np.isnan(self.rate_P)
        else:
            fit_P = np.ones(len(self.problems), dtype=bool)
        open_P: np.ndarray = fit_P & ~self.retired_P
        # Rather retired problems again than none.
        return open_P if open_P.any() else fit_P

    def draw(
        self, how: InTurn | Band | Gaussian, count: int, step: int, number: int
    ) -> tuple[list[Problem], list[float]]:
        """`count` problems for draw `number` of 0-based `step`, and their pass rates.

        None comes twice in a step, unless there are fewer.
        """
        if number == 0:
            self._step_P[:] = False
        open_P = self.open_P(how)
        key_P = None
        if isinstance(how, Gaussian):
            key_P = gaussian_keys(
                self.rate_P,
                target=how.target,
                spread=how.spread,
                generator=np.random.default_rng([self.seed, self.position, step, number]),
            )
        taken: list[int] = []
        # Each round takes what is left of a pass; a second one begins where problems are too few.
        while len(taken) < count:
            if key_P is None:
                # Those that were drawn least often, in the permutation of that pass.
                times = int(self.drawn_P[open_P].min())
                row_P = np.flatnonzero(open_P & (self.drawn_P == times))
                row_P = row_P[np.argsort(self._rank_P(times)[row_P])]
            else:
                # The largest keys among those that this step has not had yet.
                if not (open_P & ~self._step_P).any():
                    self._step_P[:] = False
                row_P = np.flatnonzero(open_P & ~self._step_P)
                row_P = row_P[np.argsort(-key_P[row_P], kind="stable")]
            row_P = row_P[: count - len(taken)]
            self._step_P[row_P] = True
            self.drawn_P[row_P] += 1
            taken += row_P.tolist()
        return [self.problems[row] for row in taken], self.rate_P[taken].tolist()

    def subset(self, count: int, *, seed: int) -> list[Problem]:
        """At most `count` problems that follow from the seed, in their own order."""
        order_P = np.random.default_rng(seed).permutation(len(self.problems))
        return [self.problems[row] for row in sorted(order_P[:count].tolist())]

    def count_draw(self, row: Row) -> None:
        """Count that a problem was drawn."""
        self.drawn_P[self._row[_whole(row)]] += 1

    def set_rate(self, row: Row, rate: float) -> None:
        """Remember the pass rate of a problem; a row without a mode speaks for all modes."""
        for place in self._named.get((row["id"], row.get("mode")), []):
            self.rate_P[place] = rate

    def retire(self, row: Row, retired: bool) -> None:
        """Draw a problem no more, or again."""
        self.retired_P[self._row[_whole(row)]] = retired

    def reset_retired(self) -> None:
        """Where all are retired, draw all again."""
        if self.retired_P.all():
            self.retired_P[:] = False

    def _rank_P(self, times: int) -> np.ndarray:
        """The place of each problem in the order in which those drawn `times` times come."""
        if times not in self._ranks:
            generator = np.random.default_rng([self.seed, self.position, times])
            rank_P = np.empty(len(self.problems), dtype=np.int64)
            # The inverse of the permutation: from a problem to its place.
            rank_P[generator.permutation(len(self.problems))] = np.arange(len(self.problems))
            self._ranks[times] = rank_P
        return self._ranks[times]


def in_band(rate_P: np.ndarray, low: float, high: float) -> np.ndarray:
    """bool: the problems whose pass rate lies in [`low`, `high`], or those that are nearest to it
    where none does. NaN is an unknown rate; one at least must be known."""
    # NaN stays NaN here and compares as False below: an unknown rate is never chosen.
    distance_P = np.maximum(0.0, np.maximum(low - rate_P, rate_P - high))
    nearest_P: np.ndarray = distance_P <= np.nanmin(distance_P)
    return nearest_P


def gaussian_keys(
    rate_P: np.ndarray, *, target: float, spread: float, generator: np.random.Generator
) -> np.ndarray:
    """Keys whose largest n are a draw of n problems without replacement, each in proportion to
    exp(-(rate - target)^2 / (2 spread^2)): log weights plus Gumbel noise. NaN stays NaN.

    Nemotron 3 Nano's curriculum; the noise is Kool et al., arXiv 1903.06059.
    """
    noise_P = generator.gumbel(size=len(rate_P))
    keys_P: np.ndarray = noise_P - (rate_P - target) ** 2 / (2 * spread**2)
    return keys_P


def reprofile_of(s: Rl) -> Reprofile | None:
    """How the policy is profiled anew within the stage, None where it is not."""
    return None if isinstance(s.draw, InTurn) else s.draw.reprofile


def reprofile_due(how: Reprofile, step: int, reward: Sequence[float]) -> bool:
    """Whether the policy is profiled anew before 0-based `step`; `reward` is that of each step."""
    if how.every is not None and step > 0 and step % how.every == 0:
        return True
    return how.on_plateau is not None and step in plateaus(
        reward[:step], patience=how.on_plateau, gain=PLATEAU_GAIN
    )


def _groups(batch: Batch, size: int) -> Iterator[tuple[Problem, bool]]:
    """The problem of each group of `size` neighbouring rows, and whether its rewards are alike."""
    # From one flag per row to one per group.
    # In the type in which advantages are computed.
    alike = zero_variance(batch["reward_B"].float(), batch["group_B"])[::size].tolist()
    return zip(batch.problems[::size], alike, strict=True)


def _rows_of_groups(numbers: Sequence[int], size: int) -> Tensor:
    """The rows of these groups of `size` neighbours: those of [0, 2] with 2 are [0, 1, 4, 5]."""
    # From one entry per group to one per row.
    first_B = torch.tensor(numbers).repeat_interleave(size) * size
    return first_B + torch.arange(size).repeat(len(numbers))


def _means(values: Sequence[float], size: int) -> list[float]:
    """The mean of each `size` values."""
    return [mean(values[i : i + size]) for i in range(0, len(values), size)]


def _whole(row: Row) -> tuple[str, Any, str | None]:
    """What tells a problem from all others, in a problem's row and in a rollout's; ids of a user's
    table may repeat."""
    return row["id"], asked_key(asked(row)), row.get("mode")
