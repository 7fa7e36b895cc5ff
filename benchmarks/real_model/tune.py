"""One specialist on validation problems: where it starts, what the light SFT and then RL add.

Source: benchmarks/README.md, "A real language model".
In one line: `base → sft → sft(d) → rl[d]`.
For choosing settings: the stages are those of `mopd`, so what was made here is there for it. Only
the evaluation is another one, on the validation split.
"""

from posttrain import Recipe, Stage
from posttrain.engine.errors import ConfigError
from posttrain.recipes.mopd import specialist


def recipe(r: Recipe, base: str, domain: str) -> Stage:
    if domain not in r.domains:
        raise ConfigError(f"domain = {domain!r} is none of {', '.join(r.domains)}")
    start = r.model(base)
    sft = r.sft(start=start, data=r.demos(r.domains), steps=40, lr=5e-4)
    teacher = specialist(r, domain, sft)
    return r.evaluate(
        teacher,
        init=r.stage(f"{domain}_sft"),
        along={"base": start, "sft": sft},
        domains=[domain],
        split="validation",
        name="tuning",
    )
