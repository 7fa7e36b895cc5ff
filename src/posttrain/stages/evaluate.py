"""How good is each model, how much of each teacher did the student recover, and which is the best?

All models answer the same problems, which no training stage can draw from. `evaluate` has them
answered at temperature 1 and greedily, and its report is `evaluation.json`; `rl/statistics.py` has
the arithmetic. The checkpoint of the best one becomes the stage `best`'s own.

Legend: B rows (responses).
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posttrain.backends.base import Sampler
from posttrain.backends.checkpoint_source import MODEL_FILES
from posttrain.backends.prompting import Problem, format_answer, in_modes
from posttrain.engine.graph import edge_name, named, role_of
from posttrain.rewards.judge_base import Judge
from posttrain.rewards.pool import VerifierPool
from posttrain.rl.batch import Batch, concatenate
from posttrain.rl.seeds import step_seed
from posttrain.rl.statistics import Scores, evaluation, mean_interval
from posttrain.stages.context import Context
from posttrain.stages.judging import judge_readers, make_reward, responses_of
from posttrain.stages.lengths import Reader, fit_prompts
from posttrain.stages.rollout import rollout, submit, verified_mean, verifiers
from posttrain.stages.settings.models import Best, Evaluate


def run(settings: Evaluate, ctx: Context) -> dict[str, float]:
    """Score student, init and teachers on every domain, in every mode; write evaluation.json and
    transcripts.json."""
    verifier_pool = verifiers(ctx)
    problems = problems_by_name(settings, ctx)
    models = [edge for edge in ctx.inputs if role_of(edge) != "domains"]
    problems = fitting(settings, ctx, models, problems)
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


def fitting(
    settings: Evaluate | Best,
    ctx: Context,
    edges: Sequence[str],
    problems: dict[str, list[Problem]],
) -> dict[str, list[Problem]]:
    """The problems whose responses fit into the positions of the models of these edges."""
    readers = [Reader(name=f"model {edge!r}", chat=ctx.chat(edge)) for edge in edges]
    readers += judge_readers(getattr(settings, "judge", None), ctx)
    return fit_prompts(problems, settings, ctx, readers, new_tokens=settings.max_new_tokens)


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
        # One per response -> [problems, samples]; samples of a problem are neighbours.
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
            answers_to(rows, settings, sampler, verifier_pool, number=number, samples=samples)
            for samples in (settings.samples, 0)
        )
        answers[name] = Answers(sampled, greedy, settings.transcripts)
    return answers


def answers_to(
    problems: list[Problem],
    settings: Evaluate | Best,
    sampler: Sampler,
    verifier_pool: VerifierPool,
    *,
    number: int,
    samples: int,
) -> Batch:
    """One model's verified answers to the problems of domain `number`: so many `samples` of each at
    temperature 1, or with 0 one greedy response."""
    return rollout(
        sampler,
        problems,
        verifier_pool,
        group_size=samples or 1,
        max_new_tokens=settings.max_new_tokens,
        temperature=1.0 if samples else 0.0,
        # Every model gets the same random numbers on the same problem: a paired comparison.
        seed=step_seed(settings.seed, number),
    )


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


def run_best(settings: Best, ctx: Context) -> dict[str, Any]:
    """Let all candidates answer the same problems; write best.json and the winner's files."""
    verifier_pool = verifiers(ctx)
    problems = {
        name: in_modes(ctx.problems(name, "validation")[: settings.num_problems], settings.modes)
        for name in ctx.domains
    }
    names = list(named(ctx.inputs, "candidates"))
    problems = fitting(settings, ctx, [edge_name("candidates", n) for n in names], problems)
    answers: dict[str, list[Batch]] = {}
    for number, name in enumerate(names):
        sampler = ctx.sampler(edge_name("candidates", name), precision=settings.precision)
        answers[name] = [
            answers_to(
                rows, settings, sampler, verifier_pool, number=position, samples=settings.samples
            )
            for position, rows in enumerate(problems.values())
        ]
        tokens = sum(batch.num_tokens for batch in answers[name])
        found = (verified_mean(batch["reward_B"]) for batch in answers[name])
        rewards = [reward for reward in found if reward is not None]
        about = {"reward": float(np.mean(rewards))} if rewards else {}
        ctx.log(number + 1, len(names), tokens=tokens, **about)
    worths = {name: [b["reward_B"].double() for b in of_it] for name, of_it in answers.items()}
    if settings.judge is not None:
        worths = judge_scores(settings.judge, settings, ctx, answers)
    found = {
        name: measured(settings, list(problems), of_it, worths[name])
        for name, of_it in answers.items()
    }
    # The first of equal ones: max keeps it.
    winner = max(found, key=lambda name: found[name]["value"])
    result = {"winner": winner, "metric": settings.metric, "split": "validation"}
    text = json.dumps(result | {"candidates": found}, indent=1)
    (ctx.out / "best.json").write_text(text, encoding="utf-8")
    take_over(ctx.inputs[edge_name("candidates", winner)], ctx.out)
    summary: dict[str, Any] = {"winner": winner, "score": found[winner]["value"]}
    for name, scores in found.items():
        summary |= {f"score/{name}": scores["value"]}
        summary |= {f"{end}/{name}": scores[end] for end in ("low", "high")}
    return summary


