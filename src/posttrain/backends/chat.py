"""Text to tokens through the tokenizer's own chat template, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from posttrain.backends.prompting import CLOSE, OPEN, check_mode
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
        self._prompts: dict[tuple[str, str | None], list[int]] = {}
        self._responses: dict[tuple[str, str, str | None], list[int]] = {}
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

    def prompt(self, text: str, mode: str | None = None) -> list[int]:
        """Token ids of a user message up to where the assistant starts to speak.

        Raises ConfigError for a mode where the template knows none.
        """
        key = (text, mode)
        if key not in self._prompts:
            ids = self._encode(self._render(text, None, mode))
            # A template writes the BOS token itself.
            if self.tokenizer.chat_template is None:
                ids = self._opening() + ids
            self._prompts[key] = ids
        return self._prompts[key]

    def response(self, prompt: str, text: str, mode: str | None = None) -> list[int]:
        """Token ids of an assistant message, its stop token included.

        In the mode think, `text` is `<think>steps</think>answer`. Raises as `prompt`.
        """
        key = (prompt, text, mode)
        if key not in self._responses:
            self._responses[key] = self._response(prompt, text, mode)
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

    def _response(self, prompt: str, text: str, mode: str | None) -> list[int]:
        head, whole = self._render(prompt, None, mode), self._render(prompt, text, mode)
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

    def _render(self, prompt: str, response: str | None, mode: str | None) -> str:
        switch = {} if mode is None else self._switch(mode)
        if self.tokenizer.chat_template is None:
            return prompt if response is None else prompt + response
        messages = [{"role": "user", "content": prompt}]
        if response is not None:
            messages.append({"role": "assistant", "content": response})
        return str(
            self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=response is None, **switch
            )
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
