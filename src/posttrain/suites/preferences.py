"""A user's own preference data: pairs, rankings of several responses, or single responses that are
desirable or not. Makes pairs.jsonl, for `dpo` and `reward_model`.

    pairs     prompt, chosen, rejected; margin, strength, or the scores of both
    rankings  prompt, responses (a list), scores (a list); without scores the best comes first
    single    prompt, response, label

Prompts are texts or lists of messages. So are responses: a text, the assistant's message, or the
whole conversation; the common beginning of two conversations is then the prompt. Without a prompt
column a conversation may be a text as in HH-RLHF, "\n\nHuman: ...\n\nAssistant: ...".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from posttrain.engine.errors import ConfigError
from posttrain.suites.cells import shown
from posttrain.suites.messages import Message, looks_like_messages, message_list
from posttrain.suites.own_data import (
    Config,
    Facts,
    Row,
    TableKind,
    as_number,
    asked_for,
    cell,
    check_texts,
    number,
    read_json,
    response,
    transcript,
)

SIDES = ("chosen", "rejected")
FORMS: Mapping[str, tuple[str, ...]] = {
    "pairs": ("chosen", "rejected", "margin", "strength", "chosen_score", "rejected_score"),
    "rankings": ("responses", "scores"),
    "single": ("response", "label"),
}
"""Form of a table to the columns that only it has."""

LABELS: Mapping[object, bool] = {
    **dict.fromkeys(("true", "1", "yes", "good", "up", "thumbs_up", "desirable", "👍"), True),
    **dict.fromkeys(("false", "0", "no", "bad", "down", "thumbs_down", "undesirable", "👎"), False),
}
"""What a label may say, whatever its case."""


@dataclass(frozen=True, kw_only=True)
class Preferences:
    """A table of a user's own preferences, whose columns say in which form they are."""

    data: str
    """Where it lies: as a table of a domain."""
    prompt: str | None = None
    """Column of the prompt, a text or a list of messages; `prompt` if not given. Conversations hold
    their prompt and need none."""
    system: str | None = None
    """The system message of every prompt that has none of its own."""
    system_column: str | None = None
    """Column of each row's own; an empty cell means none."""
    chosen: str | None = None
    rejected: str | None = None
    """Columns of the two responses of a pair; `chosen` and `rejected` if not given."""
    margin: str | None = None
    """Column of how much better the chosen response is, 0 or more: for a reward model with
    `margins = "margin"`."""
    strength: str | None = None
    """Column of how clearly it is better, 1 to 4: for one with `margins = "strength"`."""
    chosen_score: str | None = None
    rejected_score: str | None = None
    """Columns of a score of each response, whose difference is the margin."""
    responses: str | None = None
    """Column of a list of responses to one prompt: rankings in place of pairs."""
    scores: str | None = None
    """Column of a list with the score of each; without it the best response comes first."""
    response: str | None = None
    label: str | None = None
    """Columns of a single response and of whether it is desirable: true or false, 1 or 0, or a
    thumb; `response` and `label` if one of them is given. For `dpo` with the loss `kto`."""

    def __post_init__(self) -> None:
        where = f"preferences of {self.data}"
        check_texts(self, where)
        given = {
            form: [column for column in columns if getattr(self, column) is not None]
            for form, columns in FORMS.items()
        }
        found = [form for form, columns in given.items() if columns]
        if len(found) > 1:
            one, other = found[:2]
            raise ConfigError(
                f"{where}: {given[one][0]} is a column of {one} and {given[other][0]} one of "
                f"{other}; a table has one form: name the columns of one"
            )
        if self.scores is not None and self.responses is None:
            raise ConfigError(
                f"{where}: scores = {self.scores!r} are those of a list of responses; name its "
                'column with responses = "..."'
            )
        if (self.chosen_score is None) != (self.rejected_score is None):
            raise ConfigError(
                f"{where}: the margin is the difference of chosen_score and rejected_score; name "
                "both columns"
            )
        if self.margin is not None and self.chosen_score is not None:
            raise ConfigError(
                f"{where}: margin and chosen_score both say how much better a response is; name "
                "one of them"
            )


