"""A few samples every some steps, in samples.jsonl of the artifact: what a training stage makes of
its model, for people to read while it runs and afterwards.

    if ctx.samples.due(step + 1, steps):
        few = shown_rows(batch)
        ctx.samples.write(step + 1, of_rollout(few, chat, reward=few["reward_B"]))

They change nothing that is learned: whatever is sampled for them is greedy, and draws on no random
state. Of `rl` and `distill` they are rows of the step; the others write responses to the same few
prompts of their own data every time, so that one can read how they change. The form of the rows is
in `report/samples.py`.

Without a number of steps they are taken about `SNAPSHOTS` times in a stage, and less often where
they would take more than `SHARE` of its time.

Legend: B rows, N sampled tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.backends.base import Sampler
from posttrain.backends.chat import Chat
from posttrain.backends.prompting import Asked, Problem, asked, asked_key, readable
from posttrain.engine.jsonl import write_jsonl
from posttrain.losses.ops import row_sums
from posttrain.report.samples import SAMPLES, Sample, parse_samples
from posttrain.rl.batch import Batch

SNAPSHOTS = 10
ROWS = 4
"""Of each snapshot; a domain has a row before another one has two."""
NEW_TOKENS = 64
"""Of a response that is sampled for this alone."""
SHARE = 0.01
"""Of a stage's time."""
LOOKED_AT = 64
"""Rows of each domain among which the prompts are looked for that are answered every time."""
TEXT = 2000
"""Characters of a text; of a longer one the middle is left out."""


class SampleLog:
    """Says when samples are due, and keeps them."""

    def __init__(self, out: Path, every: int | None = None) -> None:
        """Samples go to `out`, every `every` steps; 0 is never."""
        self.path, self.every = out / SAMPLES, every
        self._newest = 0
        self._began = time.monotonic()
        self._asked, self._spent, self._cost = 0.0, 0.0, 0.0

    def resume(self, step: int) -> None:
        """Keep the samples of the first `step` steps and drop later ones."""
        if not self.path.exists():
            return
        kept = [row for row in parse_samples(self.path.read_bytes()) if row.step <= step]
        write_jsonl(self.path, map(asdict, kept))
        self._newest = kept[-1].step if kept else 0

    def due(self, step: int, total: int) -> bool:
        """Whether samples are to be taken after `step` of `total` steps; then `write` follows."""
        every = math.ceil(total / SNAPSHOTS) if self.every is None else self.every
        if every == 0 or (step - self._newest < every and step < total):
            return False
        self._asked = time.monotonic()
        budget = SHARE * (self._asked - self._began)
        # A number that somebody gave is kept to; what the first one costs is not known before.
        return self.every is not None or self._spent + self._cost <= budget

    def write(self, step: int, rows: Sequence[Sample]) -> None:
        """Append the rows of a snapshot; each gets the step."""
        write_jsonl(self.path, [asdict(row) | {"step": step} for row in rows], append=True)
        self._newest = step
        self._cost = time.monotonic() - self._asked
        self._spent += self._cost


def sample_of(
    row: Mapping[str, Any], shown: Asked, texts: Mapping[str, str], numbers: Mapping[str, float]
) -> Sample:
    """A sample about a problem or a row of data: what the model is shown, then these texts."""
    prompt = shown if isinstance(shown, str) else readable(shown)
    return Sample(
        step=0,
        domain=str(row.get("domain", "")),
        texts={name: shortened(text) for name, text in {"prompt": prompt, **texts}.items()},
        numbers={name: float(f"{v:.6g}") for name, v in numbers.items() if math.isfinite(v)},
    )


def shortened(text: str) -> str:
    """A text of at most about `TEXT` characters."""
    if len(text) <= TEXT:
        return text
    gone = len(text) - TEXT
    return f"{text[: TEXT // 2]}\n[... {gone} characters ...]\n{text[-(TEXT // 2) :]}"


