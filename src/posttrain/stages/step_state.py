"""The tensors of a step checkpoint, without a second copy of them in memory.

Weights and moments are several times the size of a model, so copies of them would decide how much
memory a stage needs. What is large is written from where it lies, and who changes it waits for the
end of that; a file is read one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Event
from typing import Protocol, runtime_checkable

import torch
from safetensors import safe_open
from torch import Tensor

COPIED = 2**26
"""Up to so many bytes are copied: that takes less time than waiting for the disk."""


class Resumable(Protocol):
    """Something whose whole state is named tensors, such as a learner."""

    def state(self) -> dict[str, Tensor]:
        """All tensors."""
        ...

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put them back."""
        ...


@runtime_checkable
class Lender(Protocol):
    """Something that can leave what `state` gave as it is while others read it."""

    def hold(self, read: Event) -> None:
        """Wait for this event before changing what `state` gave."""
        ...


class CheckpointGroup:
    """Several things with a state as one `Resumable`; each finds its own tensors by its name."""

    def __init__(self, parts: Mapping[str, Resumable]) -> None:
        self.parts = dict(parts)

    def state(self) -> dict[str, Tensor]:
        """The tensors of all parts, `part/name`."""
        return {
            f"{part}/{name}": tensor
            for part, resumable in self.parts.items()
            for name, tensor in resumable.state().items()
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Give every part its own."""
        for part, resumable in self.parts.items():
            resumable.restore(Part(tensors, f"{part}/"))

    def hold(self, read: Event) -> None:
        """See `Lender.hold`; for parts that cannot, `lends` is False."""
        for resumable in self.parts.values():
            if isinstance(resumable, Lender):
                resumable.hold(read)

    @property
    def lends(self) -> bool:
        """Whether every part can `hold`."""
        return all(isinstance(resumable, Lender) for resumable in self.parts.values())


class Part(Mapping[str, Tensor]):
    """The tensors whose names begin with a prefix, by the rest of their names."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        self._tensors, self._prefix = tensors, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._prefix + name]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._prefix + name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return (
            name.removeprefix(self._prefix)
            for name in self._tensors
            if name.startswith(self._prefix)
        )

    def __len__(self) -> int:
        return sum(1 for _ in self)


class SavedTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        """Raises SafetensorError and OSError for a file that cannot be read."""
        self._file = safe_open(path, framework="pt")
        self._names = frozenset(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)


def to_write(learner: Resumable, read: Event) -> dict[str, Tensor]:
    """The state of a learner as a thread may write it while the learner goes on: copies, or, where
    these would be large, the very tensors, which do not change before `read` is set."""
    tensors = {name: value.detach() for name, value in learner.state().items()}
    size = sum(value.nbytes for value in tensors.values())
    lent = size > COPIED and isinstance(learner, Lender) and getattr(learner, "lends", True)
    if lent:
        learner.hold(read)
    # On the CPU, and contiguous, because safetensors writes no others.
    return {
        name: value.to("cpu", copy=not lent, memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }
