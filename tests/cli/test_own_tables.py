"""plan tells of preferences and tables that are no domain, before anything is computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RECIPE = '''"""Preferences and a table.

Source: the tests of the command line.
"""

from posttrain import Recipe


def recipe(r: Recipe):
    base = r.pretrain(data=r.table("chat"), steps=1)
    s = r.dpo(start=base, data=r.preferences("ranked"), steps=1)
    return r.dpo(start=s, data=r.preferences("more.jsonl"), steps=1, name="second")
'''
SUITE = """
name = "mine"
[preferences.ranked]
data = "ranked.jsonl"
responses = "all"
scores = "points"
[tables.chat]
data = "chat.jsonl"
"""


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_plan_has_a_line_for_each_table(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: Any
) -> None:
    """Longest is prompt, line end and response; of "p\\nbb" and "p\\na" the median is the lower."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(RECIPE)
    (tmp_path / "mine.toml").write_text(SUITE)
    ranked = [{"prompt": "p", "all": ["a", "bb", "c"], "points": [1, 2, 1]}]
    ranked += [{"prompt": "q", "all": ["a", "b"], "points": [3, 3]}]
    write(tmp_path / "ranked.jsonl", ranked)
    write(tmp_path / "chat.jsonl", [{"prompt": "p", "demo": str(i // 2)} for i in range(6)])
    pairs = [{"prompt": "p", "chosen": a, "rejected": b} for a, b in ("ab", "ba")]
    write(tmp_path / "more.jsonl", pairs)
    options = ("own.py", "--suite", "mine.toml", "--store", "store")
    told = {line["domain"]: line for line in cli("plan", *options, "--json").json["data"]}
    nothing = {"further_demos": 0, "validation": 0, "heldout": 0, "unit": "characters"}
    assert told["chat"] == {
        **{"domain": "chat", "kind": "table", "rows": 6, "duplicates": 3, "train": 3},
        **{"prompts": 1, "median": 3, "longest": 3},
        **nothing,
    }
    assert told["ranked"] == {
        **{"domain": "ranked", "kind": "preferences", "rows": 2, "duplicates": 0, "train": 2},
        **{"prompts": 1, "median": 3, "longest": 4, "tied": 1, "contradictions": 0},
        **nothing,
    }
    shown = cli("plan", *options).out
    assert ["ranked", "2", "0", "2", "3", "4", "characters"] in [
        line.split() for line in shown.splitlines()
    ]
    assert "ranked: 1 ranking without a preference" in shown and "more: 1 contradiction" in shown
    # Where the conversations are is told.
    talk = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]
    write(tmp_path / "chat.jsonl", [{"talk": talk}])
    refused = cli("plan", *options)
    assert refused.code == 2 and 'write messages = "talk"' in " ".join(refused.err.split())
    write(tmp_path / "chat.jsonl", [{"prompt": "p", "demo": "a"}])
    # A mistake in a row is a message, and no plan.
    write(tmp_path / "more.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "a"}])
    refused = cli("plan", *options)
    assert refused.code == 2 and "more.jsonl, line 1: " in refused.err
    assert "are the same text" in refused.err and "Traceback" not in refused.err
