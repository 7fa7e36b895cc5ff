"""Models that rest: their weights give their memory back, and are read again when they are needed.

A frozen model on the CPU rests in the files of its checkpoint. They are on the disk anyway, and the
system keeps what is read often in memory that it can take back. A weight that no file has with the
bytes that it has in memory (of a family whose layers transformers joins while loading, or one that
was changed) goes to a scratch file once. On a CUDA device a model rests in page-locked host memory,
all but its output layer, which stays there: a loss reads it in every forward pass.

What the scheme is for: N teachers cost the memory of the largest (DeepSeek-V4, arXiv 2606.19348,
section 5.2.2).

Legend: V vocabulary, D hidden size.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from posttrain.backends.base import Head
from posttrain.backends.checkpoint import drawn_head, has_score, output_head
from posttrain.backends.outside.headers import read_headers
from posttrain.backends.vocabulary import TokenIds
from posttrain.engine.errors import StageError

PORTION_BYTES = 2**26
"""So much of a file is read before its mapping is given up: pages that are mapped count as memory
of the process."""


ALIGNMENT = 64
"""Bytes; where torch lets tensors begin. Products may round otherwise elsewhere."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: a safetensors file, and its name there."""

    file: Path
    name: str


@dataclass(frozen=True, kw_only=True)
class RestingHead:
    """Stands for the output layer of a model that rests. A `HeadSource`; small when it is pickled.

    The numbers are those of `Scorer.head`.
    """

    weight: Place
    bias: Place | None
    dtype: torch.dtype
    """The type in which the model computes."""
    ids: TokenIds
    width: int
    """Hidden size."""

    @property
    def shape(self) -> tuple[int, int]:
        """See `ClosedHead.shape`."""
        return self.ids.size, self.width

    @property
    def has_bias(self) -> bool:
        """See `ClosedHead.has_bias`: rows between those that may be drawn get one, too."""
        return self.bias is not None or bool(self.ids.holes)

    def open(self) -> Head:
        """See `HeadSource.open`: read from the file, or mapped where it has the type."""
        bias_V = None if self.bias is None else self._read(self.bias)
        return drawn_head(self._read(self.weight), bias_V, self.ids)

    def _read(self, place: Place) -> Tensor:
        with safe_open(place.file, framework="pt") as file:
            # Only the rows that may be drawn.
            rows: Tensor = file.get_slice(place.name)[: self.ids.size]
        return rows.to(self.dtype)


