"""What plan and run tell of the tables that a recipe reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SUITE = """
[domains.chat]
train = "chat.jsonl"
messages = "messages"
verifier = "none"
heldout = 0
validation = 0
[domains.sums]
train = "sums.jsonl"
demo = "demo"
verifier = "exact"
[domains.made]
dataset = "chain_sum"
num_train = 2
num_validation = 2
num_heldout = 2
"""
RECIPE = """
def recipe(r, base=None):
    domains = ["chat", "sums"]
    if base is None:
        start = r.pretrain(data=r.demos(domains), steps=1, batch_size=2, hidden_size=16,
                           num_layers=1, num_heads=1, head_dim=16, intermediate_size=16)
    else:
        start = r.model(base)
    return r.sft(start=start, data=r.demos(domains), steps=1, batch_size=2, name="learned")
"""


@pytest.fixture
def mine(place: Path) -> tuple[str, ...]:
    def talk(n: int, said: str) -> dict[str, Any]:
        messages = [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": said}]
        return {"messages": messages}

    chat = [talk(n, "a" * (n + 1)) for n in range(20)]
    chat += [talk(0, "a"), talk(0, "another"), {"messages": talk(99, "")["messages"][:1]}]
    sums = [{"prompt": f"{n}+1", "answer": str(n + 1), "demo": str(n + 1)} for n in range(80)]
    sums += [{"prompt": " 0+1", "answer": "2", "demo": "2"}]
    for name, rows in {"chat": chat, "sums": sums}.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "own.toml").write_text(SUITE)
    (place / "own.py").write_text(RECIPE)
    return "own.py", "--suite", "own.toml"


CHAT = {
    "domain": "chat",
    "kind": "domain",
    "rows": 23,
    "duplicates": 1,
    "further_demos": 1,
    "train": 21,
    "validation": 0,
    "heldout": 0,
    "no_demo": 1,
    "contradicting": 0,
    "left_out": 0,
    # In characters: prompt, line break and demonstration.
    "longest": len("q19\n") + 20,
    # The eleventh of 4, 4, 5, 6, 7, 8, 9, 10, 10, 11, 12, 13, 15 and on.
    "median": 12,
    "unit": "characters",
}


def test_plan_tells_rows_repeats_splits_and_lengths(
    cli: Callable[..., Any], mine: tuple[str, ...], place: Path
) -> None:
    chat, sums = cli("plan", *mine, "--json").json["data"]
    assert chat == CHAT
    assert (sums["rows"], sums["contradicting"]) == (81, 1)
    assert sums["train"] + sums["validation"] + sums["heldout"] == 81
    # Planning leaves nothing behind.
    assert not (place / "posttrain-store").exists()
    said = cli("plan", *mine).out
    assert f"{CHAT['longest']} characters" in said
    assert "chat: 1 row with an empty demonstration or none\n" in said
    assert "sums: 1 prompt with several answers\n" in said


def test_run_tells_the_same_and_the_artifact_keeps_it(
    cli: Callable[..., Any], mine: tuple[str, ...], place: Path
) -> None:
    # A conversation without a demonstration is told; here every one has it.
    lines = (place / "chat.jsonl").read_text().splitlines()[:-1]
    (place / "chat.jsonl").write_text("\n".join(lines))
    planned = cli("plan", *mine, "--json").json["data"]
    assert cli("run", *mine, "--no-report", "--json").json["data"] == planned
    (record,) = (place / "posttrain-store/artifacts/domain").glob("chat-*/record.json")
    metrics = json.loads(record.read_text())["metrics"]
    assert {name: metrics[name] for name in ("rows", "duplicates", "further_demos")} == {
        "rows": 22,
        "duplicates": 1,
        "further_demos": 1,
    }
    assert "22" in cli("run", *mine, "--no-report").out


def test_lengths_are_tokens_of_the_one_checkpoint(
    cli: Callable[..., Any], mine: tuple[str, ...], place: Path, models: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (place / "posttrain-store").mkdir()
    (place / "posttrain-store/store.json").write_text('{"format": 1}')
    with_base = (*mine, "--set", f"base={models['one']}", "--json")
    (chat, _) = cli("plan", *with_base).json["data"]
    assert chat["unit"] == "tokens"
    # The tokenizer of these models has one token per character, and none for the line break.
    assert chat["longest"] == CHAT["longest"]
    assert {path.name.split("-")[0] for path in (place / "posttrain-store/cache").iterdir()} == {
        "rows",
        "tokens",
    }

    def unread(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the table is read again")

    monkeypatch.setattr("posttrain.suites.checked.read_rows", unread)
    assert cli("plan", *with_base).json["data"][0] == chat


def test_a_tokenizer_that_cannot_encode_leaves_the_lengths_to_characters(
    cli: Callable[..., Any], mine: tuple[str, ...], models: dict[str, str], tmp_path: Path
) -> None:
    """Its unknown token is none of its vocabulary, which it says at the first unknown text."""
    broken = tmp_path / "broken"
    shutil.copytree(models["one"], broken)
    tokenizer = json.loads((broken / "tokenizer.json").read_text())
    tokenizer["model"]["unk_token"] = "nowhere"
    (broken / "tokenizer.json").write_text(json.dumps(tokenizer))
    planned = cli("plan", *mine, "--set", f"base={broken}", "--json")
    assert planned.code == 0 and planned.json["data"][0]["unit"] == "characters"


def test_generated_problems_have_no_line(cli: Callable[..., Any], place: Path) -> None:
    assert cli("plan", "mopd", "--json").json["data"] == []
    assert "repeats" not in cli("plan", "mopd").out
