"""The frozen teachers of a distillation, and what each of them says about the student's tokens.

Each teacher reads only the rows of its own domains, while others are still being sampled. For the
exact estimator what is kept of a teacher is the last hidden state of every token, from which the
loss rebuilds logits through that teacher's head, a chunk of tokens at a time (DeepSeek-V4, arXiv
2606.19348, section 5.2.2).

Legend: B rows, N flat response tokens of one teacher's rows, E teacher's hidden size, K top-k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.backends.base import Head, Sampling
from posttrain.backends.chat import Chat
from posttrain.backends.checkpoint import LanguageModel, load
from posttrain.backends.local import LocalScorer, response_logprobs
from posttrain.engine.errors import ConfigError
from posttrain.losses.distill import teacher_top_k_targets
from posttrain.rl.types import Rollouts, pad_rows
from posttrain.stages.batches import Problem
from posttrain.stages.settings.distill import Distill
from posttrain.suites.prompting import hinted


@dataclass(frozen=True, kw_only=True)
class Targets:
    """One teacher's view of its rows; which fields are filled depends on the estimator.

    All of it is on the teacher's device.
    """

    head: Head
    start_B: Tensor
    """Where each row of the WHOLE batch begins in the flat tensors; -1 for rows of others."""
    hidden_NE: Tensor | None = None
    top_ids_NK: Tensor | None = None
    top_logp_NK: Tensor | None = None
    logp_N: Tensor | None = None


READ_TOKENS = 1024
"""Rows are read when they have this many tokens: fewer fill a forward pass badly."""


class Teachers:
    """All teachers of a stage by name."""

    def __init__(
        self,
        paths: Mapping[str, Path],
        student: LanguageModel,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        workers: Executor | None = None,
    ) -> None:
        """`workers` read responses while others are still being sampled."""
        self.names = list(paths)
        by_path: dict[Path, LocalScorer] = {}
        for name, path in paths.items():
            if path not in by_path:
                teacher = load(path, dtype=dtype, device=device)
                check_same_tokens(student, teacher, name)
                by_path[path] = LocalScorer(teacher)
        self.scorers = {name: by_path[path] for name, path in paths.items()}
        self.workers = workers

    def reading(
        self, config: Distill, teacher_B: Tensor, prompts: Sequence[Sequence[int] | None] = ()
    ) -> Reading:
        """Begin to score a batch; row b is for teacher `teacher_B[b]` (int64, indexes `names`).

        Where `prompts` has token ids for the group of a row, its teacher reads the response after
        these, and else after the prompt that the student saw.
        """
        return Reading(self, config, teacher_B, prompts)


class Reading:
    """The scoring of one batch, row by row as responses end. A `Reader`.

    Whole groups are read some at a time, so that a forward pass has enough tokens. Which together
    follows from the order in which rows ended, and so from what was sampled: not from the clock,
    and not from whether there is a core to spare.
    """

    def __init__(
        self,
        teachers: Teachers,
        config: Distill,
        teacher_B: Tensor,
        prompts: Sequence[Sequence[int] | None] = (),
    ) -> None:
        self.teachers, self.config, self.teacher_B = teachers, config, teacher_B
        self.prompts = prompts
        self.parts: list[tuple[int, Tensor, Future[Scores] | Scores]] = []
        # Ended rows by group: a group is read when it is whole, so that its prompt is read once.
        self.groups: dict[int, list[int]] = {}
        self.whole: list[int] = []
        self.num_tokens = 0

    def read(self, row_B: Tensor, sampling: Sampling) -> None:
        """Score these rows of `sampling` with others, once enough of them have ended."""
        size = self.config.samples_per_prompt
        for row in row_B.tolist():
            group = self.groups.setdefault(row // size, [])
            group.append(row)
            if len(group) == size:
                self.whole += group
                self.num_tokens += sampling.num_tokens(self.groups.pop(row // size))
        if self.num_tokens >= READ_TOKENS:
            row_B = torch.tensor(sorted(self.whole))
            self.whole, self.num_tokens = [], 0
            self._score(row_B, sampling.rollouts(row_B))

    def targets(self, rollouts: Rollouts) -> list[Targets]:
        """What each teacher says of its rows; reads those of the whole batch that are left."""
        left_B = torch.ones(len(rollouts), dtype=torch.bool)
        for _, row_B, _ in self.parts:
            left_B[row_B] = False
        if bool(left_B.any()):
            self._score(left_B.nonzero()[:, 0], rollouts.rows(left_B))
        joined = [self._joined(number, rollouts) for number in range(len(self.teachers.names))]
        # The joined copies serve all updates of the batch.
        self.parts = []
        return joined

    def _score(self, row_B: Tensor, rows: Rollouts) -> None:
        teacher_B = self.teacher_B[row_B]
        for number in teacher_B.unique().tolist():
            member_B = (teacher_B == number).nonzero()[:, 0]
            asked = self._asked(row_B[member_B], rows.rows(member_B))
            work = (self.teachers.scorers[self.teachers.names[number]], asked)
            scores: Future[Scores] | Scores
            if self.teachers.workers is None:
                scores = read_rows(self.config, *work)
            else:
                scores = self.teachers.workers.submit(read_rows, self.config, *work)
            self.parts.append((number, row_B[member_B], scores))

    def _asked(self, row_B: Tensor, rows: Rollouts) -> Rollouts:
        """Rows `row_B` of the batch as their teacher is to read them."""
        size = self.config.samples_per_prompt
        given = [self.prompts[row // size] if self.prompts else None for row in row_B.tolist()]
        return rows if all(prompt is None for prompt in given) else after_prompts(rows, given)

    def _joined(self, number: int, rollouts: Rollouts) -> Targets:
        """The parts of one teacher, its rows in the order of the batch."""
        head = self.teachers.scorers[self.teachers.names[number]].head
        device = head.weight_VD.device
        start_B = torch.full((len(rollouts),), -1)
        parts = [(row_B, scores) for of, row_B, scores in self.parts if of == number]
        if not parts:
            return Targets(head=head, start_B=start_B.to(device))
        found = [s.result() if isinstance(s, Future) else s for _, s in parts]
        at = 0
        for row_B, _ in parts:
            count_B = rollouts.response_len_B[row_B]
            start_B[row_B] = at + count_B.cumsum(0) - count_B
            at += int(count_B.sum())
        joined = {n: torch.cat([scores[n] for scores in found]).to(device) for n in found[0]}
        return Targets(head=head, start_B=start_B.to(device), **joined)


Scores = dict[str, Tensor]
"""Fields of `Targets` for some rows of one teacher."""


@torch.no_grad()
def read_rows(config: Distill, scorer: LocalScorer, rows: Rollouts) -> Scores:
    """What the estimator needs of a teacher, for each response token of `rows`."""
    hidden_NE = scorer.hidden(rows)
    if config.estimator == "full_vocabulary":
        if config.precision == "float32":
            hidden_NE = hidden_NE.to(getattr(torch, config.teacher_cache))
        return {"hidden_NE": hidden_NE}
    if config.estimator == "sampled_token":
        logp_N = response_logprobs(hidden_NE, scorer.head, rows, config.temperature)
        return {"logp_N": logp_N}
    head = scorer.head
    top_ids_NK, top_logp_NK = teacher_top_k_targets(
        hidden_NE,
        head.weight_VD,
        min(config.top_k, head.weight_VD.shape[0]),
        bias_V=head.bias_V,
        temperature=config.temperature,
    )
    return {"top_ids_NK": top_ids_NK, "top_logp_NK": top_logp_NK}


def hinted_prompts(
    config: Distill, chat: Chat, problems: Sequence[Problem], *, where: str
) -> list[list[int] | None]:
    """What the teachers read instead of each prompt: token ids, None where there is no hint."""
    hints = [config.hints.get(problem["domain"]) for problem in problems]
    return [
        None
        if hint is None
        else chat.prompt(hinted(problem, hint, where=where), problem.get("mode"))
        for problem, hint in zip(problems, hints, strict=True)
    ]


def after_prompts(rows: Rollouts, prompts: Sequence[Sequence[int] | None]) -> Rollouts:
    """The same responses after other prompts; None leaves a row's own.

    The n-th response token stays the n-th: only the context before it differs.
    """
    starts, lengths = rows.prompt_len_B.tolist(), rows.response_len_B.tolist()
    tokens = rows.tokens_BT.tolist()
    changed = [
        [*(row[:start] if prompt is None else prompt), *row[start : start + length]]
        for row, start, length, prompt in zip(tokens, starts, lengths, prompts, strict=True)
    ]
    # What fills the rows up is never read.
    tokens_BT, length_B = pad_rows(changed, 0)
    return replace(rows, tokens_BT=tokens_BT, prompt_len_B=length_B - rows.response_len_B)


def check_same_tokens(
    student: LanguageModel, teacher: LanguageModel, name: str, *, role: str = "teacher"
) -> None:
    """Raise ConfigError unless teacher and student mean the same by every token id.

    Compared are the vocabulary, the size of the output layer, the stop tokens and the chat
    template: a difference in any of them compares the wrong tokens without a sign. `role` is what
    the message calls the teacher.
    """

    def size(language_model: LanguageModel) -> int:
        model = language_model.model
        # A critic has no output layer; it has to read what the policy writes.
        layer = model.get_output_embeddings() or model.get_input_embeddings()
        return int(layer.weight.shape[0])

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
