"""Weights that are held once for all who read them: frozen models, and adapters on top of them.

A stage may ask for the same checkpoint several times, as start, reference and teacher, and for
several adapters of one base. `SharedModels` loads each checkpoint once for a type of numbers and
keeps it as long as somebody reads it. Nobody may change it: who has to (a reference that follows
the policy) takes a copy of its own first.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor

from posttrain.backends import lora
from posttrain.backends.base import LoraSettings
from posttrain.backends.checkpoint import Adapter, LanguageModel, checked_base, read_tokenizer
from posttrain.backends.outside.adapters import base_of, is_adapter, read_adapter_headers
from posttrain.backends.outside.files import model_files
from posttrain.backends.resting import RestingWeights
from posttrain.backends.saved_types import types_of
from posttrain.engine.errors import ConfigError
from posttrain.engine.record import RECORD

Load = Callable[[Path, torch.dtype, bool], LanguageModel]
"""Loads a checkpoint in a type of numbers, with logits or with a score."""


@dataclass(kw_only=True, eq=False)
class Frozen:
    """A model that nobody changes, and who reads it."""

    language_model: LanguageModel
    readers: WeakSet[Any] = field(default_factory=WeakSet)
    """Samplers, scorers and learners over these tensors, those with an adapter included."""

    weights: RestingWeights
    """Its tensors, in memory or at rest."""
    learns: bool = False
    """Whether an adapter that learns stands on it, which never rests."""
    taken: bool = False
    """Whether its one reader changes it from now on; the next one loads another."""
    at_rest: WeakSet[Any] = field(default_factory=WeakSet)
    """The readers that need nothing of it just now."""

    def rest(self, reader: object) -> None:
        """Note that `reader` is at rest; with the last one the memory is given back."""
        self.at_rest.add(reader)
        if not self.learns and all(other in self.at_rest for other in self.readers):
            self.weights.rest()

    def wake(self, reader: object) -> None:
        """Have the weights in memory, for `reader`."""
        self.at_rest.discard(reader)
        self.weights.wake()

    def check_frozen(self, model: Any, learning: Sequence[Tensor]) -> None:
        """Assert that a model above these tensors asks for no gradient of them, and that none of
        them is among those that learn."""
        below = {id(parameter) for parameter in self.language_model.model.parameters()}
        assert not any(p.requires_grad for p in model.parameters() if id(p) in below)
        assert not any(id(parameter) in below for parameter in learning)

    def has_others(self, reader: object) -> bool:
        """Whether anybody but `reader` computes with these tensors."""
        return any(other is not reader for other in self.readers)


class SharedModels:
    """The frozen models of a backend, by what they are and not by where they lie."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._frozen: WeakValueDictionary[tuple[str, torch.dtype, bool], Frozen] = (
            WeakValueDictionary()
        )

    def whole(self, checkpoint: Path, dtype: torch.dtype, scalar: bool) -> Frozen:
        """The frozen model of a checkpoint, which may be held already."""
        key = (_identity(checkpoint), dtype, scalar)
        found = self._frozen.get(key)
        if found is None or found.taken:
            loaded = self._load(checkpoint, dtype, scalar)
            loaded.model.eval().requires_grad_(False)
            # Of an adapter that was merged no file has the weights.
            place = None if is_adapter(checkpoint) else checkpoint
            weights = RestingWeights(loaded.model, place)
            found = self._frozen[key] = Frozen(language_model=loaded, weights=weights)
        # It may have been at rest, and somebody else is to read it.
        found.weights.wake()
        return found

    def read(self, checkpoint: Path, dtype: torch.dtype, scalar: bool) -> LanguageModel:
        """A frozen model of a checkpoint: of an adapter that can stand beside its base, one that
        shares the base; else one that others may have too."""
        if not _stands_beside(checkpoint, scalar):
            frozen = self.whole(checkpoint, dtype, scalar)
            return replace(frozen.language_model, below=frozen)
        made = self._with_adapter(checkpoint, dtype, scalar, dtype)
        made.model.requires_grad_(False)
        return made

    def learn(
        self, checkpoint: Path, settings: LoraSettings, dtype: torch.dtype, scalar: bool
    ) -> LanguageModel:
        """A model whose adapter is to learn: a new one beside a checkpoint, or that of the
        checkpoint. The base is of type `dtype`, the adapter in float32.

        Raises ConfigError for an adapter with other settings.
        """
        if not is_adapter(checkpoint):
            frozen = self.whole(checkpoint, dtype, scalar)
            below = frozen.language_model
            model = lora.twin(below.model)
            config = lora.attach(model, settings)
            adapter = Adapter(config=config, base=checkpoint)
            return replace(below, model=model, adapter=adapter, types={}, below=frozen)
        rest = (
            "leave lora out to train the merged weights, or start from the adapter's base to begin "
            "another one"
        )
        if not _stands_beside(checkpoint, scalar):
            raise ConfigError(
                f"lora: {checkpoint} is an adapter that cannot go on as one here: it brings whole "
                f"modules, biases or an output layer of its own; {rest}"
            )
        made = self._with_adapter(checkpoint, dtype, scalar, torch.float32)
        assert made.adapter is not None
        difference = lora.same_settings(
            made.adapter.config, settings, made.below.language_model.model
        )
        if difference is not None:
            raise ConfigError(
                f"{difference} ({checkpoint}); give the same settings to go on with that adapter, "
                f"{rest}"
            )
        return made

    def _with_adapter(
        self, checkpoint: Path, dtype: torch.dtype, scalar: bool, adapter_dtype: torch.dtype
    ) -> LanguageModel:
        """The adapter of a directory on its base."""
        base = base_of(checkpoint)
        frozen = self.whole(base, dtype, scalar)
        below = frozen.language_model
        model = lora.twin(below.model)
        config = lora.attach_saved(model, checkpoint, dtype=adapter_dtype)
        return replace(
            below,
            model=model,
            tokenizer=read_tokenizer(checkpoint, what="an adapter"),
            adapter=Adapter(config=config, base=base),
            types=types_of(read_adapter_headers(checkpoint)),
            below=frozen,
        )


