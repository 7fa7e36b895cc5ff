"""The style sheet: legible colours in both modes; and what importing the page costs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.report import html


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.1)."""
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", [0, 1])
def test_colours_have_contrast_in_light_and_dark(mode: int):
    """4.5 for text and 3 for lines of plots, WCAG 2.1 AA."""
    css = (Path(html.__file__).parent / "report.css").read_text(encoding="utf-8")
    block = re.findall(r":root \{(.*?)\}", css, flags=re.DOTALL)[mode]
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
    for name in ("ink", "muted", "accent", "good", "bad", "warn"):
        for ground in ("bg", "soft"):
            assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
    for number in range(1, 9):
        assert contrast(colours[f"c{number}"], colours["bg"]) >= 3, number


def test_importing_the_page_needs_neither_torch_nor_numpy():
    code = (
        "import sys, posttrain.report.html, posttrain.report.live, posttrain.report.card; "
        "print([m for m in ('torch', 'transformers', 'numpy', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=None
    )
    assert done.stdout.strip() == "[]"
