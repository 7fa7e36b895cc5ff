"""Learning to judge from the policy's own rollouts: Kimi K2's closed loop (arXiv 2507.20534, 3.2).

A policy that judges itself (`judges.itself`) changes as it learns, and so do the responses that it
is asked about. Where the verifier tells two responses of a step apart, the policy learns which is
the better one beside its rewards: its verdicts on what no verifier judges then rest on what was
checked, and on responses such as it gives now.

Legend: B rows (comparisons), D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from posttrain.backends.base import Head, LossFunction, Metrics, MicroBatch, Part
from posttrain.backends.chat import Chat
from posttrain.backends.checkpoint import LanguageModel
from posttrain.backends.local import response_targets
from posttrain.losses.ops import token_logprobs
from posttrain.losses.sft import cross_entropy
from posttrain.rewards.comparisons import VERDICTS, Compared, compared
from posttrain.rewards.judge_kinds import Itself
from posttrain.stages.batches import sequences
from posttrain.stages.curriculum import derived_seed
from posttrain.stages.judging import comparison_prompt, positions_of, verdict_ids
from posttrain.stages.rows import by_problem
from posttrain.stages.settings.rl import Rl

NAME = "critique"
"""Of the part of the loss; its metrics are `critique_...`."""
CHOOSING = 1 << 21
"""Apart from the numbers of a step's draws and profiles."""


class Also(Protocol):
    """Further losses of a stage's optimiser steps."""

    def parts(self, update: int, weights: Mapping[str, float]) -> list[Part]:
        """Those of 0-based optimiser step `update` of the stage, weighed as in `weights`."""
        ...


class Critique:
    """The losses of `also`, and beside them the verdicts on what was sampled last."""

    def __init__(self, config: Rl, language_model: LanguageModel, also: Also) -> None:
        """`config` holds for the whole stage. Raises ConfigError where the two verdicts begin with
        the same token."""
        self.also, self.chat = also, Chat(language_model)
        self.pad_id, self.limit = language_model.pad_id, positions_of(language_model)
        asked = (part for part in config.reward.walk() if isinstance(part, Itself))
        self.template = next((part.template for part in asked), None)
        """The question that the reward asks the policy, so that it learns to answer that one."""
        self.verdicts = verdict_ids(self.chat)
        self.batches: list[list[tuple[list[int], int]]] = []
        self.weight = 0.0

    def take(self, now: Rl, step: int, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Prepare the comparisons of a step out of its rollouts, as the log has them.

        `now` are the settings of the step. Which pairs are taken where there are more than the
        updates have room for follows from (seed, step).
        """
        known = now.critique_domains
        asked = [row for row in rows if not known or row["domain"] in known]
        pairs = compared(by_problem(row for row in asked if row["finished"]))
        encoded = [row for row in map(self._encode, pairs) if row is not None]
        room = now.critique_pairs * now.updates_per_batch
        order = np.random.default_rng(derived_seed(now.seed, step, CHOOSING))
        chosen = [encoded[i] for i in order.permutation(len(encoded))[:room]]
        self.batches = [chosen[i :: now.updates_per_batch] for i in range(now.updates_per_batch)]
        self.weight = now.critique_weight
        return {f"{NAME}_pairs": float(len(chosen))}

    def parts(self, update: int, weights: Mapping[str, float]) -> list[Part]:
        """The losses of an update, `also` weighed as in `weights`.

        The comparisons of a step are shared out over its updates.
        """
        parts = self.also.parts(update, weights)
        batch = self.batches[update % len(self.batches)]
        if not batch:
            return parts
        rollouts = sequences([p for p, _ in batch], [[v] for _, v in batch], self.pad_id)
        total = sum(map(len, self.batches))
        own = Part(
            name=NAME,
            rollouts=rollouts,
            loss=verdict_loss(self.verdicts, total),
            count=len(batch),
            weight=self.weight,
        )
        return [*parts, own]

    def _encode(self, pair: Compared) -> tuple[list[int], int] | None:
        """The question and the token of its verdict; None where no room is left for the texts."""
        verdict = self.verdicts[VERDICTS.index(pair.verdict)]
        sides = (pair.a, pair.b)
        prompt = comparison_prompt(self.chat, self.limit, self.template, pair.problem, sides)
        if self.limit is not None and len(prompt) >= self.limit:
            return None
        return prompt, verdict


def verdict_loss(verdicts: tuple[int, int], total: int) -> LossFunction:
    """The cross-entropy in nats of the verdicts; metrics add up to means over `total` comparisons.

    `accuracy` is how often the right one of the two verdicts is the likelier one, which is what
    `judges.itself` reads.
    """

    def loss(hidden_BD: Tensor, head: Head, part: MicroBatch) -> tuple[Tensor, Metrics]:
        target_B = response_targets(part.rollouts)
        logp_B, _ = token_logprobs(hidden_BD, head.weight_VD, target_B, bias_V=head.bias_V)
        with torch.no_grad():
            other_B = sum(verdicts) - target_B
            other_logp_B, _ = token_logprobs(hidden_BD, head.weight_VD, other_B, bias_V=head.bias_V)
            right = (logp_B > other_logp_B).sum()
        sum_, _ = cross_entropy(logp_B, logp_B.new_ones(len(target_B)))
        return sum_, {"loss": sum_.detach() / total, "accuracy": right / total}

    return loss


def take_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Remove what `verdict_loss` measured from the sums over a step's updates, and return it."""
    found = [name for name in sums if name.startswith(f"{NAME}/")]
    return {name.replace("/", "_"): sums.pop(name) for name in found}
