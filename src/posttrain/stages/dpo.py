"""Learning from preference pairs: DPO, length-normalised DPO, SimPO, IPO and KTO.

The reference never changes, so its log-probabilities are computed once before the loop, and of each
response only their sum is kept: that is all a loss reads of it. The chosen and the rejected
responses of a step go through the model together. Legend: B rows (two per pair, chosen first), P
pairs, N flat response tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from posttrain.backends.base import Head, Metrics, MicroBatch, Part
from posttrain.backends.chat import Chat
from posttrain.backends.checkpoint import LanguageModel, load, save
from posttrain.backends.local import (
    LocalLearner,
    LocalScorer,
    response_logprobs,
    response_targets,
)
from posttrain.losses.ops import token_logprobs
from posttrain.losses.preference import (
    chosen_nll,
    kto,
    kto_baseline,
    logistic,
    pair_metrics,
    response_scores,
    row_sums,
    squared,
)
from posttrain.rl.types import Rollouts
from posttrain.schedules import learning_rate
from posttrain.stages.auxiliary import Auxiliary, take_metrics
from posttrain.stages.batches import Batches
from posttrain.stages.context import Context
from posttrain.stages.learner import new_learner, steps_to_do
from posttrain.stages.preferences import Rows, encode, encode_mismatched, read_pairs
from posttrain.stages.settings.preference import Dpo
from posttrain.stages.teachers import check_same_tokens

ROWS_PER_CALL = 1024
"""Rows that the reference reads at once."""
MEANS = ("length_normalised", "simpo", "ipo")
"""Losses whose score is a mean over tokens; of the others it is the sum."""


def run(config: Dpo, ctx: Context) -> dict[str, float]:
    """Train `start` on the pairs of its data."""
    language_model = load(ctx.inputs["start"], device=ctx.device)
    chat, pad_id = Chat(language_model), language_model.pad_id
    by_domain = read_pairs(ctx)
    pairs = list(chain.from_iterable(by_domain.values()))
    rows = encode(pairs, chat, pad_id)
    counted_V = counted_tokens(config, language_model)
    learner = new_learner(config, language_model, ctx)
    aux = Auxiliary(config, config.seed, ctx, chat, pad_id)
    # The start is its own reference: read here, before a step or a checkpoint changes its weights.
    reference = reference_model(config, ctx, learner.policy)
    reference_B, baseline = None, None
    if reference is not None:
        reference_B = response_sums(LocalScorer(reference), rows, counted_V)
    if reference is not None and config.loss == "kto":
        others = encode_mismatched(pairs, chat, pad_id)
        sums_B = response_sums(LocalScorer(reference), others, counted_V)
        baseline = Baseline(others, sums_B, counted_V)
    del reference
    batches = Batches(by_domain, config, size="batch_size", stage=ctx.name)
    steps = config.steps or math.ceil((config.epochs or 0) * len(pairs) / config.batch_size)
    for step, now in steps_to_do(config, ctx, learner, batches, steps):
        drawn = torch.tensor([pair["row"] for pair in batches.draw(now)])
        index_B = (2 * drawn[:, None] + torch.arange(2)).flatten()
        update = PairUpdate(
            now,
            rows=rows.batch(index_B),
            counted_V=counted_V,
            reference_B=None if reference_B is None else reference_B[index_B],
            baseline=None if baseline is None else baseline.value(learner, index_B),
            device=learner.device,
        )
        lr = learning_rate(now, step, steps)
        metrics = learn(learner, update, lr=lr, also=aux.parts(step, now.aux))
        metrics |= now.scheduled()
        ctx.log(step + 1, steps, tokens=update.rows.num_tokens, **metrics)
        ctx.checkpoint(step + 1, learner)
    save(learner.result(), ctx.out)
    summary = {name: ctx.metrics[name] for name in ("loss", "accuracy", "margin")}
    return summary | {"tokens": ctx.tokens}


def learn(
    learner: LocalLearner, update: PairUpdate, *, lr: float, also: Sequence[Part] = ()
) -> dict[str, float]:
    """One optimiser step on a batch of pairs; returns its metrics, means over pairs."""
    count = update.count
    sums = learner.update(update.rows, update.loss, count=count, lr=lr, group_rows=2, also=also)
    grad_norm, loss, aux = sums.pop("grad_norm"), sums.pop("loss"), take_metrics(sums)
    num_pairs = len(update.rows) // 2
    metrics = {"loss": loss / count} | {k: v / num_pairs for k, v in sums.items()}
    if update.baseline is not None:
        metrics["kl_baseline"] = float(update.baseline)
    return metrics | aux | {"grad_norm": grad_norm, "lr": lr}


class PairUpdate:
    """The pairs of one optimiser step with the constants of their loss, which are on `device`."""

    def __init__(
        self,
        config: Dpo,
        *,
        rows: Rollouts,
        counted_V: Tensor,
        reference_B: Tensor | None,
        baseline: Tensor | None,
        device: torch.device,
    ) -> None:
        self.config, self.rows, self.counted_V = config, rows, counted_V.to(device)
        self.reference_B = None if reference_B is None else reference_B.to(device)
        self.baseline = None if baseline is None else baseline.to(device)
        # KTO is a mean over responses, the others are means over pairs.
        self.count = float(len(rows) if config.loss == "kto" else len(rows) // 2)

    def loss(self, hidden_ND: Tensor, head: Head, part: MicroBatch) -> tuple[Tensor, Metrics]:
        """The preference loss of whole pairs, plus the cross-entropy of the chosen responses."""
        config, index_B, length_B = self.config, part.index_B, part.rollouts.response_len_B
        assert bool((index_B[1::2] == index_B[::2] + 1).all()), "a pair was taken apart"
        targets_N = response_targets(part.rollouts)
        logp_N, _ = token_logprobs(hidden_ND, head.weight_VD, targets_N, bias_V=head.bias_V)
        row_N = part.rollouts.row_N()
        counted_N = self.counted_V[targets_N]
        score_B = response_scores(
            logp_N,
            counted_N,
            row_N,
            num_rows=len(length_B),
            ref_logp_B=None if self.reference_B is None else self.reference_B[index_B],
            mean=config.loss in MEANS,
        )
        chosen_P, rejected_P = score_B[::2], score_B[1::2]
        total, metrics = self._preference(chosen_P, rejected_P)
        logp_B = row_sums(logp_N, torch.ones_like(counted_N), row_N, len(length_B))
        nll, nll_metrics = chosen_nll(logp_B[::2], length_B[::2], weight=config.nll_weight)
        if config.nll_weight > 0:
            total = total + nll
        sums_P2 = logp_B.detach().reshape(-1, 2)
        logps = {"logp_chosen": sums_P2[:, 0].sum(), "logp_rejected": sums_P2[:, 1].sum()}
        return total, metrics | nll_metrics | logps | {"loss": total.detach()}

    def _preference(self, chosen_P: Tensor, rejected_P: Tensor) -> tuple[Tensor, Metrics]:
        config = self.config
        if config.loss == "ipo":
            return squared(chosen_P, rejected_P, beta=config.beta)
        if self.baseline is not None:
            total, metrics = kto(
                chosen_P,
                rejected_P,
                self.baseline,
                beta=config.beta,
                desirable_weight=config.desirable_weight,
                undesirable_weight=config.undesirable_weight,
            )
            return total, pair_metrics(chosen_P, rejected_P, beta=config.beta) | metrics
        return logistic(
            chosen_P,
            rejected_P,
            beta=config.beta,
            gamma=config.gamma if config.loss == "simpo" else 0.0,
            label_smoothing=config.label_smoothing,
        )


class Baseline:
    """What KTO compares rewards with: log ratios of responses after prompts of other problems."""

    def __init__(self, rows: Rows, reference_B: Tensor, counted_V: Tensor) -> None:
        self.rows, self.reference_B, self.counted_V = rows, reference_B, counted_V

    def value(self, learner: LocalLearner, index_B: Tensor) -> Tensor:
        """`kto_baseline` (0-d) of the current weights on the rows at `index_B`."""
        batch = self.rows.batch(index_B)
        logp_N = learner.logprobs(batch, temperature=1.0)
        return kto_baseline(counted_sums(batch, logp_N, self.counted_V) - self.reference_B[index_B])


def reference_model(
    config: Dpo, ctx: Context, language_model: LanguageModel
) -> LanguageModel | None:
    """The stage of the edge `reference`, else the start; None where no loss reads it."""
    if config.loss == "simpo":
        return None
    if "reference" not in ctx.inputs:
        return language_model
    dtype = getattr(torch, config.precision)
    reference = load(ctx.inputs["reference"], dtype=dtype, device=ctx.device)
    check_same_tokens(language_model, reference, "reference", role="reference")
    return reference


def counted_tokens(config: Dpo, language_model: LanguageModel) -> Tensor:
    """`counted_V` (bool): which token ids the preference loss reads."""
    size = int(language_model.model.get_output_embeddings().weight.shape[0])
    counted_V = torch.ones(size, dtype=torch.bool)
    if config.mask_formatting:
        special = {*language_model.tokenizer.all_special_ids, *language_model.stop_ids}
        counted_V[sorted(special)] = False
    return counted_V


def response_sums(scorer: LocalScorer, rows: Rows, counted_V: Tensor) -> Tensor:
    """`logp_B` of all rows under a frozen model: sums over the counted response tokens."""
    parts = []
    for index_B in torch.arange(len(rows)).split(ROWS_PER_CALL):
        batch = rows.batch(index_B)
        logp_N = response_logprobs(scorer.hidden(batch), scorer.head, batch, temperature=1.0)
        parts.append(counted_sums(batch, logp_N, counted_V))
    return torch.cat(parts)


def counted_sums(batch: Rollouts, logp_N: Tensor, counted_V: Tensor) -> Tensor:
    """`row_sums` over the counted tokens of each response."""
    counted_N = counted_V[response_targets(batch)]
    return row_sums(logp_N, counted_N, batch.row_N(), len(batch))
