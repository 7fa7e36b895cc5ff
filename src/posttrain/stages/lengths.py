"""Rows that are longer than a model has positions, found before the first step of a stage.

    reader = Reader(name="the start", chat=policy.chat)
    problems = fit_prompts(problems, settings, ctx, [reader, *teachers], new_tokens=64)

The rows are those of a stage by domain, the readers all models that will read them. By the setting
`on_long` rows that do not fit are refused (`error`), left out (`drop`) or shortened (`truncate`);
what is left out or shortened is counted and told. Rows that fit stay as they are.

A shortened prompt becomes the `messages` of its row; its "prompt", which verifiers, judges and
people read, stays. Demonstrations and responses are cut when they are encoded (`cut_to`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol

from posttrain.backends.chat import Chat
from posttrain.backends.prompting import Asked, Problem, asked, hinted, learned_part
from posttrain.engine.errors import ConfigError, shortened
from posttrain.rl.batch import Span
from posttrain.stages.context import Context
from posttrain.stages.sampled_ids import names, own_ids, response_ids, tell_encoded_anew

Rows = Mapping[str, Sequence[Problem]]
"""The rows of a stage by domain."""

OTHERWISE = {"error": '"drop" or "truncate"', "drop": '"truncate"', "truncate": '"drop"'}
"""What a stage with a setting of `on_long` could set it to."""
SHOWN = 60
"""Characters of a prompt in a message."""
SHORTENED = ("user", "tool")
"""Whose messages lose their beginning."""


LEARNER = "the model that learns"
"""What a stage that trains one model calls it in messages."""


class OnLong(Protocol):
    """The settings of a stage that reads rows."""

    @property
    def on_long(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A model that will read the rows of a stage."""

    name: str
    """As messages call it, such as "teacher 'math'"."""
    chat: Chat
    """What encodes the rows."""
    positions: int | None = None
    """How many tokens it reads; without a number as many as the model of `chat`."""
    hints: Mapping[str, str] = field(default_factory=dict)
    """Domain to the template of the prompt that it reads in place of a row's own."""
    domains: frozenset[str] | None = None
    """Whose rows it reads; None for all."""
    more: int = 0
    """Tokens that it reads beyond prompt and response."""

    @property
    def limit(self) -> int | None:
        """The tokens of prompt and response that it can read; None without a limit."""
        limit = self.chat.max_positions if self.positions is None else self.positions
        return None if limit is None else limit - self.more

    def reads(self, row: Problem) -> bool:
        """Whether the row is one of its domains."""
        return self.domains is None or row["domain"] in self.domains

    def shown(self, row: Problem) -> Asked:
        """What it reads of a row before the response."""
        hint = self.hints.get(row["domain"])
        return asked(row if hint is None else hinted(row, hint, where=self.name))


def smallest(readers: Sequence[Reader]) -> int | None:
    """The most tokens that all of them can read; None without a limit."""
    return min((reader.limit for reader in readers if reader.limit is not None), default=None)


def cut_to(settings: OnLong, readers: Sequence[Reader]) -> int | None:
    """To how many tokens the rows of a stage are cut; None where none is cut."""
    return smallest(readers) if settings.on_long == "truncate" else None


def cut(response: Sequence[int], prompt: Sequence[int], limit: int | None) -> Sequence[int]:
    """What a row of `limit` tokens has room for of a response to a prompt."""
    return response if limit is None else response[: max(0, limit - len(prompt))]


def fit_prompts(
    rows: Rows,
    settings: OnLong,
    ctx: Context,
    readers: Sequence[Reader],
    *,
    new_tokens: int,
    begun: str = "",
) -> dict[str, list[Problem]]:
    """The rows whose prompts leave room for `new_tokens`, after a response's first words `begun`.

    Raises ConfigError for rows that do not fit, and where `new_tokens` alone would not.
    """
    for reader in readers:
        if reader.limit is not None and new_tokens >= reader.limit:
            raise ConfigError(
                f"stage {ctx.name!r}: max_new_tokens = {new_tokens} leaves no room for a prompt: "
                f"{reader.name} has {reader.limit + reader.more} positions; lower max_new_tokens, "
                "or use a model with more positions (max_position_embeddings in its config.json)"
            )
    return _Fitting(settings, ctx, readers, new_tokens=new_tokens, begun=begun).fit(rows)


