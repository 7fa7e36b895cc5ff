"""From what a person types to an artifact of the store."""

from __future__ import annotations

import os
from pathlib import Path

from posttrain.engine.errors import ConfigError
from posttrain.engine.record import Artifact
from posttrain.engine.store import Store
from posttrain.stages.kinds import kinds_making, shown_kind


def find_artifact(store: Store, text: str) -> Artifact:
    """The artifact meant by a name, `name-fingerprint`, a fingerprint, or its directory.

    Raises StoreError when there is none (nearest names), or several (the choices).
    """
    path = Path(text).absolute()
    if os.sep in text and path.parent.parent == store.root / "artifacts":
        return store.resolve(path.name)
    return store.resolve(text)


def find_model(root: Path, text: str) -> Path:
    """The checkpoint directory meant by `text`: a directory, or an artifact of the store.

    Raises ConfigError for an artifact that is no model, StoreError when there is none.
    """
    path = Path(text).expanduser()
    if (path / "config.json").is_file():
        return path
    artifact = find_artifact(Store(root), text)
    if "model" not in shown_kind(artifact.kind).makes:
        raise ConfigError(
            f"{artifact.label} is of kind {artifact.kind}, not a model; kinds that are: "
            f"{', '.join(kinds_making('model'))}"
        )
    return artifact.path