def _stands_beside(checkpoint: Path, scalar: bool) -> bool:
    """Whether a checkpoint is an adapter that can compute beside a shared base. Raises ConfigError
    for that of a reward model where a language model is wanted."""
    if not is_adapter(checkpoint):
        return False
    checked_base(checkpoint, scalar=scalar)
    return lora.is_separable(checkpoint)


def _identity(checkpoint: Path) -> str:
    """What a checkpoint is: the hashes of its files where a record has them, else its place; and of
    an adapter that of its base as well."""
    below = f" on {_identity(base_of(checkpoint))}" if is_adapter(checkpoint) else ""
    record = checkpoint / RECORD
    files = json.loads(record.read_bytes()).get("files") if record.is_file() else None
    if not files:
        return str(checkpoint.resolve()) + below
    return json.dumps([(name, files[name]["sha256"]) for name in _read(checkpoint, files)]) + below


def _read(checkpoint: Path, files: Any) -> list[str]:
    return [name for name in model_files(checkpoint) if name in files]


def own_copy(language_model: LanguageModel, reader: object) -> LanguageModel:
    """A model of its own, with the adapter in its weights, for a reader that is to change it.

    Where nobody else has the weights they are taken over without a copy.
    """
    model, below = language_model.model, language_model.below
    alone = not below.has_others(reader)
    if lora.has_adapter(model):
        model = lora.merged_twin(model)
    elif alone and not below.taken:
        below.taken = True
        return replace(language_model, below=None)
    below.readers.discard(reader)
    return replace(language_model, model=copy.deepcopy(model), adapter=None, below=None)
