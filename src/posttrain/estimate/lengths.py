"""How many tokens prompts and demonstrations have: counted in rows of the data, as far as it is
there.

Of a domain that is in the store some rows are read; of one that reasoning-gym makes some problems
are made, of a table some rows are read. What was found is remembered by the identity of the data.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from posttrain.backends.prompting import Asked, asked
from posttrain.backends.template import ChatTemplate, template_text
from posttrain.engine.atomic import remembered
from posttrain.engine.errors import PosttrainError
from posttrain.engine.graph import Node
from posttrain.engine.jsonl import read_jsonl
from posttrain.engine.record import Artifact
from posttrain.estimate import kept

ROWS = 200
"""Rows of a domain or a table that are looked at."""
MADE, MADE_SECONDS = 4000, 1.0
"""Problems that are made of a domain which is not in the store, and how long at most."""
HIGH = 0.99
"""The share of rows that are no longer than what counts as long."""
CHARACTERS_PER_TOKEN = 4.0
"""Of a tokenizer that cannot be read; English text of models with 30,000 to 150,000 tokens."""
TEMPLATE_TOKENS = 8
"""What a chat template adds to a prompt where it cannot be rendered."""
FILE = "lengths.json"


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens of rows: means, and those of a long row."""

    prompt: float
    response: float
    """Of the demonstration, its stop token included; 0 where there is none."""
    prompt_high: float
    response_high: float


@dataclass(frozen=True)
class Characters:
    """The tokenizer of a model that `pretrain` makes: one token for each character."""

    key: str = "characters"

    def prompt(self, shown: Asked) -> int:
        """Tokens of what a model is shown, with what opens its turn."""
        texts = [shown] if isinstance(shown, str) else [str(m.get("content", "")) for m in shown]
        return sum(len(text) + 1 for text in texts) + 1

    def response(self, text: str) -> int:
        """Tokens of a response and of its end."""
        return len(text.replace("<think>", "x").replace("</think>", "x")) + 1


@dataclass(frozen=True)
class Checkpoint:
    """The tokenizer and the chat template of a checkpoint directory."""

    directory: Path

    @property
    def key(self) -> str:
        """What tells it from others."""
        return str(self.directory.resolve())

    @cached_property
    def _tokenizer(self) -> Any:
        # A wheel of some size, of which nobody else here has need.
        from tokenizers import Tokenizer

        try:
            return Tokenizer.from_file(str(self.directory / "tokenizer.json"))
        except Exception:  # whatever is wrong with it, the stage will tell
            return None

    @cached_property
    def _template(self) -> ChatTemplate | None:
        path = self.directory / "chat_template.jinja"
        try:
            if path.is_file():
                return ChatTemplate(path.read_text(encoding="utf-8"))
            said = remembered(self.directory / "tokenizer_config.json") or {}
            text = template_text(said.get("chat_template"))
            return None if text is None else ChatTemplate(text)
        except (PosttrainError, OSError):
            return None

    def count(self, text: str) -> int:
        """Tokens of a text."""
        if self._tokenizer is None:
            return round(len(text) / CHARACTERS_PER_TOKEN)
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def prompt(self, shown: Asked) -> int:
        """Tokens of what a model is shown, with all that the template writes around it."""
        messages = [{"role": "user", "content": shown}] if isinstance(shown, str) else shown
        laid_out = self._laid_out(messages)
        if laid_out is not None:
            return self.count(laid_out)
        texts = [str(message.get("content", "")) for message in messages]
        return sum(map(self.count, texts)) + TEMPLATE_TOKENS

    def _laid_out(self, messages: Sequence[Mapping[str, Any]]) -> str | None:
        """The text that the template makes of messages; None without one, and where it refuses
        them: the stage itself will tell."""
        if self._template is None:
            return None
        try:
            special = {"bos_token": "", "eos_token": ""}
            return self._template.render(messages, add_generation_prompt=True, **special)
        # A stranger's code: there is nothing that it could not raise.
        except Exception:
            return None

    def response(self, text: str) -> int:
        """Tokens of a response and of its end."""
        return self.count(text) + 1


Counter = Characters | Checkpoint


