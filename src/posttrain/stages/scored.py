"""Scored rollouts of several draws as one batch, and the groups of it that a step learns from.

Legend: B rows (responses), T positions, R response positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from posttrain.rl.advantage import zero_variance
from posttrain.rl.kept import joined_kept
from posttrain.rl.types import Rollouts
from posttrain.stages.rollouts import Scored


def joined(parts: Sequence[Scored]) -> Scored:
    """The rows of all parts, part after part; groups are numbered on."""
    if len(parts) == 1:
        return parts[0]
    values: dict[str, Any] = {}
    for field in fields(Scored):
        found = [getattr(part, field.name) for part in parts]
        if field.name == "group_B":
            values["group_B"] = _numbered_on(found)
        elif isinstance(found[0], Rollouts):
            values[field.name] = _together(found)
        elif isinstance(found[0], Tensor):
            values[field.name] = torch.cat(found)
        else:
            values[field.name] = [value for part in found for value in part]
    return Scored(**values)


def chosen_groups(scored: Scored, wanted: Mapping[str, int], size: int) -> Scored:
    """As many groups of `size` rows of each domain as are wanted, those with unequal rewards first.

    They come in the order in which they were drawn.
    """
    flat = zero_variance(scored.reward_B, scored.group_B)[::size].tolist()
    left = dict(wanted)
    chosen: list[int] = []
    for number in sorted(range(len(flat)), key=lambda number: (flat[number], number)):
        domain = scored.problems[number * size]["domain"]
        if left[domain] > 0:
            left[domain] -= 1
            chosen.append(number)
    group_B = torch.tensor(sorted(chosen)).repeat_interleave(size)
    return rows_of(scored, group_B * size + torch.arange(size).repeat(len(chosen)))


def rows_of(scored: Scored, index_B: Tensor) -> Scored:
    """The rows at `index_B`, int64."""
    values: dict[str, Any] = {}
    for field in fields(Scored):
        value = getattr(scored, field.name)
        if isinstance(value, Rollouts):
            values[field.name] = value.rows(index_B)
        elif isinstance(value, Tensor):
            values[field.name] = value[index_B]
        else:
            values[field.name] = [value[row] for row in index_B.tolist()]
    return Scored(**values)


def _numbered_on(groups: Sequence[Tensor]) -> Tensor:
    numbered, first = [], 0
    for group_B in groups:
        numbered.append(group_B + first)
        first += int(group_B.max()) + 1
    return torch.cat(numbered)


def _together(parts: Sequence[Rollouts]) -> Rollouts:
    """Rows of unlike widths; what a shorter one is padded with is never read."""
    columns = max(part.tokens_BT.shape[1] for part in parts)
    responses = max(part.logp_BR.shape[1] for part in parts)
    kept = [part.kept for part in parts if part.kept is not None]
    assert len(kept) in (0, len(parts)), "all parts carry what was kept, or none"
    return replace(
        parts[0],
        tokens_BT=torch.cat([pad(p.tokens_BT, (0, columns - p.tokens_BT.shape[1])) for p in parts]),
        prompt_len_B=torch.cat([part.prompt_len_B for part in parts]),
        response_len_B=torch.cat([part.response_len_B for part in parts]),
        logp_BR=torch.cat([pad(p.logp_BR, (0, responses - p.logp_BR.shape[1])) for p in parts]),
        finished_B=torch.cat([part.finished_B for part in parts]),
        kept=joined_kept(kept) if kept else None,
    )
