"""Text to imitate, and auxiliary losses: cross-entropy on such text beside a stage's own loss.

Pretraining or demonstration data that holds a policy where it was while something else is learned:
InstructGPT's PPO-ptx (arXiv 2203.02155, equation 2), the PTX loss of Kimi K2 (arXiv 2507.20534),
the supervised term beside Nemotron's DPO. What is descended is the stage's own loss, which is a
mean, plus `weight` times the mean cross-entropy of the auxiliary batch's response tokens.

Legend: N sampled tokens (here those of the demonstrations).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from posttrain.algorithms import Aux
from posttrain.backends.base import AuxLoss, Metrics, TokenLoss
from posttrain.backends.chat import Chat
from posttrain.backends.prompting import (
    THINKING,
    Problem,
    in_modes,
    learned_part,
    learned_rows,
)
from posttrain.engine.errors import ConfigError
from posttrain.engine.graph import edge_name, named
from posttrain.engine.jsonl import read_jsonl
from posttrain.losses.ops import cross_entropy
from posttrain.rl.batch import Batch
from posttrain.rl.seeds import named_seed
from posttrain.stages.context import Context
from posttrain.stages.data import Pool
from posttrain.stages.lengths import LEARNER, Reader, cut_spans, cut_to, demo_spans, fit_demos

EDGE = "aux"
"""First part of the names of the edges with auxiliary data, and of the metrics."""


class AuxSettings(Protocol):
    """The settings of a stage that may have auxiliary losses."""

    @property
    def seed(self) -> int: ...
    @property
    def on_long(self) -> str: ...
    @property
    def aux(self) -> Mapping[str, Aux]: ...


class AuxData:
    """The auxiliary data of a stage, drawn anew for every optimiser step."""

    def __init__(self, settings: AuxSettings, ctx: Context, chat: Chat) -> None:
        """Reads the edges `aux.NAME` (an artifact with data.jsonl) and `aux.NAME.DOMAIN` (the
        demonstrations of a domain). Raises ConfigError for a name of `settings.aux` without data,
        and for rows that are too long.
        """
        self.chat = chat
        reader = Reader(name=LEARNER, chat=chat)
        self.limit = cut_to(settings, [reader])
        # Not the stage's seed: the rows must not come in the order in which its own come.
        self.pools = {
            name: Pool(
                fit_demos(rows, settings, ctx, [reader]),
                seed=named_seed(EDGE, settings.seed, name),
            )
            for name, rows in aux_rows(settings, ctx).items()
        }

    def losses(self, update: int, step_settings: AuxSettings) -> list[AuxLoss]:
        """The losses of 0-based optimiser step `update` of the stage, with the step's weights.

        What is drawn follows from the seed and from `update` alone.
        """
        found = []
        for name, pool in self.pools.items():
            aux = step_settings.aux[name]
            batch = demo_batch(pool.draw(update, aux.batch_size), self.chat, limit=self.limit)
            count = batch.num_tokens
            found.append(
                AuxLoss(
                    name=f"{EDGE}/{name}",
                    batch=batch,
                    loss=TokenLoss(token_cross_entropy, count),
                    count=count,
                    weight=aux.weight,
                )
            )
        return found


def pop_metrics(sums: dict[str, float], num_updates: int = 1) -> dict[str, float]:
    """Take the metrics of auxiliary losses out of the sums of `num_updates` updates: `aux/NAME`,
    the mean cross-entropy of a token, averaged over the updates."""
    found = [name for name in sums if name.startswith(f"{EDGE}/")]
    return {name.removesuffix("/loss"): sums.pop(name) / num_updates for name in found}


def token_cross_entropy(
    divisor: float, logp_N: Tensor, entropy_N: Tensor, batch: Batch
) -> tuple[Tensor, Metrics]:
    """A `TokenLoss`: cross-entropy in nats, summed over tokens. The metric `loss` is that sum over
    `divisor`, so that it can be a mean or, with 1, a sum."""
    total, _ = cross_entropy(logp_N, torch.ones_like(logp_N))
    return total, {"loss": total.detach() / divisor}


def demo_batch(
    rows: Sequence[Problem], chat: Chat, *, loss_on: str = "all", limit: int | None = None
) -> Batch:
    """Prompts with their demonstrations, whose tokens are those to learn; one row each.

    Of a conversation also what the assistant said before is learned, unless `loss_on` is "last".
    Rows longer than `limit` lose their end.
    """
    spans = [demo_spans(row, chat, loss_on=loss_on) for row in rows]
    if limit is not None:
        spans = [cut_spans(row, limit) for row in spans]
    return Batch.from_spans(spans, pad_id=chat.pad_id)


def aux_rows(settings: AuxSettings, ctx: Context) -> dict[str, dict[str, list[Problem]]]:
    """Name of each auxiliary loss to its rows with prompt and demo, by domain.

    Demonstrations of domains are in each of the loss's `modes`, as in `in_modes`, each a row of its
    own.
    """
    return {name: _rows_of(ctx, name, aux.modes) for name, aux in sorted(settings.aux.items())}


def _rows_of(ctx: Context, name: str, modes: Sequence[str]) -> dict[str, list[Problem]]:
    edge = edge_name("aux", name)
    if edge in ctx.inputs:
        return rows_by_domain(ctx.inputs[edge] / "data.jsonl", ctx.name)
    demos = {
        domain: in_told_modes(list(read_jsonl(path / "train.jsonl")), modes, domain, ctx)
        for domain, path in sorted(named(ctx.inputs, edge).items())
    }
    if not demos:
        raise ConfigError(
            f"stage {ctx.name!r}: aux = {name!r} has a weight and no data; give both in the "
            f"recipe: aux={{{name!r}: (r.demos(...), weight)}}"
        )
    return with_demonstrations(demos, ctx)


def in_told_modes(
    problems: Sequence[Problem], modes: Sequence[str], domain: str, ctx: Context
) -> list[Problem]:
    """The problems of a domain in each of the modes. Tells of further demonstrations of a problem
    that are none of a mode."""
    shown = in_modes(problems, modes)
    further = [sum(len(row.get("demos", ())) for row in rows) for rows in (problems, shown)]
    left_out = further[0] * max(1, len(modes)) - further[1]
    if left_out:
        ctx.warn(
            f"{left_out} further demonstrations of domain {domain!r} are not learned: in the modes "
            f"{', '.join(modes)} the columns for the thought and for the answer alone belong to "
            "the first demonstration of a problem; give such rows prompts that differ."
        )
    return shown


def rows_by_domain(path: Path, stage: str) -> dict[str, list[Problem]]:
    """The rows of a data artifact by domain. Raises ConfigError where it has none.

    The rows of a mix stand in one group, whatever their domains: its shares are to stay.
    """
    rows: dict[str, list[Problem]] = {}
    for row in learned_rows(read_jsonl(path)):
        rows.setdefault(str(row.get("pool", row["domain"])), []).append(row)
    if not rows:
        raise ConfigError(f"stage {stage!r}: its data has no rows; loosen the selection")
    return dict(sorted(rows.items()))


def with_demonstrations(
    demos: Mapping[str, Sequence[Problem]], ctx: Context
) -> dict[str, list[Problem]]:
    """Every demonstration of these problems as a row of its own, by domain.

    Problems without one are left out, which is told. Raises ConfigError for a domain that has no
    demonstration at all.
    """
    found: dict[str, list[Problem]] = {}
    for name, problems in demos.items():
        shown = [problem for problem in problems if learned_part(problem) is not None]
        missing = next((problem for problem in problems if learned_part(problem) is None), None)
        if missing is not None and shown:
            ctx.warn(
                f"domain {name!r}: problems without a demonstration are not learned, "
                f"{len(problems) - len(shown)} of {len(problems)}, the first of them "
                f"{missing['id']} ({missing['prompt'][:60]!r}); add demonstrations to the table"
            )
        elif missing is not None:
            thinks = missing.get("mode") in THINKING
            raise ConfigError(
                f"stage {ctx.name!r}: domain {name!r} has no "
                + ("thinking demonstration" if thinks else "demonstration")
                + f" for problem {missing['id']}; fill its column, or name another with "
                + ("`thought = ...`" if thinks else "`demo = ...`")
                + " in the suite, or leave the domain out of `data`"
            )
        found[name] = learned_rows(shown)
    return found