def form_of(config: Mapping[str, Any]) -> str:
    """The form of a table by the columns that are named: a key of `FORMS`."""
    found = [form for form, columns in FORMS.items() if any(column in config for column in columns)]
    return found[0] if found else "pairs"


def has_margins(config: Mapping[str, Any]) -> bool:
    """Whether its pairs say by how much the chosen response is better."""
    return any(column in config for column in ("margin", "chosen_score", "scores"))


def _facts(config: Config, rows: list[Row]) -> Facts:
    """contradictions (pairs of responses that are preferred both ways, or responses with both
    labels), and desirable (single responses)."""
    if form_of(config) == "single":
        said = {(row["id"], row["response"], row["desirable"]) for row in rows}
        both = sum(good and (id_, text, False) in said for id_, text, good in said)
        return {"contradictions": both, "desirable": sum(row["desirable"] for row in rows)}
    pairs = {(row["id"], row["chosen"], row["rejected"]) for row in rows}
    both = sum((id_, other, one) in pairs for id_, one, other in pairs) // 2
    return {"contradictions": both}


def _rows(config: Config, record: Mapping[str, Any]) -> list[Row]:
    """The rows of pairs.jsonl that a row of the table makes."""
    read = {"pairs": _pair, "rankings": _ranking, "single": _single}
    return read[form_of(config)](config, record)


def _pair(config: Config, record: Mapping[str, Any]) -> list[Row]:
    before: dict[str, list[Message]] = {}
    texts: dict[str, str] = {}
    alone = "prompt" not in config and "prompt" not in record
    for side in SIDES:
        column = config.get(side, side)
        if column not in record and "chosen" not in config and "rejected" not in config:
            raise ConfigError(
                f"column {column!r} is missing; columns there: {', '.join(record) or 'none'}; name "
                'those of pairs with chosen = "..." and rejected = "...", those of rankings with '
                'responses = "...", those of single responses with response = "..." and label = '
                '"..."'
            )
        value = cell(record, side, column)
        value = transcript(value) if alone else value
        before[side], texts[side] = response(value, f"column {column!r}")
    _check_alike(before["chosen"], before["rejected"])
    row = _asked(config, record, before["chosen"])
    if texts["chosen"] == texts["rejected"]:
        raise ConfigError(
            "the chosen and the rejected response are the same text, so that nothing is preferred; "
            "leave the row out"
        )
    return [row | texts | _how_much(config, record)]


def _how_much(config: Config, record: Mapping[str, Any]) -> Row:
    """The margin and the strength of a pair, where the table has them."""
    found: Row = {}
    if "margin" in config:
        found["margin"] = number(record, "margin", config["margin"])
        if found["margin"] < 0:
            raise ConfigError(
                f"column {config['margin']!r} is {found['margin']:g}; a margin says how much "
                "better the chosen response is: 0 or more"
            )
    if "chosen_score" in config:
        better = number(record, "chosen_score", config["chosen_score"])
        worse = number(record, "rejected_score", config["rejected_score"])
        if better < worse:
            raise ConfigError(
                f"the chosen response has the lower score, {better:g} against {worse:g}; swap the "
                "two, or leave the row out"
            )
        found["margin"] = _difference(better, worse)
    if "strength" in config:
        strength = number(record, "strength", config["strength"])
        if strength not in (1, 2, 3, 4):
            raise ConfigError(
                f"column {config['strength']!r} is {strength:g}; a strength is 1, 2, 3 or 4, from "
                "slightly to much better"
            )
        found["strength"] = int(strength)
    return found


