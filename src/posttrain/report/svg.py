"""From matplotlib's SVG to one that lives inside the page.

Colours are drawn as sentinels and become variables of the page's style sheet, so that a plot
follows dark mode. Fonts become the page's own. Ids get a prefix, because all inline SVGs of a page
share one namespace.
"""

from __future__ import annotations

import re

INK, MUTED, LINE, BACKGROUND, ACCENT = "#010101", "#010102", "#010103", "#010104", "#010105"
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    LINE: "--line",
    BACKGROUND: "--bg",
    ACCENT: "--accent",
}
_SERIES = "#01020"


def series(number: int) -> str:
    """The sentinel of a domain's colour; 0 is the colour of text."""
    return INK if number == 0 else f"{_SERIES}{number}"


DASHES = ((), (4.0, 2.0), (1.0, 1.5), (5.0, 1.5, 1.0, 1.5))
"""Patterns of lines, in line widths; the first is solid."""


def dash_array(number: int, *, width: float = 2.0) -> str:
    """A pattern as the value of stroke-dasharray."""
    return " ".join(f"{part * width:g}" for part in DASHES[number % len(DASHES)]) or "none"


def inline(text: str, *, prefix: str, title: str) -> str:
    """The <svg> element of an SVG file, fit for a page.

    `prefix` has to be unique in the page; `title` is what a screen reader says.
    """
    svg = text[text.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # matplotlib's style sheet would hold for the whole page.
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    for sentinel, variable in _VARIABLES.items():
        svg = svg.replace(sentinel, f"var({variable})")
    svg = re.sub(_SERIES + r"(\d)", r"var(--c\1)", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r"font: (?:[\w ]+ )?([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r' transform="rotate\(-?0 [^"]*"', "", svg)
    # A hundredth of a pixel is more than any screen shows. Texts keep their digits.
    svg = re.sub(r'="[^"]*"', lambda m: re.sub(r"\d+\.\d{3,}", _rounded, m[0]), svg)
    head = re.search(r"<svg[^>]*>", svg)
    assert head is not None
    view = re.search(r'viewBox="[\d. -]+"', head[0])
    assert view is not None
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'{view[0]} role="img" aria-label="{_attribute(title)}">'
    )
    body = re.sub(r"\s*\n\s*", " ", re.sub(r">\s+<", "><", svg[head.end() :]))
    return opening + body.strip()


def _rounded(match: re.Match[str]) -> str:
    return f"{float(match[0]):.2f}".rstrip("0").rstrip(".")


def _attribute(text: str) -> str:
    return (
        text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")
    )
