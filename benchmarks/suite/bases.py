"""The base that recipes start from, by itself: `benchmarks/recipes.py` makes it before they run."""

from posttrain import Recipe, Stage


def recipe(r: Recipe, size: str = "tiny", thinking: bool = False) -> Stage:
    base = r.base(size, thinking=thinking)
    return r.evaluate(base, init=base, num_problems=50)
