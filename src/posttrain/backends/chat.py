"""Text to tokens through the tokenizer's own chat template, and back."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NoReturn

from jinja2 import TemplateError

from posttrain.backends.prompting import CLOSE, OPEN, Asked, Message, asked_key, check_mode
from posttrain.backends.vocabulary import TokenIds, drawable
from posttrain.engine.errors import ConfigError, shortened
from posttrain.rl.batch import Span

SWITCH = "enable_thinking"
"""The template variable that turns thinking on or off, as in Qwen3, GLM 4.5 and SmolLM 3."""

SHOWN = 60
"""Characters of a text in a message."""


class Chat:
    """Encodes prompts and responses the way the checkpoint's chat template lays them out.

    A mode, think or no_think, is the template's `enable_thinking`; without one the template is
    asked as it stands. Encodings are remembered, because stages draw the same problems again and
    again. `checkpoint.chat_of` makes the one of a model.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        stop_ids: tuple[int, ...],
        pad_id: int,
        ids: TokenIds | None = None,
        max_positions: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        """A transformers tokenizer."""
        self.stop_ids = stop_ids
        """Token ids that end a response; the first is the one that is learned."""
        self.pad_id = pad_id
        """The id that fills rows; any id serves, since padding is never attended to."""
        known = set(tokenizer.get_vocab().values())
        self.ids = drawable(known, max(known) + 1) if ids is None else ids
        """The ids that the model may say; without any given those of the tokenizer's tokens."""
        self._unusable = frozenset(token for token in known if token not in self.ids)
        """Ids of the tokenizer that no text may have."""
        self.max_positions = max_positions
        """The longest row, prompt and response, that the model reads; None without a limit."""
        self._prompts: dict[tuple[Any, str | None], list[int]] = {}
        self._responses: dict[tuple[Any, str, str | None], list[int]] = {}
        self._head: tuple[Any, str] = ((), "")
        """The last text up to where the assistant speaks, and what it was made of."""
        self._spans: dict[tuple[Any, str, str | None], list[Span] | None] = {}
        # Some tokenizers mark these as special, and a verifier has to see where the answer begins.
        special, added = set(self.tokenizer.all_special_ids), self.tokenizer.get_added_vocab()
        tags = {added[tag] for tag in (OPEN, CLOSE) if tag in added}
        self._dropped = special - tags if special & tags else None
        # Texts that are one token wherever they stand: nothing beside them changes that.
        self._stops = {text: added[text] for text in added if added[text] in self.stop_ids}

    def fresh(self) -> Chat:
        """The same without the encodings that it remembers, for texts that come only once."""
        return Chat(
            self.tokenizer,
            stop_ids=self.stop_ids,
            pad_id=self.pad_id,
            ids=self.ids,
            max_positions=self.max_positions,
        )

    @property
    def num_ids(self) -> int:
        """All ids that may be drawn are below it."""
        return self.ids.size

    def restrict(self, absent: Collection[int]) -> None:
        """Draw none of these ids any more, and refuse text that has one."""
        self.ids = self.ids.without(absent)
        self._unusable |= frozenset(absent)
        # Encoded before, and so not checked.
        for known in (self._prompts, self._responses, self._spans):
            known.clear()

    def prompt(self, asked: Asked, mode: str | None = None) -> list[int]:
        """Token ids of a user message, or of a conversation, up to where the assistant starts to
        speak.

        Raises ConfigError for a mode where the template knows none, and for a conversation where
        there is no template or it refuses the messages.
        """
        key = (asked_key(asked), mode)
        if key not in self._prompts:
            ids = self._encode(self._opened(asked, mode))
            # A template writes the BOS token itself.
            if self.tokenizer.chat_template is None:
                ids = self._opening() + ids
            self._prompts[key] = ids
        return self._prompts[key]

    def response(self, asked: Asked, text: str, mode: str | None = None) -> list[int]:
        """Token ids of an assistant message, its stop token included.

        In the mode think, `text` is `<think>steps</think>answer`. Raises as `prompt`.
        """
        key = (asked_key(asked), text, mode)
        if key not in self._responses:
            self._responses[key] = self._response(asked, text, mode)
        return self._responses[key]

    def spans(self, asked: Asked, text: str, mode: str | None = None) -> list[Span] | None:
        """The token ids of a whole conversation, where everything that the assistant said counts as
        sampled: each turn from where it starts to speak up to its stop token.

        None where an earlier turn cannot be found in what the template writes. The last turn is as
        `prompt` and `response` give it; of earlier ones it is what the template still shows when
        the last turn begins, which may leave out what was thought. Raises as `prompt`.
        """
        turns = () if isinstance(asked, str) else asked
        if not any(message["role"] == "assistant" for message in turns):
            return [(self.prompt(asked, mode), False), (self.response(asked, text, mode), True)]
        key = (asked_key(asked), text, mode)
        if key not in self._spans:
            head = self._head_spans(turns, mode)
            last = (self.response(asked, text, mode), True)
            self._spans[key] = None if head is None else [*head, last]
        return self._spans[key]

    def begin(self, text: str) -> list[int]:
        """Token ids of the first words of an assistant message, which is still to go on."""
        return self._encode(text) if text else []

    def text(self, ids: Sequence[int]) -> str:
        """The text of any tokens, special ones included."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a response: stop token and special tokens left out, thinking tags kept."""
        if ids and ids[-1] in self.stop_ids:
            # Not every stop token is marked as special in its tokenizer.
            ids = ids[:-1]
        if self._dropped is not None:
            ids = [token for token in ids if token not in self._dropped]
            return str(self.tokenizer.decode(ids, skip_special_tokens=False))
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _response(self, asked: Asked, text: str, mode: str | None) -> list[int]:
        head, whole = self._opened(asked, mode), self._render(asked, text, mode)
        # Some templates render a finished turn differently from an open one (they drop a thinking
        # block, say); then the message itself is the best response text there is.
        body = whole[len(head) :] if whole.startswith(head) else text
        if mode == "think" and CLOSE in text:
            if CLOSE not in body:
                body = text
            if head.rstrip().endswith(OPEN):
                # The prompt has opened the block already.
                body = body.lstrip().removeprefix(OPEN)
        ids = self._encode(body)
        # What a template puts after the stop token, such as a new line, is no part of a response.
        for position, token in enumerate(ids):
            if token in self.stop_ids:
                return ids[: position + 1]
        return [*ids, self.stop_ids[0]]

    def _opened(self, asked: Asked, mode: str | None) -> str:
        """The text of what is asked up to where the assistant speaks, made once for those that ask
        for the same one after another."""
        key = (asked_key(asked), mode)
        if self._head[0] != key:
            self._head = (key, self._render(asked, None, mode))
        return self._head[1]

    def _render(self, asked: Asked, response: str | None, mode: str | None) -> str:
        switch = {} if mode is None else self._switch(mode)
        if self.tokenizer.chat_template is None:
            prompt = self._plain(asked)
            return prompt if response is None else prompt + response
        messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else list(asked)
        if response is not None:
            messages.append({"role": "assistant", "content": response})
        return self._templated(messages, add_generation_prompt=response is None, **switch)

    def _head_spans(self, messages: Sequence[Message], mode: str | None) -> list[Span] | None:
        """The spans of a conversation up to where the assistant speaks next."""
        head = self._opened(messages, mode)
        places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        turns = [self._turn(messages, place, head, mode) for place in places]
        starts = [turn[0] for turn in turns if turn is not None] + [len(head)]
        if len(starts) <= len(places) or starts != sorted(starts):
            return None
        spans: list[Span] = [(self._encode(head[: starts[0]]), False)]
        for number, place in enumerate(places):
            start, end = turns[number] or (0, 0)
            after = head[end : starts[number + 1]]
            stop = next((text for text in self._stops if after.startswith(text)), None)
            if stop is not None:
                said = self._encode(head[start:end])
                rest = self._encode(after.removeprefix(stop))
                spans += [([*said, self._stops[stop]], True), (rest, False)]
                continue
            length = self._turn_length(messages, place, head, (start, end), after, mode)
            ids = self._encode(head[start:end] + after)
            if length is None:
                # The template ends its turns without a stop token.
                said = self._encode(head[start:end])
                spans += [(said, True), (self._encode(after), False)]
            else:
                spans += [(ids[:length], True), (ids[length:], False)]
        return [(ids, sampled) for ids, sampled in spans if ids]

    def _turn_length(
        self,
        messages: Sequence[Message],
        place: int,
        head: str,
        turn: tuple[int, int],
        after: str,
        mode: str | None,
    ) -> int | None:
        """Of the tokens of a turn and of what stands after it, how many there are up to the first
        stop token after the turn; None where none comes before the next message."""
        start, end = turn
        # A stop token in the message itself is not its end.
        within = sum(token in self.stop_ids for token in self._encode(head[start:end]))
        following, _ = self._content(messages, place + 1, head, mode)
        if following is not None:
            after = head[end:following]
        ids = self._encode(head[start:end] + after)
        stops = [position for position, token in enumerate(ids) if token in self.stop_ids]
        return stops[within] + 1 if len(stops) > within else None

    def _turn(
        self, messages: Sequence[Message], place: int, head: str, mode: str | None
    ) -> tuple[int, int] | None:
        """Where in `head` an assistant message stands, from where the assistant starts to speak."""
        start, end = self._content(messages, place, head, mode)
        try:
            asked = self._render(messages[:place], None, mode)
        except ConfigError:
            # Some templates refuse to begin with the assistant.
            asked = None
        if asked is not None and head.startswith(asked):
            start = len(asked)
        return None if start is None or end is None or start > end else (start, end)

    def _content(
        self, messages: Sequence[Message], place: int, head: str, mode: str | None
    ) -> tuple[int | None, int | None]:
        """Where in `head`, which the template makes of the messages, the content of one begins and
        ends; None for what cannot be said.

        Found by what stands before and after a marker in its place, so it may be shown otherwise
        than it was written.
        """
        if place >= len(messages):
            return None, None
        marker = "here"
        while marker in head:
            marker += "x"
        marked = [*messages]
        marked[place] = {**messages[place], "content": marker}
        try:
            before, *rest = self._render(marked, None, mode).split(marker)
        except ConfigError:
            return None, None
        if len(rest) != 1:
            return None, None
        return (
            len(before) if head.startswith(before) else None,
            len(head) - len(rest[0]) if head.endswith(rest[0]) else None,
        )

    def _templated(self, messages: Sequence[Message], **variables: bool) -> str:
        """The text of a conversation. Raises ConfigError where the template refuses it."""
        try:
            return str(
                self.tokenizer.apply_chat_template(list(messages), tokenize=False, **variables)
            )
        except (TemplateError, TypeError) as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise ConfigError(
                f"the model's chat template does not take a conversation of {roles}: {error}; give "
                "it the messages that the template knows, or use a checkpoint whose template "
                "takes these"
            ) from None

    def _plain(self, asked: Asked) -> str:
        """What is asked as a text. Raises ConfigError for a conversation."""
        if isinstance(asked, str):
            return asked
        if len(asked) == 1 and asked[0].get("role") == "user":
            return str(asked[0]["content"])
        roles = ", ".join(str(message.get("role")) for message in asked)
        raise ConfigError(
            f"the tokenizer has no chat template, which says how a conversation ({roles}) is laid "
            "out; use a checkpoint with one (an instruct model, or set chat_template in its "
            "tokenizer_config.json), or data of one user message per row without `system`"
        )

    def _switch(self, mode: str) -> dict[str, bool]:
        """The template variable of a mode. Raises ConfigError where the template has none."""
        mode = check_mode(mode, where="chat template")
        if SWITCH not in str(self.tokenizer.chat_template):
            raise ConfigError(
                f"mode = {mode!r}: the model's "
                + (
                    "tokenizer has no chat template"
                    if self.tokenizer.chat_template is None
                    else f"chat template does not read {SWITCH}"
                )
                + "; take a model that thinks (pretrain: thinking=True), or leave the mode out"
            )
        return {SWITCH: mode == "think"}

    def _opening(self) -> list[int]:
        """The BOS token where the tokenizer itself starts every text with it."""
        first = list(self.tokenizer("")["input_ids"])[:1]
        return first if first == [self.tokenizer.bos_token_id] else []

    def _encode(self, text: str) -> list[int]:
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if self._unusable and not self._unusable.isdisjoint(ids):
            self._refuse(next(token for token in ids if token in self._unusable), text)
        return ids

    def _refuse(self, token: int, text: str) -> NoReturn:
        name = str(self.tokenizer.convert_ids_to_tokens(token))
        place = max(0, text.find(name) - SHOWN // 2)
        raise ConfigError(
            f"the text {shortened(text[place:], SHOWN)!r} has the token {name!r} (id {token}), "
            f"which is none of the {len(self.ids)} tokens that the models of this stage have; "
            "leave it out of the data, or use a checkpoint that has a row for it "
            "(model.resize_token_embeddings(len(tokenizer)))"
        )
