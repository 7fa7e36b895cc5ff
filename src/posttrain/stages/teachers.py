"""The frozen teachers of a distillation, and what each of them says about the student's tokens.

Each teacher reads only the rows of its own domains, while others are still being sampled. What it
says becomes columns of the batch:

    teacher_B              int64, which teacher reads the row, an index into `Teachers.names`
    teacher_logp_N         log-probability of each sampled token (`SampledToken`)
    teacher_ids_NK         its likeliest tokens at each position, and
    teacher_logp_NK        their log-probabilities (`TopK`)
    teacher_hidden_NE      its last hidden state at each position (the exact divergences), from
                           which the loss rebuilds logits through that teacher's head, a chunk of
                           tokens at a time (DeepSeek-V4, arXiv 2606.19348, section 5.2.2)

A teacher of `REST_BYTES` or more rests whenever it does not read: when all rows of the batch are
there, one teacher after another wakes, reads its own, and rests again. So N teachers cost the
memory of the largest, and none is in memory while the student samples and learns; the loss opens
their output layers one at a time. Smaller ones stay awake and read beside the sampler. Either way
the same rows are read together, so it changes no number.

Legend: B rows, N sampled tokens, K top-k, E the largest hidden size of the teachers; a smaller one
fills the first places of its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import torch
from torch import Tensor

from posttrain.algorithms import SampledToken, TopK
from posttrain.backends.base import HeadSource, Learner, Sampling, Scorer
from posttrain.backends.chat import Chat
from posttrain.backends.lora import is_separable
from posttrain.backends.outside.adapters import base_of, is_adapter
from posttrain.backends.prompting import Problem, asked, hinted
from posttrain.backends.vocabulary import check_same_tokens, draw_alike
from posttrain.engine.errors import ConfigError
from posttrain.engine.graph import edge_name
from posttrain.rl.batch import Batch, ragged_index
from posttrain.schedules import History
from posttrain.stages.context import Context
from posttrain.stages.lengths import Reader
from posttrain.stages.probes import Probe
from posttrain.stages.settings.distill import Distill

READ_TOKENS = 1024
"""Rows are read when they have this many tokens: fewer fill a forward pass badly."""

REST_BYTES = 16_000_000
"""Weight files of this size are worth to be read again in every step. Below it a stage computes
on one thread and has the others let teachers read beside the sampler (`worker.TINY_BYTES`)."""

Columns = dict[str, Tensor]
"""What a teacher says about some rows, by the name of the column."""


class Teachers:
    """All teachers of a stage by name. Those of one checkpoint share one model."""

    def __init__(self, settings: Distill, ctx: Context, policy: Learner) -> None:
        """Reads the edges `teachers.NAME`. Student and teachers give probability to the tokens
        that all of them have. Raises ConfigError for a teacher whose tokens are not the
        student's."""
        student = policy.chat
        self.names = settings.teachers
        by_path: dict[Path, Scorer] = {}
        for name in self.names:
            edge = edge_name("teachers", name)
            if ctx.inputs[edge] not in by_path:
                scorer = ctx.scorer(edge, precision=settings.precision)
                check_same_tokens(student, scorer.chat, name)
                check_modes(settings, ctx, scorer, name)
                self._warn_of_end(ctx, policy, scorer, name)
                by_path[ctx.inputs[edge]] = scorer
                if rests(ctx.inputs[edge]):
                    # Before the next one is loaded.
                    scorer.rest()
        self.scorers = [by_path[ctx.inputs[edge_name("teachers", name)]] for name in self.names]
        self.workers = ctx.workers
        self.chat = student
        scorers = list(by_path.values())
        own_text = [scorer for scorer in scorers if self._layout(scorer) is not None]
        draw_alike(policy, scorers, own_text=own_text)
        self.where = f"stage {ctx.name!r}"
        self.ctx = ctx
        self.resting = [scorer for path, scorer in by_path.items() if rests(path)]
        """Those that rest when they do not read; each once."""
        self.probes: dict[str, Probe] = {}
        """Of each checkpoint, by the first name that has it."""
        exact = ctx.backend.exact
        for path, scorer in by_path.items():
            name = self.names[self.scorers.index(scorer)]
            self.probes[name] = Probe(name, scorer, path, exact=exact)
            if scorer in self.resting:
                scorer.rest()

    @property
    def heads(self) -> tuple[HeadSource, ...]:
        """The output layer of each teacher, in the order of `names`; those of teachers that rest
        are not opened."""
        return tuple(
            scorer.head_at_rest if scorer in self.resting else scorer.head
            for scorer in self.scorers
        )

    def replay(self, settings: Distill, done: int, total: int, history: History) -> None:
        """Go on after `done` steps. Raises StageError where the teachers are not those that the
        steps before have learned from."""
        found = self.ctx.kept.get("teachers", {})
        for name, probe in self.probes.items():
            if name in found:
                probe.check(found[name], self.ctx.work)
        self.ctx.kept["teachers"] = {name: p.identity() for name, p in self.probes.items()}
        self.ctx.facts["teachers_probed"] = self.ctx.kept.setdefault("teachers_probed", 0)

    def probe(self, scorer: Scorer) -> None:
        """Raise StageError unless a teacher says of its probe what it said at first."""
        self.probes[self.names[self.scorers.index(scorer)]].again()

    def probed(self) -> None:
        """Note that all teachers were probed and are what they were."""
        self.ctx.kept["teachers_probed"] += 1
        self.ctx.facts["teachers_probed"] = self.ctx.kept["teachers_probed"]

    def readers(self, settings: Distill) -> list[Reader]:
        """The teachers as readers of the prompts of their domains, with their hints."""
        domains: dict[str, set[str]] = {name: set() for name in self.names}
        for route, names in settings.routes.items():
            for name in (names,) if isinstance(names, str) else names:
                domains[name].add(route.partition("/")[0])
        # With the student's template nothing is encoded twice.
        return [
            Reader(
                name=f"teacher {name!r}",
                chat=self._layout(scorer) or self.chat,
                positions=scorer.chat.max_positions,
                more=self._opening(settings, scorer),
                hints=settings.hints,
                domains=frozenset(domains[name]),
            )
            for name, scorer in zip(self.names, self.scorers, strict=True)
        ]

    def scoring(
        self, step_settings: Distill, problems: Sequence[Problem], *, probe: bool = False
    ) -> TeacherScoring:
        """Begin to score the responses to these problems, one group each; with `probe` each teacher
        is probed, too.

        A domain with several teachers has its problems read by them in turn.
        """
        numbers = []
        for place, problem in enumerate(problems):
            names = step_settings.teachers_of(problem["domain"], problem.get("mode"))
            numbers.append(self.names.index(names[place % len(names)]))
        prompts = [
            self._own_prompt(step_settings, self.scorers[number], problem)
            for number, problem in zip(numbers, problems, strict=True)
        ]
        return TeacherScoring(self, step_settings, numbers, prompts, probe=probe)

    def _own_prompt(
        self, step_settings: Distill, scorer: Scorer, problem: Problem
    ) -> list[int] | None:
        """What a teacher reads in place of the student's prompt: with its hint, in its own
        template. None where it reads the very same."""
        hint, chat = step_settings.hints.get(problem["domain"]), self._layout(scorer)
        if hint is None and chat is None:
            return None
        shown = problem if hint is None else hinted(problem, hint, where=self.where)
        mode = problem.get("mode")
        # The student's response begins behind what its own prompt has opened.
        opened = self.chat.opened(asked(problem), mode)
        return (chat or self.chat).prompt_before(asked(shown), opened, mode)

    def _opening(self, settings: Distill, scorer: Scorer) -> int:
        """Tokens that a teacher reads beyond its own prompt: the beginning of a thinking block that
        the student's prompt opens and its own does not."""
        chat, most = self._layout(scorer) or self.chat, 0
        for mode in settings.modes or (None,):
            read = chat.prompt_before("q", self.chat.opened("q", mode), mode)
            most = max(most, len(read) - len(chat.prompt("q", mode)))
        return most

    def _layout(self, scorer: Scorer) -> Chat | None:
        """The chat of a teacher that lays a prompt out in another way than the student."""
        return None if scorer.chat.lays_out_as(self.chat) else scorer.chat

    def _warn_of_end(self, ctx: Context, policy: Learner, scorer: Scorer, name: str) -> None:
        """Tell of a teacher that ends its turns with a token that does not end the student's."""
        end = scorer.chat.stop_ids[0]
        if end not in policy.chat.stop_ids:
            ends = [policy.chat.text([token]) for token in policy.chat.stop_ids]
            ctx.warn(
                f"teacher {name!r} ends its turns with {scorer.chat.text([end])!r}, the student "
                f"with {' or '.join(map(repr, ends))}: what the student learns from it does not "
                "end its responses; let eos_token_id in the generation_config.json of the "
                "student's start name both"
            )


