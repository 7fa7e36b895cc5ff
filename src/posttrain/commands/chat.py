"""`chat`: talk to a checkpoint."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from posttrain.backends.outside.gguf import ENDING
from posttrain.commands import io
from posttrain.commands.io import console
from posttrain.engine.errors import ConfigError
from posttrain.engine.links import check_links
from posttrain.engine.store import Store
from posttrain.engine.text import plain_text
from posttrain.engine.unfinished import is_place
from posttrain.stages.kinds import kinds_making, shown_kind
from posttrain.stages.step_checkpoint import step_model

if TYPE_CHECKING:  # it imports torch
    from posttrain.backends.base import Sampler

MAX_NEW_TOKENS = 256
"""Length of a response unless the model has fewer positions left."""
RESET = "/reset"
"""What starts a conversation anew."""


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
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="System message before all.")
    ] = None,
    store: io.StorePath = io.DEFAULT_STORE,
) -> None:
    """Talk to a model, which remembers what was said.

    `/reset` starts anew, and an empty line ends.
    """
    import torch

    from posttrain.stages.worker import new_backend

    directory = find_model(store, model)
    sampler = new_backend(os.environ).sampler(directory, dtype=torch.float32)
    talk = Conversation(sampler, system=system, temperature=temperature, limit=max_new_tokens)
    if prompt is not None:
        answer = talk.answer(prompt, seed)
        print(plain_text(answer) if sys.stdout.isatty() else answer)
        return
    out = console()
    how = (
        f"{RESET} starts anew"
        if talk.remembers
        else "the model's tokenizer has no chat template, so each message is answered by itself"
    )
    out.print(Text(f"{model}: {how}; an empty line ends", "dim"), soft_wrap=True)
    while True:
        try:
            message = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not message:
            return
        if message == RESET:
            talk.reset()
            out.print(Text("a new conversation", "dim"))
            continue
        reply = talk.answer(message, seed)
        if talk.dropped:
            out.print(Text(talk.dropped, "dim"))
        out.print(Text(reply, "green"))
        seed += 1


def find_model(root: Path, text: str) -> Path:
    """The checkpoint directory meant by `text`: a directory, or an artifact of the store.

    Raises ConfigError for a directory or an artifact that is no model, StoreError where there is
    none.
    """
    path = Path(text).expanduser()
    named = (os.sep in text or path.suffix == ENDING) and not is_place(text)
    whole = (path / "config.json").is_file() or (path / "adapter_config.json").is_file()
    if whole or (named and path.exists()):
        # It reads templates, which `--help` has no use for.
        from posttrain.backends.checkpoint_source import find_checkpoint

        # Told in the words of a plan. What the bytes are does not matter here.
        found = find_checkpoint(path, hash_file=lambda file: "")
        if found.gguf is not None:
            raise ConfigError(
                f"{found.gguf}: a GGUF file is converted by a run that starts from it (r.model, "
                "--set base=...); talk to what that made, by its name in the store"
            )
        return path
    store = Store(root)
    artifact = step_model(store, text) if is_place(text) else store.resolve(text)
    if "model" not in shown_kind(artifact.kind).makes:
        raise ConfigError(
            f"{artifact.label} is of kind {artifact.kind}, not a model; kinds that are: "
            f"{', '.join(kinds_making('model'))}"
        )
    check_links(store.root, artifact, store.hashes)
    return artifact.path


class Conversation:
    """What was said to a model and what it answered."""

    def __init__(
        self, sampler: Sampler, *, system: str | None, temperature: float, limit: int | None
    ) -> None:
        """`limit` is the length of a response; without one it is `MAX_NEW_TOKENS`, or what the
        positions leave. Raises ConfigError for a system message where there is no chat template."""
        self.sampler, self.temperature, self.limit = sampler, temperature, limit
        self.remembers = sampler.chat.tokenizer.chat_template is not None
        """Whether a message is answered in the light of those before it."""
        if system is not None and not self.remembers:
            raise ConfigError(
                "--system: the model's tokenizer has no chat template, which says where a system "
                "message stands; leave --system out, or talk to a checkpoint with a template"
            )
        self.system = [] if system is None else [{"role": "system", "content": system}]
        self.said: list[dict[str, str]] = []
        self.dropped = ""
        """Which messages the last answer no longer read, in words; empty where it read all."""

    def reset(self) -> None:
        """Forget what was said; the system message stays."""
        self.said = []

    def answer(self, message: str, seed: int) -> str:
        """The model's answer; greedy at temperature 0. The oldest turns are forgotten where all do
        not fit its positions. Raises ConfigError for a message that is too long by itself."""
        chat, asked = self.sampler.chat, {"role": "user", "content": message}
        if not self.remembers:
            self.said = []
        ids = chat.prompt([*self.system, *self.said, asked])
        count = 0
        while self.said and self._room(ids) < self._wanted():
            # A turn is what the user said and what was answered.
            self.said, count = self.said[2:], count + 2
            ids = chat.prompt([*self.system, *self.said, asked])
        self.dropped = (
            f"the model has {chat.max_positions} positions: the oldest {count} messages are "
            f"forgotten ({RESET} starts anew)"
            if count
            else ""
        )
        batch = self.sampler.sample(
            [ids],
            group_size=1,
            max_new_tokens=self.limit or max(1, min(MAX_NEW_TOKENS, self._room(ids))),
            temperature=self.temperature,
            seed=seed,
        )
        opened = chat.opened([*self.system, *self.said, asked])
        reply = opened + chat.decode(batch.responses()[0])
        self.said += [asked, {"role": "assistant", "content": reply}]
        return reply

    def _room(self, ids: list[int]) -> int:
        """Tokens that are left for a response."""
        positions = self.sampler.chat.max_positions
        return MAX_NEW_TOKENS if positions is None else positions - len(ids)

    def _wanted(self) -> int:
        """The room that a response is to have: as asked for, else a quarter of the positions."""
        positions = self.sampler.chat.max_positions or MAX_NEW_TOKENS
        return self.limit or min(MAX_NEW_TOKENS, max(1, positions // 4))
