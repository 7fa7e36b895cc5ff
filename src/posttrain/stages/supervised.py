"""Learning from given text: pretraining from nothing, and supervised fine-tuning.

Both draw documents, each a prompt and its demonstration in chat form, and descend the mean
cross-entropy of the tokens that are to be learned. Pretraining makes its model and a tokenizer from
the data first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from posttrain.backends.base import Learner, TokenLoss
from posttrain.backends.chat import Chat
from posttrain.backends.checkpoint import save
from posttrain.backends.prompting import (
    Problem,
    also_hinted,
    learned_part,
    shown_text,
)
from posttrain.backends.tiny import character_tokenizer, new_model
from posttrain.report.samples import Sample
from posttrain.rewards.oracle import demonstrate
from posttrain.rl.batch import Batch, between
from posttrain.schedules import learning_rate
from posttrain.stages.aux_losses import (
    AuxData,
    aux_rows,
    demo_batch,
    in_told_modes,
    pop_metrics,
    rows_by_domain,
    token_cross_entropy,
    with_demonstrations,
)
from posttrain.stages.context import Context
from posttrain.stages.data import Batches
from posttrain.stages.lengths import LEARNER, Reader, cut_to, fit_demos
from posttrain.stages.rollout import verifiers
from posttrain.stages.samples import LOOKED_AT, Question, answered, questions, token_means
from posttrain.stages.settings.offline import Pretrain, Sft

TEXTS = ("prompt", "demo", "thought", "direct")
"""Fields of a row whose characters the tokenizer of a new model must have."""


def pretrain(settings: Pretrain, ctx: Context) -> dict[str, float]:
    """Train a new model on documents."""
    demos = demonstrations(settings, ctx)
    policy = ctx.learner(settings, fresh_model(settings, ctx, demos))
    demos = fitting(settings, ctx, policy.chat, demos)
    imitate(settings, ctx, policy, demos, settings.steps)
    return {
        "loss": ctx.metrics["loss"],
        "tokens": ctx.tokens,
        "parameters": policy.num_parameters(),
    }


def sft(settings: Sft, ctx: Context) -> dict[str, float]:
    """Train from `start` on demonstrations, or on the rows of a `data` artifact."""
    policy = ctx.learner(settings)
    demos = also_hinted(demonstrations(settings, ctx), settings.hint, where=f"stage {ctx.name!r}")
    demos = fitting(settings, ctx, policy.chat, demos)
    num_rows = sum(map(len, demos.values()))
    steps = settings.num_steps(num_rows, settings.batch_size)
    imitate(settings, ctx, policy, demos, steps)
    return {"loss": ctx.metrics["loss"], "tokens": ctx.tokens}


def imitate(
    settings: Pretrain | Sft,
    ctx: Context,
    policy: Learner,
    demos: Mapping[str, Sequence[Problem]],
    steps: int,
) -> None:
    """The loop of both stages: descend the cross-entropy of the demonstrations, averaged over
    tokens, and save the model."""
    batches = Batches(demos, settings, size="batch_size", stage=ctx.name)
    aux = AuxData(settings, ctx, policy.chat)
    limit = cut_to(settings, [Reader(name=LEARNER, chat=policy.chat)])
    about = questions(demo_questions(demos), policy.chat)
    for step, s in ctx.steps(settings, steps, replayed=[batches], policy=policy):
        batch = demo_batch(
            batches.draw(s), policy.chat, loss_on=learned_turns(settings), limit=limit
        )
        if isinstance(settings, Pretrain) and settings.loss_on == "all":
            batch = whole_documents(batch)
        count, lr = batch.num_tokens, learning_rate(s, step, steps)
        # With a divisor of 1 the metric `loss` is a sum, which becomes a mean below.
        sums = policy.update(
            batch, TokenLoss(token_cross_entropy, 1.0), count=count, lr=lr, aux=aux.losses(step, s)
        )
        metrics = {"loss": sums["loss"] / count, "grad_norm": sums["grad_norm"], "lr": lr}
        metrics |= pop_metrics(sums) | s.scheduled()
        ctx.log(step + 1, steps, tokens=count, **metrics)
        if about and ctx.samples.due(step + 1, steps):
            ctx.samples.write(step + 1, imitations(ctx, policy, about, limit))
    policy.finish()
    policy.save(ctx.out)


def demo_questions(demos: Mapping[str, Sequence[Problem]]) -> Iterator[Question]:
    """The first demonstrations of each domain, as questions that the model is asked."""
    for rows in demos.values():
        for row in rows[:LOOKED_AT]:
            if (part := learned_part(row)) is not None:
                yield Question(row=row, shown=part[0], texts={"demonstration": part[1]})


def imitations(
    ctx: Context, policy: Learner, about: Sequence[Question], limit: int | None
) -> list[Sample]:
    """What the model answers now to a few prompts, beside their demonstrations; `loss` is the
    cross-entropy of these, nats per token."""
    rows = [one.row for one in about]
    batch = demo_batch(rows, policy.chat, loss_on="last", limit=limit)
    loss_B = -token_means(policy.logprobs(batch), batch)
    return answered(ctx.sampler(policy), about, [{"loss": loss} for loss in loss_B.tolist()])


def learned_turns(settings: Pretrain | Sft) -> str:
    """Which turns of a conversation are learned: all, or the last."""
    return settings.loss_on if isinstance(settings, Sft) else "all"


def fitting(
    settings: Pretrain | Sft, ctx: Context, chat: Chat, demos: Mapping[str, Sequence[Problem]]
) -> dict[str, list[Problem]]:
    """The demonstrations that the model can read. Tells of conversations of which it learns only
    the last turn because the others cannot be found in what its template writes."""
    loss_on = learned_turns(settings)
    demos = fit_demos(demos, settings, ctx, [Reader(name=LEARNER, chat=chat)], loss_on=loss_on)
    if loss_on == "all":
        rows = [row for of_domain in demos.values() for row in of_domain if "messages" in row]
        parts = [(learned_part(row), row.get("mode")) for row in rows]
        missed = sum(part is not None and chat.spans(*part, mode) is None for part, mode in parts)
        if missed:
            ctx.warn(
                f"{missed} of {len(rows)} conversations are learned in their last turn only: the "
                "model's chat template does not show their earlier turns so that they can be found "
                'in its text; loss_on = "last" asks for this.'
            )
    return dict(demos)


def whole_documents(batch: Batch) -> Batch:
    """The same rows with every token to be learned but the first, which nothing predicts."""
    first_B = batch.length_B.clamp(max=1)
    every_BT = between(first_B, batch.length_B, batch.tokens_BT.shape[1])
    return replace(batch, prompt_len_B=first_B, sampled_BT=every_BT)


def fresh_model(settings: Pretrain, ctx: Context, demos: Mapping[str, Sequence[Problem]]) -> Path:
    """A directory with a model of random weights and a tokenizer that has every character."""
    fields = TEXTS if settings.thinks else TEXTS[:2]
    # Auxiliary rows as well: the model is to read these too.
    every = [demos, *aux_rows(settings, ctx).values()]
    rows = [row for by_domain in every for rows in by_domain.values() for row in rows]
    tokenizer = character_tokenizer(
        chain(
            (row[field] or "" for row in rows for field in fields if field in row),
            # All that a conversation shows, the names of its roles among it.
            (shown_text(row) for row in rows if "messages" in row),
        ),
        thinking=settings.thinks,
    )
    directory = ctx.work / "fresh"
    save(
        new_model(
            tokenizer,
            hidden_size=settings.hidden_size,
            num_layers=settings.num_layers,
            num_heads=settings.num_heads,
            head_dim=settings.head_dim,
            intermediate_size=settings.intermediate_size,
            max_positions=settings.max_positions,
            seed=settings.seed,
        ),
        directory,
    )
    return directory


def demonstrations(settings: Pretrain | Sft, ctx: Context) -> dict[str, list[Problem]]:
    """Rows with prompt and demo by domain: of the domains themselves, or of a data artifact.

    Those of domains are in the stage's modes, and some of them wrong with `demo_noise`.
    """
    if "data" in ctx.inputs:
        return rows_by_domain(ctx.inputs["data"] / "data.jsonl", ctx.name)
    return demonstrated(
        ctx, ctx.domains, modes=settings.modes, noise=settings.demo_noise, seed=settings.seed
    )


def demonstrated(
    ctx: Context, domains: Iterable[str], *, modes: Sequence[str], noise: float, seed: int
) -> dict[str, list[Problem]]:
    """The demonstrations of these domains in each of the modes, each a row of its own, a share
    `noise` of them wrong.

    Problems without one are left out. Raises ConfigError for a domain that has none.
    """
    demos = {name: in_told_modes(ctx.problems(name, "train"), modes, name, ctx) for name in domains}
    demos = with_demonstrations(demos, ctx)
    return corrupt_demos(ctx, demos, noise=noise, seed=seed) if noise else demos


def corrupt_demos(
    ctx: Context, demos: dict[str, list[Problem]], *, noise: float, seed: int
) -> dict[str, list[Problem]]:
    """The demonstrations as a careless annotator gives them."""
    pool = verifiers(ctx)

    def score(text: str, problem: Mapping[str, Any]) -> float:
        return pool.scores([problem], [text])[0]

    def noisy(rows: list[Problem]) -> list[Problem]:
        by_mode: dict[str | None, list[Problem]] = {}
        # A conversation that ends with the user has no demonstration to be wrong.
        for row in (row for row in rows if row["demo"] is not None):
            by_mode.setdefault(row.get("mode"), []).append(row)
        return [
            row
            if row["demo"] is None
            else row
            | {"demo": demonstrate(row, by_mode[row.get("mode")], score, noise=noise, seed=seed)}
            for row in rows
        ]

    return {name: noisy(rows) for name, rows in demos.items()}
