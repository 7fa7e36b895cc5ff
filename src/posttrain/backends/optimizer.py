"""AdamW over the weights that learn, in one of two ways, with moments in float32 or in 8 bits.

`FullPrecision`: the weights are float32. Where the model computes in bfloat16, a copy of them does.

`StochasticRounding`: there are bfloat16 weights and no others. A step computes the new number in
float32 and rounds it up or down at random, with the nearer neighbour the likelier one, so that the
expected weight is the exact one. Rounding to the nearest would lose every update that is smaller
than half of the distance between two bfloat16 numbers, which most are at usual learning rates
("Stochastic rounding for LLM training", arXiv 2502.20566). What is drawn follows from the stage's
seed and the number of the step, so a resumed stage has the same bits.

Moments in 8 bits are those of bitsandbytes: numbers of one byte with a scale for each block of 256
(Dettmers et al., arXiv 2110.02861).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from posttrain.backends.base import LearnerSettings
from posttrain.engine.errors import ConfigError
from posttrain.rl.seeds import named_seed

SHARED = ("qmap1", "qmap2")
"""Tables of 8-bit numbers, the same for every weight and every step: no part of the state."""
STEPS = "rounding.steps"


def make_optimizer(
    weights: Sequence[Parameter], settings: LearnerSettings
) -> FullPrecision | StochasticRounding:
    """The optimiser that the settings ask for. Raises ConfigError without the library it needs."""
    make = FullPrecision if settings.master == "float32" else StochasticRounding
    return make(weights, settings)


def _adamw(parameters: Sequence[Parameter], settings: LearnerSettings) -> torch.optim.Optimizer:
    # Every step brings its own learning rate.
    how: dict[str, Any] = {
        "lr": 0.0,
        "betas": settings.betas,
        "weight_decay": settings.weight_decay,
    }
    if settings.states == "float32":
        return torch.optim.AdamW(parameters, fused=True, **how)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            "optimizer.states = 'int8' needs bitsandbytes, which is not installed; "
            "pip install 'posttrain[optim8]', or leave the moments in float32"
        ) from error
    found: torch.optim.Optimizer = AdamW8bit(parameters, **how)
    return found


class FullPrecision:
    """AdamW on float32 weights."""

    def __init__(self, weights: Sequence[Parameter], settings: LearnerSettings) -> None:
        self.parameters = list(weights)
        """Whose `grad` holds the gradients: the weights themselves."""
        self.adamw = _adamw(self.parameters, settings)

    def set_weight_decay(self, weight_decay: float) -> None:
        """For the steps that follow."""
        _set([self.adamw], weight_decay=weight_decay)

    def step(self, lr: float) -> None:
        """Change the weights by their gradients, and drop these."""
        _set([self.adamw], lr=lr)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """The moments by name; of no weight that had no gradient yet."""
        return _named([self.adamw.state.get(p, {}) for p in self.parameters])

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave, among other tensors."""
        for position, names in _moments(tensors).items():
            _put_back(self.adamw, self.parameters[position], names, tensors)

    def release(self) -> None:
        """Give the memory of the moments back. There is no step afterwards."""
        self.adamw.state.clear()


class StochasticRounding:
    """AdamW on weights in bfloat16, each of which is in float32 while it is changed."""

    def __init__(self, weights: Sequence[Parameter], settings: LearnerSettings) -> None:
        self.weights, self.seed, self.steps = list(weights), settings.seed, 0
        self.parameters = [Parameter(_nothing_like(weight)) for weight in self.weights]
        """Whose `grad` holds the gradients, in float32. They stand in for the weights and have no
        numbers of their own but during a step."""
        # One each, so that one weight at a time is in float32.
        self.adamws = [_adamw([parameter], settings) for parameter in self.parameters]

    def set_weight_decay(self, weight_decay: float) -> None:
        """For the steps that follow."""
        _set(self.adamws, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Change the weights by their gradients, and drop these."""
        _set(self.adamws, lr=lr)
        generator = torch.Generator(self.weights[0].device)
        generator.manual_seed(named_seed("rounding", self.seed, self.steps))
        self.steps += 1
        for weight, parameter, adamw in zip(
            self.weights, self.parameters, self.adamws, strict=True
        ):
            if parameter.grad is None:
                continue
            parameter.data = weight.float()
            adamw.step()
            parameter.grad = None
            round_into(weight, parameter.data, generator)
            parameter.data = _nothing_like(weight)

    def state(self) -> dict[str, Tensor]:
        """The moments by name, and how many steps there were."""
        states = [
            adamw.state.get(parameter, {})
            for adamw, parameter in zip(self.adamws, self.parameters, strict=True)
        ]
        return _named(states) | {STEPS: torch.tensor(self.steps)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave, among other tensors."""
        self.steps = int(tensors[STEPS])
        for position, names in _moments(tensors).items():
            _put_back(self.adamws[position], self.parameters[position], names, tensors)

    def release(self) -> None:
        """Give the memory of the moments back. There is no step afterwards."""
        for adamw in self.adamws:
            adamw.state.clear()


def round_into(weight: Tensor, exact: Tensor, generator: torch.Generator) -> None:
    """Round the float32 numbers `exact` to the bfloat16 tensor `weight`, up or down at random.

    The expected result is the exact number. `exact` is used up.
    """
    bits = exact.view(torch.int32)
    # A bfloat16 number is the upper half of a float32 one. A random lower half that is added
    # carries into the upper one as often as the lower half is large.
    bits += torch.randint(
        2**16, bits.shape, generator=generator, dtype=torch.int32, device=bits.device
    )
    bits &= -(2**16)
    weight.copy_(exact)


def _nothing_like(weight: Tensor) -> Tensor:
    """A float32 tensor of that shape which is one number in memory."""
    return torch.zeros((), device=weight.device).expand(weight.shape)


def _set(optimizers: Iterable[torch.optim.Optimizer], **values: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.update(values)


def _named(states: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """`optimizer.POSITION.NAME` of every number that a step changes."""
    return {
        # The count of steps is a plain number in bitsandbytes.
        f"optimizer.{position}.{name}": torch.as_tensor(value)
        for position, state in enumerate(states)
        for name, value in state.items()
        if name not in SHARED
    }


def _moments(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, str]]:
    """By position of a weight, each of its moments to its name in `tensors`."""
    found: dict[int, dict[str, str]] = {}
    for name in tensors:
        kind, position, *rest = name.split(".")
        if kind == "optimizer":
            found.setdefault(int(position), {})[rest[0]] = name
    return found


def _put_back(
    adamw: Any, parameter: Parameter, names: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> None:
    # Clones, because a step changes them in place.
    state = {name: tensors[key].clone().to(parameter.device) for name, key in names.items()}
    adamw.state[parameter] = state
    if "state1" not in state:
        return
    state["step"] = int(state["step"])
    if state["state1"].dtype == torch.uint8:
        if "dynamic" not in adamw.name2qmap:
            adamw.fill_qmap()
        for table, name in zip(SHARED, ("dynamic", "udynamic"), strict=True):
            state[table] = adamw.name2qmap[name].to(parameter.device)
