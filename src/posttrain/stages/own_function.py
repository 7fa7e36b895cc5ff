"""Functions of the user's own in an rl stage (`posttrain.algorithms.custom`): where one goes wrong,
the stage ends with an error that names its file, its name and what it has to return.

Legend: N sampled tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from posttrain.algorithms import Custom
from posttrain.backends.base import Metrics
from posttrain.engine.errors import StageError
from posttrain.rewards.python_file import line_in
from posttrain.values import Settings


@contextmanager
def named(choice: Settings) -> Iterator[None]:
    """Raise what goes wrong inside as a StageError that names the user's function.

    For calling the function of a choice (`Settings.implementation`) and checking what it returned.
    Where the choice is none of the user's, errors stay what they are.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(choice, Custom):
            raise
        file = choice.name.rpartition(":")[0]
        raise StageError(
            f"custom({choice.name!r}): {type(error).__name__}: {error}{line_in(error, file)}; what "
            "a function of your own is given and has to return: docs/language.md"
        ) from error


def checked_sum(choice: Settings, found: Any, logp_N: Tensor) -> tuple[Tensor, Metrics]:
    """What a surrogate returned: `(loss sum, metric sums)`.

    Raises TypeError or ValueError where the user's own returned anything else, a sum that is not
    finite, or one without a gradient.
    """
    if isinstance(choice, Custom):
        if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], dict)):
            raise TypeError(
                f"it returned {_told(found)}; it has to return (loss sum, dict of metric sums)"
            )
        wrong = [name for name, value in found[1].items() if not _is_sum(value)]
        if not _is_sum(found[0]) or wrong:
            what = "a loss sum of" if not wrong else f"the metric {wrong[0]!r} as"
            value = found[1][wrong[0]] if wrong else found[0]
            raise TypeError(
                f"it returned {what} {_told(value)}; each has to be one number, a tensor without "
                "axes: sum over the tokens"
            )
        if not bool(torch.isfinite(found[0])):
            raise ValueError(
                f"it returned a loss sum of {float(found[0].detach())}; it has to be finite"
            )
        if logp_N.requires_grad and not found[0].requires_grad:
            raise ValueError("the loss sum it returned has no gradient; calculate it from logp_N")
        return found[0], {name: value.detach() for name, value in found[1].items()}
    total, metrics = found
    return total, metrics


def checked_values(choice: Settings, found: Any, *sizes: int) -> Tensor:
    """What an advantage or a token weight returned: one finite number per entry, `sizes` long.

    Raises TypeError or ValueError where the user's own returned anything else.
    """
    if isinstance(choice, Custom):
        allowed = " or ".join(map(str, dict.fromkeys(sizes)))
        if not isinstance(found, Tensor) or found.ndim != 1 or len(found) not in sizes:
            raise TypeError(
                f"it returned {_told(found)}; it has to return a tensor of {allowed} entries"
            )
        if not bool(torch.isfinite(found).all()):
            bad = torch.nonzero(~torch.isfinite(found))[:, 0].tolist()
            raise ValueError(f"the entries {bad[:8]} of what it returned are not finite")
    values: Tensor = found
    return values


def _is_sum(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0


def _told(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"{value!r:.60} ({type(value).__name__})"
