"""OLMo 3 Instruct: from the Think SFT, two DPO candidates that each get RL, and the better one.

Source: OLMo 3, arXiv 2512.13961, section 5.
In one line: `think.sft → sft → {dpo × 2} → {rl} → best`.
SFT without traces starts from the SFT model of OLMo 3 Think, not from the base. Two DPO
candidates start from it: one on delta pairs (a strong model's answer over a weak one's), one on
pairs that a judge makes out of a pool of strong and weak models, the worst answer rejected.
Answers of like length only. Each candidate gets RL on all prompts, and the better of the two by
score and length is the model.
Left out: multi-turn pairs; function calling; the vibe test. In the paper each candidate learns
from pairs of both kinds.
"""

from posttrain import Recipe, Stage, judges
from posttrain.algorithms import DpoNorm
from posttrain.recipes.olmo3_think import olmo_rl, strong, think_sft, weak


def recipe(r: Recipe, base: str = "tiny", steps: int = 40) -> Stage:
    prompts = r.prompts(r.domains, mode="no_think")
    demos = r.demos(r.domains, mode="no_think")
    start = r.base(base, thinking=True)
    think = think_sft(r, start)
    sft = r.sft(start=think, data=demos, steps=40, lr=5e-4, name="instruct_sft")

    models = {"strong": strong(r, start), "weak": weak(r, base), "own": sft}
    answers = {
        name: r.sample(model, prompts=prompts, k=1, max_new_tokens=24, name=f"{name}_answers")
        for name, model in models.items()
    }
    pairs = {
        "delta": r.pairs(answers["strong"], against=answers["weak"], name="delta"),
        "judged": r.pairs(
            list(answers.values()), judge=judges.oracle(), max_length_gap=10, name="judged"
        ),
    }
    verified = dict.fromkeys(r.domains[:-1], judges.verifier())
    reward = judges.by_domain(verified | {r.domains[-1]: 0.2 * judges.oracle()})
    candidates = {}
    for kind, data in pairs.items():
        dpo = r.dpo(
            start=sft,
            data=data,
            loss=DpoNorm(beta=5),
            epochs=1,
            lr=1e-5,
            name=f"{kind}_dpo",
        )
        candidates[kind] = olmo_rl(r, dpo, prompts, reward, steps, f"{kind}_rl")
    final = r.best(candidates, modes=("no_think",), length_weight=0.1, max_new_tokens=24)
    return r.evaluate(final, init=sft, modes=("no_think",), max_new_tokens=24)
