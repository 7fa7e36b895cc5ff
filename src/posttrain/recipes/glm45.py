"""GLM-4.5: a reasoning, an agent and a general expert, joined by SFT of the base; then general RL.

Source: GLM-4.5, arXiv 2508.06471, section 3.
In one line: `E = {reason: sft → rl(difficulty, T up), agent: for k: sft(D@previous) → rl(harder),
chat}; base → sft(select(D@E)) → rl[general] → rl[late prompts]`.
Each expert has its own cold start. Reasoning: RL without KL on moderately hard prompts, then on
those that the policy rarely solves; the temperature rises whenever the reward has stopped to.
Agent: RL, then SFT of the base on the model's own successes in place of the cold start's data, then
RL on harder prompts (iterated self-distillation). The base learns the experts' correct
samples, with and without thoughts in balance, and general RL and a last RL against pathologies
(responses that do not end, or repeat) make the model.
Left out: tools, human preferences, the function-calling experts. Domains of the suite stand for
skills: the first half for reasoning, the next for agents, the last for chat.
"""

from posttrain import Recipe, Stage, judges, schedules
from posttrain.algorithms import Repetition

MODES = ("think", "no_think")
GRPO = {"max_new_tokens": 48, "lr": 7e-5}
LATE = {"prompts_per_step": 128, "lr": 1e-4}


def recipe(r: Recipe, base: str = "tiny", iterations: int = 1) -> Stage:
    start = r.base(base, thinking=True)
    half = (len(r.domains) + 1) // 2
    skills = {"reasoning": r.domains[:half], "agent": r.domains[half:-1], "chat": r.domains[-1:]}

    chosen: dict[str, Stage] = {}
    for skill, domains in skills.items():
        for d in domains:
            cold = cold_start(r, start, r.demos(d, mode="think"), f"{d}_cold_start")
            if skill == "reasoning":
                chosen.setdefault(d, reasoning(r, cold, d))
            elif skill == "agent":
                chosen.setdefault(d, agent(r, start, cold, d, iterations))
            else:
                chosen.setdefault(d, grpo(r, cold, r.prompts(d, mode="think"), f"{d}_chat"))
    samples = r.sample(chosen, prompts=r.prompts(r.domains, mode="think"), k=4, num_prompts=500,
                       max_new_tokens=48, name="expert_samples")  # fmt: skip
    thinking = r.select(
        samples, how="correct", max_repetition=Repetition(0.5), name="thinking_data"
    )
    direct = r.select(samples, how="correct", strip_thought=True, name="direct_data")
    hybrid = r.sft(start=start, data=r.mix({thinking: 0.5, direct: 0.5}), steps=120, lr=8e-4,
                   name="hybrid")  # fmt: skip

    both = r.prompts(r.domains, mode=MODES)
    general = grpo(r, hybrid, both, "general_rl", steps=40, prompts_per_step=128, lr=2e-4)
    healthy = (
        judges.verifier() + 0.2 * judges.finished() - 0.2 * judges.repetition(unit="character")
    )
    final = grpo(r, general, both, "pathology_rl", reward=healthy, steps=10, **LATE)
    return r.evaluate(final, init=hybrid, modes=MODES, max_new_tokens=48, num_problems=200)


def reasoning(r: Recipe, cold: Stage, domain: str) -> Stage:
    """Two steps of difficulty: moderate, then what is rarely solved."""
    prompts = r.prompts(domain, mode="think")
    rates = r.profile(cold, prompts=prompts, n=8, num_prompts=400, max_new_tokens=48,
                      name=f"{domain}_rates")  # fmt: skip
    moderate = r.filter(prompts, profile=rates, low=0.1, high=0.9, at_least=50,
                        name=f"{domain}_moderate")  # fmt: skip
    hard = r.filter(prompts, profile=rates, high=0.4, at_least=50, name=f"{domain}_hard")
    rising = schedules.on_plateau(0.9, 1.2, change=0.1, patience=5)
    first = grpo(r, cold, moderate, f"{domain}_moderate_rl", temperature=rising)
    return grpo(r, first, hard, f"{domain}_reasoning", temperature=rising, steps=15)


def agent(r: Recipe, start: Stage, model: Stage, domain: str, iterations: int) -> Stage:
    """RL, its successes as the next cold start's data, RL on harder prompts."""
    prompts = r.prompts(domain, mode="think")
    model = grpo(r, model, prompts, f"{domain}_agent0")
    for k in range(1, iterations + 1):
        own = r.select(model, how="correct", name=f"{domain}_successes{k}")
        again = cold_start(r, start, own, f"{domain}_restart{k}")
        rates = r.profile(again, prompts=prompts, n=8, num_prompts=400, max_new_tokens=48,
                          name=f"{domain}_rates{k}")  # fmt: skip
        harder = r.filter(prompts, profile=rates, high=0.7, at_least=50, name=f"{domain}_harder{k}")
        model = grpo(r, again, harder, f"{domain}_agent{k}")
    return model


def cold_start(r: Recipe, start: Stage, data: object, name: str) -> Stage:
    return r.sft(start=start, data=data, steps=100, lr=1.5e-3, name=name)


def grpo(r: Recipe, start: Stage, prompts: object, name: str, **settings: object) -> Stage:
    return r.rl(start=start, prompts=prompts, name=name, **({"steps": 25} | GRPO | settings))
