"""One wording for every message about an unknown name: the nearest match, then all choices."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def choices_text(value: str, choices: Iterable[str], *, label: str = "choices") -> str:
    """Returns e.g. `did you mean 'math'? choices: choice, exact, math`.

    The first part is left out where nothing is close. A long list is cut to the 12 closest
    names, so that one typing error does not fill the screen.
    """
    names = sorted(set(choices))
    if not names:
        return f"{label}: none"
    near = difflib.get_close_matches(value, names, n=1, cutoff=0.6)
    shown = names
    rest = ""
    if len(names) > 24:
        shown = difflib.get_close_matches(value, names, n=12, cutoff=0.0)
        rest = f" and {len(names) - len(shown)} more"
    question = f"did you mean {near[0]!r}? " if near else ""
    return f"{question}{label}: {', '.join(shown)}{rest}"
