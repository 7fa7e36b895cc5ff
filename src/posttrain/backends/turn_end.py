"""What ends an assistant's turn: one decision out of all places that say something about it.

A checkpoint says it up to four times: generation_config.json, config.json, the tokenizer's
end-of-sequence token, and the chat template, which writes a token after an assistant message. They
need not agree: a base model's generation config ends texts, its template ends turns; a generation
config may be older than the template beside it. A response ends at any of these tokens, and the one
that is learned is the template's, because that is what the history of a conversation shows.

Plain data in, so that a plan can ask without torch or transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError

GENERATION, CONFIG = "generation_config.json", "config.json"
TOKENIZER, TEMPLATE = "the tokenizer", "the chat template"

Render = Callable[[Sequence[Mapping[str, str]]], str]
"""The text that a chat template makes of a conversation; raises what a template raises."""

MARKER = "qzxjvwk"
"""Stands for what is said, where nothing in a template is taken for it."""


@dataclass(frozen=True, kw_only=True)
class TurnEnd:
    """The token ids that end a response, and why."""

    ids: tuple[int, ...]
    """The first is the one that is learned. Empty where nothing would ever stop."""
    sources: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """Where each is from."""
    warnings: tuple[str, ...] = ()
    """What was decided where the sources disagree."""


def turn_end(
    *,
    eos: int | None,
    generation: Any,
    config: Any,
    added: Mapping[str, int],
    usable: Callable[[int], bool],
    render: Render | None,
) -> TurnEnd:
    """What ends a turn.

    `eos` is the tokenizer's id, `generation` and `config` the `eos_token_id` of their files (a
    number, a list or None), `added` the added tokens of the tokenizer, `usable` says which ids the
    model has a token and a row for, and `render` is the chat template, None without one.
    """
    special = set(added.values())
    sources: dict[int, list[str]] = {}

    def add(ids: Sequence[int], source: str) -> None:
        for token in ids:
            if usable(token):
                sources.setdefault(token, []).append(source)

    add(_ids(generation), GENERATION)
    # A config has an id by default, which then is an ordinary token's: the generation config knows
    # better where there is one.
    add([i for i in _ids(config) if not sources or i in sources or i in special], CONFIG)
    add(_ids(eos), TOKENIZER)
    text_of = {token: text for text, token in added.items()}
    written = None
    if render is not None:
        declared = {text_of[token] for token in sources if token in text_of}
        text = written_end(render, added, declared)
        written = added[text] if text is not None and usable(added[text]) else None
    order = list(sources)
    if written is not None:
        add([written], TEMPLATE)
        order = [written, *(token for token in order if token != written)]
    return TurnEnd(
        ids=tuple(order),
        sources={token: tuple(sources[token]) for token in order},
        warnings=_warnings(written, sources, text_of, has_generation=generation is not None),
    )


def written_end(render: Render, added: Mapping[str, int], declared: set[str]) -> str | None:
    """The token that a template writes after an assistant message; None where it writes none.

    Some templates end a turn by the token that begins the next message; that is one where it is
    `declared` to end a text. White space before the token does not count.
    """
    asked, said = {"role": "user", "content": "q"}, {"role": "assistant", "content": MARKER}
    # Longest first: of two tokens that begin alike the longer one is meant.
    texts = sorted((text for text in added if text.strip()), key=len, reverse=True)
    for messages, known in (([asked, said], texts), ([asked, said, asked], list(declared))):
        try:
            whole = render(messages)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
            continue
        _, found, after = whole.rpartition(MARKER)
        after = after.lstrip()
        text = next((text for text in known if found and after.startswith(text)), None)
        if text is not None:
            return text
    return None


def _ids(value: Any) -> list[int]:
    """The ids of an `eos_token_id`, which is a number, several or None."""
    found = value if isinstance(value, list | tuple) else [value]
    return [i for i in found if isinstance(i, int) and not isinstance(i, bool)]


def _warnings(
    written: int | None,
    sources: Mapping[int, Sequence[str]],
    text_of: Mapping[int, str],
    *,
    has_generation: bool,
) -> tuple[str, ...]:
    """What is to be told where generation config and template, or tokenizer, disagree."""
    if not has_generation:
        return ()
    late = [token for token, where in sources.items() if GENERATION not in where]
    if not late:
        return ()

    def named(token: int) -> str:
        return f"{text_of[token]} ({token})" if token in text_of else f"id {token}"

    lacking = ", ".join(f"{named(i)}, which ends it by {' and '.join(sources[i])}" for i in late)
    learned = written if written is not None else next(iter(sources))
    others = [named(token) for token in sources if token != learned]
    return (
        f"a turn's end: {GENERATION} does not name {lacking}; responses learn to end with "
        f"{named(learned)}" + (f", and stop at {', '.join(others)}, too" if others else ""),
    )
