"""`chat`: talk to a checkpoint, one message at a time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from posttrain.commands import io
from posttrain.commands.io import console
from posttrain.engine.errors import ConfigError
from posttrain.engine.store import Store
from posttrain.engine.unfinished import is_place
from posttrain.stages.kinds import kinds_making, shown_kind
from posttrain.stages.step_checkpoint import step_model

if TYPE_CHECKING:  # it imports torch
    from posttrain.backends.base import Sampler

MAX_NEW_TOKENS = 256
"""Length of a response unless the model has fewer positions left."""


def chat(
    model: Annotated[
        str, typer.Argument(metavar="ARTIFACT|DIR", help="A model of the store, or a checkpoint.")
    ],
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="Answer this one message.")
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0 always takes the likeliest token.")
    ] = 1.0,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="Longest response.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the sampling.")] = 0,
    store: io.StorePath = io.DEFAULT_STORE,
) -> None:
    """Talk to a model, one message at a time."""
    import torch
    import transformers

    from posttrain.stages.worker import new_backend

    directory = find_model(store, model)
    messages: Any = transformers.utils.logging
    messages.disable_progress_bar()
    sampler = new_backend(os.environ).sampler(directory, dtype=torch.float32)

    def answer(message: str, seed: int) -> str:
        return _answer(sampler, message, temperature=temperature, limit=max_new_tokens, seed=seed)

    if prompt is not None:
        print(answer(prompt, seed))
        return
    out = console()
    out.print(Text(f"{model}: each message is answered by itself; an empty line ends", "dim"))
    while True:
        try:
            message = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not message:
            return
        out.print(Text(answer(message, seed), "green"))
        seed += 1


def find_model(root: Path, text: str) -> Path:
    """The checkpoint directory meant by `text`: a directory, or an artifact of the store.

    Raises ConfigError for an artifact that is no model, StoreError when there is none.
    """
    path = Path(text).expanduser()
    if (path / "config.json").is_file():
        return path
    store = Store(root)
    artifact = step_model(store, text) if is_place(text) else store.resolve(text)
    if "model" not in shown_kind(artifact.kind).makes:
        raise ConfigError(
            f"{artifact.label} is of kind {artifact.kind}, not a model; kinds that are: "
            f"{', '.join(kinds_making('model'))}"
        )
    return artifact.path


def _answer(
    sampler: Sampler, message: str, *, temperature: float, limit: int | None, seed: int
) -> str:
    """One response to one message, without what was said before, as in training; greedy at
    temperature 0."""
    chat = sampler.chat
    ids = chat.prompt(message)
    room = MAX_NEW_TOKENS if chat.max_positions is None else chat.max_positions - len(ids)
    batch = sampler.sample(
        [ids],
        group_size=1,
        max_new_tokens=limit or max(1, min(MAX_NEW_TOKENS, room)),
        temperature=temperature,
        seed=seed,
    )
    return chat.decode(batch.responses()[0])
