"""From a batch to the numbers of its sampled tokens: which way through the model, and what follows.

Forward passes are planned on the CPU, where batches are. Each then goes to the device of the model.

Legend: B rows, T positions, N sampled tokens (row after row), D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from posttrain.backends.architecture import path_of
from posttrain.backends.base import Head
from posttrain.backends.budget import MAX_TOKENS
from posttrain.backends.cpu.flat import FlatPass
from posttrain.backends.cpu.fused import is_fusable
from posttrain.backends.cpu.packing import flat_passes, packed_passes
from posttrain.backends.outside.positions import positions_of, text_config
from posttrain.backends.padded import ForwardPass, padded_passes
from posttrain.engine.errors import ConfigError
from posttrain.losses.nucleus import nucleus_logprobs
from posttrain.losses.ops import token_logprobs
from posttrain.rl.batch import Batch, ragged_index

HIDDEN_BYTES = 2**28
"""What the hidden states of rows that are read may take before they become log-probabilities."""


def forward_passes(
    model: Any,
    batch: Batch,
    *,
    max_tokens: int = MAX_TOKENS,
    group_rows: int = 1,
    compiled: bool = False,
    fast_paths: bool = True,
) -> Iterator[ForwardPass]:
    """The forward passes over all rows; every `group_rows` adjacent rows stay together.

    A `compiled` model is called as a whole, so it gets no flat passes.

    Raises ConfigError for a row longer than the model has positions.
    """
    if not len(batch):
        return
    longest = int(batch.length_B.max())
    limit = positions_of(model.config)
    if limit is not None and longest > limit:
        raise ConfigError(
            f"a row of {longest} tokens, prompt and response, does not fit the {limit} positions "
            "of the model; leave long rows out of the data, or use a model with more positions "
            "(max_position_embeddings in its config.json, max_positions of a pretrain stage)"
        )
    if not fast_paths or path_of(model) == "plain":
        yield from padded_passes(batch, max_tokens=max_tokens, group_rows=group_rows)
        return
    sizes = {"max_tokens": max_tokens, "hidden_size": text_config(model.config).hidden_size}
    if compiled or not is_fusable(model):
        yield from packed_passes(batch, **sizes, group_rows=group_rows)
        return
    for parts in flat_passes(batch, **sizes, group_rows=group_rows):
        yield FlatPass(parts=parts)


def hidden_portions(batch: Batch, head: Head) -> Iterator[Batch]:
    """The rows in portions whose hidden states at the sampled tokens take `HIDDEN_BYTES` at most,
    or of one row; all together where they do."""
    width_bytes = head.weight_VD.shape[1] * head.weight_VD.element_size()
    most = max(1, HIDDEN_BYTES // width_bytes)
    if batch.num_tokens <= most:
        yield batch
        return
    first, tokens = 0, 0
    for row, length in enumerate(batch.sampled_len_B.tolist()):
        if tokens + length > most and row > first:
            yield batch.select(torch.arange(first, row))
            first, tokens = row, 0
        tokens += length
    yield batch.select(torch.arange(first, len(batch)))


def sampled_logprobs(
    hidden_ND: Tensor, head: Head, batch: Batch, temperature: float
) -> tuple[Tensor, Tensor]:
    """`(logp_N, entropy_N)` of the sampled tokens from the hidden states that predict them.

    Over the nucleus of each token where the batch has these columns. All on one device; `logp_N` is
    differentiable, `entropy_N` detached.
    """
    if "nucleus_ids_F" not in batch:
        return token_logprobs(
            hidden_ND, head.weight_VD, batch.targets_N, bias_V=head.bias_V, temperature=temperature
        )
    return nucleus_logprobs(
        hidden_ND,
        head.weight_VD,
        batch.targets_N,
        batch["nucleus_ids_F"],
        batch["nucleus_count_N"],
        bias_V=head.bias_V,
        temperature=temperature,
    )


@torch.no_grad()
def read_hidden(
    model: Any,
    head: Head,
    batch: Batch,
    *,
    max_tokens: int = MAX_TOKENS,
    fast_paths: bool = True,
) -> Tensor:
    """`hidden_ND`, the last hidden states that predict the sampled tokens, on the model's device.

    No gradient. `head` gives the width where there are no rows.
    """
    hidden_ND = head.weight_VD.new_empty(0, head.weight_VD.shape[1])
    for forward in forward_passes(model, batch, max_tokens=max_tokens, fast_paths=fast_paths):
        part_ND = forward.hidden_states(model)
        # Made when the first pass has told type and width.
        if not len(hidden_ND):
            hidden_ND = part_ND.new_empty(batch.num_tokens, part_ND.shape[1])
        # Passes hold rows in an order of their own; the result has that of the batch.
        index_N = ragged_index(batch.sampled_len_B, forward.index_B)
        hidden_ND[index_N.to(part_ND.device)] = part_ND
    return hidden_ND


@torch.no_grad()
def read_logprobs(
    model: Any,
    head: Head,
    batch: Batch,
    temperature: float,
    *,
    max_tokens: int = MAX_TOKENS,
    fast_paths: bool = True,
) -> Tensor:
    """`logp_N` of the sampled tokens, on the CPU, as `Scorer.logprobs`. No gradient."""
    parts = []
    for rows in hidden_portions(batch, head):
        hidden_ND = read_hidden(model, head, rows, max_tokens=max_tokens, fast_paths=fast_paths)
        there = rows.to(hidden_ND.device)
        parts.append(sampled_logprobs(hidden_ND, head, there, temperature)[0].cpu())
    return torch.cat(parts)
