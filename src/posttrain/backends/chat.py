"""Text to tokens through the tokenizer's own chat template, and back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from posttrain.backends.prompting import CLOSE, OPEN, Asked, Message, check_mode
from posttrain.engine.errors import ConfigError

SWITCH = "enable_thinking"
"""The template variable that turns thinking on or off, as in Qwen3, GLM 4.5 and SmolLM 3."""


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
        num_ids: int,
        max_positions: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        """A transformers tokenizer."""
        self.stop_ids = stop_ids
        """Token ids that end a response; the first is the one that is learned."""
        self.pad_id = pad_id
        """The id that fills rows; any id serves, since padding is never attended to."""
        self.num_ids = num_ids
        """Rows of the output layer (of a model with a score, input embeddings): ids from 0 up to
        this. May be more than the tokenizer has."""
        self.max_positions = max_positions
        """The longest row, prompt and response, that the model reads; None without a limit."""
        self._prompts: dict[tuple[Any, str | None], list[int]] = {}
        self._responses: dict[tuple[Any, str, str | None], list[int]] = {}
        # Some tokenizers mark these as special, and a verifier has to see where the answer begins.
        special, added = set(self.tokenizer.all_special_ids), self.tokenizer.get_added_vocab()
        tags = {added[tag] for tag in (OPEN, CLOSE) if tag in added}
        self._dropped = special - tags if special & tags else None

    def fresh(self) -> Chat:
        """The same without the encodings that it remembers, for texts that come only once."""
        return Chat(
            self.tokenizer,
            stop_ids=self.stop_ids,
            pad_id=self.pad_id,
            num_ids=self.num_ids,
            max_positions=self.max_positions,
        )

    def prompt(self, asked: Asked, mode: str | None = None) -> list[int]:
        """Token ids of a user message, or of a conversation, up to where the assistant starts to
        speak.

        Raises ConfigError for a mode where the template knows none, and for a conversation where
        there is no template or it refuses the messages.
        """
        key = (_key(asked), mode)
        if key not in self._prompts:
            ids = self._encode(self._render(asked, None, mode))
            # A template writes the BOS token itself.
            if self.tokenizer.chat_template is None:
                ids = self._opening() + ids
            self._prompts[key] = ids
        return self._prompts[key]

    def response(self, asked: Asked, text: str, mode: str | None = None) -> list[int]:
        """Token ids of an assistant message, its stop token included.

        In the mode think, `text` is `<think>steps</think>answer`. Raises as `prompt`.
        """
        key = (_key(asked), text, mode)
        if key not in self._responses:
            self._responses[key] = self._response(asked, text, mode)
        return self._responses[key]

    def begin(self, text: str) -> list[int]:
        """Token ids of the first words of an assistant message, which is still to go on."""
        return self._encode(text) if text else []

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
        head, whole = self._render(asked, None, mode), self._render(asked, text, mode)
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

    def _render(self, asked: Asked, response: str | None, mode: str | None) -> str:
        switch = {} if mode is None else self._switch(mode)
        if self.tokenizer.chat_template is None:
            prompt = self._plain(asked)
            return prompt if response is None else prompt + response
        messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else list(asked)
        if response is not None:
            messages.append({"role": "assistant", "content": response})
        return self._templated(messages, add_generation_prompt=response is None, **switch)

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
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _key(asked: Asked) -> Any:
    """What is asked as a key: the text, or the messages in a form that can be hashed."""
    # A tuple, so that no text is taken for a conversation.
    return asked if isinstance(asked, str) else (json.dumps(asked, sort_keys=True, default=str),)


def check_same_tokens(student: Chat, teacher: Chat, name: str, *, role: str = "teacher") -> None:
    """Raise ConfigError unless teacher and student mean the same by every token id.

    Compared are the size of the output layer, the stop tokens, the vocabulary and the chat
    template: a difference in any of them compares the wrong tokens without a sign. `name` and
    `role` are what the message calls the teacher.
    """
    differences: list[tuple[str, Any, Any]] = [
        ("output layer rows", student.num_ids, teacher.num_ids),
        ("stop token ids", sorted(student.stop_ids), sorted(teacher.stop_ids)),
    ]
    ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    if ours != theirs:
        token = min(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
        differences.append((f"id of token {token!r}", ours.get(token), theirs.get(token)))
    template = (student.tokenizer.chat_template, teacher.tokenizer.chat_template)
    differences.append(("chat template", *template))
    for what, mine, other in differences:
        if mine != other:
            raise ConfigError(
                f"{role} {name!r}: its vocabulary differs from the student's: {what} is "
                f"{other!r} there and {mine!r} here; a {role} must come from the same tokenizer, "
                "best from the same checkpoint as the student"
            )