def judge_scores(
    judge: Judge, settings: Best, ctx: Context, answers: dict[str, list[Batch]]
) -> dict[str, list[Tensor]]:
    """The judge's scores (float64) of all answers, those of all candidates to a problem in one
    group: a judge that compares responses compares the candidates."""
    of_candidates = [concatenate(batches) for batches in answers.values()]
    group_B = torch.cat([batch["group_B"] for batch in of_candidates])
    together = concatenate(of_candidates)
    together["group_B"] = group_B
    cut = settings.on_long == "truncate"
    reward = make_reward(judge, ctx, precision=settings.precision, seed=settings.seed, cut=cut)
    scores, _ = reward.score(responses_of(together))
    score_B = torch.tensor(scores, dtype=torch.float64)
    split = iter(score_B.split([len(b) for batches in answers.values() for b in batches]))
    return {name: [next(split) for _ in batches] for name, batches in answers.items()}


def measured(
    settings: Best, domains: list[str], answers: list[Batch], worths: list[Tensor]
) -> dict[str, Any]:
    """What a candidate is worth, with its interval.

    The value is a mean over domains of the mean over problems of worth minus `length_weight` times
    length in `max_new_tokens`.
    """
    means = []
    for batch, worth_B in zip(answers, worths, strict=True):
        length_B = batch.sampled_len_B.double()
        net_B = worth_B - settings.length_weight * length_B / settings.max_new_tokens
        count = int(batch["group_B"].max()) + 1
        means.append(net_B.reshape(count, -1).mean(dim=1).numpy())
    interval = mean_interval(means, resamples=settings.bootstrap, seed=settings.seed)
    means_B = (verified_mean(batch["reward_B"].double()) for batch in answers)
    rewards = {n: r for n, r in zip(domains, means_B, strict=True) if r is not None}
    length = sum(batch.num_tokens for batch in answers) / sum(map(len, answers))
    reward = {"reward": float(np.mean(list(rewards.values())))} if rewards else {}
    return interval | reward | {"response_length": length, "rewards": rewards}


def take_over(source: Path, out: Path) -> None:
    """The files of a model in another place without copying, where the file system allows it."""
    for path in sorted(source.iterdir()):
        if not any(fnmatch(path.name, pattern) for pattern in MODEL_FILES):
            continue
        target = out / path.name
        target.unlink(missing_ok=True)
        # What a link of an outside checkpoint points at may change; links keep pointing at it.
        if path.is_symlink():
            target.symlink_to(path.resolve())
            continue
        try:
            os.link(path, target)
        except OSError:
            shutil.copyfile(path, target)