def fit_demos(
    rows: Rows, settings: OnLong, ctx: Context, readers: Sequence[Reader], *, loss_on: str = "all"
) -> dict[str, list[Problem]]:
    """The rows whose demonstrations fit behind their prompts. Raises ConfigError for others. Tells
    of sampled ones that the first reader cannot learn as they were sampled."""
    tell_encoded_anew(ctx, chain.from_iterable(rows.values()), readers[0].chat, ["demo"])
    return _Fitting(settings, ctx, readers, loss_on=loss_on).fit(rows)


def fit_responses(
    rows: Rows,
    settings: OnLong,
    ctx: Context,
    readers: Sequence[Reader],
    *,
    fields: Sequence[str],
) -> dict[str, list[Problem]]:
    """The rows each of whose responses, in some of `fields`, fits behind its prompt. Raises
    ConfigError for others. Tells of sampled ones that a model which learns cannot learn as they
    were sampled."""
    if readers and readers[0].name == LEARNER:
        tell_encoded_anew(ctx, chain.from_iterable(rows.values()), readers[0].chat, fields)
    return _Fitting(settings, ctx, readers, fields=fields).fit(rows)


@dataclass(frozen=True, kw_only=True)
class _TooLong:
    """A row that a reader cannot read."""

    domain: str
    row: Problem
    reader: Reader
    tokens: int

    @property
    def excess(self) -> int:
        """How many tokens too many."""
        return 0 if self.reader.limit is None else self.tokens - self.reader.limit


