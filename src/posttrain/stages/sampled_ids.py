"""Token ids of responses as they were sampled: kept in rows, handed on, and trained on as they are.

Text does not tell which tokens it was sampled as: "1" and "2" may come back as "12", and special
tokens are left out of it. So a row that has a sampled text has its ids as well:

    {"response": "12", "ids": [41, 42, 2], "ids_of": "0c1f...", ...}       rollouts.jsonl
    {"demo": "12", "ids": [41, 42, 2], "ids_of": "0c1f...", ...}           data.jsonl
    {"chosen": "12", "chosen_ids": [...], "chosen_ids_of": "0c1f...",      pairs.jsonl
     "rejected": "3", "rejected_ids": [...], "rejected_ids_of": "0c1f..."}

`ids` is everything after the prompt: a prefix that was put in, what was sampled, and the stop
token, which a response that was cut off does not have. `ids_of` is `Chat.tokens_digest` of the
tokenizer. Whoever learns from the row or scores it takes the ids where its own tokenizer has the
same digest, and encodes the text otherwise (`own_ids`). Whoever changes the text drops them.

A list of numbers is one sampled span. A row with several, such as turns with a tool's answers
between them, can have a list of `[ids, sampled]` in its place, the form of `rl.batch.Span`; until
something writes that, `own_ids` takes flat lists alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from posttrain.backends.chat import Chat
from posttrain.backends.prompting import Asked, asked
from posttrain.stages.context import Context

Row = Mapping[str, Any]

ALONE = ("response", "demo")
"""Fields of a text that is the only sampled one of its row."""


def names(field: str) -> tuple[str, str]:
    """The fields with the ids of a text, and with the digest of their tokenizer."""
    start = "" if field in ALONE else f"{field}_"
    return f"{start}ids", f"{start}ids_of"


def taken(row: Row, field: str, to: str) -> dict[str, Any]:
    """The ids of the text in `field`, under the names that they have for a text in the field
    `to`; nothing where the row has none."""
    old, new = names(field), names(to)
    return {n: row[o] for o, n in zip(old, new, strict=True) if o in row}


def without_ids(row: Row, field: str = "response") -> dict[str, Any]:
    """The row without the ids of a text that is to change."""
    return {name: value for name, value in row.items() if name not in names(field)}


def own_ids(chat: Chat, shown: Asked, row: Row, field: str) -> list[int] | None:
    """The ids of the text in `field` as they were sampled after `shown`, for a model with the
    tokens of `chat`.

    None where there are none, where they are those of another tokenizer or say another text than
    the row, where this model may not say one of them, where the response is whole but ends with a
    token that does not end one for this model, and where only one of the two prompts opens the
    thinking block.
    """
    ids_field, of_field = names(field)
    of, ids = row.get(of_field), row.get(ids_field)
    if of is None or not ids or of != chat.tokens_digest:
        return None
    if row.get("finished", True) and ids[-1] not in chat.stop_ids:
        return None
    if not all(token in chat.ids for token in ids):
        return None
    return list(ids) if chat.continues(shown, ids, row[field], row.get("mode")) else None


def response_ids(chat: Chat, shown: Asked, row: Row, field: str) -> list[int]:
    """The ids of the text in `field`, a response to `shown`: as sampled, or else encoded."""
    ids = own_ids(chat, shown, row, field)
    return chat.response(shown, row[field], row.get("mode")) if ids is None else ids


def tell_encoded_anew(ctx: Context, rows: Iterable[Row], chat: Chat, fields: Sequence[str]) -> None:
    """Warn of responses that have ids which the model that learns cannot take."""
    sampled, anew = 0, 0
    for row in rows:
        for field in fields:
            if row.get(names(field)[1]) is not None and row.get(field) is not None:
                sampled += 1
                anew += own_ids(chat, asked(row), row, field) is None
    if anew:
        ctx.warn(
            f"{anew} of {sampled} sampled responses ({100 * anew / sampled:.0f} %) are encoded "
            "anew from their text: they were sampled with another tokenizer than that of the model "
            "that learns, have a token that it does not have, end with one that ends no response "
            "of it, followed a prompt that thinks where its own does not, or their text was "
            "changed; sample from a model like it to train on the very tokens that were sampled",
            about="sampled ids",
        )


def tell_without_ids(ctx: Context, rows: Sequence[Row]) -> None:
    """Warn of rollouts that were written before rollouts had ids."""
    missing = sum(names("response")[0] not in row for row in rows)
    if missing:
        ctx.warn(
            f"{missing} of {len(rows)} rollouts ({100 * missing / len(rows):.0f} %) have no token "
            "ids: an older version sampled them, and what learns from them encodes their text; "
            "sample again to train on the very tokens that were sampled",
            about="rollouts without ids",
        )
