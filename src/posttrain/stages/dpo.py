"""Learning from preference pairs: DPO, length-normalised DPO, SimPO, IPO and KTO.

The reference never changes, so its log-probabilities are computed once before the loop, and of each
response only their sum is kept: that is all a loss reads of it. The chosen and the rejected
responses of a step go through the model together.

KTO needs no pairs: it also learns from single responses that are called desirable or undesirable
(`r.preferences(..., label=...)`), each of which is a row by itself.

Legend: B rows (two per pair, chosen first; one per single response), P pairs, N sampled tokens
(those of the responses), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from posttrain.algorithms import Dpo, DpoNorm, Ipo, Kto, Preference, SimPO
from posttrain.backends.base import Learner, Metrics, Scorer, TokenLoss
from posttrain.backends.chat import Chat
from posttrain.backends.prompting import asked
from posttrain.backends.vocabulary import check_same_tokens, draw_alike
from posttrain.engine.errors import ConfigError
from posttrain.losses.ops import row_sums
from posttrain.losses.preference import (
    chosen_nll,
    dpo,
    ipo,
    kto,
    kto_baseline,
    pair_metrics,
    response_scores,
)
from posttrain.report.samples import Sample
from posttrain.rl.batch import Batch
from posttrain.schedules import learning_rate
from posttrain.stages.aux_losses import AuxData, pop_metrics
from posttrain.stages.context import Context
from posttrain.stages.data import Batches
from posttrain.stages.lengths import LEARNER, Reader, cut, cut_to, fit_responses, smallest
from posttrain.stages.rows import SIDES, Pair, numbered, read_pairs
from posttrain.stages.sampled_ids import response_ids
from posttrain.stages.samples import LOOKED_AT, Question, answered, questions
from posttrain.stages.settings.offline import DpoStage

RESPONSES = (*SIDES, "response")
"""Fields of a row that have a response, as far as it has them."""
PAIRS_PER_CALL = 512
"""Pairs that the reference reads at once."""


def run(settings: DpoStage, ctx: Context) -> dict[str, float]:
    """Train `start` on the pairs of its data."""
    policy = ctx.learner(settings)
    chat = policy.chat
    # The start is its own reference: read here, before a step or a checkpoint changes its weights.
    reference = None if isinstance(settings.loss, SimPO) else reference_model(settings, ctx, policy)
    readers = [Reader(name=LEARNER, chat=chat)]
    if reference is not None:
        # It has the policy's tokens, so its rows need not be encoded again.
        positions = reference.chat.max_positions
        readers += [Reader(name="the reference", chat=chat, positions=positions)]
    by_domain = fit_responses(read_pairs(ctx), settings, ctx, readers, fields=RESPONSES)
    pairs = numbered(by_domain)
    single = check_form(pairs, settings.loss)
    limit, crossed_limit = cut_to(settings, readers), smallest(readers)
    rows_each = 1 if single else len(SIDES)
    counted_V = counted_tokens(chat, mask_formatting=settings.mask_formatting)
    aux = AuxData(settings, ctx, chat)
    others = mismatched(pairs) if isinstance(settings.loss, Kto) else None
    if reference is not None:
        ref_logp_B = response_sums(reference, pairs, chat, counted_V, limit=limit)
    if reference is not None and others is not None:
        other_ref_logp_B = response_sums(
            reference, pairs, chat, counted_V, others, limit=crossed_limit
        )
    # A model of its own is not to stay in memory through the steps.
    del reference
    batches = Batches(by_domain, settings, size="batch_size", stage=ctx.name)
    steps = settings.num_steps(len(pairs), settings.batch_size)
    about = questions(pair_questions(by_domain), chat)
    for step, s in ctx.steps(settings, steps, replayed=[batches], policy=policy):
        drawn = batches.draw(s)
        batch = pair_batch(drawn, chat, limit=limit)
        # One per token id -> one per sampled token.
        batch["counted_N"] = counted_V[batch.targets_N]
        # From pairs to rows: pair r of all has the rows 2 r and 2 r + 1 of the reference's sums,
        # single response r the row r.
        drawn_B = torch.tensor(
            [rows_each * pair["row"] + side for pair in drawn for side in range(rows_each)]
        )
        if not isinstance(s.loss, SimPO):
            batch["ref_logp_B"] = ref_logp_B[drawn_B]
        metrics = {}
        if others is not None:
            crossed = pair_batch(
                drawn, chat, [others[pair["row"]] for pair in drawn], limit=crossed_limit
            )
            logp_B = counted_sums(crossed, policy.logprobs(crossed), counted_V)
            # KTO's z_0 (arXiv 2402.01306, section 4.1), over the whole step before it is split.
            baseline = kto_baseline(logp_B - other_ref_logp_B[drawn_B])
            # One number, as a column: that is how it gets to the loss with the rows.
            batch["baseline_B"] = baseline.expand(len(batch))
            metrics["kl_baseline"] = float(baseline)
        # KTO is a mean over responses, the others are means over pairs.
        count = float(len(batch) if isinstance(s.loss, Kto) else len(drawn))
        lr = learning_rate(s, step, steps)
        sums = policy.update(
            batch,
            TokenLoss(single_loss if single else preference_loss, s.loss),
            count=count,
            lr=lr,
            # A pair reaches the loss whole, however the batch is split into forward passes.
            group_rows=rows_each,
            aux=aux.losses(step, s),
        )
        rates = {"grad_norm": sums.pop("grad_norm"), "lr": lr}
        losses = {"loss": sums.pop("loss") / count} | pop_metrics(sums)
        means = {name: value / len(drawn) for name, value in sums.items()}
        if single:
            means = single_means(sums, batch)
        metrics |= losses | means | rates
        ctx.log(step + 1, steps, tokens=batch.num_tokens, **metrics, **s.scheduled())
        if about and ctx.samples.due(step + 1, steps):
            ctx.samples.write(step + 1, preferences(ctx, policy, about, limit))
    policy.finish()
    policy.save(ctx.out)
    # A last step may have had single responses of one kind only, and so no margin.
    said = {name: ctx.history(name) for name in ("loss", "accuracy", "margin")}
    summary = {name: values[-1] for name, values in said.items() if values}
    return summary | {"tokens": ctx.tokens}


def pair_questions(by_domain: Mapping[str, Sequence[Pair]]) -> Iterator[Question]:
    """The first pairs of each domain, as questions that the model is asked."""
    for pairs in by_domain.values():
        for pair in pairs[:LOOKED_AT]:
            texts = {field: pair[field] for field in SIDES if field in pair}
            if "response" in pair:
                texts = {"desirable" if pair["desirable"] else "undesirable": pair["response"]}
            yield Question(row=pair, shown=asked(pair), texts=texts)


def preferences(
    ctx: Context, policy: Learner, about: Sequence[Question], limit: int | None
) -> list[Sample]:
    """What the model answers now to a few prompts, beside the responses of their pairs; `logp_...`
    are the log-probabilities of these, nats per response."""
    batch = pair_batch([one.row for one in about], policy.chat, limit=limit)
    sums = iter(row_sums(policy.logprobs(batch), batch.row_N, len(batch)).tolist())
    # The rows of the batch are the responses of the pairs, in the order of their texts.
    numbers = [{f"logp_{name}": next(sums) for name in one.texts} for one in about]
    return answered(ctx.sampler(policy), about, numbers)


def check_form(pairs: Sequence[Pair], loss: Preference) -> bool:
    """Whether these are single responses and no pairs. Raises ConfigError for a loss that cannot
    learn from them."""
    single = bool(pairs) and "response" in pairs[0]
    if single and not isinstance(loss, Kto):
        raise ConfigError(
            f"loss = {loss.kind!r} learns from pairs, and the data are single responses, desirable "
            "or not; use loss = 'kto'"
        )
    return single


def pair_batch(
    pairs: Sequence[Pair],
    chat: Chat,
    answers: Sequence[Pair] | None = None,
    *,
    limit: int | None = None,
) -> Batch:
    """Two rows for each pair, chosen first, or one for each single response, with `desirable_B`.

    `answers` are pairs whose responses stand in place of the pairs' own. Rows of more than `limit`
    tokens lose their end.
    """
    prompts: list[Sequence[int]] = []
    responses: list[Sequence[int]] = []
    for pair, answer in zip(pairs, pairs if answers is None else answers, strict=True):
        for side in ("response",) if "response" in answer else SIDES:
            prompts.append(chat.prompt(asked(pair), pair.get("mode")))
            response = response_ids(chat, asked(answer), answer, side)
            responses.append(cut(response, prompts[-1], limit))
    batch = Batch.from_tokens(prompts, responses, pad_id=chat.pad_id)
    if pairs and "response" in pairs[0]:
        batch["desirable_B"] = torch.tensor([pair["desirable"] for pair in pairs])
    return batch


def mismatched(pairs: Sequence[Pair]) -> list[Pair]:
    """For every pair the first one after it, round the end, that answers another problem.

    KTO's baseline is measured on the responses of these. Raises ConfigError where all pairs answer
    one problem.
    """
    keys = [(pair["domain"], pair["id"]) for pair in pairs]
    if len(set(keys)) < 2:
        raise ConfigError(
            "loss = 'kto' needs pairs of two problems at least: its baseline is measured on "
            "responses to other prompts; use more problems, or another loss"
        )
    # Twice around, from the back: what follows a pair of the same problem follows this one too.
    following: list[int] = [0] * len(keys)
    for place in range(2 * len(keys) - 2, -1, -1):
        here, after = place % len(keys), (place + 1) % len(keys)
        following[here] = following[after] if keys[here] == keys[after] else after
    return [pairs[number] for number in following]


def preference_loss(
    loss: Preference, logp_N: Tensor, entropy_N: Tensor, batch: Batch
) -> tuple[Tensor, Metrics]:
    """A `TokenLoss` of whole pairs: the preference loss, plus the cross-entropy of the chosen
    responses.

    Columns: `counted_N` (bool, tokens that the preference loss reads), `ref_logp_B` (the
    reference's sum over these; none with SimPO), `baseline_B` (KTO's, the same for all rows).
    """
    row_N, num_rows = batch.row_N, len(batch)
    score_B = response_scores(
        logp_N,
        batch["counted_N"],
        row_N,
        num_rows=num_rows,
        ref_logp_B=None if isinstance(loss, SimPO) else batch["ref_logp_B"],
        mean=loss.MEAN,
    )
    # One per row -> one per pair, of the chosen and of the rejected.
    total, metrics = _of_scores(loss, score_B[::2], score_B[1::2], batch)
    # Over all tokens, also those that are not counted: the end of a response is to be learned.
    logp_B = row_sums(logp_N, row_N, num_rows)
    nll_weight = 0.0 if isinstance(loss, Kto) else loss.nll_weight
    nll, nll_metrics = chosen_nll(logp_B[::2], batch.sampled_len_B[::2], weight=nll_weight)
    if nll_weight > 0:
        total = total + nll
    # One per row -> chosen and rejected of each pair.
    sums_P2 = logp_B.detach().reshape(-1, 2)
    logps = {"logp_chosen": sums_P2[:, 0].sum(), "logp_rejected": sums_P2[:, 1].sum()}
    return total, metrics | nll_metrics | logps | {"loss": total.detach()}


def single_loss(
    loss: Kto, logp_N: Tensor, entropy_N: Tensor, batch: Batch
) -> tuple[Tensor, Metrics]:
    """A `TokenLoss` of single responses, each desirable or not: KTO.

    Columns: those of `preference_loss`, and `desirable_B` (bool). Metrics are sums over the rows
    that `single_means` divides by.
    """
    row_N, num_rows, good_B = batch.row_N, len(batch), batch["desirable_B"]
    score_B = response_scores(
        logp_N, batch["counted_N"], row_N, num_rows=num_rows, ref_logp_B=batch["ref_logp_B"]
    )
    baseline = batch["baseline_B"][0]
    total, metrics = kto(
        score_B[good_B],
        score_B[~good_B],
        baseline,
        beta=loss.beta,
        desirable_weight=loss.desirable_weight,
        undesirable_weight=loss.undesirable_weight,
    )
    above_B = score_B.detach() > baseline
    logp_B = row_sums(logp_N, row_N, num_rows).detach()
    metrics |= {
        # On its side of the baseline: a desirable response above it, another one not.
        "accuracy": (above_B == good_B).to(logp_B.dtype).sum(),
        "logp_chosen": logp_B[good_B].sum(),
        "logp_rejected": logp_B[~good_B].sum(),
    }
    return total, metrics | {"loss": total.detach()}


def single_means(sums: Mapping[str, float], batch: Batch) -> dict[str, float]:
    """The metrics of a step of single responses: of the desirable ones (chosen), of the others
    (rejected), and `margin`, by how much the mean rewards differ. Those of a kind of response that
    the step did not draw are left out."""
    good = int(batch["desirable_B"].sum())
    counts = {"chosen": good, "rejected": len(batch) - good}
    means = {"accuracy": sums["accuracy"] / len(batch)}
    for kind in [kind for kind, count in counts.items() if count]:
        means |= {
            f"{what}_{kind}": sums[f"{what}_{kind}"] / counts[kind] for what in ("reward", "logp")
        }
    if all(counts.values()):
        means["margin"] = means["reward_chosen"] - means["reward_rejected"]
    return means


def _of_scores(
    loss: Preference, chosen_P: Tensor, rejected_P: Tensor, batch: Batch
) -> tuple[Tensor, Metrics]:
    match loss:
        case Ipo():
            return ipo(chosen_P, rejected_P, beta=loss.beta)
        case Kto():
            total, metrics = kto(
                chosen_P,
                rejected_P,
                batch["baseline_B"][0],
                beta=loss.beta,
                desirable_weight=loss.desirable_weight,
                undesirable_weight=loss.undesirable_weight,
            )
            return total, pair_metrics(chosen_P, rejected_P, beta=loss.beta) | metrics
        case Dpo() | DpoNorm() | SimPO():
            return dpo(
                chosen_P,
                rejected_P,
                beta=loss.beta,
                gamma=loss.gamma if isinstance(loss, SimPO) else 0.0,
                label_smoothing=loss.label_smoothing,
            )


def reference_model(settings: DpoStage, ctx: Context, policy: Learner) -> Learner | Scorer:
    """The stage of the edge `reference`, else the start. Its tokens have to be the policy's; where
    its chat template is another one, that is told."""
    if "reference" not in ctx.inputs:
        return policy
    reference = ctx.scorer("reference", precision=settings.precision)
    check_same_tokens(policy.chat, reference.chat, "reference", role="reference")
    draw_alike(policy, [reference])
    if not reference.chat.lays_out_as(policy.chat):
        ctx.warn(
            "the reference has another chat template than the policy, and reads the pairs as the "
            "policy's lays them out, which it was not trained on; take a reference with the "
            "policy's template, or the start",
            about="reference",
        )
    return reference


def counted_tokens(chat: Chat, *, mask_formatting: bool) -> Tensor:
    """`counted_V` (bool): which token ids the preference loss reads."""
    counted_V = torch.ones(chat.num_ids, dtype=torch.bool)
    if mask_formatting:
        formatting = {*chat.tokenizer.all_special_ids, *chat.stop_ids}
        counted_V[sorted(token for token in formatting if token in chat.ids)] = False
    return counted_V


def response_sums(
    reference: Learner | Scorer,
    pairs: Sequence[Pair],
    chat: Chat,
    counted_V: Tensor,
    answers: Sequence[Pair] | None = None,
    *,
    limit: int | None = None,
) -> Tensor:
    """`logp_B` of the rows of all pairs: sums over the counted response tokens."""
    parts = []
    for first in range(0, len(pairs), PAIRS_PER_CALL):
        here = slice(first, first + PAIRS_PER_CALL)
        replies = None if answers is None else answers[here]
        batch = pair_batch(pairs[here], chat, replies, limit=limit)
        parts.append(counted_sums(batch, reference.logprobs(batch), counted_V))
    return torch.cat(parts)


def counted_sums(batch: Batch, logp_N: Tensor, counted_V: Tensor) -> Tensor:
    """`row_sums` over the counted tokens of each response."""
    return row_sums(logp_N, batch.row_N, len(batch), counted_V[batch.targets_N])
