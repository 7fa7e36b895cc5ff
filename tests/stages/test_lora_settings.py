"""What is said of settings of adapters that are none."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain.engine.errors import ConfigError
from posttrain.stages.config import build_config


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        (
            {"targets": "q_proj"},
            r"'lora.targets': 'q_proj' is no list .* write \[.q_proj.\]",
        ),
        ({"targets": []}, "field 'lora.targets'"),
        ({"rank": 0}, "field 'lora.rank'"),
        ({"rnak": 4}, "'lora.rnak': unknown option; did you mean 'rank'"),
        (8, r"field 'lora': 8 is not allowed; write lora=LoRA\(8\)"),
    ],
    ids=["one name", "no name", "no rank", "misspelt", "a number"],
)
def test_it_is_said_what_to_write(lora: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build_config("sft", "tuned", {"steps": 1, "lora": lora})


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_layers_are_all_or_a_list(targets: Any) -> None:
    made = build_config("sft", "tuned", {"steps": 1, "lora": {"targets": targets}}).to_json()
    assert made["lora"].get("targets", "all-linear") == targets
