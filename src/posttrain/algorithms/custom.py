"""A function of the user's own in place of an algorithm: the value `Custom`, made by `custom`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

from pydantic import Field

from posttrain.engine.errors import ConfigError
from posttrain.engine.fingerprint import digest
from posttrain.values import Settings, tag


class Custom(Settings):
    """A function of the user's own; made by `custom`. Its source text is its identity."""

    BY_GROUP: ClassVar[bool] = False
    """As an advantage it may set rows apart in any way, so none is left out before it is asked."""

    kind: Literal["custom"] = tag("custom")
    name: str
    """File and function, for messages: "loss.py:sapo"."""
    source: str
    """The text of the file."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the function."""

    def implementation(self) -> Callable[..., Any]:
        """The user's function, from a module of its own that is made of the source text."""
        return _load(self.name, self.source)

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that the recipe gave."""
        return dict(self.settings)


@cache
def _load(name: str, source: str) -> Callable[..., Any]:
    file, _, function = name.rpartition(":")
    # Named by the text, so that two versions of a file never meet under one name.
    module = ModuleType(f"posttrain_custom_{digest(source)[:16]}")
    # Dataclasses and pickle look their module up by name while the file is being executed.
    sys.modules[module.__name__] = module
    exec(compile(source, file, "exec"), module.__dict__)
    return getattr(module, function)  # type: ignore[no-any-return]


def custom(place: str, **settings: Any) -> Custom:
    """A function of your own, `"file.py:function"`, as a surrogate, an advantage or a token weight.

    The path is relative to the file that calls this, else to the working directory. The text of
    the file becomes part of the stage's identity, so the file has to stand alone: it may import
    installed packages, not its neighbours. `settings` are passed on by name. What the function is
    given and has to return: `docs/language.md`, "Functions of your own".

    Raises ConfigError for a file that is missing or does not parse, or has no such function.
    """
    from posttrain.rewards.python_file import check_file

    file, _, function = place.rpartition(":")
    path = Path(file).expanduser()
    if not path.is_absolute():
        beside = Path(sys._getframe(1).f_code.co_filename).parent / path
        path = beside if beside.is_file() else path
    if not file:
        raise ConfigError(f"custom({place!r}): write it as 'file.py:function'")
    check_file(path, function, where=f"custom({place!r})")
    source = path.read_text(encoding="utf-8")
    return Custom(name=f"{path.name}:{function}", source=source, settings=settings)