def spread(domains: Sequence[str], count: int = ROWS) -> list[int]:
    """Places of `count` rows, in order: the first of every domain, then the second ones."""
    seen: dict[str, int] = {}
    turns = []
    for place, domain in enumerate(domains):
        turns.append((seen.get(domain, 0), place))
        seen[domain] = seen.get(domain, 0) + 1
    return sorted(place for _, place in sorted(turns)[:count])


def shown_rows(batch: Batch) -> Batch:
    """A few rows of what a step has sampled, of different problems where there are some."""
    firsts: dict[int, int] = {}
    # The other rows of a group answer the same problem.
    for row, group in enumerate(batch["group_B"].tolist()):
        firsts.setdefault(group, row)
    rows = list(firsts.values())
    places = spread([str(batch.problems[row]["domain"]) for row in rows])
    return batch.select(torch.tensor([rows[place] for place in places]))


def of_rollout(batch: Batch, chat: Chat, **value_B: Tensor) -> list[Sample]:
    """Samples of sampled rows, each with its values, such as its reward. NaN is left out."""
    length_B, finished_B = batch.sampled_len_B.tolist(), batch["finished_B"].tolist()
    return [
        sample_of(
            problem,
            asked(problem),
            {"response": batch.texts[row] if batch.texts else chat.decode(ids)},
            {name: float(value[row]) for name, value in value_B.items()}
            | {"tokens": length_B[row], "finished": float(finished_B[row])},
        )
        for row, (problem, ids) in enumerate(zip(batch.problems, batch.responses(), strict=True))
    ]


def token_means(value_N: Tensor, batch: Batch) -> Tensor:
    """`mean_B`: of a value of sampled tokens, over each row; NaN for a row without any."""
    sums_B = row_sums(value_N.float(), batch.row_N, len(batch))
    return sums_B / batch.sampled_len_B


@dataclass(frozen=True, kw_only=True)
class Question:
    """A row of a stage's data whose prompt is answered at every snapshot."""

    row: Problem
    shown: Asked
    """What stands before the response."""
    texts: Mapping[str, str]
    """What the data has in its place, by name."""


def questions(rows: Iterable[Question], chat: Chat) -> list[Question]:
    """The first few with different prompts, of all domains, that leave room for a response."""
    found: dict[Any, Question] = {}
    for one in rows:
        key = (one.row["domain"], one.row.get("mode"), asked_key(one.shown))
        if key not in found and _has_room(one, chat):
            found[key] = one
    kept = list(found.values())
    return [kept[place] for place in spread([one.row["domain"] for one in kept])]


def _has_room(one: Question, chat: Chat) -> bool:
    prompt = chat.prompt(one.shown, one.row.get("mode"))
    return chat.max_positions is None or len(prompt) + new_tokens(chat) <= chat.max_positions


def new_tokens(chat: Chat) -> int:
    """Most tokens of a response that is sampled for people: `NEW_TOKENS`, of a model with few
    positions a quarter of these."""
    return NEW_TOKENS if chat.max_positions is None else min(NEW_TOKENS, chat.max_positions // 4)


def answered(
    sampler: Sampler, about: Sequence[Question], numbers: Sequence[Mapping[str, float]]
) -> list[Sample]:
    """Greedy responses to some questions, each beside the texts of its row, with its numbers."""
    chat = sampler.chat
    batch = sampler.sample(
        [chat.prompt(one.shown, one.row.get("mode")) for one in about],
        group_size=1,
        max_new_tokens=new_tokens(chat),
        temperature=0.0,
        seed=0,
    )
    parts = zip(about, numbers, batch.responses(), batch["finished_B"].tolist(), strict=True)
    return [
        sample_of(
            one.row,
            one.shown,
            {"response": chat.decode(ids), **one.texts},
            {**known, "tokens": len(ids), "finished": float(whole)},
        )
        for one, known, ids, whole in parts
    ]
