"""A reward: a judge of `posttrain.judges` applied to responses.

    reward = RewardFunction(judge, {part.identity: what scores for it, for parts with a SCORER})
    scores, parts = reward.score(responses, at)

Each judge is asked once per batch, however often it occurs in the reward. `comparisons` and
`win_shares` are what the judges have in common that compare two responses. Imports no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Protocol

from posttrain.backends.prompting import visible
from posttrain.engine.errors import StageError
from posttrain.rewards.judge_base import Judge
from posttrain.rewards.penalties import groups
from posttrain.schedules import Schedule

At = Callable[[Schedule], float]
"""The value of a schedule at the present step."""


@dataclass(frozen=True, kw_only=True)
class Responses:
    """Responses to be judged, one entry of every list per response."""

    problems: Sequence[Mapping[str, Any]]
    """The problem that it answers: id, domain, prompt, answer, maybe mode and rubric."""
    texts: Sequence[str]
    group: Sequence[int]
    """Which prompt of the batch it answers; responses of one group stand together or apart."""
    finished: Sequence[bool]
    """Whether it ended by itself, not at the length limit."""
    num_tokens: Sequence[int]
    """Response tokens, the stop token included."""
    verdicts: Sequence[float] | None = None
    """The domain verifier's scores where they are known already."""
    sampled: Sequence[Mapping[str, Any]] | None = None
    """The token ids of each as they were sampled (`ids`), and whose they are (`ids_of`)."""
    steps: Sequence[int | None] | None = None
    """The training step that sampled each, from 0; None where no stage that trains did."""

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, index: Sequence[int]) -> Responses:
        """The responses at `index`."""
        columns = {name: column for name, column in vars(self).items() if column is not None}
        return Responses(**{n: [column[i] for i in index] for n, column in columns.items()})

    def portions(self, size: int) -> list[list[int]]:
        """The rows in portions of `size` or a few more, each group in one of them."""
        portions: list[list[int]] = [[]]
        for rows in groups(self.group):
            if len(portions[-1]) >= size:
                portions.append([])
            portions[-1] += rows
        return portions


class Scorer(Protocol):
    """What scores for a judge with a `SCORER`; made from the judge and a stage's `StageTools`."""

    def score(self, responses: Responses) -> list[float]:
        """One number per response, higher is better.

        Raises StageError or ConfigError where it cannot be asked, or its answer cannot be read.
        """
        ...


class Scoring:
    """What judges say about one batch of responses, each asked once."""

    def __init__(
        self,
        responses: Responses,
        scorers: Mapping[str, Scorer],
        at: At | None,
        labels: Mapping[str, str],
    ) -> None:
        """`labels`: the identity of each judge that is logged to what the log calls it."""
        self.responses, self.scorers, self.at, self.labels = responses, scorers, at, labels
        self._known: dict[str, list[float]] = {}
        self._logged: dict[str, list[float]] = {}
        self._subsets: list[Scoring] = []

    def scores(self, judge: Judge) -> list[float]:
        """A judge's score of each response."""
        if judge.identity not in self._known:
            self._known[judge.identity] = judge.score(self)
            if not judge.COMBINES:
                self._logged[self.labels[judge.identity]] = self._known[judge.identity]
        return self._known[judge.identity]

    def ask(self, judge: Judge) -> list[float]:
        """The scores by the scorer of a judge, checked. Raises StageError where they are no
        numbers or too few, and what the scorer raises."""
        scores = self.scorers[judge.identity].score(self.responses)
        # NaN alone differs from itself.
        bad = [score for score in scores if score != score]
        if len(scores) != len(self.responses) or bad:
            raise StageError(
                f"judge {judge.judge}: it gave {len(scores)} scores for {len(self.responses)} "
                f"responses, {len(bad)} of them not a number"
            )
        return scores

    def value(self, weight: Any) -> Any:
        """A number as it is, a schedule's present value."""
        if not isinstance(weight, Schedule):
            return weight
        return weight.possible_values()[0] if self.at is None else self.at(weight)

    def subset(self, index: Sequence[int]) -> Scoring:
        """The same about some of the responses; judges are asked about these alone."""
        subset = Scoring(self.responses.select(index), self.scorers, self.at, self.labels)
        self._subsets.append(subset)
        return subset

    def answers(self) -> Scoring:
        """The same about the answers alone, as a verifier sees them, in no mode: an empty text
        where there is none."""
        given = self.responses
        shown = zip(given.texts, given.problems, strict=True)
        # The ids that some responses come with are those of the whole.
        answers = Responses(
            problems=[{n: p[n] for n in p if n != "mode"} for p in given.problems],
            texts=[visible(text, problem.get("mode")) or "" for text, problem in shown],
            group=given.group,
            finished=given.finished,
            num_tokens=given.num_tokens,
            verdicts=given.verdicts,
            steps=given.steps,
        )
        scoring = copy(self)
        scoring.responses = answers
        scoring._known, scoring._logged, scoring._subsets = {}, {}, []
        self._subsets.append(scoring)
        return scoring

    def parts(self) -> dict[str, list[float]]:
        """Label to the scores of each judge inside, of the responses that it was asked about.

        What was asked of subsets stands in one list.
        """
        found: dict[str, list[float]] = {}
        for subset in self._subsets:
            for label, scores in subset.parts().items():
                found.setdefault(label, []).extend(scores)
        return found | self._logged