def _ranking(config: Config, record: Mapping[str, Any]) -> list[Row]:
    """All pairs of a row's responses of which one is strictly better."""
    place = f"column {config['responses']!r}"
    given = _list(config, record, "responses")
    said = [response(value, f"{place}, response {i}") for i, value in enumerate(given, start=1)]
    if len(said) < 2:
        raise ConfigError(f"{place} holds {len(said)} response; a ranking has two or more")
    # Without scores the best comes first.
    scores = [-float(number_) for number_ in range(len(said))]
    if "scores" in config:
        values = _list(config, record, "scores")
        if len(values) != len(said):
            raise ConfigError(
                f"{len(said)} responses and {len(values)} scores; every response has one score"
            )
        scores = [as_number(value, f"column {config['scores']!r}") for value in values]
    for before, _ in said:
        _check_alike(said[0][0], before)
    row = _asked(config, record, said[0][0])
    pairs = []
    for one, other in combinations(range(len(said)), 2):
        if scores[one] == scores[other]:
            continue
        if said[one][1] == said[other][1]:
            raise ConfigError(
                f"responses {one + 1} and {other + 1} are the same text, and one is ranked above "
                "the other; leave one of them out"
            )
        better, worse = (one, other) if scores[one] > scores[other] else (other, one)
        pair = row | {"chosen": said[better][1], "rejected": said[worse][1]}
        margin = {}
        if "scores" in config:
            margin["margin"] = _difference(scores[better], scores[worse])
        pairs.append(pair | margin)
    return pairs


def _difference(better: float, worse: float) -> float:
    if not math.isfinite(better - worse):
        raise ConfigError(f"the scores {better:g} and {worse:g} are too far apart to be subtracted")
    return better - worse


def _list(config: Config, record: Mapping[str, Any], field: str) -> list[Any]:
    value = cell(record, field, config[field])
    value = read_json(value, f"column {config[field]!r}", hint="a list")
    if not isinstance(value, list):
        raise ConfigError(
            f"column {config[field]!r} holds {shown(value)}; the {field} of a ranking are a list"
        )
    return value


def _single(config: Config, record: Mapping[str, Any]) -> list[Row]:
    """A response by itself, and whether it is desirable."""
    column = config.get("response", "response")
    before, said = response(cell(record, "response", column), f"column {column!r}")
    row = _asked(config, record, before)
    column = config.get("label", "label")
    label = cell(record, "label", column)
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    good = LABELS.get(str(label).strip().lower())
    if good is None:
        raise ConfigError(
            f"column {column!r} holds {shown(label)}; a label is true or false, 1 or 0, yes or no, "
            "good or bad, desirable or undesirable, or a thumb, up or down"
        )
    return [row | {"response": said, "desirable": good}]


def _asked(config: Config, record: Mapping[str, Any], before: list[Message]) -> Row:
    """The beginning of a row: its prompt, of a column or what stands before the response."""
    if before:
        place = f"column {config.get('prompt')!r}"
        if "prompt" in config and not _begins(
            before, cell(record, "prompt", config["prompt"]), place
        ):
            raise ConfigError(
                f"column {config['prompt']!r} is not what the conversation begins with; leave "
                "prompt out, and the beginning of the conversation is the prompt"
            )
        return asked_for(config, record, before, "what stands before the response")
    column = config.get("prompt", "prompt")
    return asked_for(config, record, cell(record, "prompt", column), f"column {column!r}")


def _begins(before: list[Message], prompt: Any, place: str) -> bool:
    """Whether the prompt of a column is what a conversation says before its response."""
    if looks_like_messages(prompt):
        try:
            given = message_list(prompt)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from None
        return given in (before, [message for message in before if message["role"] != "system"])
    said = [message["content"] for message in before if message["role"] == "user"]
    return str(prompt).strip() in [str(text).strip() for text in said]


def _check_alike(one: list[Message], other: list[Message]) -> None:
    """Raise ConfigError for what stands before two responses, if they do not answer the same."""
    if one == other:
        return
    if not one or not other:
        raise ConfigError(
            "one response is a whole conversation and the other only a response; give both in one "
            "form"
        )
    same = 0
    while same < min(len(one), len(other)) and one[same] == other[same]:
        same += 1
    raise ConfigError(
        f"the conversations part at message {same + 1} already; responses to one prompt differ in "
        "the last message only, so leave the row out"
    )


PREFERENCES = TableKind(
    name="preferences",
    plural="preferences",
    source=Preferences,
    example="pairs.jsonl",
    file="pairs.jsonl",
    rows=_rows,
    facts=_facts,
)
