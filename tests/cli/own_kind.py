"""A kind of stage that the package does not know: its row, its settings, its loop, and a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

from posttrain import Recipe
from posttrain.stages.kinds import Kind
from posttrain.values import Settings

if TYPE_CHECKING:  # it imports torch
    from posttrain.estimate.parts import View
    from posttrain.stages.context import Context

ECHO = Kind(
    name="own_kind.ECHO",
    settings="own_kind:Echo",
    run="own_kind:run",
    work="own_kind:work",
    makes=("model",),
    card="an echo of its problems",
    headline=("loudness",),
    number=("loudness", "loudness"),
    unit="calls",
    section="Echoes",
    panels=("loudness",),
    hints={"loudness": "how loud it still is"},
)


class Echo(Settings):
    """Settings of an echo."""

    calls: int = 3
    loss: float = 0.5


def run(config: Echo, ctx: Context) -> dict[str, float]:
    """Each call comes back weaker; the artifact holds the first problem of each domain."""
    loudness = 1.0
    for call in range(config.calls):
        loudness *= 1 - config.loss
        ctx.log(call + 1, config.calls, tokens=1, loudness=loudness)
    first = [ctx.problems(domain, "train")[0]["prompt"] for domain in ctx.domains]
    (ctx.out / "echo.txt").write_text("\n".join(first))
    return {"loudness": loudness}


def work(view: View):
    """A call handles every problem."""
    from posttrain.estimate.parts import Work

    problems = sum(view.problems("train").values())
    return Work(rows=problems * view.settings.calls, steps=view.settings.calls)


def recipe(r: Recipe):
    """An echo of all domains, and one of that echo.

    Source: the tests of the command line.
    """
    first = r.stage_of_kind(ECHO, inputs={"prompts": r.prompts(r.domains)}, name="first")
    return r.stage_of_kind(
        ECHO, inputs={"start": first, "prompts": r.prompts("sums")}, name="second", calls=2
    )