class _Fitting:
    """One look at the rows of a stage."""

    def __init__(
        self,
        settings: OnLong,
        ctx: Context,
        readers: Sequence[Reader],
        *,
        new_tokens: int | None = None,
        begun: str = "",
        loss_on: str | None = None,
        fields: Sequence[str] = (),
    ) -> None:
        """What follows a prompt: `new_tokens` to come, or a demonstration, or one of `fields`."""
        self.on_long, self.ctx = settings.on_long, ctx
        self.readers = list(readers)
        self.new_tokens, self.begun, self.loss_on, self.fields = new_tokens, begun, loss_on, fields
        self._seen: set[tuple[Any, ...]] = set()
        self._overheads = [_overhead(reader.chat) for reader in self.readers]

    def fit(self, rows: Rows) -> dict[str, list[Problem]]:
        """The rows that are left, by domain."""
        found = {
            domain: [self._too_long(domain, row) for row in of_domain]
            for domain, of_domain in rows.items()
        }
        long = [one for of_domain in found.values() for one in of_domain if one is not None]
        if not long:
            return {domain: list(of_domain) for domain, of_domain in rows.items()}
        if self.on_long == "error":
            raise ConfigError(self._refusal(long, sum(map(len, rows.values()))))
        if self.on_long == "drop":
            kept = {
                domain: [
                    row for row, one in zip(rows[domain], found[domain], strict=True) if not one
                ]
                for domain in rows
            }
            empty = next((domain for domain in rows if not kept[domain]), None)
            if empty is not None:
                mine = [one for one in found[empty] if one is not None]
                raise ConfigError(
                    self._refusal(mine, len(rows[empty]))
                    + f'; on_long = "drop" would leave no row of {empty!r}'
                )
        else:
            kept = {
                domain: [
                    row if one is None else self._shortened(one)
                    for row, one in zip(rows[domain], found[domain], strict=True)
                ]
                for domain in rows
            }
        # A row whose end alone is cut stays as it is until it is encoded.
        begun = any(
            old is not new for d in rows for old, new in zip(rows[d], kept[d], strict=False)
        )
        self.ctx.warn(self._told(long, sum(map(len, rows.values())), prompts=begun))
        return kept

    def _too_long(self, domain: str, row: Problem) -> _TooLong | None:
        """The reader that lacks most positions for a row; None where all can read it."""
        worst: _TooLong | None = None
        for reader, overhead in zip(self.readers, self._overheads, strict=True):
            if not reader.reads(row) or self._surely_fits(row, reader, overhead):
                continue
            one = _TooLong(domain=domain, row=row, reader=reader, tokens=self._tokens(row, reader))
            if one.excess > (0 if worst is None else worst.excess):
                worst = one
        return worst

    def _surely_fits(self, row: Problem, reader: Reader, overhead: int) -> bool:
        """Whether a row is so short that it need not be encoded: no token has less than a byte."""
        shown = reader.shown(row)
        if isinstance(shown, str):
            size, count = _most_tokens(shown), 1
        else:
            # One of each form of conversation is encoded, to see that the template takes it.
            keys = (tuple(sorted(message)) for message in shown)
            roles = (reader.name, *(message.get("role") for message in shown), *keys)
            if roles not in self._seen:
                self._seen.add(roles)
                return False
            size, count = _most_tokens(json.dumps(shown, ensure_ascii=False)), len(shown)
        given = [name for name in ("demo", *self.fields) if row.get(name) is not None]
        # What was sampled may have tokens without a text.
        size += sum(max(_most_tokens(row[n]), len(row.get(names(n)[0], ()))) for n in given)
        size += _most_tokens(self.begun)
        limit = math.inf if reader.limit is None else reader.limit
        return size + (count + 1) * overhead + (self.new_tokens or 0) <= limit

    def _tokens(self, row: Problem, reader: Reader) -> int:
        """The tokens of a row as a reader reads it, its longest response included."""
        chat, mode = reader.chat, row.get("mode")
        if self.loss_on is not None:
            return sum(len(ids) for ids, _ in demo_spans(row, chat, loss_on=self.loss_on))
        shown = reader.shown(row)
        length = len(chat.prompt(shown, mode)) + len(chat.begin(self.begun))
        if self.new_tokens is not None:
            return length + self.new_tokens
        return length + max(
            len(response_ids(chat, shown, row, name)) for name in self.fields if name in row
        )

    def _shortened(self, long: _TooLong) -> Problem:
        """The row with less of its prompt, unless cutting the end of the row is enough."""
        row = long.row
        for reader in self.readers:
            if reader.limit is not None and reader.reads(row):
                row = self._for_reader(long, row, reader)
        return row

    def _for_reader(self, long: _TooLong, row: Problem, reader: Reader) -> Problem:
        limit = reader.limit or 0
        if self.loss_on is not None:
            spans = cut_spans(demo_spans(row, reader.chat, loss_on=self.loss_on), limit)
            if any(sampled for _, sampled in spans):
                return row
        room = self._room(row, reader, limit)
        part = learned_part(row) if self.loss_on is not None else None
        # Of a conversation what comes before the response that is learned.
        shown = {**row, "messages": part[0]} if part and not isinstance(part[0], str) else row
        short = shown
        while True:
            prompt = reader.chat.prompt(reader.shown(short), short.get("mode"))
            excess = len(prompt) + room - limit
            if excess <= 0:
                break
            messages = _without_beginning(reader.chat, asked(short), excess)
            if messages is None:
                raise ConfigError(
                    self._refusal([long]) + '; on_long = "truncate" shortens user and tool '
                    "messages, and cannot make it fit by that"
                )
            short = {**short, "messages": messages}
        if short is shown:
            return row
        return short if part is None else {**short, "demo": part[1]}

    def _room(self, row: Problem, reader: Reader, limit: int) -> int:
        """How many positions what follows the prompt is to have: all that are to be sampled; of
        given responses as many as they need, at most half of all, where the prompt must be cut."""
        if self.new_tokens is not None:
            return self.new_tokens + len(reader.chat.begin(self.begun))
        chat, mode = reader.chat, row.get("mode")
        part = learned_part(row) if self.loss_on is not None else None
        if part is not None:
            shown, said = part[0], [_learned_ids(row, chat)]
        else:
            shown = reader.shown(row)
            said = [response_ids(chat, shown, row, name) for name in self.fields if name in row]
        longest = max(map(len, said))
        # One token at least, and the whole prompt where it leaves room for that.
        if len(chat.prompt(shown, mode)) < limit:
            return 1
        return max(1, min(longest, limit // 2))

    def _refusal(self, long: Sequence[_TooLong], num_rows: int | None = None) -> str:
        """Why rows cannot be read, out of `num_rows`; without that number of a single one."""
        worst = max(long, key=lambda one: one.tokens)
        first, reader = long[0], worst.reader
        sampling = self.new_tokens is not None
        lengths = (
            f"the longest prompt has {worst.tokens - (self.new_tokens or 0)} tokens, and "
            f"max_new_tokens = {self.new_tokens}"
            if sampling
            else f"the longest has {worst.tokens} tokens, prompt and response"
        )
        begins = shortened(str(first.row.get("prompt", "")), SHOWN)
        less = "lower max_new_tokens, " if sampling else ""
        which = "it" if num_rows is None else "the first"
        how_many = "a row does" if num_rows is None else f"{len(long)} of {num_rows} rows do"
        return (
            f"stage {self.ctx.name!r}: {how_many} not fit the "
            f"{(reader.limit or 0) + reader.more} positions of {reader.name}: {lengths}; {which} "
            f"is {first.row.get('id')!r} of domain {first.row['domain']!r} (prompt {begins!r}); "
            f"{less}shorten these rows, set on_long = {OTHERWISE[self.on_long]} for the stage, or "
            "use a model with more positions (max_position_embeddings in its config.json, "
            "max_positions of a pretrain stage)"
        )

    def _told(self, long: Sequence[_TooLong], num_rows: int, *, prompts: bool) -> str:
        """What was done to rows; `prompts`: some of them have a shorter prompt now."""
        worst = max(long, key=lambda one: one.tokens)
        reader = worst.reader
        done = (
            "leaves out"
            if self.on_long == "drop"
            else "cuts the beginning of the longest message of"
            if self.new_tokens is not None
            else "cuts the end, or the beginning of a long prompt, of"
            if prompts
            else "cuts the end of"
        )
        domains = ", ".join(sorted({str(one.row["domain"]) for one in long}))
        return (
            f'on_long = "{self.on_long}" {done} {len(long)} of {num_rows} rows ({domains}): with '
            f"up to {worst.tokens} tokens they do not fit the {(reader.limit or 0) + reader.more} "
            f"positions of {reader.name}; a model with more positions"
            + (" or a lower max_new_tokens" if self.new_tokens is not None else "")
            + " takes them whole"
        )


def demo_spans(row: Problem, chat: Chat, *, loss_on: str = "all") -> list[Span]:
    """The tokens of a prompt and its demonstration, and which of them are to be learned.

    The last turn alone where the earlier ones cannot be told from the other text.
    """
    part = learned_part(row)
    assert part is not None, "rows without a demonstration are refused before"
    mode = row.get("mode")
    last = (_learned_ids(row, chat), True)
    spans = chat.spans(*part, mode) if loss_on == "all" else None
    if spans is None:
        return [(chat.prompt(part[0], mode), False), last]
    # Earlier turns are known as text alone.
    return [*spans[:-1], last]


def _learned_ids(row: Problem, chat: Chat) -> list[int]:
    """The ids of the response of `learned_part`: as sampled, or else encoded."""
    part = learned_part(row)
    assert part is not None, "rows without a demonstration are refused before"
    ids = None if row.get("demo") is None else own_ids(chat, part[0], row, "demo")
    return chat.response(*part, row.get("mode")) if ids is None else ids


def cut_spans(spans: Sequence[Span], limit: int) -> list[Span]:
    """The first `limit` tokens."""
    found: list[Span] = []
    for ids, sampled in spans:
        found.append((ids[:limit], sampled))
        limit -= len(found[-1][0])
    return [span for span in found if span[0]]


def _without_beginning(chat: Chat, shown: Asked, excess: int) -> list[dict[str, Any]] | None:
    """The messages with `excess` tokens less, or what it has, of the longest one of a user or a
    tool; None where there is none that could be shorter."""
    messages = [{"role": "user", "content": shown}] if isinstance(shown, str) else list(shown)
    tokens = [
        chat.begin(message["content"])
        if message.get("role") in SHORTENED and isinstance(message.get("content"), str)
        else []
        for message in messages
    ]
    place = max(range(len(messages)), key=lambda place: len(tokens[place]))
    if not tokens[place]:
        return None
    whole = messages[place]["content"]
    # A character may have several tokens, of which a part decodes to a mark.
    rest = chat.text(tokens[place][excess:]).lstrip("\ufffd")
    if not whole.endswith(rest) or len(rest) >= len(whole):
        rest = whole[max(1, excess) :]
    messages[place] = {**messages[place], "content": rest}
    return [dict(message) for message in messages]


def _most_tokens(text: str) -> int:
    """More tokens than a tokenizer can make of a text. Some write characters such as ligatures out
    first, which makes several of one."""
    return len(text) if text.isascii() else 12 * len(text.encode())


def _overhead(chat: Chat) -> int:
    """More tokens than a template writes around one message."""
    return len(chat.prompt("a")) + len(chat.response("a", "a"))
