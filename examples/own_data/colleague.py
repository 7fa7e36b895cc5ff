"""What a colleague made of the same general model, in a store of their own: a specialist."""

from posttrain import Recipe, Stage


def recipe(r: Recipe, general: str = "general", steps: int = 300) -> Stage:
    return r.rl(
        start=r.model(general),
        prompts=r.prompts("order"),
        steps=steps,
        lr=2e-4,
        advantage="group_mean",
        max_new_tokens=10,
        name="order_specialist",
    )
