"""Models with one number per position where others have a distribution: reward models and critics.

Both are Hugging Face sequence-classification models with one label: a backbone, and a `score` layer
of one row. A critic's value of a state is read where the next token is predicted, as logits are. A
reward is read at the last token of a row, its stop token: `Batch.with_end_position` adds a position
that nobody reads, so that what "predicts" it is that last token.

Legend: B rows, N sampled tokens, T positions, V vocabulary (1 here), D hidden.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, GenerationConfig

from posttrain.backends.architecture import SEES_LATER, backbone, is_causal, path_of
from posttrain.backends.base import Head, Scorer
from posttrain.backends.checkpoint import (
    SCALAR,
    LanguageModel,
    checked_base,
    is_scalar,
    load,
    load_merged,
    read_config,
    read_weights,
    save,
)
from posttrain.backends.outside.adapters import is_adapter, read_adapter_config
from posttrain.backends.saved_types import Types
from posttrain.engine.errors import ConfigError
from posttrain.rl.batch import Batch

GENERATION = "generation_config.json"
ROWS_PER_CALL = 256
"""Rows whose hidden states are kept at once."""


def load_scalar(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LanguageModel:
    """Load a reward model, or a causal LM with a score layer of zeros in place of its own head.

    With zeros every first reward and value is 0 and no seed is needed; the first update changes the
    score layer alone. `save_scalar` keeps what this returns.

    Raises ConfigError for a checkpoint that lacks weights, that has several labels or
    whose tokens see later ones; for a causal LM also what `load`
    refuses, and where transformers has no model with a score for its family.
    """
    path, what = Path(path), "a model with a score"
    if is_adapter(path):
        if read_adapter_config(path).get("task_type") != "SEQ_CLS":
            return _with_score(load(path, dtype=dtype, device=device), path, device)
        below = load_scalar(checked_base(path, scalar=True), dtype=dtype, device=device)
        return load_merged(below, path)
    if not is_scalar(read_config(path, what=what)):
        return _with_score(load(path, dtype=dtype), path, device)
    auto = AutoModelForSequenceClassification
    read = read_weights(auto, path, dtype=dtype, what=what)
    model = read.model.eval()
    _check(model, path)
    # What a causal LM has of itself: it says which tokens end a response.
    model.generation_config = (
        GenerationConfig.from_pretrained(path)
        if (path / GENERATION).exists()
        else GenerationConfig.from_model_config(model.config)
    )
    return replace(read, model=model.to(device))


def _with_score(
    language_model: LanguageModel, path: Path, device: torch.device | str
) -> LanguageModel:
    """The backbone of a causal LM, itself and not a copy, below a score of zeros."""
    theirs, body = language_model.model, backbone(language_model.model)
    config = deepcopy(theirs.config)
    config.num_labels = 1
    try:
        # On meta no weights are made: both parts that have some are replaced below.
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


def save_scalar(
    language_model: LanguageModel, out: Path, *, types: Types | str | None = None
) -> None:
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
    save(replace(language_model, tokenizer=tokenizer), out, types=types)
    # `save` has let it name all that ends a turn.
    model.generation_config.save_pretrained(out)


def _check(model: Any, path: Path) -> None:
    """Refuse what is no scalar model over a causal backbone."""
    score = getattr(model, "score", None)
    if score is None or score.weight.shape[0] != 1:
        raise ConfigError(
            f"{path}: a reward model has one label, a layer called score with one row; this "
            f"{type(model).__name__} has num_labels = {model.config.num_labels}"
        )
    weight_VD = model.get_input_embeddings().weight
    if path_of(model) == "plain" and not is_causal(model, weight_VD):
        raise ConfigError(
            f"{path}: the model ({model.config.model_type}) {SEES_LATER}; posttrain "
            "would compute wrong numbers with it. Choose another model"
        )


def scores_N(hidden_ND: Tensor, head: Head) -> Tensor:
    """The model's number for each hidden state, float32 at least.

    `head` has one row. The product is a sum of its own for every state, so that a state's number
    does not depend on how many stand beside it.
    """
    dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
    # [N, D] * [D] -> [N].
    score_N = (hidden_ND.to(dtype) * head.weight_VD[0].to(dtype)).sum(-1)
    return score_N if head.bias_V is None else score_N + head.bias_V[0].to(dtype)


def rewards_B(scorer: Scorer, batch: Batch) -> Tensor:
    """The reward of each row, float32, on the CPU: the score at its last token. No gradient.

    A row in which nothing was sampled has the reward of its prompt's last token.
    """
    parts = [torch.empty(0)]
    for index_B in torch.arange(len(batch)).split(ROWS_PER_CALL):
        rows = batch.select(index_B).with_end_position()
        parts.append(scorer.scores(rows)[rows.last_B])
    return torch.cat(parts)
