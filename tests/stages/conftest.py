"""What tests of stages share: contexts, the edges of a kind, and stages that are killed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from posttrain.stages.context import Context


class Killed(Exception):
    """In place of a signal."""


@pytest.fixture
def new_context(tmp_path: Path) -> Iterator[Callable[..., Context]]:
    """`new_context(inputs)`: what a stage has, with the local backend and a work directory of its
    own; closed at the end."""
    from posttrain.backends.local import LocalBackend

    with ExitStack() as stack:

        def new(inputs: Mapping[str, str] | None = None, name: str = "mine") -> Context:
            work = tmp_path / f"context-{len(list(tmp_path.glob('context-*')))}"
            backend = LocalBackend()
            ctx = Context(name=name, work=work, inputs=inputs or {}, threads=1, backend=backend)
            return stack.enter_context(closing(ctx))

        yield new


@pytest.fixture
def edges(models: Mapping[str, str], domains: Mapping[str, str], data: str) -> Callable[..., Any]:
    """`edges(kind, more)`: what a stage that trains needs, one teacher `t`, and further edges."""

    def edges(kind: str, more: Mapping[str, str] | None = None) -> dict[str, str]:
        inputs = {**(more or {})}
        if kind != "pretrain":
            inputs["start"] = models["start"]
        if kind in ("dpo", "reward_model"):
            inputs["data"] = data
        elif "data" not in inputs:
            inputs |= domains
        if kind == "distill":
            inputs["teachers.t"] = models["one"]
        return inputs

    return edges


@pytest.fixture
def goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same: Any) -> Callable[..., Any]:
    """`goes_on(run, saved=, killed=)`: a stage that is saved after one step and killed after a
    later one goes on to the same bits and the same log; returns it without that, and with it.

    `run(work)` runs it in a work directory, or in a fresh one.
    """

    def check(run: Callable[[Path | None], Any], *, saved: int, killed: int) -> tuple[Any, Any]:
        calm = run(None)

        def checkpoint(ctx: Context, step: int, learner: Any) -> None:
            if step == saved:
                ctx.save(step, learner)
            if step == killed:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(Context, "checkpoint", checkpoint)
            with pytest.raises(Killed):
                run(tmp_path / "stopped")
        stopped = run(tmp_path / "stopped")
        assert same(calm, stopped)
        assert [{**line, "seconds": 0} for line in calm.lines] == [
            {**line, "seconds": 0} for line in stopped.lines
        ]
        return calm, stopped

    return check
