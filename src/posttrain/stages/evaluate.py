"""How good is each model, and how much of each teacher did the student recover?

All models answer the same problems, which no training stage can draw from, at temperature 1 and
greedily. The report of it is `evaluation.json`; `rl/statistics.py` has the arithmetic.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np

from posttrain.backends.base import Sampler
from posttrain.backends.prompting import Problem, format_answer, in_modes
from posttrain.engine.graph import role_of
from posttrain.rewards.pool import VerifierPool
from posttrain.rl.batch import Batch
from posttrain.rl.seeds import step_seed
from posttrain.rl.statistics import Scores, evaluation
from posttrain.stages.context import Context
from posttrain.stages.rollout import rollout, submit, verifiers
from posttrain.stages.settings.models import Evaluate


def run(settings: Evaluate, ctx: Context) -> dict[str, float]:
    """Score student, init and teachers on every domain, in every mode; write evaluation.json and
    transcripts.json."""
    verifier_pool = verifiers(ctx)
    problems = problems_by_name(settings, ctx)
    models = [edge for edge in ctx.inputs if role_of(edge) != "domains"]
    scores: dict[str, dict[str, Scores]] = {}
    said: dict[str, dict[str, list[str]]] = {}
    transcripts: dict[str, list[dict[str, Any]]] = {
        name: [{"prompt": p["prompt"], "answer": p["answer"], "responses": {}} for p in rows]
        for name, rows in ((n, r[: settings.transcripts]) for n, r in problems.items())
    }
    for number, edge in enumerate(models):
        sampler = ctx.sampler(edge, precision=settings.precision)
        answers = answer_all(settings, sampler, problems, verifier_pool)
        scores[edge] = {name: answer.scores for name, answer in answers.items()}
        for name, answer in answers.items():
            said.setdefault(name, {})[edge] = answer.texts
            for shown, row in zip(transcripts[name], answer.shown, strict=False):
                shown["responses"][edge] = row
        ctx.log(number + 1, len(models), tokens=sum(a.num_tokens for a in answers.values()))
    constants = {
        name: best_constant(rows, said[name], verifier_pool) for name, rows in problems.items()
    }
    result = evaluation(
        scores,
        routes={
            name: settings.routes[key]
            for name, rows in problems.items()
            for key in (name, rows[0]["domain"])
            if key in settings.routes
        },
        constants=constants,
        resamples=settings.bootstrap,
        seed=settings.seed,
    )
    result |= {"split": settings.split, "samples": settings.samples}
    (ctx.out / "evaluation.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    (ctx.out / "transcripts.json").write_text(
        json.dumps(transcripts, ensure_ascii=False, indent=1), encoding="utf-8"
    )
    summary = {f"student/{n}": row["student"]["value"] for n, row in result["domains"].items()}
    return summary if result["norm"] is None else summary | {"norm": result["norm"]}


def problems_by_name(settings: Evaluate, ctx: Context) -> dict[str, list[Problem]]:
    """The problems by what is reported: the domain, or with modes `domain/mode`."""
    found: dict[str, list[Problem]] = {}
    for name in ctx.domains:
        rows = ctx.problems(name, settings.split)[: settings.num_problems]
        if not settings.modes:
            found[name] = rows
        for mode in settings.modes:
            found[f"{name}/{mode}"] = in_modes(rows, [mode])
    return found


class Answers:
    """One model's answers to one domain."""

    def __init__(self, sampled: Batch, greedy: Batch, num_shown: int) -> None:
        count = len(greedy)
        by_problem = sampled["reward_B"].reshape(count, -1)
        self.scores = Scores(
            sampled=by_problem.mean(dim=1).double().numpy(),
            greedy=greedy["reward_B"].double().numpy(),
        )
        self.texts = greedy.texts
        self.num_tokens = sampled.num_tokens + greedy.num_tokens
        per_problem = by_problem.shape[1]
        self.shown = [
            {
                "sampled": sampled.texts[i * per_problem],
                "sampled_score": float(by_problem[i, 0]),
                "greedy": greedy.texts[i],
                "greedy_score": float(greedy["reward_B"][i]),
            }
            for i in range(min(num_shown, count))
        ]


def answer_all(
    settings: Evaluate,
    sampler: Sampler,
    problems: dict[str, list[Problem]],
    verifier_pool: VerifierPool,
) -> dict[str, Answers]:
    """One model's sampled and greedy answers to all domains."""
    answers = {}
    for number, (name, rows) in enumerate(problems.items()):
        sampled, greedy = (
            rollout(
                sampler,
                rows,
                verifier_pool,
                group_size=group_size,
                max_new_tokens=settings.max_new_tokens,
                temperature=temperature,
                # Every model gets the same random numbers on the same problem: a paired comparison.
                seed=step_seed(settings.seed, number),
            )
            for group_size, temperature in ((settings.samples, 1.0), (1, 0.0))
        )
        answers[name] = Answers(sampled, greedy, settings.transcripts)
    return answers


def best_constant(
    problems: list[Problem], texts: dict[str, list[str]], verifier_pool: VerifierPool
) -> dict[str, Any]:
    """The one response that scores best when given to every problem.

    Tried are the most common demonstrations and answers, and what the models say most often. A
    specialist near this value has learned the majority answer and nothing else.
    """
    tries: Counter[str] = Counter()
    # Not a set: its order, which decides between equals, is another one in every process.
    answers = ((p["demo"], format_answer(p["answer"], p.get("mode"))) for p in problems)
    gold = (text for demo, answer in answers for text in dict.fromkeys((demo or answer, answer)))
    for source in (gold, *texts.values()):
        tries.update(dict(Counter(source).most_common(5)))
    pending = {
        text: submit(verifier_pool, range(len(problems)), [text] * len(problems), problems)
        for text, _ in tries.most_common(25)
    }
    values = {
        text: float(np.mean([score for _, scores in parts for score in scores.result()]))
        for text, parts in pending.items()
    }
    best = max(values, key=lambda text: values[text])
    return {"value": values[best], "response": best}
