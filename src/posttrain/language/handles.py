"""What a recipe passes from verb to verb: names of what is not there yet."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from posttrain.backends.prompting import Mode, check_mode
from posttrain.stages.kinds import Product, kind_of


@dataclass(frozen=True, repr=False)
class Stage:
    """A handle on a stage of the recipe: what it makes is not there yet."""

    name: str
    kind: str
    """Empty for one that is defined further down."""
    domains: tuple[str, ...] = ()
    """Those of its prompts or its data; empty while they are not known."""

    def __repr__(self) -> str:
        return f"stage {self.name!r}" + (f" ({self.kind})" if self.kind else "")

    def may_make(self, *products: Product) -> bool:
        """Whether it makes one of these, as far as it is known."""
        return not self.kind or bool(set(products) & set(kind_of(self.kind).makes))

    def settings(self) -> dict[str, Any]:
        """What the handle asks of the stage that draws from it: nothing, its rows say it all."""
        return {}


@dataclass(frozen=True, repr=False)
class Prompts:
    """The training prompts of some domains, each in each of the modes."""

    domains: tuple[str, ...]
    modes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"r.prompts({', '.join(map(repr, self.domains))})"

    def settings(self) -> dict[str, Any]:
        """What the handle asks of the stage that draws from it."""
        return {"modes": self.modes} if self.modes else {}


@dataclass(frozen=True, repr=False)
class Demos:
    """The training prompts of some domains with demonstrations of good responses.

    Each is in each of the modes, and a share `noise` of them is wrong. With a `hint` each is there
    with its own prompt and with the hinted one.
    """

    domains: tuple[str, ...]
    modes: tuple[str, ...] = ()
    noise: float = 0.0
    hint: str | None = None

    def __repr__(self) -> str:
        return f"r.demos({', '.join(map(repr, self.domains))})"

    def settings(self) -> dict[str, Any]:
        """What the handle asks of the stage that learns from it."""
        settings = {"modes": self.modes, "demo_noise": self.noise, "hint": self.hint}
        return {name: value for name, value in settings.items() if value}


@dataclass(frozen=True)
class Warned:
    """A warning made while the recipe was read; it is shown with those of its stages."""

    text: str
    stage: str | None = None
    """The stage that it is about, None for the recipe."""


SELF = "self"
"""As a teacher: the student's own start, to hold a domain where it is."""


def check_modes(mode: str | Iterable[str] | None) -> tuple[Mode, ...]:
    """One mode or several as a tuple. Raises ConfigError for what is none."""
    given = () if mode is None else (mode,) if isinstance(mode, str) else tuple(mode)
    return tuple(check_mode(one, where="mode of the prompts or demonstrations") for one in given)
