"""One model out of several by arithmetic on their weights.

Every function works on one tensor of each model, in float32; `merged` goes through the tensors of
whole models, which may be read as they are needed (`TensorFiles`), so that beside the result no
more than one tensor of each model is in memory.

It is the arithmetic of mergekit (arXiv 2403.13257): `average` is its `linear`, the others have its
names, and `normalize` is as its methods have it by default (`ties` divides by the weights that
agree, `task_arithmetic` and DARE do not divide). `scale` is its `lambda`. What differs: where the
weighted differences of all models add up to 0 nothing is added (the sign of 0 is 0, as in the TIES
paper), while mergekit takes the positive side; and DARE draws other random numbers.

Legend: tensors of weights have any shape, the same in all models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from posttrain.backends.outside.headers import weight_files
from posttrain.engine.errors import ConfigError
from posttrain.engine.exact import rounded
from posttrain.rl.seeds import named_seed

How = Literal["average", "task_arithmetic", "ties", "dare_linear", "dare_ties"]


def average(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`sum w_i t_i / sum w_i` (model soups, arXiv 2203.05482). The weights must not add up to 0."""
    return _weighted_sum(tensors, weights) / sum(weights)


def task_arithmetic(
    base: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], *, scale: float = 1.0
) -> Tensor:
    """`base + scale * sum w_i (t_i - base)` (arXiv 2212.04089). A negative weight unlearns."""
    return base + scale * _weighted_sum(_deltas(base, tensors), weights)


def ties(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    density: float,
    scale: float = 1.0,
) -> Tensor:
    """TIES (arXiv 2306.01708, section 3): trim each difference from the base, elect a sign for
    every number, and add `scale` times the weighted mean of the differences that have it.

    Trimming keeps the `density` largest of each tensor (the paper's top k % are of all weights at
    once). `weights` must not be negative.
    """
    trimmed = [trim(delta, density) for delta in _deltas(base, tensors)]
    return base + scale * _agreeing(trimmed, weights, mean=True)


def dare(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    density: float,
    seeds: Sequence[int],
    scale: float = 1.0,
    elect: bool = False,
) -> Tensor:
    """DARE (arXiv 2311.03099, section 3.1): of each difference from the base a random `density`
    stays, divided by `density`, so that its expectation does; then task arithmetic.

    With `elect` a sign is elected as in TIES, and the weighted differences that have it are added
    up, not averaged: where one of two models was dropped, a mean would count the other one twice.
    One seed per model; `weights` must not be negative with `elect`.
    """
    deltas = _deltas(base, tensors)
    dropped = [drop(delta, density, seed) for delta, seed in zip(deltas, seeds, strict=True)]
    if elect:
        return base + scale * _agreeing(dropped, weights, mean=False)
    return base + scale * _weighted_sum(dropped, weights)


def trim(delta: Tensor, density: float) -> Tensor:
    """The `density` numbers of largest size, one at least; the others are 0."""
    flat = delta.flatten()
    count = max(1, rounded(density, flat.numel()))
    if count >= flat.numel():
        return delta
    kept = flat.abs().topk(count, sorted=False).indices
    return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).view_as(delta)


def drop(delta: Tensor, density: float, seed: int) -> Tensor:
    """Each number stays with probability `density`, divided by it; the others are 0."""
    drawn = torch.rand(delta.shape, generator=torch.Generator().manual_seed(seed))
    return delta * (drawn < density) / density


