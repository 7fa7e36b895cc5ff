"""Which split a problem belongs to, and which rows are one problem.

Text alone decides, so two splits can never share a problem, whatever the seed, the order of the
rows or the domain. For a procedural domain the text is the format's `key`, which is the same for
prompts that ask the same thing. Of a user's table it is the first message of the user, normalised:
what differs in white space, case or Unicode form only stays together, and so do all conversations
that open alike.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from posttrain.backends.prompting import FIRST
from posttrain.engine.errors import ConfigError, shortened
from posttrain.suites.cells import spread
from posttrain.suites.messages import Message, shape_of
from posttrain.suites.tables import LEFT_OUT, NO_DEMO, Row

SPLITS = ("train", "validation", "heldout")

HELDOUT_PERCENT = 15
VALIDATION_PERCENT = 10


def prompt_digest(prompt: str) -> str:
    """sha256 of the problem text, 64 hex digits."""
    return hashlib.sha256(prompt.encode("utf-8")).hexdigest()


def split_of(prompt: str) -> str:
    """train (75 %), validation (10 %) or heldout (15 %), by the hash of the problem text."""
    bucket = int(prompt_digest(prompt)[:8], 16) % 100
    if bucket < HELDOUT_PERCENT:
        return "heldout"
    return "validation" if bucket < HELDOUT_PERCENT + VALIDATION_PERCENT else "train"


def normalised(text: str) -> str:
    """The text in one Unicode form (NFKC), without case, each stretch of white space one blank."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    # Folding may leave characters that compose.
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def _digest(*parts: str | None) -> str:
    """sha256 of some texts, 64 hex digits; None is not an empty one."""
    # With their lengths, so that no two lists of texts read the same.
    whole = "".join("-" if part is None else f"{len(part)}:{part}" for part in parts)
    return hashlib.sha256(whole.encode("utf-8")).hexdigest()


def _alike(message: Message) -> tuple[str, str, str | None]:
    """Role, text and the rest of a message, the text normalised."""
    rest = None
    if len(message) > 2:
        rest = json.dumps(message | {"content": None}, sort_keys=True)
    return message["role"], normalised(message["content"] or ""), rest


@dataclass(kw_only=True)
class _Problem:
    """A problem whose rows are being gathered."""

    label: str
    place: str
    split: str
    demos: set[str] = field(default_factory=set)
    """Digests of the demonstrations that it has."""
    row: dict[str, Any] | None = None
    """As it is written; None where the rows are counted only."""


DEMONSTRATION = ("demo", "thought", "direct")
"""Fields of a row by which its demonstrations differ."""


