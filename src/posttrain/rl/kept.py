"""The tokens that a sampler could draw at each position: the mask of top-p sampling.

A policy that is sampled from its nucleus is not the policy over the whole vocabulary. Rollouts
carry the nucleus of every token, so that the log-probs of the update are of the distribution that
was sampled from (Keep Sampling Mask: DeepSeek-V3.2, arXiv 2512.02556, section 3.1).

Legend: B rows, N flat response tokens, F ids of all tokens, token after token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Which ids could be drawn, for each of N tokens; the drawn id is always among them.

    Example: {3, 7} for the first token and {5} for the second::

        ids_F [3, 7, 5]    count_N [2, 1]
    """

    ids_F: Tensor
    """int32, ascending within a token."""
    count_N: Tensor
    """int64, at least 1: number of ids of each token."""

    def tokens(self, index_N: Tensor) -> Kept:
        """The tokens at `index_N`, int64, in that order."""
        start_N = self.count_N.cumsum(0) - self.count_N
        flat_F = flat_index(start_N, self.count_N, index_N)
        return Kept(ids_F=self.ids_F[flat_F], count_N=self.count_N[index_N])

    def to(self, device: torch.device) -> Kept:
        """The same on another device."""
        return Kept(ids_F=self.ids_F.to(device), count_N=self.count_N.to(device))


def kept_of(mask_NV: Tensor) -> Kept:
    """The ids where a bool mask is true, on the CPU."""
    return Kept(
        ids_F=mask_NV.nonzero()[:, 1].to(torch.int32).cpu(),
        count_N=mask_NV.sum(1).cpu(),
    )


def joined_kept(parts: Sequence[Kept]) -> Kept:
    """The tokens of all parts, part after part."""
    return Kept(
        ids_F=torch.cat([part.ids_F for part in parts]),
        count_N=torch.cat([part.count_N for part in parts]),
    )


def flat_index(start_B: Tensor, count_B: Tensor, index_B: Tensor) -> Tensor:
    """Where the response tokens of the rows `index_B` stand in a flat `_N` tensor."""
    count = count_B[index_B]
    offset_N = torch.arange(int(count.sum()), device=count.device)
    offset_N -= (count.cumsum(0) - count).repeat_interleave(count)
    return start_B[index_B].repeat_interleave(count) + offset_N
