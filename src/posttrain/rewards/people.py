"""People as the judge: a file of comparisons that the stage writes and somebody fills in.

One JSON object per line: id, domain, prompt, a, b, and what is to be filled in, `preferred` ("a",
"b" or "tie") and, if wanted, `strength` (1 to 4: marginal, better, clear, strong). Which response
is a and which is b follows from a hash, so that it tells nothing. Until every line is filled in,
the stage ends with `Waiting`; the same command then goes on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.engine.atomic import write_whole
from posttrain.engine.errors import ConfigError, Waiting
from posttrain.rewards.judge_kinds import Human
from posttrain.rewards.judging import Responses, comparisons, win_shares

FILE = "comparisons.jsonl"
PREFERRED = ("a", "b", "tie")
STRENGTHS = (1, 2, 3, 4)
ASKED = ("id", "domain", "prompt", "a", "b")
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two responses to one problem."""

    problem: Mapping[str, Any]
    first: str
    second: str


@dataclass(frozen=True, kw_only=True)
class Preference:
    """What somebody said about a pair."""

    first: float
    """1 where the first response is preferred, 0 the second, 0.5 for a tie."""
    strength: int | None
    """1 to 4; None where it was left out."""


class HumanJudge:
    """`judges.human`: win shares within each group. Ask it about all responses at once."""

    def __init__(self, judge: Human, tools: Any) -> None:
        """`tools` are a stage's `StageTools`; the filled file is copied into the stage's `out`,
        whose hash the record keeps."""
        self.judge = judge
        self.path = tools.ctx.work / FILE if judge.file is None else Path(judge.file)
        self.out = tools.ctx.out

    def score(self, responses: Responses) -> list[float]:
        """Shares in [0, 1]; 0.5 for a response that was in no comparison. Raises as `prefer`.

        Equal responses of a group are not compared: they share no win and no loss.
        """
        problems, texts = responses.problems, responses.texts
        pairs = comparisons(responses.group, pairing=self.judge.pairing, swap=False)
        asked = [(a, b) for a, b in pairs if texts[a] != texts[b]]
        found = self.prefer(
            [Pair(problem=problems[a], first=texts[a], second=texts[b]) for a, b in asked]
        )
        return win_shares(len(responses), asked, [preference.first for preference in found])

    def prefer(self, pairs: Sequence[Pair]) -> list[Preference]:
        """What people prefer in each pair.

        Raises Waiting where the file was not there, and is now, or lacks verdicts; ConfigError,
        with the line, for one that is wrong, or where the file is about other pairs.
        """
        rows = [_row(pair) for pair in pairs]
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            asked = list({_key(row): row for row in rows}.values())
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in asked)
            write_whole(self.path, text.encode("utf-8"))
        answers = self._read({_key(row) for row in rows})
        missing = [row for row in rows if _key(row) not in answers]
        if missing:
            count = len({_key(row) for row in missing})
            raise Waiting(
                f"{count} of {len({_key(row) for row in rows})} comparisons in {self.path} are to "
                'be filled in: set "preferred" to "a", "b" or "tie" and, if wanted, "strength" to '
                "1 (marginal) to 4 (strong)",
                file=self.path,
            )
        shutil.copyfile(self.path, self.out / FILE)
        return [
            _preference(pair, answers[_key(row)]) for pair, row in zip(pairs, rows, strict=True)
        ]

    def _read(self, wanted: set[tuple[str, ...]]) -> dict[tuple[str, ...], Row]:
        """The filled lines by what they ask."""
        found: dict[tuple[str, ...], Row] = {}
        text = self.path.read_text(encoding="utf-8")
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip():
                continue
            where = f"{self.path}, line {number}"
            row = _parse(line, where)
            if _key(row) not in wanted:
                raise ConfigError(
                    f"{where}: this stage does not ask about these responses to problem "
                    f"{row['id']}; restore the line, or remove the file and run the same command "
                    "again to have it written anew"
                )
            if row.get("preferred") in ("", None):
                continue
            _check(row, where)
            if _key(row) in found:
                raise ConfigError(f"{where}: problem {row['id']} has the same pair twice")
            found[_key(row)] = row
        return found


def _row(pair: Pair) -> Row:
    a, b = (pair.second, pair.first) if _turned(pair) else (pair.first, pair.second)
    asked = {name: pair.problem[name] for name in ("id", "domain", "prompt")}
    return asked | {"a": a, "b": b, "preferred": "", "strength": None}


def _turned(pair: Pair) -> bool:
    """Whether the second response is shown as a; it does not matter which one comes first."""
    low, high = sorted((pair.first, pair.second))
    key = json.dumps([pair.problem["domain"], pair.problem["id"], low, high])
    shows_high = hashlib.sha256(key.encode("ascii")).digest()[0] % 2 == 1
    return shows_high == (pair.first == low)


def _key(row: Row) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in ASKED)


def _parse(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: it is no JSON object ({error})") from None
    missing = [name for name in ASKED if not isinstance(row, dict) or name not in row]
    if missing:
        raise ConfigError(f"{where}: it has no {missing[0]!r}; change only preferred and strength")
    return dict(row)


def _check(row: Row, where: str) -> None:
    if row["preferred"] not in PREFERRED:
        raise ConfigError(
            f"{where}: preferred = {row['preferred']!r}; it has to be one of "
            f"{', '.join(PREFERRED)}, or empty while it is to be filled in"
        )
    strength = row.get("strength")
    if strength is not None and (strength not in STRENGTHS or isinstance(strength, bool | float)):
        raise ConfigError(f"{where}: strength = {strength!r}; it has to be 1, 2, 3 or 4, or null")


def _preference(pair: Pair, row: Row) -> Preference:
    first = 0.5 if row["preferred"] == "tie" else float(row[row["preferred"]] == pair.first)
    return Preference(first=first, strength=row.get("strength"))
