"""Models with one number per position where others have a distribution: reward models and critics.

Both are Hugging Face sequence-classification models with one label: a backbone, and a `score` layer
of one row. A critic's value of a state is read where the next token is predicted, as logits are. A
reward is read at the last token of a response, its stop token: `ended` adds a response token that
nobody reads, so that what "predicts" it is that last one.

Legend: B rows, N flat response tokens, T positions, V vocabulary (1 here), D hidden.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    GenerationConfig,
)

from posttrain.backends.architecture import backbone, path_of
from posttrain.backends.base import Head, Scorer
from posttrain.backends.checkpoint import (
    SCALAR,
    LanguageModel,
    is_scalar,
    load,
    read_config,
    read_weights,
    save,
)
from posttrain.engine.errors import ConfigError
from posttrain.rl.types import Rollouts

GENERATION = "generation_config.json"
ROWS_PER_CALL = 256
"""Rows whose hidden states are kept at once."""
PROBE_LENGTH = 12


def load_scalar(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LanguageModel:
    """Load a reward model, or a causal LM with a score layer of zeros in place of its own head.

    With zeros every first reward and value is 0 and no seed is needed; the first update changes the
    score layer alone. `save_scalar` keeps what this returns.

    Raises ConfigError for a checkpoint that lacks weights, that has several labels, whose tokenizer
    has ids that the model lacks or whose tokens see later ones; for a causal LM also what `load`
    refuses, and where transformers has no model with a score for its family.
    """
    path, what = Path(path), "a model with a score"
    if not is_scalar(read_config(path, what=what)):
        return _with_score(load(path, dtype=dtype), path, device)
    auto = AutoModelForSequenceClassification
    model, tokenizer = read_weights(auto, path, dtype=dtype, what=what)
    _check(model.eval(), tokenizer, path)
    # What a causal LM has of itself: it says which tokens end a response.
    model.generation_config = (
        GenerationConfig.from_pretrained(path)
        if (path / GENERATION).exists()
        else GenerationConfig.from_model_config(model.config)
    )
    return LanguageModel(model=model.to(device), tokenizer=tokenizer)


def _with_score(
    language_model: LanguageModel, path: Path, device: torch.device | str
) -> LanguageModel:
    """The backbone of a causal LM, itself and not a copy, below a score of zeros."""
    theirs, body = language_model.model, backbone(language_model.model)
    config = deepcopy(theirs.config)
    config.num_labels = 1
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config, dtype=theirs.dtype)
    except ValueError:
        model = None
    if model is None or not hasattr(model, "score") or type(model.base_model) is not type(body):
        raise ConfigError(
            f"{path}: transformers has no {SCALAR} class with a score for its family "
            f"({config.model_type}); start a reward model or a critic from another family, such "
            "as qwen3 or llama"
        )
    setattr(model, model.base_model_prefix, body)
    model.score = torch.nn.Linear(model.score.in_features, 1, bias=False, dtype=theirs.dtype)
    torch.nn.init.zeros_(model.score.weight)
    model.generation_config = theirs.generation_config
    return replace(language_model, model=model.eval().to(device))


def save_scalar(language_model: LanguageModel, out: Path) -> None:
    """Write what `AutoModelForSequenceClassification.from_pretrained` reads as it is.

    transformers reads the reward at the last token that is not padding. Where the tokenizer pads
    with a token that ends responses, the saved tokenizer and config pad with its unknown or its
    first token instead; where it has none of these, with nothing, and transformers then reads one
    row at a time only.
    """
    tokenizer, stop_ids = language_model.tokenizer, language_model.stop_ids
    choices = ("pad_token", "unk_token", "bos_token")
    found = [getattr(tokenizer, name) for name in choices]
    usable = [t for t in found if t and tokenizer.convert_tokens_to_ids(t) not in stop_ids]
    if usable and usable[0] != tokenizer.pad_token:
        tokenizer = deepcopy(tokenizer)
        tokenizer.pad_token = usable[0]
    model = language_model.model
    model.config.pad_token_id = tokenizer.pad_token_id if usable else None
    save(replace(language_model, tokenizer=tokenizer), out)
    model.generation_config.save_pretrained(out)


def _check(model: Any, tokenizer: Any, path: Path) -> None:
    """Refuse what is no scalar model over a causal backbone."""
    score = getattr(model, "score", None)
    if score is None or score.weight.shape[0] != 1:
        raise ConfigError(
            f"{path}: a reward model has one label, a layer called score with one row; this "
            f"{type(model).__name__} has num_labels = {model.config.num_labels}"
        )
    rows = int(model.get_input_embeddings().weight.shape[0])
    if len(tokenizer) > rows:
        raise ConfigError(
            f"{path}: the tokenizer has {len(tokenizer)} tokens and the model {rows} embeddings; "
            "call model.resize_token_embeddings(len(tokenizer)) and save it again"
        )
    if path_of(model) == "plain" and not _is_causal(model, rows):
        raise ConfigError(
            f"{path}: the model ({model.config.model_type}) lets a token see later ones; posttrain "
            "would compute wrong numbers with it. Choose another model"
        )


@torch.inference_mode()
def _is_causal(model: Any, rows: int) -> bool:
    """Whether what follows a short row leaves its hidden states as they are, to rounding."""
    row_1T = (torch.arange(2 * PROBE_LENGTH, device=model.device) * 7 % 31 + 3)[None] % rows
    body = backbone(model)
    short, longer = (
        body(input_ids=tokens_1T, use_cache=False).last_hidden_state[:, :PROBE_LENGTH].float()
        for tokens_1T in (row_1T[:, :PROBE_LENGTH], row_1T)
    )
    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
    scale = max(1.0, float(longer.abs().max()))
    return bool((short - longer).abs().max() <= tolerance * scale)


def ended(rollouts: Rollouts) -> Rollouts:
    """The same rows with one response token more, of which only hidden states can be asked.

    The last of a row's hidden states is then that of its last token: see `end_B`. The token is
    never read and `tokens_BT` has no column for it, so that a row may fill all of the model's
    positions.
    """
    return replace(rollouts, response_len_B=rollouts.response_len_B + 1)


def end_B(rollouts: Rollouts) -> Tensor:
    """int64, where the last hidden state of each of the `ended` rows stands in a `_ND` tensor."""
    end: Tensor = rollouts.response_len_B.cumsum(0) - 1
    return end


def scores_N(hidden_ND: Tensor, head: Head) -> Tensor:
    """The model's number for each hidden state, float32 at least.

    `head` has one row. The product is a sum of its own for every state, so that a state's number
    does not depend on how many stand beside it.
    """
    dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
    score_N = (hidden_ND.to(dtype) * head.weight_VD[0].to(dtype)).sum(-1)
    return score_N if head.bias_V is None else score_N + head.bias_V[0].to(dtype)


@torch.no_grad()
def rewards_B(scorer: Scorer, rollouts: Rollouts) -> Tensor:
    """The reward of each row, float32, on the CPU. No gradient.

    A response of no tokens has the reward of its prompt's last one.
    """
    parts = []
    for index_B in torch.arange(len(rollouts)).split(ROWS_PER_CALL):
        rows = ended(rollouts.rows(index_B))
        hidden_BD = scorer.hidden(rows)[end_B(rows).to(scorer.head.weight_VD.device)]
        parts.append(scores_N(hidden_BD, scorer.head).cpu())
    return torch.cat(parts)
