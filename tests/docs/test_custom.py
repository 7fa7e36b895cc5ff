"""The function of one's own that the documentation shows, in a stage that runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.algorithms import custom
from posttrain.engine.store import Store
from posttrain.language.loader import load_recipe
from posttrain.stages.config import build_config

PAGE = Path(__file__).resolve().parents[2] / "docs/language.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
LOSS = next(block for block in BLOCKS if block.startswith("# loss.py"))
SETTINGS: dict[str, Any] = {
    "steps": 3,
    "prompts_per_step": 6,
    "group_size": 4,
    "max_new_tokens": 6,
    "lr": 0.05,
    "warmup_steps": 0,
    "num_minibatches": 2,
}


@pytest.fixture
def rl(
    run_stage: Callable[..., Any],
    models: Mapping[str, str],
    domains: Mapping[str, str],
    tmp_path: Path,
) -> Callable[..., Any]:
    """An rl stage; `loss.py` is the file that is shown."""
    (tmp_path / "loss.py").write_text(LOSS)
    return lambda **more: run_stage("rl", SETTINGS | more, {"start": models["start"], **domains})


def test_the_surrogate_that_is_shown_trains(
    rl: Callable[..., Any], same: Any, tmp_path: Path
) -> None:
    assert len(LOSS.splitlines()) <= 15
    soft = rl(surrogate=custom(f"{tmp_path}/loss.py:sapo", down=1.1))
    assert not same(soft, rl())
    # sigmoid(0) * 4 / temperature = 2 / temperature at the policy that sampled.
    assert 1.5 < soft.lines[0]["gate"] < 2.1


def test_it_is_the_plain_policy_gradient_before_the_first_update(tmp_path: Path) -> None:
    (tmp_path / "loss.py").write_text(LOSS)
    function = custom(f"{tmp_path}/loss.py:sapo").implementation()
    logp_N = torch.tensor([-0.5, -1.0, -2.0], requires_grad=True)
    weight_N, advantage_N = torch.tensor([1.0, 0.5, 1.0]), torch.tensor([1.0, 1.0, -2.0])
    constants = (logp_N.detach(), advantage_N, weight_N, torch.tensor([0, 0, 1]))
    total, metrics = function(logp_N, *constants, num_rows=2, correction_N=torch.ones(3))
    total.backward()
    assert logp_N.grad is not None
    assert torch.allclose(logp_N.grad, -weight_N * advantage_N)
    assert float(metrics["gate"]) == pytest.approx(2 + 2 + 2 / 1.05)


def test_the_recipe_that_is_shown_plans(tmp_path: Path) -> None:
    (tmp_path / "loss.py").write_text(LOSS)
    recipe = tmp_path / "recipe.py"
    recipe.write_text(next(block for block in BLOCKS if "loss.py:sapo" in block))
    store = Store(tmp_path / "store")
    node = load_recipe(str(recipe), store=store).graph.nodes["rl"]
    assert node.config["surrogate"]["settings"] == {"down": 1.1}
    # Its text is its identity, and what the stage runs.
    assert node.identity is not None and node.identity["surrogate"]["source"] == LOSS
    built: Any = build_config("rl", "rl", node.config)
    assert built.surrogate.implementation().__name__ == "sapo"
    (tmp_path / "loss.py").write_text(LOSS.replace("* 4", "* 5"))
    assert load_recipe(str(recipe), store=store).graph.nodes["rl"].identity != node.identity
