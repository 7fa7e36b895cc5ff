"""Learning and scoring with one transformers model in this process: the reference backend.

Rows are right-padded, so that causal attention alone keeps padding out, and only the positions that
predict response tokens reach the output head. Legend: B rows, T positions, N flat response tokens,
D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from posttrain.backends.architecture import path_of
from posttrain.backends.base import Head, LossFunction, MicroBatch
from posttrain.backends.checkpoint import LanguageModel, output_head
from posttrain.backends.lockstep import padded_hidden_states
from posttrain.backends.packing import pack
from posttrain.engine.errors import ConfigError, StageError
from posttrain.losses.ops import token_logprobs
from posttrain.rl.types import Rollouts

POSITIONS = "max_position_embeddings"


def hidden_states(model: Any, rollouts: Rollouts) -> Tensor:
    """`hidden_ND`: last hidden states that predict the response tokens, row after row.

    Short rows share bins, so that hardly any padding is computed; long rows stay one to a bin.
    Raises ConfigError for a row longer than the model has positions.
    """
    longest, limit = rollouts.tokens_BT.shape[1], getattr(model.config, POSITIONS, None)
    if limit is not None and longest > limit:
        raise ConfigError(
            f"a row of {longest} tokens, prompt and response, does not fit the {limit} positions "
            "of the model; leave long rows out of the data, or use a model with more positions "
            f"({POSITIONS} in its config.json, max_positions of a pretrain stage)"
        )
    if path_of(model) == "plain":
        return padded_hidden_states(model, rollouts)
    # Position t predicts token t + 1, so the last token of a row need not be read.
    length_B = rollouts.prompt_len_B + rollouts.response_len_B - 1
    bins = pack(length_B)
    row_CT, position_CT = bins.row_CT, bins.position_CT
    tokens_CT = rollouts.tokens_BT[row_CT.clamp(min=0), position_CT]
    hidden_CTD = model.base_model(
        input_ids=tokens_CT,
        position_ids=position_CT,
        attention_mask=bins.mask(),
        use_cache=False,
    ).last_hidden_state
    first_B = bins.start_B + rollouts.prompt_len_B - 1
    flat_N = flat_index(first_B, rollouts.response_len_B, torch.arange(len(length_B)))
    return hidden_CTD.flatten(0, 1)[flat_N]


def response_targets(rollouts: Rollouts) -> Tensor:
    """`targets_N`: the response tokens themselves."""
    return rollouts.tokens_BT[rollouts.response_mask_BT()]


def split_by_tokens(rollouts: Rollouts, max_tokens: int) -> Iterator[MicroBatch]:
    """Micro-batches of rows of like length whose padded size stays under `max_tokens`.

    A single row longer than `max_tokens` is a micro-batch of its own.
    """
    length_B = rollouts.prompt_len_B + rollouts.response_len_B
    order_B = torch.argsort(length_B, stable=True)
    lengths = length_B[order_B].tolist()
    start = 0
    for end in range(1, len(lengths) + 1):
        if end < len(lengths) and lengths[end] * (end + 1 - start) <= max_tokens:
            continue
        index_B = order_B[start:end]
        yield MicroBatch(index_B=index_B, rollouts=rollouts.rows(index_B))
        start = end


@torch.no_grad()
def response_logprobs(
    hidden_ND: Tensor, head: Head, rollouts: Rollouts, temperature: float
) -> Tensor:
    """`logp_N` of the response tokens from the hidden states that predict them. No gradient."""
    logp_N, _ = token_logprobs(
        hidden_ND,
        head.weight_VD,
        response_targets(rollouts),
        bias_V=head.bias_V,
        temperature=temperature,
    )
    return logp_N


class LocalScorer:
    """A `Scorer` over a frozen model."""

    def __init__(self, language_model: LanguageModel, *, max_tokens: int = 8192) -> None:
        self.model = language_model.model.eval()
        self.head: Head = output_head(self.model)
        self.max_tokens = max_tokens

    @torch.no_grad()
    def hidden(self, rollouts: Rollouts) -> Tensor:
        """See `Scorer.hidden`."""
        count_B = rollouts.response_len_B
        start_B = count_B.cumsum(0) - count_B
        hidden_ND: Tensor | None = None
        for batch in split_by_tokens(rollouts, self.max_tokens):
            part = hidden_states(self.model, batch.rollouts)
            if hidden_ND is None:
                hidden_ND = part.new_empty(rollouts.num_tokens, part.shape[1])
            hidden_ND[flat_index(start_B, count_B, batch.index_B)] = part
        assert hidden_ND is not None, "no rows to score"
        return hidden_ND


def flat_index(start_B: Tensor, count_B: Tensor, index_B: Tensor) -> Tensor:
    """Where the response tokens of the rows `index_B` stand in a flat `_N` tensor."""
    count = count_B[index_B]
    offset_N = torch.arange(int(count.sum())) - (count.cumsum(0) - count).repeat_interleave(count)
    return start_B[index_B].repeat_interleave(count) + offset_N


class LocalLearner:
    """A `Learner`: AdamW on one model, gradients summed over micro-batches.

    The model stays in evaluation mode, that is without dropout: a policy that learns must be the
    one that sampled, and there is no random state that a resumed stage would have to find again.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        *,
        betas: tuple[float, float],
        weight_decay: float,
        max_grad_norm: float,
        max_tokens: int = 8192,
    ) -> None:
        self.language_model = language_model
        self.model = language_model.model.eval()
        self.head: Head = output_head(self.model)
        self.max_tokens = max_tokens
        self.max_grad_norm = max_grad_norm
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=0.0, betas=betas, weight_decay=weight_decay, fused=True
        )

    def update(
        self,
        rollouts: Rollouts,
        loss: LossFunction,
        *,
        count: float,
        lr: float,
    ) -> dict[str, float]:
        """See `Learner.update`."""
        totals: dict[str, Tensor] = {}
        for batch in split_by_tokens(rollouts, self.max_tokens):
            hidden_ND = hidden_states(self.model, batch.rollouts)
            loss_sum, metrics = loss(hidden_ND, self.head, batch)
            (loss_sum / count).backward()
            for name, value in metrics.items():
                totals[name] = totals[name] + value if name in totals else value
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        if not bool(torch.isfinite(norm)):
            raise StageError(
                f"training diverged: the gradient norm is {float(norm)} at lr {lr:g}; lower lr or "
                "max_grad_norm, or lengthen warmup_steps (the run resumes from its last step "
                "checkpoint only with unchanged settings)"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {name: float(value) for name, value in totals.items()} | {"grad_norm": float(norm)}

    def logprobs(self, rollouts: Rollouts, *, temperature: float) -> Tensor:
        """See `Learner.logprobs`."""
        scorer = LocalScorer(self.language_model, max_tokens=self.max_tokens)
        return response_logprobs(scorer.hidden(rollouts), self.head, rollouts, temperature)

    def state(self) -> dict[str, Tensor]:
        """Weights and optimiser moments by name, for a step checkpoint."""
        tensors = {f"weight.{n}": p.detach() for n, p in self.model.named_parameters()}
        for position, parameter in enumerate(self.parameters):
            for name, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{position}.{name}"] = value
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state` gave; the next update is then bit-identical."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"weight.{name}"])
        for name, value in tensors.items():
            kind, position, *rest = name.split(".")
            if kind == "optimizer":
                self.optimizer.state[self.parameters[int(position)]][rest[0]] = value.clone()
