"""A user's own preference data: pairs, rankings of several responses, or single responses that are
desirable or not. Makes pairs.jsonl, for `dpo` and `reward_model`.

    pairs     prompt, chosen, rejected; margin, strength, or the scores of both
    rankings  prompt, responses (a list), scores (a list); without scores the best comes first
    single    prompt, response, label

Prompts are texts or lists of messages. So are responses: a text, the assistant's message, or the
whole conversation; the common beginning of two conversations is then the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from posttrain.engine.errors import ConfigError
from posttrain.engine.fingerprint import file_digest
from posttrain.engine.hashes import HashFile
from posttrain.rewards.spec import NodeParts
from posttrain.suites.own_data import (
    Counts,
    Made,
    Message,
    Row,
    asked_for,
    build_table,
    cell,
    conversation,
    lengths,
    named_row,
    number,
    read_all,
    response,
    table_node,
)
from posttrain.suites.tables import Location

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
    """A system message before every prompt that has none."""
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
        given = {
            form: [column for column in columns if getattr(self, column) is not None]
            for form, columns in FORMS.items()
        }
        found = [form for form, columns in given.items() if columns]
        where = f"preferences in {self.data}"
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


def preferences_node(
    source: Preferences, name: str, base_dir: Path, hash_file: HashFile = file_digest
) -> NodeParts:
    """The parts of the graph node of kind "preferences"; every row of a local table is checked."""
    where = f"preferences {name}"
    return table_node(source, name, base_dir, where=where, make=_make, hash_file=hash_file)


def build_preferences(
    config: Mapping[str, Any], runtime: Mapping[str, Any], out: Path, data: Mapping[str, str]
) -> Counts:
    """Write pairs.jsonl into `out`; the others are the parts of `preferences_node`.

    Returns rows (pairs, or single responses), read (rows of the table), duplicates (rows that
    repeat others), prompts, contradictions (pairs of responses that are preferred both ways, or
    responses with both labels), desirable (of single responses), and characters of the responses.
    """
    where = f"preferences {config['name']}"
    return build_table("pairs.jsonl", config, runtime, out, data, where=where, make=_make)


def _make(config: Mapping[str, Any], location: Location, *, where: str) -> Made:
    read = {"pairs": _pair, "rankings": _ranking, "single": _single}[form_of(config)]
    rows, num_read, duplicates = read_all(
        location, lambda record, place: read(config, record, place), where=where
    )
    counts: Counts = {"rows": len(rows), "read": num_read, "duplicates": duplicates}
    counts["prompts"] = len({row["id"] for row in rows})
    if form_of(config) == "single":
        said = {(row["id"], row["response"], row["desirable"]) for row in rows}
        both = {(id_, text) for id_, text, good in said if good and (id_, text, False) in said}
        counts["contradictions"] = len(both)
        counts["desirable"] = sum(row["desirable"] for row in rows)
        return rows, counts | lengths(row["response"] for row in rows)
    pairs = {(row["id"], row["chosen"], row["rejected"]) for row in rows}
    both_ways = sum((id_, other, one) in pairs for id_, one, other in pairs)
    counts["contradictions"] = both_ways // 2
    return rows, counts | lengths(row[side] for row in rows for side in ("chosen", "rejected"))


def _pair(config: Mapping[str, Any], record: Mapping[str, Any], place: str) -> list[Row]:
    """The one pair of a row."""
    before: dict[str, list[Message]] = {}
    texts: dict[str, str] = {}
    for side in ("chosen", "rejected"):
        column = config.get(side, side)
        value = cell(record, side, column, place)
        before[side], texts[side] = response(value, f"{place}: column {column!r}")
    if before["chosen"] != before["rejected"]:
        raise ConfigError(f"{place}: {_parting(before['chosen'], before['rejected'])}")
    row = _row(config, record, before["chosen"], place)
    if texts["chosen"] == texts["rejected"]:
        raise ConfigError(
            f"{place}: the chosen and the rejected response are the same text, so that nothing is "
            "preferred; leave the row out"
        )
    return [row | texts | _how_much(config, record, place)]


def _how_much(config: Mapping[str, Any], record: Mapping[str, Any], place: str) -> Row:
    """The margin and the strength of a pair, where the table has them."""

    def value(field: str) -> float:
        column = config[field]
        return number(cell(record, field, column, place), f"{place}: column {column!r}")

    found: Row = {}
    if "margin" in config:
        found["margin"] = value("margin")
        if found["margin"] < 0:
            raise ConfigError(
                f"{place}: column {config['margin']!r} is {found['margin']:g}; a margin says how "
                "much better the chosen response is: 0 or more"
            )
    if "chosen_score" in config:
        better, worse = value("chosen_score"), value("rejected_score")
        if better < worse:
            raise ConfigError(
                f"{place}: the chosen response has the lower score, {better:g} against {worse:g}; "
                "swap the two, or leave the row out"
            )
        found["margin"] = better - worse
    if "strength" in config:
        found["strength"] = value("strength")
        if found["strength"] not in (1, 2, 3, 4):
            raise ConfigError(
                f"{place}: column {config['strength']!r} is {found['strength']:g}; a strength is "
                "1, 2, 3 or 4, from slightly to much better"
            )
        found["strength"] = int(found["strength"])
    return found


def _ranking(config: Mapping[str, Any], record: Mapping[str, Any], place: str) -> list[Row]:
    """All pairs of a row's responses of which one is strictly better."""
    texts = _list(config, record, "responses", place)
    at = f"{place}: column {config['responses']!r}"
    said = [response(value, f"{at}, response {i}") for i, value in enumerate(texts, start=1)]
    if len(said) < 2:
        raise ConfigError(f"{at} holds {len(said)} response; a ranking has two or more")
    scores = [float(-place_) for place_ in range(len(said))]
    if "scores" in config:
        values = _list(config, record, "scores", place)
        if len(values) != len(said):
            raise ConfigError(
                f"{place}: {len(said)} responses and {len(values)} scores; every response has one"
            )
        scores = [number(value, f"{place}: column {config['scores']!r}") for value in values]
    for before, _ in said[1:]:
        if before != said[0][0]:
            raise ConfigError(f"{place}: {_parting(said[0][0], before)}")
    row = _row(config, record, said[0][0], place)
    pairs = []
    for one, other in combinations(range(len(said)), 2):
        if scores[one] == scores[other]:
            continue
        better, worse = (one, other) if scores[one] > scores[other] else (other, one)
        if said[one][1] == said[other][1]:
            raise ConfigError(
                f"{place}: responses {one + 1} and {other + 1} are the same text, and one is "
                "ranked above the other; leave one of them out"
            )
        pair = row | {"chosen": said[better][1], "rejected": said[worse][1]}
        pairs.append(pair | _margin(config, scores[better] - scores[worse]))
    return pairs


