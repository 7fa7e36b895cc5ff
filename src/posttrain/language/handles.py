"""What a recipe passes from verb to verb: names of what is not there yet."""

from __future__ import annotations

from dataclasses import dataclass

MODEL_KINDS = ("model", "pretrain", "sft", "dpo", "rl", "distill")
"""Kinds of stages that make a language model."""


@dataclass(frozen=True)
class Stage:
    """A handle on a stage of the recipe: what it makes is not there yet."""

    name: str
    kind: str


@dataclass(frozen=True)
class Prompts:
    """The training prompts of some domains."""

    domains: tuple[str, ...]


@dataclass(frozen=True)
class Demos:
    """The training prompts of some domains with demonstrations of good responses."""

    domains: tuple[str, ...]


SELF = "self"
"""As a teacher: the student's own start, to hold a domain where it is."""
