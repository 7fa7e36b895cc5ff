"""Several things with a state as one, for a step checkpoint that holds all of them."""

from __future__ import annotations

from torch import Tensor

from posttrain.stages.context import Resumable


class Together:
    """A `Resumable` of named parts; each finds its own tensors again by its name.

    Example: `Together(policy=learner, reference=reference)`.
    """

    def __init__(self, **parts: Resumable) -> None:
        self.parts = parts

    def state(self) -> dict[str, Tensor]:
        """The tensors of all parts, `part/name`."""
        return {
            f"{part}/{name}": tensor
            for part, resumable in self.parts.items()
            for name, tensor in resumable.state().items()
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Give every part its own."""
        for part, resumable in self.parts.items():
            own = {
                name.removeprefix(f"{part}/"): tensor
                for name, tensor in tensors.items()
                if name.startswith(f"{part}/")
            }
            resumable.restore(own)
