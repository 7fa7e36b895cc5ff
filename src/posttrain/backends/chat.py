"""Text to tokens through the tokenizer's own chat template, and back."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from copy import copy
from functools import cached_property
from typing import Any, NoReturn

from jinja2 import TemplateError

from posttrain.backends.control_text import ControlText
from posttrain.backends.prompting import CLOSE, OPEN, Asked, Message, asked_key, check_mode
from posttrain.backends.template import PLAIN, ChatTemplate, template_text
from posttrain.backends.token_ids import tokens_digest
from posttrain.backends.vocabulary import TokenIds, drawable
from posttrain.engine.errors import ConfigError, shortened
from posttrain.rl.batch import Span

SHOWN = 60
"""Characters of a text in a message."""


class Chat:
    """Encodes prompts and responses the way the checkpoint's chat template lays them out.

    A mode is a variable of the template (`ChatTemplate.variables`); without one the template is
    asked as it stands. What data says is text: that of a control token in it is no token
    (`ControlText`). Encodings are remembered, because stages draw the same problems again and
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
        text = template_text(tokenizer.chat_template)
        self.template = None if text is None else ChatTemplate(text)
        self.marks = PLAIN if self.template is None else self.template.marks
        """How a response marks what is thought."""
        self._forget()
        # Some tokenizers mark these as special, and a verifier has to see where the answer begins.
        added = self.tokenizer.get_added_vocab()
        decoder = tokenizer.added_tokens_decoder
        special = {*tokenizer.all_special_ids, *(i for i in decoder if decoder[i].special)}
        kept = "\n".join((OPEN, CLOSE, self.marks.open, self.marks.close))
        tags = {added[text] for text in added if text in kept}
        self._dropped = special - tags if special & tags else None
        self._control = ControlText(
            tokenizer,
            stop_ids=stop_ids,
            literal="" if self.template is None else self.template.literal,
            kept="\n".join((OPEN, CLOSE, *self.marks.tags)),
        )
        # Texts that are one token wherever they stand: nothing beside them changes that.
        self._stops = {text: added[text] for text in added if added[text] in self.stop_ids}

    @cached_property
    def tokens_digest(self) -> str:
        """What tells whether another model means the same by every token id; see `token_ids.py`."""
        return tokens_digest(self.tokenizer)

    def fresh(self) -> Chat:
        """The same without the encodings that it remembers, for texts that come only once."""
        fresh = copy(self)
        fresh._forget()
        return fresh

    def _forget(self) -> None:
        self._prompts: dict[tuple[Any, str | None], list[int]] = {}
        self._responses: dict[tuple[Any, str, str | None], list[int]] = {}
        self._opens: dict[tuple[Any, str | None], str] = {}
        self._head: tuple[Any, str] = ((), "")
        """The last text up to where the assistant speaks, and what it was made of."""
        self._spans: dict[tuple[Any, str, str | None], list[Span] | None] = {}

    @property
    def num_ids(self) -> int:
        """All ids that may be drawn are below it."""
        return self.ids.size

    def lays_out_as(self, other: Chat) -> bool:
        """Whether both write a conversation in the same way."""
        ours, theirs = (
            (chat.tokenizer.chat_template, chat.tokenizer.bos_token, chat.tokenizer.eos_token)
            for chat in (self, other)
        )
        return ours == theirs

    def restrict(self, absent: Collection[int]) -> None:
        """Draw none of these ids any more. Raises ConfigError where nothing would be left to end a
        response."""
        stop_ids = tuple(token for token in self.stop_ids if token not in absent)
        if not stop_ids:
            ends = ", ".join(repr(self.text([token])) for token in self.stop_ids)
            raise ConfigError(
                f"what ends a response ({ends}) is a token that another model of this stage does "
                "not have, so none would end; use models with the same end of a turn, or name one "
                "more in eos_token_id of the generation_config.json of the stage's start"
            )
        self.ids, self.stop_ids = self.ids.without(absent), stop_ids
        self._forget()

    def refuse(self, unknown: Collection[int]) -> None:
        """Refuse text that has one of these ids: a model that reads it has no token for them."""
        self._unusable |= frozenset(unknown)
        # Encoded before, and so not checked.
        self._forget()

    def prompt(self, asked: Asked, mode: str | None = None) -> list[int]:
        """Token ids of a user message, or of a conversation, up to where the assistant starts to
        speak.

        Raises ConfigError for a mode where the template knows none, for a conversation where there
        is no template or it refuses the messages, and for a prompt without tokens.
        """
        key = (asked_key(asked), mode)
        if key not in self._prompts:
            self._prompts[key] = self.encoded(self.laid_out(asked, mode))
        return self._prompts[key]

    def encoded(self, head: str) -> list[int]:
        """Token ids of the text of a prompt, as `laid_out` gives it."""
        # A template writes the BOS token itself.
        ids = [*(self._opening() if self.template is None else []), *self._encode(head)]
        if not ids:
            why = "its text is empty" if self.template is None else "the chat template writes none"
            raise ConfigError(
                f"a prompt has no tokens: {why}; nothing would say what a response begins with"
            )
        return ids

    def response(self, asked: Asked, text: str, mode: str | None = None) -> list[int]:
        """Token ids of an assistant message, its stop token included.

        A text that thinks is `<think>steps</think>answer`. Where the prompt has opened the block
        already, it is not opened again, and a text without a thought begins by closing it. Raises
        as `prompt`.
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

    def opened(self, asked: Asked, mode: str | None = None) -> str:
        """What the prompt has begun of the response: `<think>` and blanks where the template opens
        the thinking block, else nothing. What is sampled after it is text from there on."""
        key = (asked_key(asked), mode)
        if key not in self._opens:
            begun = self._begun(self.laid_out(asked, mode))
            self._opens[key] = self.marks.told(begun) if begun else ""
        return self._opens[key]

    def opens_thought(self, asked: Asked, mode: str | None = None) -> bool:
        """Whether the prompt ends inside a thinking block."""
        return bool(self.opened(asked, mode))

    def prompt_before(self, asked: Asked, opened: str, mode: str | None = None) -> list[int]:
        """Token ids of the prompt, for a response that another model began behind `opened`: a
        thinking block is open in the one where it is in the other."""
        ours = self.opened(asked, mode)
        if bool(ours) == bool(opened):
            return self.prompt(asked, mode)
        if opened:
            return [*self.prompt(asked, mode), *self.begin(opened)]
        head = self.laid_out(asked, mode)
        return self.encoded(head[: -len(self._begun(head))])

    def continues(self, asked: Asked, ids: Sequence[int], text: str, mode: str | None) -> bool:
        """Whether ids that were sampled can follow this model's prompt in place of `text`: they
        say it, and where a prompt had opened the thinking block for them, this one opens it, too.
        """
        said = self.decode(ids)
        before = text != said
        if before and (not text.endswith(said) or text.removesuffix(said).rstrip() != OPEN):
            return False
        return before == self.opens_thought(asked, mode)

    def begin(self, text: str) -> list[int]:
        """Token ids of the first words of an assistant message, which is still to go on."""
        return self._after("\n", self.marks.said(self._control.hide(text))) if text else []

    def text(self, ids: Sequence[int]) -> str:
        """The text of any tokens, special ones included."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a response: stop token and special tokens left out, thinking tags kept, in
        whatever marks the model has for them."""
        if ids and ids[-1] in self.stop_ids:
            # Not every stop token is marked as special in its tokenizer.
            ids = ids[:-1]
        if self._dropped is not None:
            ids = [token for token in ids if token not in self._dropped]
            return self.marks.told(self.tokenizer.decode(ids, skip_special_tokens=False))
        return self.marks.told(str(self.tokenizer.decode(ids, skip_special_tokens=True)))

    def _response(self, asked: Asked, text: str, mode: str | None) -> list[int]:
        body = self._body(asked, self._control.hide(text), mode)
        ids = self._after(self.laid_out(asked, mode), body)
        # What a template puts after the stop token, such as a new line, is no part of a response.
        for position, token in enumerate(ids):
            if token in self.stop_ids:
                return ids[: position + 1]
        return [*ids, self.stop_ids[0]]

    def _body(self, asked: Asked, text: str, mode: str | None) -> str:
        """The text of a response from where the prompt ends, in the marks of the model."""
        head, marks = self.laid_out(asked, mode), self.marks
        begun, said = self._begun(head), marks.said(text)
        if OPEN in text and CLOSE not in text and (begun or marks.answer):
            # It never ended to think; a template would take the thought for an answer.
            return _without(said, begun)
        whole = self._render(asked, text, mode, hidden=True)
        # Some templates render a finished turn differently from an open one (they drop a thinking
        # block, say); then the message itself is the best response text there is.
        body = whole[len(head) :] if whole.startswith(head) else said
        if CLOSE in text and marks.close not in body:
            thought = said.rpartition(marks.close)[0] + marks.close
            # With a mark of its own the template showed the answer alone.
            answered = marks.answer and body.startswith(marks.answer)
            body = thought + body.removeprefix(marks.answer) if answered else said
        if not begun:
            return body
        body = _without(body, begun)
        # An answer without a thought is not to be taken for one.
        return body if marks.close in body else marks.close + body

    def _begun(self, head: str) -> str:
        """The beginning of a thinking block with which the text of a prompt ends."""
        if not head.rstrip().endswith(self.marks.open):
            return ""
        return head[head.rindex(self.marks.open) :]

    def laid_out(self, asked: Asked, mode: str | None = None) -> str:
        """The text of what is asked up to where the assistant speaks, in which control text that
        data says is hidden; made once for those that ask for the same one after another."""
        key = (asked_key(asked), mode)
        if self._head[0] != key:
            self._head = (key, self._render(asked, None, mode))
        return self._head[1]

    def _render(
        self, asked: Asked, response: str | None, mode: str | None, *, hidden: bool = False
    ) -> str:
        """The text of a conversation; `hidden` says that the response's control text is that."""
        variables = {} if mode is None else self._switch(mode)
        if response is not None and not hidden:
            response = self._control.hide(response)
        if self.template is None:
            prompt: str = self._control.hide(self._plain(asked))
            return prompt if response is None else prompt + response
        shown = self._control.hide(asked)
        messages = [{"role": "user", "content": shown}] if isinstance(asked, str) else shown
        if response is not None:
            messages.append({"role": "assistant", "content": response})
        if not self.marks.plain:
            messages = [self._marked(message) for message in messages]
        return self._templated(messages, add_generation_prompt=response is None, **variables)

    def _marked(self, message: Message) -> Message:
        """An assistant's message with the model's own marks of what was thought, or with the answer
        alone where the template marks that."""
        content = message.get("content")
        if message["role"] != "assistant" or not isinstance(content, str):
            return message
        if self.marks.answer:
            content = content.rpartition(CLOSE)[2]
        return {**message, "content": self.marks.said(content)}

    def _head_spans(self, messages: Sequence[Message], mode: str | None) -> list[Span] | None:
        """The spans of a conversation up to where the assistant speaks next."""
        head = self.laid_out(messages, mode)
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
                said = self._after(head[:start], head[start:end])
                rest = self._after(head[:end] + stop, after.removeprefix(stop))
                spans += [([*said, self._stops[stop]], True), (rest, False)]
                continue
            length = self._turn_length(messages, place, head, (start, end), after, mode)
            ids = self._after(head[:start], head[start:end] + after)
            if length is None:
                # The template ends its turns without a stop token.
                said = self._after(head[:start], head[start:end])
                spans += [(said, True), (self._after(head[:end], after), False)]
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
        said = self._after(head[:start], head[start:end])
        within = sum(token in self.stop_ids for token in said)
        following, _ = self._content(messages, place + 1, head, mode)
        if following is not None:
            after = head[end:following]
        ids = self._after(head[:start], head[start:end] + after)
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
        elif start and head[start - 1] == " ":
            # No prompt ends with a space: it would be no beginning of a word any more.
            start -= 1
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

    def _templated(self, messages: Sequence[Message], **variables: Any) -> str:
        """The text of a conversation. Raises ConfigError where the template refuses it."""
        try:
            if self.template is not None and self.template.reads_clock:
                # transformers would tell it the time, and takes no function in its place.
                special = self.tokenizer.special_tokens_map
                return self.template.render(messages, **{**special, **variables})
            return str(
                self.tokenizer.apply_chat_template(list(messages), tokenize=False, **variables)
            )
        except (TemplateError, TypeError, ValueError, AttributeError, LookupError) as error:
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

    def _switch(self, mode: str) -> dict[str, Any]:
        """The template variables of a mode. Raises ConfigError where the template has none."""
        if self.template is None:
            mode = check_mode(mode, where="chat template")
            raise ConfigError(
                f"mode = {mode!r}: the model's tokenizer has no chat template; take a model that "
                "thinks (pretrain: thinking=True), or leave the mode out"
            )
        return self.template.variables(mode)

    def _opening(self) -> list[int]:
        """The BOS token where the tokenizer itself starts every text with it."""
        first = list(self.tokenizer("")["input_ids"])[:1]
        return first if first == [self.tokenizer.bos_token_id] else []

    def _after(self, before: str, text: str) -> list[int]:
        """Token ids of a text that stands behind another one.

        Some tokenizers mark the beginning of what they are given, as SentencePiece's do with a
        space: Llama 2 would learn two spaces where its turns have one.
        """
        if not self._marks_beginning or not text:
            return self._encode(text)
        # A line where no token of the text before ends with it.
        for start in (before, "\n"):
            first, whole = self._encode(start), self._encode(start + text)
            if whole[: len(first)] == first:
                return whole[len(first) :]
        return self._encode(text)

    @cached_property
    def _marks_beginning(self) -> bool:
        return self._encode("\na") != [*self._encode("\n"), *self._encode("a")]

    def _encode(self, text: str) -> list[int]:
        ids = self._control.encode(text)
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


def _without(body: str, begun: str) -> str:
    """A text without the beginning of the thinking block that the prompt has written already."""
    if not begun or body.startswith(begun):
        return body.removeprefix(begun)
    rest = body.lstrip()
    return rest.removeprefix(begun.rstrip()) if rest.startswith(begun.rstrip()) else body
