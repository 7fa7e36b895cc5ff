"""The general SFT that all specialists start from, on a file of conversations."""

from posttrain import Recipe, Stage


def general(r: Recipe, base: str, steps: int) -> Stage:
    return r.sft(
        start=r.model(base),
        data=r.table("data/sft.jsonl", messages="messages", name="conversations"),
        steps=steps,
        lr=3e-3,
        name="general",
    )


def recipe(r: Recipe, base: str = "base", sft_steps: int = 500) -> Stage:
    return general(r, base, sft_steps)
