"""Signs that a stage does little of what it is for, told to the user as warnings (`Context.warn`).

Nothing here changes a number or ends a stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.backends.chat import Chat
from posttrain.rl.batch import Batch
from posttrain.stages.context import Context
from posttrain.stages.settings.rl import Rl

STEPS = 10
"""For so many steps a sign has to last."""
FEW = 0.05
"""The share of what a stage was given below which it keeps nearly nothing."""
ENOUGH = 16
"""Of fewer things no share is told."""
SHOWN = 4
"""So many stop tokens are named."""


def few_kept(ctx: Context, kept: int, total: int, what: str, fix: str) -> None:
    """Warn where a stage keeps nearly none of the `total` things it was given: `what`, such as
    "rollouts"."""
    if total >= ENOUGH and kept < FEW * total:
        ctx.warn(f"it keeps {kept} of {total} {what} ({100 * kept / total:.1f} %); {fix}")


def cut_responses(
    ctx: Context, shares: Sequence[float], total: int, max_new_tokens: int, chat: Chat
) -> None:
    """Warn where more than half of the responses of the newest steps, or of all in a short stage,
    were cut off.

    To be called after each of `total` steps: `shares` are what was finished in each so far,
    `max_new_tokens` the limit in this one, `chat` is that of the model.
    """
    newest = shares[-STEPS:]
    if len(newest) >= min(STEPS, total) and sum(newest) < 0.5 * len(newest):
        share = 1 - sum(newest) / len(newest)
        first, last = len(shares) - len(newest) + 1, len(shares)
        when = f"steps {first} to {last}" if first < last else f"step {last}"
        ctx.warn(
            f"{100 * share:.0f} % of the responses of {when} were cut off at "
            f"max_new_tokens = {max_new_tokens}: {_cut(chat)}",
            about="cut responses",
        )


def _cut(chat: Chat) -> str:
    """What it means that responses were cut, and what would have ended them."""
    return (
        "they have no end to learn and give no answer; what ends a response of this model is "
        f"{ends(chat)}; raise max_new_tokens, or start from a model that ends its responses "
        "(generation_config.json says with which tokens)"
    )


def ends(chat: Chat) -> str:
    """The tokens that end a response, for people: their texts and ids."""
    shown = [f"{chat.text([token])!r} ({token})" for token in chat.stop_ids[:SHOWN]]
    more = len(chat.stop_ids) - len(shown)
    return " or ".join(shown) + (f" or one of {more} more" if more else "")


class Responses:
    """What a stage that samples sees of each domain: how many responses, how many were cut off, and
    which rewards they have."""

    def __init__(self) -> None:
        self.cut: dict[str, list[bool]] = {}
        self.rewards: dict[str, list[float]] = {}

    def add(self, batch: Batch) -> None:
        """Take in the rows of a batch."""
        columns = batch["finished_B"].tolist(), batch["reward_B"].tolist()
        for problem, finished, reward in zip(batch.problems, *columns, strict=True):
            self.cut.setdefault(problem["domain"], []).append(not finished)
            self.rewards.setdefault(problem["domain"], []).append(reward)

    def tell(self, ctx: Context, max_new_tokens: int, models: Mapping[str, str]) -> None:
        """Warn of domains in which more than half was cut off, or all rewards are the same.
        `models` are the edges of the domains' models."""
        for domain, cut in self.cut.items():
            if sum(cut) > 0.5 * len(cut):
                ctx.warn(
                    f"domain {domain!r}: {sum(cut)} of {len(cut)} responses were cut off at "
                    f"max_new_tokens = {max_new_tokens}: {_cut(ctx.chat(models[domain]))}"
                )
            rewards = self.rewards[domain]
            if len(rewards) >= ENOUGH and min(rewards) == max(rewards) and not all(cut):
                ctx.warn(
                    f"domain {domain!r}: all {len(rewards)} responses have the reward "
                    f"{rewards[0]:g}; {_same(rewards[0], rewards[0])}"
                )


class RlWatch:
    """Watches the rollouts of an rl stage for domains whose rewards tell one response from another
    in no step."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.steps: dict[str, int] = {}
        """Steps one after another, up to the newest, in which all rewards were alike."""
        self.seen: dict[str, list[float]] = {}
        """The least and the greatest reward of those steps."""

    def observe(self, s: Rl, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take in what a step sampled, whole groups one after another as the rollout log has
        them."""
        size = s.group_size if s.by_group else 1
        groups: dict[str, list[list[float]]] = {}
        for start in range(0, len(rows), size):
            values = [row.get("score", row["reward"]) for row in rows[start : start + size]]
            groups.setdefault(rows[start]["domain"], []).append(values)
        for domain, found in groups.items():
            # Without groups a response is compared with all others of its domain.
            parts = found if s.by_group else [[v for values in found for v in values]]
            if any(min(values) != max(values) for values in parts):
                self.steps.pop(domain, None)
                self.seen.pop(domain, None)
                continue
            flat = [v for values in parts for v in values]
            low, high = self.seen.get(domain, (flat[0], flat[0]))
            self.seen[domain] = [min(low, *flat), max(high, *flat)]
            self.steps[domain] = self.steps.get(domain, 0) + 1
            if self.steps[domain] == STEPS:
                self._tell(domain, by_group=s.by_group)

    def _tell(self, domain: str, *, by_group: bool) -> None:
        low, high = self.seen[domain]
        rewards = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        whose = "the responses to a prompt" if by_group else "all responses"
        self.ctx.warn(
            f"domain {domain!r}: in {STEPS} steps one after another {whose} had the same reward "
            f"({rewards}), from which nothing is learned; {_same(low, high)}",
            about=f"flat rewards of {domain}",
        )


def _same(low: float, high: float) -> str:
    """What may be wrong where rewards are all between `low` and `high` and never differ."""
    if high <= 0:
        return (
            "start from a model that solves some of the prompts, choose prompts that it solves "
            "(r.profile, r.filter), or check what the verifier says of a right answer"
        )
    if low >= 1:
        return (
            "all is solved: choose harder prompts (r.profile, r.filter), or check what the "
            "verifier says of a wrong answer"
        )
    return "check that the verifier or judge tells a good response from a bad one"
