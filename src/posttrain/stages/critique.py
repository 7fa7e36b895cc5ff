"""Learning to judge from the policy's own rollouts: Kimi K2's closed loop (arXiv 2507.20534, 3.2).

A policy that judges itself (`judges.itself`) changes as it learns, and so do the responses that it
is asked about. Where the verifier tells two responses of a step apart, the policy learns which is
the better one beside its rewards: its verdicts on what no verifier judges then rest on what was
checked, and on responses such as it gives now.

Legend: B rows (comparisons), D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posttrain.backends.base import AuxLoss, Head, HeadLoss, Metrics
from posttrain.backends.chat import Chat
from posttrain.losses.ops import cross_entropy, token_logprobs
from posttrain.rewards.comparisons import VERDICTS, Compared, compared
from posttrain.rewards.judge_kinds import Itself
from posttrain.rl.batch import Batch
from posttrain.rl.seeds import derived_seed
from posttrain.stages.judging import comparison_prompt, verdict_ids
from posttrain.stages.rows import by_problem
from posttrain.stages.settings.rl import Rl

NAME = "critique"
"""Of the auxiliary loss; its metrics are `critique_...`."""
CHOOSING = 1 << 21
"""Apart from the numbers of a step's draws and profiles."""


class CritiqueLoss:
    """The verdicts on what was sampled in a step, as an auxiliary loss of each of its updates."""

    def __init__(self, settings: Rl, chat: Chat) -> None:
        """Raises ConfigError where the policy is to learn verdicts that begin with the same
        token."""
        self.chat = chat
        asked = (part for part in settings.reward.walk() if isinstance(part, Itself))
        self.template = next((part.template for part in asked), None)
        """The question that the reward asks the policy, so that it learns to answer that one."""
        self.verdicts = (0, 0) if settings.critique is None else verdict_ids(chat)

    def losses(
        self, s: Rl, step: int, rows: Sequence[Mapping[str, Any]]
    ) -> tuple[list[list[AuxLoss]], dict[str, float]]:
        """For each update of the step its part of the comparisons of these rollouts, as the log has
        them, and metrics; no comparisons where the settings have no critique.

        Which pairs are taken where there are more than the updates have room for follows from
        (seed, step).
        """
        if s.critique is None:
            return [[] for _ in range(s.num_minibatches)], {}
        known = s.critique.domains
        asked = [row for row in rows if not known or row["domain"] in known]
        pairs = compared(by_problem(row for row in asked if row["finished"]))
        encoded = [row for row in map(self._encode, pairs) if row is not None]
        order = np.random.default_rng(derived_seed(s.seed, step, CHOOSING))
        room = s.critique.pairs * s.num_minibatches
        chosen = [encoded[i] for i in order.permutation(len(encoded))[:room]]
        loss = HeadLoss(verdict_loss, (self.verdicts, len(chosen)))
        losses: list[list[AuxLoss]] = []
        for share in (chosen[i :: s.num_minibatches] for i in range(s.num_minibatches)):
            prompts, verdicts = [prompt for prompt, _ in share], [[verdict] for _, verdict in share]
            # One sampled token per row, so that what is flat over tokens is [B] in `verdict_loss`.
            batch = Batch.from_tokens(prompts, verdicts, pad_id=self.chat.pad_id)
            weight = s.critique.weight
            own = AuxLoss(name=NAME, batch=batch, loss=loss, count=len(share), weight=weight)
            losses.append([own] if share else [])
        return losses, {f"{NAME}_pairs": float(len(chosen))}

    def _encode(self, pair: Compared) -> tuple[list[int], int] | None:
        """The question and the token of its verdict; None where no room is left for the texts."""
        verdict = self.verdicts[VERDICTS.index(pair.verdict)]
        prompt = comparison_prompt(self.chat, self.template, pair.problem, (pair.a, pair.b))
        limit = self.chat.max_positions
        if limit is not None and len(prompt) >= limit:
            return None
        return prompt, verdict


def verdict_loss(
    settings: tuple[tuple[int, int], int], hidden_BD: Tensor, head: Head, batch: Batch
) -> tuple[Tensor, Metrics]:
    """The cross-entropy in nats of the verdicts. A `HeadLoss`.

    `settings` are the ids of the two verdicts and the number of comparisons of the step, over which
    the metrics add up to means. `accuracy` is how often the right one of the two verdicts is the
    likelier one, which is what `judges.itself` reads.
    """
    verdicts, count = settings
    target_B = batch.targets_N
    logp_B, _ = token_logprobs(hidden_BD, head.weight_VD, target_B, bias_V=head.bias_V)
    with torch.no_grad():
        # Of two ids the one that is not the target.
        other_B = sum(verdicts) - target_B
        other_logp_B, _ = token_logprobs(hidden_BD, head.weight_VD, other_B, bias_V=head.bias_V)
        right = (logp_B > other_logp_B).sum()
    total, _ = cross_entropy(logp_B, logp_B.new_ones(len(target_B)))
    return total, {"loss": total.detach() / count, "accuracy": right / count}


def pop_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Remove what `verdict_loss` measured from the sums over a step's updates, and return it."""
    names = [name for name in sums if name.startswith(f"{NAME}/")]
    return {name.replace("/", "_"): sums.pop(name) for name in names}
