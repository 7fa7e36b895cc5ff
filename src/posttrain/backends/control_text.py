"""The text of control tokens inside data stays text.

Whatever a message says, `<|end|>` in it is seven characters: it ends no turn, and nobody can speak
for the assistant by writing `<|assistant|>`. Tags of a thinking block, which demonstrations hold,
are tokens wherever they stand, and so are the tags of tool calls that a tokenizer does not call
special.

Texts of control tokens are hidden before a template lays the messages out (`hide`) and encoded
character by character afterwards (`encode`), so that they are told from what the template wrote.
A text without any is encoded as it always was.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.engine.errors import ConfigError

HIDES = chr(0x100000)
"""A character for private use, with which every hidden text begins; hidden itself in data."""
_TAG = re.compile(r"</?\w+>")


class ControlText:
    """Hides the texts of a tokenizer's control tokens, and encodes what holds hidden ones."""

    def __init__(
        self, tokenizer: Any, *, stop_ids: Sequence[int], literal: str, kept: str = ""
    ) -> None:
        """`literal` is the text that stands in the chat template, whose tokens are control tokens
        too; those whose text stands in `kept` are none."""
        self.tokenizer = tokenizer
        added = {int(id): token for id, token in tokenizer.added_tokens_decoder.items()}
        self.ids = {
            token.content: id
            for id, token in added.items()
            if token.content not in kept
            and (
                token.special
                or id in stop_ids
                or (token.content in literal and not _TAG.fullmatch(token.content))
            )
            and token.content.strip()
        }
        """Text of each control token to its id."""
        texts = [HIDES, *sorted(self.ids)]
        self._hidden = {text: HIDES + chr(ord(HIDES) + 1 + n) for n, text in enumerate(texts)}
        self._texts = {hidden: text for text, hidden in self._hidden.items()}
        self._in_data = _any_of(texts)
        self._restored = re.compile(f"{HIDES}.", re.DOTALL)
        tokens = [token.content for token in added.values()]
        self._tokens = re.compile(f"({_any_of(tokens).pattern})") if tokens else None

    def hide(self, value: Any) -> Any:
        """A text with those of control tokens hidden; of messages every text but their roles."""
        if isinstance(value, str):
            return self._in_data.sub(lambda found: self._hidden[found[0]], value)
        if isinstance(value, Mapping):
            return {
                self.hide(key): each if key == "role" else self.hide(each)
                for key, each in value.items()
            }
        return [self.hide(each) for each in value] if isinstance(value, list | tuple) else value

    def encode(self, text: str) -> list[int]:
        """Token ids of a text: control tokens for those that stand in it, characters for hidden
        ones. Raises ConfigError where the tokenizer cannot write these as characters."""
        if HIDES not in text or self._tokens is None:
            return self._encode(text)
        ids: list[int] = []
        written = ""
        # Tokens and what stands between them, which no token spans.
        for part in self._tokens.split(text):
            if HIDES in part:
                ids += self._encode(written)
                ids += self._characters(self._shown(part), first=not ids)
                written = ""
            else:
                written += part
        return ids + self._encode(written)

    def _shown(self, text: str) -> str:
        return self._restored.sub(lambda found: self._texts[found[0]], text)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _characters(self, text: str, *, first: bool) -> list[int]:
        """Token ids of a text in which no token is special."""
        ids = self._plain(text)
        if not first and self.ids:
            # Some tokenizers mark the beginning of a text, which this is not.
            line, both = self._plain("\n"), self._plain("\n" + text)
            begins = self._plain("a") != self._encode(next(iter(self.ids)) + "a")[1:]
            ids = both[len(line) :] if begins and both[: len(line)] == line else ids
        unknown = self.tokenizer.unk_token_id
        wrong = [token for token, id in self.ids.items() if id in ids and id != unknown]
        if wrong:
            raise ConfigError(
                f"the data holds the text {wrong[0]!r}, which this model's tokenizer can write as "
                "its control token only, so it would not stay text; take it out of the data: "
                f"{text[:80]!r}"
            )
        return ids

    def _plain(self, text: str) -> list[int]:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return list(
                self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
            )
        # Its steps without the first, which looks for added tokens.
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        parts = [text]
        if backend.pre_tokenizer is not None:
            parts = [part for part, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for part in parts for token in backend.model.tokenize(part)]


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    """The longest of these texts that stands at a place."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))