def _margin(config: Mapping[str, Any], margin: float) -> Row:
    return {"margin": margin} if "scores" in config else {}


def _list(config: Mapping[str, Any], record: Mapping[str, Any], field: str, place: str) -> Any:
    column = config[field]
    value = cell(record, field, column, place)
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ConfigError(
            f"{place}: column {column!r} holds {str(value)[:60]!r} ({type(value).__name__}); "
            f"{field} of a ranking are a list"
        )
    return value


def _single(config: Mapping[str, Any], record: Mapping[str, Any], place: str) -> list[Row]:
    """A response by itself, and whether it is desirable."""
    column = config.get("response", "response")
    at = f"{place}: column {column!r}"
    before, said = response(cell(record, "response", column, place), at)
    row = _row(config, record, before, place)
    column = config.get("label", "label")
    label = cell(record, "label", column, place)
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    good = LABELS.get(str(label).strip().lower())
    if good is None:
        raise ConfigError(
            f"{place}: column {column!r} holds {str(label)[:60]!r}; a label is true or false, 1 or "
            "0, or a thumb, up or down"
        )
    return [row | {"response": said, "desirable": good}]


def _row(
    config: Mapping[str, Any], record: Mapping[str, Any], before: list[Message], place: str
) -> Row:
    """The beginning of a row: its prompt, of a column or what stands before the response."""
    column = config.get("prompt", "prompt")
    if not before or "prompt" in config:
        prompt = cell(record, "prompt", column, place)
        at = f"{place}: column {column!r}"
    if before:
        if "prompt" in config and not _is_prompt(prompt, before, at):
            raise ConfigError(
                f"{at} is not what the conversation begins with; leave prompt out, and the "
                "beginning of the conversation is the prompt"
            )
        prompt, at = before, f"{place}: the conversation before the response"
    return named_row(config["name"], asked_for(prompt, config.get("system"), at))


def _is_prompt(prompt: Any, before: list[Message], place: str) -> bool:
    """Whether the prompt of a column is what a conversation says before its response."""
    given = conversation(prompt, place)
    if given is not None:
        return given in (before, [message for message in before if message["role"] != "system"])
    said = [message.get("content") for message in before if message["role"] == "user"]
    return str(prompt).strip() in [str(text).strip() for text in said]


def _parting(one: list[Message], other: list[Message]) -> str:
    """Why two conversations are not two responses to one prompt."""
    if not one or not other:
        return (
            "one response is a whole conversation and the other only a response; give both in one "
            "form"
        )
    same = 0
    while same < min(len(one), len(other)) and one[same] == other[same]:
        same += 1
    return (
        f"its conversations part at message {same + 1}, before their last one; a pair is two "
        "responses to one prompt, so only the last message may differ; leave the row out"
    )
