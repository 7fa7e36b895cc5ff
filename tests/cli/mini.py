"""Two specialists and their student, small enough for a test.

It has a parameter of every type that --set can check.
Source: the tests of the command line.
"""

from typing import Literal

from posttrain import Recipe

SHAPE = {
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 1,
    "head_dim": 16,
    "intermediate_size": 16,
    "max_positions": 32,
}
SHORT = {"max_new_tokens": 4}


def recipe(
    r: Recipe,
    base: str | None = None,
    steps: int = 2,
    lr: float = 0.01,
    cards: bool = True,
    size: Literal["small", "smaller"] = "small",
):
    if base is None:
        data = r.demos(r.domains)
        width = {"small": 16, "smaller": 8}[size]
        start = r.pretrain(data=data, steps=steps, batch_size=4, **SHAPE | {"hidden_size": width})
    else:
        start = r.model(base)
    s = r.sft(start=start, data=r.demos(r.domains), steps=steps, batch_size=4, lr=lr)
    teachers = {
        d: r.rl(
            start=s,
            prompts=r.prompts(d),
            steps=2,
            prompts_per_step=2,
            group_size=2,
            name=f"{d}_teacher",
            **SHORT,
        )
        for d in r.domains
    }
    student = r.distill(
        start=s,
        teachers=teachers,
        prompts=r.prompts(r.domains),
        steps=2,
        prompts_per_step=4,
        **SHORT,
    )
    return r.evaluate(
        student,
        teachers=teachers,
        init=s,
        num_problems=6,
        bootstrap=100,
        transcripts=2,
        **SHORT,
    )
