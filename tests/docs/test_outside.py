"""The page on the outside world names tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMED = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", (ROOT / "docs/outside.md").read_text())
TESTS = sorted({(file, name) for file, name in NAMED if not file.startswith("benchmarks")})


@pytest.mark.parametrize(("file", "name"), TESTS, ids=[f"{f}::{n}" for f, n in TESTS])
def test_a_named_test_is_there(file: str, name: str) -> None:
    text = (ROOT / "tests" / file.removeprefix("tests/")).read_text(encoding="utf-8")
    assert f"def {name or 'test_'}" in text
