"""Text to tokens through the tokenizer's own chat template, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from posttrain.backends.checkpoint import LanguageModel


class Chat:
    """Encodes prompts and responses the way the checkpoint's chat template lays them out.

    Encodings are remembered, because stages draw the same problems again and again.
    """

    def __init__(self, language_model: LanguageModel) -> None:
        self.tokenizer: Any = language_model.tokenizer
        self.stop_ids = language_model.stop_ids
        self._prompts: dict[str, list[int]] = {}
        self._responses: dict[tuple[str, str], list[int]] = {}

    def prompt(self, text: str) -> list[int]:
        """Token ids of a user message up to where the assistant starts to speak."""
        if text not in self._prompts:
            ids = self._encode(self._render(text, None))
            if self.tokenizer.chat_template is None:
                ids = self._opening() + ids
            self._prompts[text] = ids
        return self._prompts[text]

    def response(self, prompt: str, text: str) -> list[int]:
        """Token ids of an assistant message, its stop token included."""
        key = (prompt, text)
        if key not in self._responses:
            self._responses[key] = self._response(prompt, text)
        return self._responses[key]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a response, stop token and other special tokens left out."""
        if ids and ids[-1] in self.stop_ids:
            # Not every stop token is marked as special in its tokenizer.
            ids = ids[:-1]
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _response(self, prompt: str, text: str) -> list[int]:
        head, whole = self._render(prompt, None), self._render(prompt, text)
        # Some templates render a finished turn differently from an open one (they drop a thinking
        # block, say); then the message itself is the best response text there is.
        body = whole[len(head) :] if whole.startswith(head) else text
        ids = self._encode(body)
        for position, token in enumerate(ids):
            if token in self.stop_ids:
                return ids[: position + 1]
        return [*ids, self.stop_ids[0]]

    def _render(self, prompt: str, response: str | None) -> str:
        if self.tokenizer.chat_template is None:
            return prompt if response is None else prompt + response
        messages = [{"role": "user", "content": prompt}]
        if response is not None:
            messages.append({"role": "assistant", "content": response})
        return str(
            self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=response is None
            )
        )

    def _opening(self) -> list[int]:
        """The BOS token where the tokenizer itself starts every text with it."""
        first = list(self.tokenizer("")["input_ids"])[:1]
        return first if first == [self.tokenizer.bos_token_id] else []

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