def rests(checkpoint: Path) -> bool:
    """Whether the teacher of a checkpoint rests when it does not read: by the size of its weight
    files, so that an adapter on a base that others hold, too, stays awake. One that is merged into
    a copy of its base goes by the base."""
    while is_adapter(checkpoint) and not is_separable(checkpoint):
        checkpoint = base_of(checkpoint)
    return sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")) >= REST_BYTES


def check_modes(settings: Distill, ctx: Context, scorer: Scorer, name: str) -> None:
    """Raise ConfigError for a teacher whose template has not the modes that the stage asks in."""
    for mode in settings.modes:
        try:
            scorer.chat.prompt("q", mode)
        except ConfigError as error:
            raise ConfigError(f"stage {ctx.name!r}: teacher {name!r}: {error}") from None


class TeacherScoring:
    """The scoring of one batch, as its responses end. A `Reader` of `rollout`.

    Whole groups are read some at a time, so that a forward pass has enough tokens. Which together
    follows from the order in which rows ended, and so from what was sampled: not from the clock,
    and not from whether there is a core to spare.
    """

    def __init__(
        self,
        teachers: Teachers,
        step_settings: Distill,
        numbers: Sequence[int],
        prompts: Sequence[Sequence[int] | None],
        *,
        probe: bool = False,
    ) -> None:
        """`numbers`: the teacher of each group; `prompts`: the token ids after which that teacher
        reads the group's responses, None for the student's own prompt; `probe`: whether teachers
        are probed when they have read."""
        self.probe = probe
        self.teachers, self.step_settings, self.prompts = teachers, step_settings, prompts
        self.group_size = step_settings.samples_per_prompt
        # From one per group to one per row; rows of a group are neighbours.
        self.teacher_B = torch.tensor(numbers).repeat_interleave(self.group_size)
        self.parts: list[tuple[Tensor, Future[Columns] | Columns]] = []
        """Rows of the batch that one teacher reads together, and what it says about them."""
        self.waiting: list[tuple[Tensor, Scorer, Batch]] = []
        """Such rows for a teacher that rests, and as it is to read them."""
        # Ended rows by group: a group is read when it is whole, so that its prompt is read once.
        self.groups: dict[int, list[int]] = {}
        self.whole: list[int] = []
        self.num_tokens = 0

    def on_finished(self, row_B: Tensor, sampling: Sampling) -> None:
        """Score these rows of `sampling` with others, once enough of them have ended."""
        for row in row_B.tolist():
            number = row // self.group_size
            group = self.groups.setdefault(number, [])
            group.append(row)
            if len(group) == self.group_size:
                self.whole += group
                self.num_tokens += sampling.num_tokens(self.groups.pop(number))
        if self.num_tokens >= READ_TOKENS:
            row_B = torch.tensor(sorted(self.whole))
            self.whole, self.num_tokens = [], 0
            self._score(row_B, sampling.batch(row_B))

    def add_columns(self, batch: Batch) -> None:
        """Give the whole batch its columns; rows that nobody has read yet are read now."""
        left_B = torch.ones(len(batch), dtype=torch.bool)
        for row_B, *_ in (*self.parts, *self.waiting):
            left_B[row_B] = False
        if bool(left_B.any()):
            self._score(left_B.nonzero()[:, 0], batch.select(left_B))
        self._take_turns()
        batch["teacher_B"] = self.teacher_B
        found = [
            (row_B, said.result() if isinstance(said, Future) else said)
            for row_B, said in self.parts
        ]
        self.parts = []
        if self.probe:
            for scorer in dict.fromkeys(self.teachers.scorers):
                if scorer not in self.teachers.resting:
                    self.teachers.probe(scorer)
            self.teachers.probed()
        # All parts have the same columns, those of the estimator.
        for name in found[0][1]:
            batch[name] = _in_place(batch, [(row_B, said[name]) for row_B, said in found])

    def _score(self, row_B: Tensor, rows: Batch) -> None:
        """Let each teacher read its own among `rows`, which are rows `row_B` of the batch."""
        for number in self.teacher_B[row_B].unique().tolist():
            # The teacher's rows as places in `rows`, and as places in the whole batch.
            member_B = (self.teacher_B[row_B] == number).nonzero()[:, 0]
            own_B = row_B[member_B]
            to_read = self._after_hints(own_B, rows.select(member_B))
            scorer = self.teachers.scorers[number]
            if scorer in self.teachers.resting:
                self.waiting.append((own_B, scorer, to_read))
                continue
            work = (self.step_settings, scorer, to_read)
            workers = self.teachers.workers
            said: Future[Columns] | Columns
            if workers is None:
                said = teacher_columns(*work)
            else:
                said = workers.submit(teacher_columns, *work)
            self.parts.append((own_B, said))

    def _take_turns(self) -> None:
        """Let each teacher that rests wake, read the rows that wait for it, and rest again."""
        for scorer in self.teachers.resting:
            for row_B, whose, to_read in self.waiting:
                if whose is scorer:
                    said = teacher_columns(self.step_settings, scorer, to_read)
                    self.parts.append((row_B, said))
            if self.probe:
                self.teachers.probe(scorer)
            scorer.rest()
        self.waiting = []

    def _after_hints(self, row_B: Tensor, rows: Batch) -> Batch:
        """Rows `row_B` of the batch as their teacher is to read them."""
        prompts = [self.prompts[row // self.group_size] for row in row_B.tolist()]
        return rows if all(prompt is None for prompt in prompts) else rows.with_prompts(prompts)


@torch.no_grad()
def teacher_columns(step_settings: Distill, scorer: Scorer, rows: Batch) -> Columns:
    """What the estimator needs of a teacher about `rows`: columns without `teacher_B`."""
    estimator = step_settings.estimator
    if isinstance(estimator, SampledToken):
        return {"teacher_logp_N": scorer.logprobs(rows, temperature=step_settings.temperature)}
    if isinstance(estimator, TopK):
        ids_NK, logp_NK = scorer.top_k(rows, estimator.k, temperature=step_settings.temperature)
        return {"teacher_ids_NK": ids_NK, "teacher_logp_NK": logp_NK}
    hidden_NE = scorer.hidden(rows)
    # A teacher that computes in bfloat16 gives states of that type already.
    if step_settings.precision == "float32":
        hidden_NE = hidden_NE.to(getattr(torch, estimator.cache))
    return {"teacher_hidden_NE": hidden_NE}


def _in_place(batch: Batch, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """One column out of `(row_B, value_N)`, the values for the sampled tokens of some rows each.

    Of columns with two axes, narrower values fill the first places of their rows; the others are 0
    and never read.
    """
    widest = max((value_N for _, value_N in parts), key=lambda value_N: value_N.shape[1:])
    column_N = widest.new_zeros(batch.num_tokens, *widest.shape[1:])
    for row_B, value_N in parts:
        # From rows to the places of their sampled tokens.
        index_N = ragged_index(batch.sampled_len_B, row_B)
        if value_N.dim() == 1:
            column_N[index_N] = value_N
        else:
            column_N[index_N, : value_N.shape[1]] = value_N
    return column_N
