"""Auxiliary losses: cross-entropy on text of its own in every optimiser step of another stage.

Pretraining or demonstration data that holds a policy where it was while something else is learned:
InstructGPT's PPO-ptx (arXiv 2203.02155, equation 2), the PTX loss of Kimi K2 (arXiv 2507.20534),
the supervised term beside Nemotron's DPO. What is descended is the stage's own loss, which is a
mean, plus `weight` times the mean cross-entropy of the auxiliary batch's response tokens.

Legend: N flat response tokens, D hidden.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from posttrain.backends.base import Head, LossFunction, Metrics, MicroBatch, Part
from posttrain.backends.chat import Chat
from posttrain.backends.local import response_targets
from posttrain.engine.errors import ConfigError
from posttrain.losses.ops import token_logprobs
from posttrain.losses.sft import cross_entropy
from posttrain.rl.types import Rollouts
from posttrain.stages.batches import Pool, Problem, sequences
from posttrain.stages.context import Context
from posttrain.stages.rows import read_rows
from posttrain.stages.settings.base import WithAux
from posttrain.suites.prompting import Mode, in_modes

EDGE = "aux"


class Auxiliary:
    """The auxiliary data of a stage, drawn anew for every optimiser step."""

    def __init__(self, config: WithAux, seed: int, ctx: Context, chat: Chat, pad_id: int) -> None:
        """Reads the edges `aux.NAME` (an artifact with data.jsonl) and `aux.NAME.DOMAIN` (the
        demonstrations of a domain). Raises ConfigError for a name of `config.aux` without data."""
        self.config, self.chat, self.pad_id = config, chat, pad_id
        self.pools = {}
        for name in sorted(config.aux):
            rows = auxiliary_rows(ctx, name, config.aux_modes.get(name, ()))
            # Not the stage's seed: the rows must not come in the order in which its own come.
            self.pools[name] = Pool(rows, seed=_seed(seed, name))

    def parts(self, update: int, weights: Mapping[str, float]) -> list[Part]:
        """The batches of 0-based optimiser step `update` of the stage, weighed as in `weights`."""
        found = []
        for name, pool in self.pools.items():
            batch = encode(pool.draw(update, self.config.aux_batch_size), self.chat, self.pad_id)
            found.append(
                Part(
                    name=EDGE,
                    rollouts=batch,
                    loss=token_cross_entropy(name, batch.num_tokens),
                    count=batch.num_tokens,
                    weight=weights[name],
                )
            )
        return found


def take_metrics(sums: dict[str, float], num_updates: int = 1) -> dict[str, float]:
    """Remove `aux/NAME` from the sums of `num_updates` updates; returns their means over these."""
    names = [name for name in sums if name.startswith(f"{EDGE}/")]
    return {name: sums.pop(name) / num_updates for name in names}


def token_cross_entropy(name: str, count: float) -> LossFunction:
    """The response tokens' cross-entropy in nats; over `count` it is the metric `name`."""

    def loss(hidden_ND: Tensor, head: Head, part: MicroBatch) -> tuple[Tensor, Metrics]:
        targets_N = response_targets(part.rollouts)
        logp_N, _ = token_logprobs(hidden_ND, head.weight_VD, targets_N, bias_V=head.bias_V)
        total, _ = cross_entropy(logp_N, logp_N.new_ones(len(targets_N)))
        return total, {name: total.detach() / count}

    return loss


def encode(rows: Sequence[Problem], chat: Chat, pad_id: int) -> Rollouts:
    """Prompts and demonstrations as a batch."""
    return sequences(
        [chat.prompt(row["prompt"], row.get("mode")) for row in rows],
        [chat.response(row["prompt"], row["demo"], row.get("mode")) for row in rows],
        pad_id,
    )


def auxiliary_rows(ctx: Context, name: str, modes: Sequence[Mode] = ()) -> dict[str, list[Problem]]:
    """Rows with prompt and demo by domain, of the edges of the auxiliary loss `name`.

    Demonstrations of domains are in each of `modes`, as in `in_modes`.
    """
    edge = f"{EDGE}.{name}"
    if edge in ctx.inputs:
        return rows_by_domain(ctx.inputs[edge] / "data.jsonl", ctx.name)
    demos: dict[str, list[Problem]] = {}
    for found, path in sorted(ctx.inputs.items()):
        if found.startswith(f"{edge}."):
            rows = in_modes(list(read_rows(path / "train.jsonl")), modes)
            demos[found.removeprefix(f"{edge}.")] = rows
    if not demos:
        raise ConfigError(
            f"stage {ctx.name!r}: aux = {name!r} has a weight and no data; give both in the "
            f"recipe: aux={{{name!r}: (r.demos(...), weight)}}"
        )
    check_demonstrated(demos, ctx.name)
    return demos


def rows_by_domain(path: Path, stage: str) -> dict[str, list[Problem]]:
    """The rows of a data artifact by domain. Raises ConfigError where it has none.

    The rows of a mix stand in one group, whatever their domains: its shares are to stay.
    """
    rows: dict[str, list[Problem]] = {}
    for row in read_rows(path):
        rows.setdefault(row.get("pool", row["domain"]), []).append(row)
    if not rows:
        raise ConfigError(f"stage {stage!r}: its data has no rows; loosen the selection")
    return dict(sorted(rows.items()))


def check_demonstrated(demos: Mapping[str, Sequence[Problem]], stage: str) -> None:
    """Raise ConfigError for a domain with a problem that has no demonstration."""
    for name, problems in demos.items():
        missing = next((p for p in problems if p["demo"] is None), None)
        if missing is not None:
            thinks = missing.get("mode") == "think"
            raise ConfigError(
                f"stage {stage!r}: domain {name!r} has no "
                + ("thinking demonstration" if thinks else "demonstration")
                + f" for problem {missing['id']}; name its column with "
                + ("`thought = ...`" if thinks else "`demo = ...`")
                + " in the suite, or leave the domain out of `data`"
            )


def _seed(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{EDGE}/{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
