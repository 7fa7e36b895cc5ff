"""Whether two tokenizers mean the same by every token id: a digest of all that decides it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

IGNORED = ("post_processor", "truncation", "padding")
"""Parts of a tokenizer that decide neither which ids a text has nor which text ids have: a response
is encoded without the tokens that a post-processor adds, and no tokenizer cuts or pads it."""


def tokens_digest(tokenizer: Any) -> str:
    """The first 16 hex digits of a SHA-256 over what turns text into ids and back: vocabulary,
    merges, normaliser, pre-tokenizer, decoder and added tokens.

    The chat template, the special tokens' names and the stop tokens have no part in it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        parts = json.loads(backend.to_str())
        facts: Any = {name: part for name, part in parts.items() if name not in IGNORED}
    else:
        # One in Python: its class has the rules, its vocabulary what they are applied to.
        facts = [
            type(tokenizer).__name__,
            sorted(tokenizer.get_vocab().items()),
            sorted(tokenizer.get_added_vocab().items()),
        ]
    text = json.dumps(facts, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
