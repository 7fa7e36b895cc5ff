"""The plain loops of `examples/`: they run, they learn, and they stay as plain as they promise."""

from __future__ import annotations

import ast
import math
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
FRAMEWORK = ("stages", "recipe", "recipes", "language", "engine", "commands", "report", "suites")


def load(name: str) -> ModuleType:
    spec = spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_grpo_raises_the_reward(capsys: pytest.CaptureFixture[str]) -> None:
    rewards = load("grpo_loop").main(steps=40)
    assert all(map(math.isfinite, rewards))
    assert sum(rewards[-10:]) / 10 > sum(rewards[:10]) / 10 + 0.03
    assert capsys.readouterr().out.count("reward of ten steps") == 5


def test_grpo_takes_a_checkpoint(models: dict[str, str]) -> None:
    rewards = load("grpo_loop").main(models["start"], steps=2)
    assert len(rewards) == 2 and all(0 <= reward <= 1 for reward in rewards)


def test_the_student_nears_its_teachers() -> None:
    scores = load("distill_loop").main(steps=60)
    means = {who: sum(of.values()) / len(of) for who, of in scores.items()}
    assert means["init"] + 0.1 < means["student"] < means["teacher"] + 0.05


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_they_are_short_and_use_no_framework(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    imported = [n.module for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom)]
    rooms = {module.split(".")[1] for module in imported if module and "posttrain." in module}
    assert rooms and not rooms & set(FRAMEWORK)
