"""The speed table of the README is what the benchmark measured last."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_ratio_of_the_readme_is_the_latest() -> None:
    rows = json.loads((ROOT / "benchmarks/results/latest.json").read_text())
    known = {f"{row['ratio']:.1f}" for row in rows if row["ratio"] is not None}
    text = (ROOT / "README.md").read_text()
    table = text.split("<!-- SPEED: benchmarks/results/latest.json -->")[1].split("\n\n")[0]
    shown = re.findall(r"\| (\d+\.\d) (?=\|)", table)
    assert len(shown) == 12 and set(shown) <= known