def merged(
    models: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    *,
    how: How,
    base: Mapping[str, Tensor] | None = None,
    density: float = 1.0,
    scale: float = 1.0,
    seed: int = 0,
) -> Iterator[tuple[str, Tensor]]:
    """`(name, tensor)` of the merged model, float32, by name; what is not a float must be equal.

    All models, and `base` where `how` is not `average`, have the same names and shapes. What DARE
    drops follows from (seed, position of the model, name of the tensor), not from any order. Raises
    ConfigError for tensors of integers that differ.
    """
    for name in sorted(models[0]):
        tensors = [model[name] for model in models]
        if not tensors[0].is_floating_point():
            if not all(torch.equal(tensor, tensors[0]) for tensor in tensors[1:]):
                raise ConfigError(
                    f"tensor {name} holds {tensors[0].dtype} and differs between the models; only "
                    "floating-point weights can be merged"
                )
            yield name, tensors[0]
            continue
        tensors = [tensor.float() for tensor in tensors]
        if how == "average":
            yield name, average(tensors, weights)
            continue
        assert base is not None, "the recipe asks for a base"
        start = base[name].float()
        if how == "task_arithmetic":
            yield name, task_arithmetic(start, tensors, weights, scale=scale)
        elif how == "ties":
            yield name, ties(start, tensors, weights, density=density, scale=scale)
        else:
            seeds = [named_seed(seed, position, name) for position in range(len(models))]
            elect = how == "dare_ties"
            rest: dict[str, Any] = {"density": density, "seeds": seeds, "scale": scale}
            yield name, dare(start, tensors, weights, elect=elect, **rest)


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of a checkpoint's safetensors files, each read when it is asked for."""

    def __init__(self, directory: Path, *, tied: Mapping[str, str] | None = None) -> None:
        """`tied` names tensors that the config ties to another one, which is its value.

        Such a tensor is left out, as it says nothing of its own, unless its numbers are others than
        those of what it is tied to: then it is not tied, whatever the config says. Raises
        ConfigError where there are no such files.
        """
        self._file_of: dict[str, Any] = {}
        self._tied = dict(tied or {})
        self._copied: dict[str, str] = {}
        for path in weight_files(directory):
            file = safe_open(path, framework="pt")
            self._file_of |= dict.fromkeys(file.keys(), file)
        for name, source in self._tied.items():
            if name in self._file_of and source in self._file_of and self._same(name, source):
                del self._file_of[name]

    def _same(self, name: str, source: str) -> bool:
        return self.shape(name) == self.shape(source) and torch.equal(self[name], self[source])

    @property
    def tied(self) -> frozenset[str]:
        """The names that the config ties."""
        return frozenset(self._tied)

    def untie(self, names: Iterable[str]) -> None:
        """Hold these tensors as well, where they are tied, as copies of what they are tied to."""
        for name in set(names) - set(self._file_of):
            if self._tied.get(name) in self._file_of:
                self._copied[name] = self._tied[name]

    def __getitem__(self, name: str) -> Tensor:
        name = self._copied.get(name, name)
        tensor: Tensor = self._file_of[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter([*self._file_of, *self._copied])

    def __len__(self) -> int:
        return len(self._file_of) + len(self._copied)

    def shape(self, name: str) -> list[int]:
        """Shape of a tensor; reads the file's header only."""
        name = self._copied.get(name, name)
        return list(self._file_of[name].get_slice(name).get_shape())


def untie(models: Sequence[TensorFiles]) -> None:
    """Let all models hold the tensors that one of them holds and the config of another ties."""
    tied = {name for model in models for name in model.tied}
    held = {name for name in tied if any(name in model for model in models)}
    for model in models:
        model.untie(held)


def _deltas(base: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor - base for tensor in tensors]


def _weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    # A new tensor, so that the sum in place leaves the first model alone.
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total += tensor * weight
    return total


def _agreeing(deltas: Sequence[Tensor], weights: Sequence[float], *, mean: bool) -> Tensor:
    """Weighted sum or mean of the numbers whose sign is that of the weighted sum of all."""
    sign = _weighted_sum(deltas, weights).sign()
    total, share = torch.zeros_like(sign), torch.zeros_like(sign)
    for delta, weight in zip(deltas, weights, strict=True):
        # A 0 is neither side's: what was trimmed does not count in the mean.
        agrees = (delta.sign() == sign) & (sign != 0)
        total += weight * delta * agrees
        share += weight * agrees
    # Where nothing agrees the total is 0 already.
    return total / share.masked_fill(share == 0, 1.0) if mean else total