class RestingWeights:
    """The weights of a model that nobody trains, in memory or at rest."""

    def __init__(self, model: Any, checkpoint: Path | None) -> None:
        """`checkpoint` is the directory that the model was loaded from, if it was from one."""
        self._model, self._checkpoint = model, checkpoint
        self._parameters: dict[str, Tensor] = dict(model.named_parameters())
        self._shapes = {name: tuple(p.shape) for name, p in self._parameters.items()}
        self._device: torch.device = model.device
        self._lock = Lock()
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        # Where each weight is while it rests, once that is known: in a file, or in host memory.
        self._places: dict[str, Place] = {}
        self._host: dict[str, Tensor] = {}
        self._states: dict[Path, tuple[int, int, int]] = {}
        self._resting: set[str] = set()

    @property
    def awake(self) -> bool:
        """Whether all weights are in memory."""
        return not self._resting

    def rest(self) -> None:
        """Give the memory back. Nobody may be reading; does nothing where it rests already."""
        with self._lock:
            if self._resting:
                return
            if self._device.type == "cpu":
                self._find_places()
                names = list(self._places)
            else:
                self._keep_in_host_memory()
                names = list(self._host)
            for name in names:
                # Not a tensor of the same shape: whoever computes with it is to fail.
                self._parameters[name].data = self._parameters[name].data.new_empty(0)
            self._resting.update(names)

    def wake(self) -> None:
        """Have all weights in memory; does nothing where they are. Any thread may call it.

        Raises StageError where a file was written since the model was loaded.
        """
        with self._lock:
            if not self._resting:
                return
            self._check_files()
            fresh = self._room()
            for name, tensor in self._tensors():
                # A copy: nothing of the file stays mapped.
                self._parameters[name].data = fresh[name].copy_(tensor, non_blocking=True)
                self._resting.discard(name)

    def _room(self) -> dict[str, Tensor]:
        """Memory for the weights at rest. On the CPU it is one block, which the system has back as
        a whole when they rest again; in pieces it would stay with the process."""
        shapes = {n: s for n, s in self._shapes.items() if n in self._resting}
        types = {name: self._parameters[name].dtype for name in shapes}
        if self._device.type != "cpu":
            return {
                name: torch.empty(shape, dtype=types[name], device=self._device)
                for name, shape in shapes.items()
            }
        sizes = [math.prod(shape) * types[name].itemsize for name, shape in shapes.items()]
        begins = [0, *accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)]
        block = torch.empty(begins.pop(), dtype=torch.uint8)
        return {
            name: block[begin : begin + size].view(types[name]).view(shape)
            for (name, shape), begin, size in zip(shapes.items(), begins, sizes, strict=True)
        }

    def will_change(self) -> None:
        """Awake, and from now on no longer what the files say."""
        self.wake()
        self._places, self._host, self._scratch, self._checkpoint = {}, {}, None, None

    def head(self, ids: TokenIds) -> RestingHead | Head:
        """The output layer, without waking the model where it lies in a file."""
        layer = self._output_layer()
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        weight = None if layer is None else names.get(id(layer.weight))
        if layer is None or weight is None or self._device.type != "cpu":
            # A score is one row; on a device the output layer does not rest.
            if self._device.type == "cpu":
                self.wake()
            return output_head(self._model, ids).detached()
        with self._lock:
            self._find_places()
        bias = getattr(layer, "bias", None)
        return RestingHead(
            weight=self._places[weight],
            bias=None if bias is None else self._places[names[id(bias)]],
            dtype=layer.weight.dtype,
            ids=ids,
            width=self._shapes[weight][1],
        )

    def _output_layer(self) -> Any:
        """The module that gives logits; None of a model with a score."""
        return None if has_score(self._model) else self._model.get_output_embeddings()

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The weights at rest, by name."""
        if self._device.type == "cpu":
            resting = {n: place for n, place in self._places.items() if n in self._resting}
            yield from read_tensors(resting)
        else:
            yield from list(self._host.items())

    def _find_places(self) -> None:
        """Know for each weight a file that has its bytes; write those that no file has."""
        if self._places:
            return
        found: dict[str, Place] = {}
        if self._checkpoint is not None:
            headers = read_headers(self._checkpoint)
            for name, aliases in self._names().items():
                for alias in aliases:
                    if alias in headers and headers[alias].shape == self._shapes[name]:
                        found[name] = Place(headers[alias].file, alias)
            for name, tensor in read_tensors(dict(found)):
                parameter = self._parameters[name].data
                if not torch.equal(tensor.to(parameter.dtype), parameter):
                    del found[name]
        for name in self._parameters.keys() - found.keys():
            found[name] = self._write(name)
        self._states = {file: _state(file) for file in {p.file for p in found.values()}}
        self._places = {name: found[name] for name in self._parameters}

    def _names(self) -> dict[str, list[str]]:
        """All names of each weight: one that is used in two places may have either in a file."""
        names: dict[int, list[str]] = {}
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        return {name: names[id(parameter)] for name, parameter in self._parameters.items()}

    def _write(self, name: str) -> Place:
        """A weight in a scratch file of its own."""
        if self._scratch is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="posttrain-rest-")
        file = Path(self._scratch.name) / f"{len(os.listdir(self._scratch.name))}.safetensors"
        save_file({name: self._parameters[name].data.clone()}, file)
        return Place(file, name)

    def _keep_in_host_memory(self) -> None:
        if self._host:
            return
        layer = self._output_layer()
        stays = set() if layer is None else {id(parameter) for parameter in layer.parameters()}
        for name, parameter in self._parameters.items():
            if id(parameter) not in stays:
                host = parameter.data.to("cpu", copy=True)
                self._host[name] = host.pin_memory() if self._device.type == "cuda" else host

    def _check_files(self) -> None:
        """Raise StageError for a file that is not what it was when the model was loaded."""
        for file, state in self._states.items():
            if self._device.type == "cpu" and _state(file) != state:
                raise StageError(
                    f"{file} was written or removed while a model of this stage rested in it: what "
                    "would be read now is another model. Put the file back as it was and run again "
                    "(the stage goes on from its last step checkpoint); a file that is to be "
                    "changed needs another place"
                )


def read_tensors(places: Mapping[str, Place]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor as its file has it, by the keys of `places`. A tensor is to be copied or dropped
    before the next: together they would map whole files."""
    by_file: dict[Path, list[str]] = {}
    for key, place in places.items():
        by_file.setdefault(place.file, []).append(key)
    for file, keys in by_file.items():
        left: Sequence[str] = keys
        while left:
            done = 0
            with safe_open(file, framework="pt") as opened:
                size = 0
                for key in left:
                    tensor = opened.get_tensor(places[key].name)
                    size += tensor.nbytes
                    done += 1
                    yield key, tensor
                    if size >= PORTION_BYTES:
                        break
            del tensor
            left = left[done:]


def _state(file: Path) -> tuple[int, int, int]:
    """What changes when a file is written: inode, size, time of change; zeros where it is gone."""
    try:
        found = file.stat()
    except OSError:
        return (0, 0, 0)
    return (found.st_ino, found.st_size, found.st_mtime_ns)
