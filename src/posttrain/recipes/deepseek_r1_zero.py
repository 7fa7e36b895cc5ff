"""DeepSeek-R1-Zero: reinforcement learning from the base by rules alone.

Source: DeepSeek-R1, arXiv 2501.12948, section 2.2; settings of the Nature version.
In one line: `base → rl[rule + format](GRPO, reference := policy from time to time)`.
GRPO from the base, no SFT before it. Rewards are accuracy and format. KL of 0.001 (k3, in the
loss) to a reference that becomes the policy from time to time; 16 responses to each of 32
prompts; one batch of rollouts is 16 minibatches; a clip at 10 that only outliers meet; responses
may grow longer from four fifths of the run on.
Left out: code. 10,400 steps are `steps`, and lengths, learning rate and times are scaled down.
"""

from posttrain import Recipe, Stage, judges, schedules
from posttrain.algorithms import KL, Clip

FORMAT = judges.format(r"(?s)^<think>.+</think>.+")


def recipe(r: Recipe, base: str = "tiny", steps: int = 50) -> Stage:
    start = r.base(base, thinking=True)
    final = zero(r, start, r.domains, steps)
    return r.evaluate(final, init=start, modes=("think",), max_new_tokens=64)


def zero(r: Recipe, start: Stage, domains: tuple[str, ...], steps: int) -> Stage:
    """R1-Zero from `start` on some domains."""
    return r.rl(
        start=start,
        prompts=r.prompts(domains, mode="think"),
        reward=judges.verifier() + 0.1 * FORMAT,
        advantage="group_zscore",
        aggregation="sequence",
        group_size=16,
        prompts_per_step=32,
        num_minibatches=16,
        surrogate=Clip(1.0, 10.0),
        kl=KL(0.001, estimator="k3", reference_every=max(1, steps // 26)),
        max_new_tokens=schedules.steps({0: 40, steps * 4 // 5: 64}),
        steps=steps,
        lr=3e-5,
        lr_decay="constant",
        name="r1_zero",
    )
