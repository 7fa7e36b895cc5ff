"""Comparing two runs: what is found to differ, and what is not compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import same_bits
from same_bits import compare, show, tensors

NUMBERS: dict[str, Any] = {
    "kind": "rl",
    "weights": {"model.safetensors: w": "aa"},
    "metrics": [{"step": 1, "loss": 0.5}, {"step": 2, "loss": float("nan")}],
    "files": {"rollouts.jsonl": [{"response": "1"}], "config.json": "bb"},
}


def test_the_same_numbers_are_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert not any(compare(NUMBERS, NUMBERS).values())
    assert show({"a": NUMBERS}, {"a": NUMBERS}) == 0
    assert "1 artifacts, 0 differ" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("part", "changed", "told"),
    [
        ("weights", {"model.safetensors: w": "ab"}, "model.safetensors: w differs"),
        ("weights", {}, "w is only there before"),
        ("metrics", [{"step": 1, "loss": 0.25}], "line 1, loss: 0.5 before, 0.25 after"),
        ("metrics", [{"step": 1, "loss": 0.5}], "2 lines before, 1 after"),
        ("metrics", [{"other": 1}, {"other": 2}], "line 1: no field in common"),
        ("files", NUMBERS["files"] | {"config.json": "bc"}, "config.json differs"),
        (
            "files",
            NUMBERS["files"] | {"rollouts.jsonl": [{"response": "2"}]},
            'rollouts.jsonl line 1, response: "1" before, "2" after',
        ),
    ],
)
def test_each_difference_is_found(
    part: str, changed: Any, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    after = NUMBERS | {part: changed}
    found = compare(NUMBERS, after)
    assert told in found[part]
    assert [name for name in ("weights", "metrics", "files") if found[name]] == [part]
    assert show({"a": NUMBERS}, {"a": after}) == 1
    assert told in capsys.readouterr().out


def test_what_failed_or_is_missing_differs() -> None:
    failed = {"kind": "rl", "error": "no such option"}
    assert compare(NUMBERS, failed)["weights"] == "after failed: no such option"
    assert show({"a": failed}, {"a": failed}) == 1
    assert show({"a": NUMBERS}, {}) == 1
    assert show({}, {}) == 1


def test_a_field_of_one_side_is_told_and_a_renamed_one_is_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    after = NUMBERS | {"metrics": [{"step": 1, "mean": 0.5}, {"step": 2, "mean": 0.75}]}
    found = compare(NUMBERS, after)
    assert not found["metrics"] and found["only"] == "only before: loss; only after: mean"
    monkeypatch.setattr(same_bits, "RENAMED", {"loss": "mean"})
    assert compare(NUMBERS, after)["metrics"] == "line 2, mean: NaN before, 0.75 after"


def test_a_tensor_is_known_by_its_bytes(tmp_path: Path) -> None:
    one = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([0.0])}
    save_file(one, tmp_path / "one", metadata={"made": "here"})
    save_file(one | {"b": torch.tensor([-0.0])}, tmp_path / "other")
    first, second = tensors(tmp_path / "one"), tensors(tmp_path / "other")
    assert first.keys() == second.keys() == {"a", "b"}
    assert first["a"] == second["a"] and first["b"] != second["b"]
