"""One optimiser step of a distillation: its rows, their constants, and the loss of the estimator.

Legend: B rows, N flat response tokens, D hidden, K top-k, E teacher's hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from posttrain.backends.base import Head, Metrics, MicroBatch
from posttrain.backends.local import response_targets
from posttrain.losses.distill import full_vocabulary_of_each, sampled_token, top_k
from posttrain.losses.divergence import TeacherStates
from posttrain.losses.ops import aggregation_weights, token_logprobs
from posttrain.losses.policy import policy_gradient
from posttrain.rl.corrections import importance_correction
from posttrain.rl.kept import flat_index
from posttrain.stages.rollouts import Scored
from posttrain.stages.settings.distill import Distill
from posttrain.stages.teachers import Targets


class DistillUpdate:
    """The rows of one optimiser step with the constants of their loss, which are on `device`."""

    def __init__(
        self,
        config: Distill,
        *,
        domains: list[str],
        targets: list[Targets],
        scored: Scored,
        rows_B: Tensor,
        domain_B: Tensor,
        teacher_B: Tensor,
        weight_B: Tensor,
        advantage_B: Tensor,
        device: torch.device,
    ) -> None:
        self.config, self.domains, self.targets = config, domains, targets
        self.rows_B, self.domain_B = rows_B.to(device), domain_B.to(device)
        self.teacher_B, self.weight_B = teacher_B.to(device), weight_B.to(device)
        self.advantage_B = advantage_B.to(device)
        self.rows = scored.rollouts.rows(rows_B)
        self.constant = config.aggregation_constant or config.max_new_tokens
        self.sampler_logp_N = self.rows.sampler_logp_N().to(device)
        length_B = self.rows.response_len_B
        self.length_B = length_B.to(device)
        self.start_B = (length_B.cumsum(0) - length_B).to(device)
        self.count = float(length_B.sum() if config.aggregation == "token" else len(length_B))

    def loss(self, hidden_ND: Tensor, head: Head, part: MicroBatch) -> tuple[Tensor, Metrics]:
        """The chosen estimator for the rows of all teachers at once."""
        hidden_ND, part = self._by_teacher(hidden_ND, part)
        config, length_B = self.config, part.rollouts.response_len_B
        row_N = part.rollouts.row_N()
        weight_N, _ = aggregation_weights(
            row_N, len(length_B), aggregation=config.aggregation, constant=self.constant
        )
        weight_N = weight_N * self.weight_B[part.index_B][row_N]
        logp_N, entropy_N, correction_N, metrics = None, None, None, {}
        if config.estimator == "sampled_token" or config.reward_weight > 0:
            logp_N, entropy_N = token_logprobs(
                hidden_ND,
                head.weight_VD,
                response_targets(part.rollouts),
                bias_V=head.bias_V,
                temperature=config.temperature,
            )
            flat_N = flat_index(self.start_B, self.length_B, part.index_B)
            # For the policy-gradient terms only: an exact divergence does not depend on which token
            # was sampled, so it has nothing to correct.
            correction_N, metrics = importance_correction(
                logp_N,
                self.sampler_logp_N[flat_N],
                mode=config.correction,
                low=config.correction_low,
                high=config.correction_high,
            )
        total, kl_N, exact_entropy_N, estimator_metrics = self._estimate(
            hidden_ND, head, part, weight_N, logp_N, correction_N
        )
        if config.reward_weight > 0 and logp_N is not None:
            advantage_N = self.advantage_B[part.index_B][row_N]
            # A ratio of the current policy to itself, which is 1: the plain policy gradient. What
            # the sampler did differently is in the correction.
            reward_total, _ = policy_gradient(
                logp_N,
                logp_N.detach(),
                advantage_N,
                weight_N,
                row_N,
                num_rows=len(length_B),
                ratio="token",
                clip_low=1.0,
                clip_high=1.0,
                correction_N=correction_N,
            )
            total = total + config.reward_weight * reward_total
        entropy_N = exact_entropy_N if entropy_N is None else entropy_N
        assert entropy_N is not None
        metrics = metrics | estimator_metrics | {"loss": total.detach()}
        domain_N = self.domain_B[part.index_B][row_N]
        values = {"kl": kl_N, "entropy": entropy_N, "tokens": torch.ones_like(kl_N)}
        for quantity, value_N in values.items():
            sums = value_N.new_zeros(len(self.domains)).index_add(0, domain_N, value_N)
            metrics |= {f"{quantity}/{d}": sums[i] for i, d in enumerate(self.domains)}
        return total, metrics

    def _by_teacher(self, hidden_ND: Tensor, part: MicroBatch) -> tuple[Tensor, MicroBatch]:
        """The same rows with those of one teacher next to each other, teachers in order."""
        teacher_B = self.teacher_B[part.index_B]
        if bool((teacher_B.diff() >= 0).all()):
            return hidden_ND, part
        order_B = teacher_B.argsort(stable=True)
        length_B = part.rollouts.response_len_B
        flat_N = flat_index(length_B.cumsum(0) - length_B, length_B, order_B)
        rows = part.rollouts.rows(order_B)
        ordered = MicroBatch(index_B=part.index_B[order_B], rollouts=rows)
        return hidden_ND.index_select(0, flat_N), ordered

    def _targets_of(self, part: MicroBatch) -> Iterator[tuple[Targets, Tensor]]:
        """Each teacher of the ordered rows, and where their tokens stand in its targets."""
        teacher_B = self.teacher_B[part.index_B]
        for number in teacher_B.unique().tolist():
            targets, index_B = self.targets[number], part.index_B[teacher_B == number]
            length_B = self.length_B[index_B]
            start_B = targets.start_B[self.rows_B[index_B]]
            all_B = torch.arange(len(length_B), device=length_B.device)
            yield targets, flat_index(start_B, length_B, all_B)

    def _estimate(
        self,
        hidden_ND: Tensor,
        head: Head,
        part: MicroBatch,
        weight_N: Tensor,
        logp_N: Tensor | None,
        correction_N: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Metrics]:
        """`(loss sum, kl_N, entropy_N or None, metric sums)` of the configured estimator."""
        config, targets_of = self.config, list(self._targets_of(part))
        if config.estimator == "sampled_token":
            assert logp_N is not None
            teacher_logp_N = torch.cat([t.logp_N[at_N] for t, at_N in targets_of])
            total, sums = sampled_token(
                logp_N,
                teacher_logp_N,
                weight_N,
                advantage_clip=config.advantage_clip,
                correction_N=correction_N,
            )
            kl_N = (logp_N - teacher_logp_N).detach()
            return total, kl_N, None, {n: sums[n] for n in ("advantage_abs", "clipped")}
        if config.estimator == "top_k":
            total, sums, per_token = top_k(
                hidden_ND,
                head.weight_VD,
                torch.cat([t.top_ids_NK[at_N] for t, at_N in targets_of]),
                torch.cat([t.top_logp_NK[at_N] for t, at_N in targets_of]),
                weight_N,
                bias_V=head.bias_V,
                temperature=config.temperature,
            )
            metrics = {name: sums[name] for name in ("student_mass", "teacher_mass")}
            return total, per_token["kl"], per_token["entropy"], metrics
        total, _, per_token = full_vocabulary_of_each(
            hidden_ND,
            head.weight_VD,
            [
                TeacherStates(
                    hidden_NE=t.hidden_NE[at_N], head_VE=t.head.weight_VD, bias_V=t.head.bias_V
                )
                for t, at_N in targets_of
            ],
            weight_N,
            bias_V=head.bias_V,
            divergence=config.divergence,
            jsd_beta=config.jsd_beta,
            temperature=config.temperature,
        )
        return total, per_token["kl"], per_token["entropy"], {}
