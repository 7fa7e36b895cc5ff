"""Which weights of a model learn, and the average of them over the steps.

Legend: tensors of weights have any shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from posttrain.engine.errors import ConfigError, choices_text


def freeze_others(model: Any, trainable: Sequence[str]) -> None:
    """Only the parameters with a name that matches a glob of `trainable` keep their gradient.

    A parameter that the model uses under two names (an output projection tied to the embedding)
    learns if one of them matches. What has no gradient already does not get one. Raises ConfigError
    for a glob that matches no name.
    """
    names: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for pattern in trainable:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"trainable: {pattern!r} matches no parameter of the model; "
                f"{choices_text(pattern, names, label='parameters')}; a glob like '*.mlp.*' "
                "matches many"
            )
    learning = {
        id(parameter)
        for name, parameter in names.items()
        if any(fnmatchcase(name, pattern) for pattern in trainable)
    }
    for parameter in names.values():
        if id(parameter) not in learning:
            parameter.requires_grad_(False)


class Average:
    """Exponential moving average of weights, which begins with the weights themselves."""

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        """`decay` is the share of the old average that each update keeps, in [0, 1)."""
        self.parameters, self.decay = list(parameters), decay
        # In float32 whatever the weights are: a step is too small a share for less.
        self.averages = [p.detach().to(torch.float32, copy=True) for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Move by `1 - decay` of the way to the newest weights."""
        for mean, parameter in zip(self.averages, self.parameters, strict=True):
            mean.lerp_(parameter.to(mean.dtype), 1.0 - self.decay)

    @torch.no_grad()
    def put_in_place(self) -> None:
        """Make the average the weights."""
        for mean, parameter in zip(self.averages, self.parameters, strict=True):
            parameter.copy_(mean)

    def state(self) -> dict[str, Tensor]:
        """The averages by name, for a step checkpoint."""
        return {f"average.{position}": mean for position, mean in enumerate(self.averages)}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave."""
        for position, mean in enumerate(self.averages):
            mean.copy_(tensors[f"average.{position}"])
