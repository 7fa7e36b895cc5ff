"""`chat`: talk to a checkpoint, one message at a time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.text import Text

from posttrain.commands.output import console
from posttrain.engine.errors import ConfigError
from posttrain.engine.store import Store
from posttrain.stages.kinds import kinds_making, shown_kind
from posttrain.stages.worker import new_backend

MAX_NEW_TOKENS = 256
"""Length of a response unless the model has fewer positions left."""


def chat(
    root: Path,
    name: str,
    *,
    prompt: str | None,
    temperature: float,
    max_new_tokens: int | None,
    seed: int,
) -> None:
    """Answer `prompt`, or every line typed until the end of the input.

    Each message is answered by itself: what was said before is not part of the prompt, as in
    training. Raises ConfigError for a checkpoint that cannot be loaded or a message without room.
    """
    speaker = Speaker(find_model(root, name), temperature=temperature, limit=max_new_tokens)
    if prompt is not None:
        print(speaker.answer(prompt, seed=seed))
        return
    out = console()
    out.print(Text(f"{name}: each message is answered by itself; an empty line ends", "dim"))
    turn = 0
    while True:
        try:
            message = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not message:
            return
        out.print(Text(speaker.answer(message, seed=seed + turn), "green"))
        turn += 1


def find_model(root: Path, text: str) -> Path:
    """The checkpoint directory meant by `text`: a directory, or an artifact of the store.

    Raises ConfigError for an artifact that is no model, StoreError when there is none.
    """
    path = Path(text).expanduser()
    if (path / "config.json").is_file():
        return path
    artifact = Store(root).resolve(text)
    if "model" not in shown_kind(artifact.kind).makes:
        raise ConfigError(
            f"{artifact.label} is of kind {artifact.kind}, not a model; kinds that are: "
            f"{', '.join(kinds_making('model'))}"
        )
    return artifact.path


class Speaker:
    """A loaded checkpoint that answers messages."""

    def __init__(self, directory: Path, *, temperature: float, limit: int | None) -> None:
        messages: Any = transformers.utils.logging
        messages.disable_progress_bar()
        self.temperature = temperature
        self.limit = limit
        self.sampler = new_backend(os.environ).sampler(directory, dtype=torch.float32)

    def answer(self, message: str, *, seed: int) -> str:
        """One response to one message; greedy at temperature 0."""
        chat = self.sampler.chat
        ids = chat.prompt(message)
        room = MAX_NEW_TOKENS if chat.max_positions is None else chat.max_positions - len(ids)
        batch = self.sampler.sample(
            [ids],
            group_size=1,
            max_new_tokens=self.limit or max(1, min(MAX_NEW_TOKENS, room)),
            temperature=self.temperature,
            seed=seed,
        )
        return chat.decode(batch.responses()[0])