class RewardFunction:
    """A judge with all of its parts ready to be asked."""

    def __init__(self, judge: Judge, scorers: Mapping[str, Scorer]) -> None:
        """`scorers`: the identity of each judge inside that has a `SCORER` to what scores."""
        self.judge = judge
        self.scorers = dict(scorers)
        self.labels = labels_of(judge)

    def score(
        self, responses: Responses, at: At | None = None
    ) -> tuple[list[float], dict[str, list[float]]]:
        """The score of each response; and by label what each judge inside said, of the responses
        that it was asked about.

        `at` gives the schedules of weights their present values; without it they have the first.
        """
        scoring = Scoring(responses, self.scorers, at, self.labels)
        return scoring.scores(self.judge), scoring.parts()

    def portions(self, responses: Responses, size: int) -> list[list[int]]:
        """The rows to be asked about at once: about `size`, or all where the judge sees all."""
        if any(part.WHOLE for part in self.judge.walk()):
            return [list(range(len(responses)))]
        return responses.portions(size)


def labels_of(judge: Judge) -> dict[str, str]:
    """Identity -> label of each judge inside that is logged. Of several with the same label the
    second is LABEL.2 and so on, in the order in which they are written."""
    found: dict[str, str] = {}
    count: Counter[str] = Counter()
    for part in judge.walk():
        if not part.COMBINES and part.identity not in found:
            count[part.label] += 1
            number = count[part.label]
            found[part.identity] = part.label if number == 1 else f"{part.label}.{number}"
    return found


def comparisons(group: Sequence[int], *, pairing: str, swap: bool) -> list[tuple[int, int]]:
    """Which rows of each group are compared, as pairs (a, b) in the order in which the judge sees
    them; with `swap` each pair is asked in both orders.

    all: every pair. circular: each response with the next and the last with the first; as many
    comparisons as responses (one where there are two).
    """
    found: list[tuple[int, int]] = []
    for rows in groups(group):
        pairs = list(combinations(rows, 2))
        if pairing == "circular" and len(rows) > 2:
            pairs = list(zip(rows, [*rows[1:], rows[0]], strict=True))
        for a, b in pairs:
            found += [(a, b), (b, a)] if swap else [(a, b)]
    return found


def win_shares(
    num_rows: int, asked: Sequence[tuple[int, int]], wins: Sequence[float]
) -> list[float]:
    """Mean of what each row won in its comparisons; 0.5 for a row that was in none.

    `wins[i]` in [0, 1] is what the first row won in comparison i; the second won the rest.
    """
    total, count = [0.0] * num_rows, [0] * num_rows
    for (a, b), won in zip(asked, wins, strict=True):
        for row, value in ((a, won), (b, 1 - won)):
            total[row] += value
            count[row] += 1
    return [t / n if n else 0.5 for t, n in zip(total, count, strict=True)]
