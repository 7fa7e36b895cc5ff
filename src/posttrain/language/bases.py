"""Models that a recipe can start from without any download."""

from __future__ import annotations

from typing import Any

TINY: dict[str, dict[str, Any]] = {
    "tiny": {"steps": 350, "lr": 4e-3, "loss_on": "response"},
    "mini": {
        "steps": 350,
        "lr": 4e-3,
        "loss_on": "response",
        "hidden_size": 48,
        "num_layers": 2,
        "intermediate_size": 192,
    },
}
"""Size to the settings of its pretraining: about 0.2 and 0.1 million parameters."""