class Placement:
    """Puts the rows of a user's tables into splits, and counts what there is to tell of them.

    A row of `train` goes where `split_of` puts the normalised text of its first message, unless
    that split has a table of its own or is not wanted; then it stays in train. Rows that ask the
    same and have the same answer are one problem, which keeps all of their demonstrations.
    """

    def __init__(
        self,
        domain: str,
        *,
        tables: Iterable[str],
        without: Iterable[str] = (),
        judged: bool = True,
        keep: bool = True,
    ) -> None:
        """`tables` are the splits with a table, `without` those that there are not to be. Without a
        verifier (`judged`) answers tell no problems apart. `keep`: keep the rows, or count only."""
        self.domain, self.judged, self.keep = domain, judged, keep
        self.fixed = {*tables, *without}
        self.counts: Counter[str] = Counter()
        """rows, duplicates, further_demos, and the notes of the rows."""
        self.shapes: Counter[str] = Counter()
        """Of conversations who speaks in them (`shape_of`), to how many there are."""
        self.lengths = array("q")
        """Characters of every row that counts."""
        self._problems: dict[str, _Problem] = {}
        self._asked: dict[str, tuple[str, str]] = {}
        """What is asked, to the table and the place where it stands first."""
        self._pairs: set[str] = set()
        """What is asked with its answer."""
        self._answers: Counter[str] = Counter()
        """What is asked, to how many answers it has."""
        self._ids: dict[str, str] = {}
        self._names: set[str] = set()

    def take(self, label: str, row: Row) -> bool:
        """The next row of the table of a split; those of heldout and validation come before train.
        Returns whether it says anything new.

        Raises:
            ConfigError: a problem stands in two tables, or an id occurs twice.
        """
        self.counts["rows"] += 1
        if "messages" in row.problem:
            self.shapes[shape_of(row.asked)] += 1
        asked = [_alike(message) for message in row.asked]
        # Whoever speaks for the system: it is the same question.
        question = _digest(*chain.from_iterable(m for m in asked if m[0] not in FIRST))
        whole = question
        if asked[0][0] in FIRST:
            whole = _digest(*chain.from_iterable(asked))
        other, place = self._asked.setdefault(question, (label, row.place))
        if other != label:
            raise ConfigError(
                f"{row.place}: this problem also stands in the {other} table ({place}); no "
                "stage may train on a problem that it is judged by, so remove one of them: "
                f"{shortened(row.prompt)!r}"
            )
        answer = normalised(row.problem["answer"] or "") if self.judged else ""
        key = pair = _digest(whole, answer)
        if "thought" in row.problem or "direct" in row.problem:
            # What a row thinks belongs to its own demonstration: it stays a row.
            key = _digest(whole, answer, _demo_digest(row.problem))
        problem = self._problems.get(key)
        if problem is None:
            opening = next(text for role, text, _ in asked if role == "user")
            problem = self._problems[key] = self._first(label, row, key, opening)
            self._answers[whole] += pair not in self._pairs
            self._pairs.add(pair)
        elif not self._further(problem, row):
            self.counts["duplicates"] += 1
            return False
        self.counts.update(row.notes)
        self.lengths.append(len(row.text))
        return True

    def _first(self, label: str, row: Row, key: str, opening: str) -> _Problem:
        if row.id is not None and self._ids.setdefault(row.id, row.place) != row.place:
            raise ConfigError(
                f"{row.place}: the id {row.id!r} already stands at {self._ids[row.id]}; ids have "
                "to be unique in a domain, or leave the id column out"
            )
        split = split_of(opening) if label == "train" else label
        problem = _Problem(
            label=label, place=row.place, split=label if split in self.fixed else split
        )
        problem.demos.add(_demo_digest(row.problem))
        if self.keep:
            own = {"id": row.id or self._name(row.prompt, key), "domain": self.domain}
            problem.row = own | row.problem
        return problem

    def _name(self, prompt: str, key: str) -> str:
        """A name for a problem: by its text, and where another one reads the same by its `key`."""
        name = f"{self.domain}-{prompt_digest(prompt)[:12]}"
        name = f"{self.domain}-{key[:12]}" if name in self._names else name
        self._names.add(name)
        return name

    def _further(self, problem: _Problem, row: Row) -> bool:
        """Whether the row has a demonstration that its problem lacks, which it then gets."""
        shown = _demo_digest(row.problem)
        if row.problem["demo"] is None or shown in problem.demos:
            return False
        first = problem.demos == {_demo_digest({})}
        problem.demos = {shown} if first else problem.demos | {shown}
        self.counts["further_demos"] += not first
        # The row without one has found its demonstration, and is the repeat of the two.
        self.counts[NO_DEMO] -= first
        self.counts["duplicates"] += first
        if problem.row is not None and first:
            problem.row["demo"] = row.problem["demo"]
        elif problem.row is not None:
            problem.row.setdefault("demos", []).append(row.problem["demo"])
        return True

    def splits(self) -> dict[str, list[dict[str, Any]]]:
        """The problems of each split, as they are written."""
        found: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        for problem in self._problems.values():
            if problem.row is not None:
                found[problem.split].append(problem.row)
        return found

    def facts(self) -> dict[str, int]:
        """What there is to tell: problems per split, rows read, duplicates, further demonstrations,
        rows without one, prompts with several answers, values left out, characters per row."""
        splits = Counter(problem.split for problem in self._problems.values())
        names = ("rows", "duplicates", "further_demos", NO_DEMO, LEFT_OUT)
        return (
            {split: splits[split] for split in SPLITS}
            | {name: self.counts[name] for name in names}
            | {"contradicting": sum(count > 1 for count in self._answers.values())}
            | spread(self.lengths)
        )


def _demo_digest(problem: Mapping[str, Any]) -> str:
    return _digest(*(problem.get(name) for name in DEMONSTRATION))


def require_all_splits(
    counts: Mapping[str, int], where: str, *, without: Iterable[str] = ()
) -> None:
    """Raises ConfigError where a split that is wanted got no row."""
    for split in SPLITS:
        if not counts.get(split) and split not in without:
            total = sum(counts.get(name, 0) for name in SPLITS)
            raise ConfigError(
                f"{where}: the {split} split got none of the {total} distinct problems (by hash, "
                "15 % of the problems of train are held out and 10 % validate); give "
                f'{split} = "..." a file of its own, add rows, or write {split} = 0 for a domain '
                "without that split"
            )