@dataclass
class Texts:
    """The rows of the domains and tables of a graph, looked at once."""

    make: bool = True
    """Whether problems may be made, which takes a second or two."""
    found: dict[str, Any] = field(default_factory=lambda: kept.read(FILE))
    fresh: dict[str, Any] = field(default_factory=dict)

    def lengths(
        self,
        node: Node,
        fingerprint: str,
        artifact: Artifact | None,
        counter: Counter,
        modes: Sequence[str] = (),
    ) -> Lengths | None:
        """Those of the rows of a stage that brings data; None where they cannot be known yet."""
        key = "/".join((fingerprint[:16], counter.key, *modes))
        known = self.found.get(key)
        if isinstance(known, Mapping) and set(known) == set(Lengths.__annotations__):
            return Lengths(**known)
        try:
            rows = list(self._rows(node, artifact))
        except (PosttrainError, OSError, ValueError, KeyError):
            # The stage itself says what is wrong with its data.
            rows = []
        if not rows:
            return None
        measured = _measured(rows, counter, modes)
        self.found[key] = self.fresh[key] = asdict(measured)
        return measured

    def remember(self) -> None:
        """Keep what was counted for the next estimate."""
        if self.fresh:
            kept.keep(FILE, self.fresh)
            self.fresh = {}

    def _rows(self, node: Node, artifact: Artifact | None) -> Iterator[Mapping[str, Any]]:
        if artifact is not None:
            names = ("train.jsonl", "data.jsonl", "pairs.jsonl", "rollouts.jsonl")
            name = next((name for name in names if name in artifact.files), None)
            yield from [] if name is None else islice(read_jsonl(artifact.path / name), ROWS)
        elif self.make and node.kind == "domain":
            source = node.config["source"]
            made = _procedural if source["kind"] == "procedural" else _table
            yield from made(node)


def _procedural(node: Node) -> Iterator[Mapping[str, Any]]:
    """Problems of a domain of reasoning-gym, none of them twice: short ones run out first."""
    from posttrain.rewards.formats import find_format
    from posttrain.rewards.gym import create_gym

    source, where = node.config["source"], f"domain {node.name}"
    text = find_format(source["format"], where=where)
    count = min(MADE, sum(source["counts"].values()))
    items = create_gym(
        source["dataset"], source["params"], seed=source["seed"], size=4 * count, where=where
    )
    seen: set[str] = set()
    end = time.monotonic() + MADE_SECONDS
    for item in islice(items, 4 * count):
        prompt = text.prompt(item)
        if prompt not in seen:
            seen.add(prompt)
            row = {"prompt": prompt, "demo": text.demo(item)}
            yield row | {"thought": text.thought(item), "direct": text.direct(item)}
        if len(seen) == count or time.monotonic() > end:
            return


def _table(node: Node) -> Iterator[Mapping[str, Any]]:
    """The first training rows of a domain that is a table."""
    from posttrain.suites.checked import tables_of

    every = tables_of(node.config, node.runtime["files"]).rows()
    yield from islice((row.problem for split, row in every if split == "train"), ROWS)


def _measured(rows: Sequence[Mapping[str, Any]], counter: Counter, modes: Sequence[str]) -> Lengths:
    prompts = [counter.prompt(asked(row)) for row in rows]
    texts = [text for row in rows for text in _responses(row, modes)]
    responses = [counter.response(text) for text in texts] or [0]
    return Lengths(
        prompt=sum(prompts) / len(prompts),
        response=sum(responses) / len(responses),
        prompt_high=_high(prompts),
        response_high=_high(responses),
    )


def _responses(row: Mapping[str, Any], modes: Sequence[str]) -> Iterator[str]:
    """What is said in a row: its demonstration in these modes, or its responses."""
    thought, direct = row.get("thought"), row.get("direct")
    if modes and direct is not None:
        for mode in modes:
            yield str(direct) if mode == "no_think" else f"<think>{thought or ''}</think>{direct}"
        return
    names = ("demo", "response", "chosen", "rejected")
    yield from (str(row[name]) for name in names if row.get(name) is not None)


def _high(lengths: Sequence[int]) -> float:
    return float(sorted(lengths)[min(len(lengths) - 1, int(HIGH * len(lengths)))])
