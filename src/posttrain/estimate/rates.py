"""How fast a machine computes a model of one shape, and where that is remembered.

A calibration measures it once for each shape, type and number of threads (`calibration.py`); what
it found is kept by machine in the user's cache directory, so that no other store asks again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from posttrain.estimate import kept
from posttrain.estimate.shapes import Model


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Seconds of the parts that a stage's work is made of, for models of one shape.

    A forward pass of one layer takes `fixed` seconds however few its tokens are, and as much again
    for each token.
    """

    learn_fixed: float
    learn_token: float
    """Of one layer, forward and backward."""
    score_fixed: float
    score_token: float
    """Of one layer, without gradients."""
    decode_fixed: float
    decode_row: float
    decode_position: float
    """Of one layer while one token of every row is sampled: for each row, and for each position
    that a row has in the cache."""
    head_learn: float
    """Of the output layer and its softmax for a token that is learned."""
    head_pair: float
    """The same for a divergence over two whole vocabularies."""
    head_score: float
    """For a token that is read."""
    draw_fixed: float
    draw_row: float
    """Of the output layer and of drawing a token, for every row."""
    adam: float
    """Of an optimiser step, for each weight."""
    operation: float
    """Of the smallest operation: what a call costs."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What rates are measured for."""

    hidden: int
    heads: int
    key_heads: int
    head_width: int
    inner: int
    vocabulary: int
    precision: str
    threads: int
    device: str

    @classmethod
    def of(cls, model: Model, *, precision: str, threads: int, device: str) -> Setting:
        """That of a model; the number of its layers does not matter."""
        return cls(
            hidden=model.shape.hidden,
            heads=model.heads,
            key_heads=model.key_heads,
            head_width=model.head_width,
            inner=model.shape.intermediate,
            vocabulary=model.shape.vocabulary,
            precision=precision,
            threads=1 if model.is_tiny and device == "cpu" else threads,
            device=device,
        )

    @property
    def key(self) -> str:
        """The same as a text."""
        return "-".join(str(value) for value in asdict(self).values())


def read_rates() -> dict[str, Rates]:
    """Rates by the key of their setting; {} where none were measured on this machine."""
    found = {key: _rates(value) for key, value in kept.read(_file()).items()}
    return {key: rates for key, rates in found.items() if rates is not None}


def keep_rates(rates: Mapping[str, Rates]) -> None:
    """Remember these beside the others."""
    kept.keep(_file(), {key: asdict(value) for key, value in rates.items()})


def _file() -> str:
    return f"rates-{kept.machine()}.json"


def _rates(value: Any) -> Rates | None:
    names = [field.name for field in fields(Rates)]
    if not isinstance(value, Mapping) or set(value) != set(names):
        return None
    numbers = all(isinstance(value[name], int | float) for name in names)
    return Rates(**value) if numbers else None
