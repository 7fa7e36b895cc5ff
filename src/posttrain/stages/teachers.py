"""The frozen teachers of a distillation, and what each of them says about the student's tokens.

Teachers are read one at a time, each only on the rows of its own domains. For the exact estimator
what is kept of a teacher is the last hidden state of every token, from which the loss rebuilds
logits through that teacher's head, a chunk of tokens at a time (DeepSeek-V4, arXiv 2606.19348,
section 5.2.2).

Legend: B rows, N flat response tokens of one teacher's rows, E teacher's hidden size, K top-k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.backends.base import Head
from posttrain.backends.checkpoint import LanguageModel, load
from posttrain.backends.local import LocalScorer, response_logprobs
from posttrain.engine.errors import ConfigError
from posttrain.losses.distill import teacher_top_k_targets
from posttrain.rl.types import Rollouts
from posttrain.stages.config import Distill


@dataclass(frozen=True, kw_only=True)
class Targets:
    """One teacher's view of its rows; which fields are filled depends on the estimator."""

    head: Head
    start_B: Tensor
    """Where each row of the WHOLE batch begins in the flat tensors; -1 for rows of others."""
    hidden_NE: Tensor | None = None
    top_ids_NK: Tensor | None = None
    top_logp_NK: Tensor | None = None
    logp_N: Tensor | None = None


class Teachers:
    """All teachers of a stage by name."""

    def __init__(self, paths: Mapping[str, Path], student: LanguageModel) -> None:
        self.names = list(paths)
        by_path: dict[Path, LocalScorer] = {}
        for name, path in paths.items():
            if path not in by_path:
                teacher = load(path)
                check_same_tokens(student, teacher, name)
                by_path[path] = LocalScorer(teacher)
        self.scorers = {name: by_path[path] for name, path in paths.items()}

    def targets(self, config: Distill, rollouts: Rollouts, teacher_B: Tensor) -> list[Targets]:
        """Score every row with its own teacher; `teacher_B` (int64) indexes `names`."""
        return [
            self._targets(config, name, rollouts, (teacher_B == number).nonzero()[:, 0])
            for number, name in enumerate(self.names)
        ]

    def _targets(self, config: Distill, name: str, rollouts: Rollouts, index_B: Tensor) -> Targets:
        scorer = self.scorers[name]
        start_B = torch.full((len(rollouts),), -1)
        if len(index_B) == 0:
            return Targets(head=scorer.head, start_B=start_B)
        rows = rollouts.rows(index_B)
        start_B[index_B] = rows.response_len_B.cumsum(0) - rows.response_len_B
        hidden_NE = scorer.hidden(rows)
        if config.estimator == "full_vocabulary":
            hidden_NE = hidden_NE.to(getattr(torch, config.teacher_cache))
            return Targets(head=scorer.head, start_B=start_B, hidden_NE=hidden_NE)
        if config.estimator == "sampled_token":
            logp_N = response_logprobs(hidden_NE, scorer.head, rows, config.temperature)
            return Targets(head=scorer.head, start_B=start_B, logp_N=logp_N)
        head = scorer.head
        top_ids_NK, top_logp_NK = teacher_top_k_targets(
            hidden_NE,
            head.weight_VD,
            min(config.top_k, head.weight_VD.shape[0]),
            bias_V=head.bias_V,
            temperature=config.temperature,
        )
        return Targets(head=head, start_B=start_B, top_ids_NK=top_ids_NK, top_logp_NK=top_logp_NK)


def check_same_tokens(
    student: LanguageModel, teacher: LanguageModel, name: str, *, role: str = "teacher"
) -> None:
    """Raise ConfigError unless teacher and student mean the same by every token id.

    Compared are the vocabulary, the size of the output layer, the stop tokens and the chat
    template: a difference in any of them compares the wrong tokens without a sign. `role` is what
    the message calls the teacher.
    """

    def size(language_model: LanguageModel) -> int:
        return int(language_model.model.get_output_embeddings().weight.shape[0])

    differences: list[tuple[str, Any, Any]] = [
        ("output layer rows", size(student), size(teacher)),
        ("stop token ids", sorted(student.stop_ids), sorted(teacher.stop_ids)),
    ]
    ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    if ours != theirs:
        token = min(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
        differences.append((f"id of token {token!r}", ours.get(token), theirs.get(token)))
    template = (student.tokenizer.chat_template, teacher.tokenizer.chat_template)
    differences.append(("chat template", *template))
    for what, mine, other in differences:
        if mine != other:
            raise ConfigError(
                f"{role} {name!r}: its vocabulary differs from the student's: {what} is "
                f"{other!r} there and {mine!r} here; a {role} must come from the same tokenizer, "
                "best from the same checkpoint as the student"
            )
