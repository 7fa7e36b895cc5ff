"""Text of others, made safe to be shown.

A name in somebody's record, the body of a server's error or the reply of a program may hold
characters that steer a terminal, turn the direction in which it writes, or are not to be seen.
"""

import re
from typing import Final

STEERING: Final = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters; new line and tab stay
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks, embeddings, overrides and isolates
    "\u2028\u2029"  # separators that some programs take for the end of a line
    "\u00ad\u115f\u1160\u17b4\u17b5\u180e\u200b\u2060-\u2065\u206a-\u206f\u3164\ufeff\uffa0"
    "\ufff9-\ufffb\U000e0000-\U000e007f"  # of no width
    "\ud800-\udfff"  # halves of a pair, which no encoding can write
    "]"
    # Joiners have their place between letters of other scripts, and in emoji.
    "|(?<![^\x00-\x7f])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\x7f])"
)
"""What steers a terminal or cannot be seen in it."""


def plain_text(text: str) -> str:
    r"""The text with what steers a terminal written out; all other characters stay.

    >>> print(plain_text("\x1b[31mred"))
    \x1b[31mred
    """
    return STEERING.sub(lambda found: ascii(found[0])[1:-1], text)


def in_markdown(text: str) -> str:
    r"""The text as Markdown shows it, on one line: no tag, no link, no table, no code.

    >>> print(in_markdown("<b>a|b"))
    &lt;b>a\|b
    """
    text = plain_text(" ".join(text.split())).replace("&", "&amp;").replace("<", "&lt;")
    # An underscore within a word means nothing.
    return re.sub(r"([\\`*\[\]|#~]|(?<!\w)_|_(?!\w))", r"\\\1", text)
