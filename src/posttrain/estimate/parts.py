"""What the work of a stage is made of, counted in rows and tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from posttrain.estimate.shapes import Model

Do = Literal["sample", "learn", "score"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A model that samples, learns from or reads rows, some at a time."""

    do: Do
    edge: str = "start"
    """The input whose weights these are; "" for a model that the stage makes."""
    calls: float
    """How often: steps, or calls of a sampler."""
    rows: float
    """Of each call."""
    group: float = 1.0
    """Rows that share a prompt."""
    prompt: float
    response: float
    """Mean tokens of a row; of the response those that are sampled, learned or read."""
    longest: float
    """Tokens of the longest row, prompt and response."""
    updates: float = 1.0
    """Optimiser steps of each call."""
    pair: bool = False
    """Whether the loss is a divergence over two whole vocabularies."""
    policy: bool = True
    """Whether it is the stage's own model, whose tokens the stage counts as its work."""

    @property
    def tokens(self) -> float:
        """Tokens that are sampled, learned or read, in all calls."""
        return self.calls * self.rows * self.response

    @property
    def read(self) -> float:
        """Tokens that a call computes: of a group the prompt once, and all responses."""
        return self.rows / self.group * self.prompt + self.rows * self.response


@dataclass(frozen=True, kw_only=True)
class Work:
    """All that a stage does."""

    parts: Sequence[Part] = ()
    rows: float = 0.0
    """Rows that are handled one by one, without a model: made, checked, sorted out."""
    read_rows: float = 0.0
    """Rows that are read and encoded before the first step."""
    kept_rows: float = 0.0
    """Rows that the stage leaves on the disk."""
    kept_tokens: float = 0.0
    """Mean tokens of these."""
    saves: bool = False
    """Whether the stage writes the weights of a model."""
    steps: float = 0.0
    """Steps of a stage that has some; of one that was stopped the rest can be told."""

    def tokens(self, do: Do) -> float:
        """Tokens that are sampled, learned or scored."""
        return sum(part.tokens for part in self.parts if part.do == do)

    @property
    def counted(self) -> float:
        """Tokens that the stage itself counts as processed: sampled, or else learned or read."""
        for do in ("sample", "learn", "score"):
            found = sum(part.tokens for part in self.parts if part.do == do and part.policy)
            if found:
                return found
        return 0.0


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows that a stage reads: how many, and their mean tokens."""

    count: float
    prompt: float
    response: float
    longest: float


class View(Protocol):
    """What a function that counts the work of a stage may ask; see `about.py`.

    Each number that is a bound or was measured says so in the estimate.
    """

    @property
    def settings(self) -> Any:
        """The checked settings of the stage."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """The same as JSON data; what takes files in has nothing else."""
        ...

    @property
    def inputs(self) -> Mapping[str, str]:
        """Edge to the name of the stage that it comes from."""
        ...

    def model(self, edge: str) -> Model | None:
        """The sizes of the model of an edge, None where they cannot be known."""
        ...

    def number(self, name: str) -> float:
        """A setting, the mean of its schedule where it has one."""
        ...

    def prompts(self) -> Rows:
        """The training prompts of the stage's domains, with their demonstrations, in its modes and
        shares."""
        ...

    def said(self, edge: str, most: float) -> float:
        """Mean tokens of what the model of an edge says to these prompts, `most` at most."""
        ...

    def data(self, *roles: str) -> Rows:
        """The rows of the edges of these roles, such as "data"; those of the domains where the
        stage has none."""
        ...

    def problems(self, split: str) -> Mapping[str, int]:
        """Domain to the number of its problems in a split."""
        ...

    def measured(self, metric: str, otherwise: float) -> float:
        """The mean of a metric in earlier runs of the stage, or else this number."""
        ...
