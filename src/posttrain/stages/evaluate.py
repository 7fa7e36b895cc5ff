"""How good is each model, how much of each teacher did the student recover, and which is the best?

All models answer the same problems, which no training stage can draw from. `evaluate` has them
answered at temperature 1 and greedily, and its report is `evaluation.json`; `rl/statistics.py` has
the arithmetic, and `stages/unverified.py` what is said about domains without a verifier and by
judges. The checkpoint of the best one becomes the stage `best`'s own.

Legend: B rows (responses).
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posttrain.backends.base import Sampler
from posttrain.backends.checkpoint import write_pointer
from posttrain.backends.outside.adapters import is_adapter, read_pointer
from posttrain.backends.outside.files import model_files
from posttrain.backends.prompting import Problem, asked, asked_key, format_answer, in_modes
from posttrain.engine.graph import edge_name, named, role_of
from posttrain.rewards.judge_base import Judge
from posttrain.rewards.pool import VerifierPool
from posttrain.rl.batch import Batch, concatenate
from posttrain.rl.seeds import step_seed
from posttrain.rl.statistics import Scores, candidates, evaluation, mean_interval
from posttrain.stages.context import Context
from posttrain.stages.judging import judge_readers, make_reward, responses_of
from posttrain.stages.lengths import Reader, fit_prompts
from posttrain.stages.rollout import rollout, submit, verified_mean, verifiers
from posttrain.stages.settings.models import Best, Evaluate
from posttrain.stages.signs import ends
from posttrain.stages.unverified import Behaviour, behaviours, judge_all, routes_of

SINGLE = {"student", "init", "teachers"}
"""Roles of the models of an evaluation of one student, whose file has a simpler form."""


def run(settings: Evaluate, ctx: Context) -> dict[str, float]:
    """Score every model on every domain, in every mode; write evaluation.json and
    transcripts.json."""
    verifier_pool = verifiers(ctx)
    problems = problems_by_name(settings, ctx)
    models = {
        edge: path
        for edge, path in ctx.inputs.items()
        if role_of(edge) not in ("domains", "judges")
    }
    problems = fitting(settings, ctx, list(models), problems)
    answers = all_answers(settings, ctx, models, problems, verifier_pool)
    scored = {name: rows for name, rows in problems.items() if is_verified(rows, verifier_pool)}
    single = is_single(settings, models, len(scored) == len(problems))
    result = results(settings, ctx, models, scored, answers, verifier_pool, single=single)
    if not single:
        silent = {name: rows for name, rows in problems.items() if name not in scored}
        result["unverified"] = behaviours(settings, models, silent, answers)
        result["judged"] = judge_all(settings, ctx, models, problems, answers)
    result |= {"split": settings.split, "samples": settings.samples}
    transcripts = {
        name: shown(rows[: settings.transcripts], {e: answers[p][name] for e, p in models.items()})
        for name, rows in problems.items()
    }
    (ctx.out / "evaluation.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    (ctx.out / "transcripts.json").write_text(
        json.dumps(transcripts, ensure_ascii=False, indent=1), encoding="utf-8"
    )
    return summary_of(result)


def all_answers(
    settings: Evaluate,
    ctx: Context,
    models: Mapping[str, Path],
    problems: Mapping[str, list[Problem]],
    verifier_pool: VerifierPool,
) -> dict[Path, dict[str, Answers]]:
    """Each model's answers to all problems; a model that has several roles is asked once."""
    answers: dict[Path, dict[str, Answers]] = {}
    behaviour = Behaviour(settings, ctx, models, problems)
    truncated: list[str] = []
    for edge, path in models.items():
        if path in answers:
            continue
        sampler = ctx.sampler(edge, precision=settings.precision)
        found = answers[path] = {}
        for number, (name, rows) in enumerate(problems.items()):
            verified = is_verified(rows, verifier_pool)
            sampled, greedy = (
                answers_to(rows, settings, sampler, verifier_pool, number=number, samples=samples)
                for samples in (settings.samples, 0)
            )
            found[name] = Answers(sampled, greedy, verified=verified)
            if not verified:
                found[name].behaviour = behaviour.of(path, name, sampler.chat, sampled)
        tokens = sum(answer.num_tokens for answer in found.values())
        ctx.log(len(answers), len(set(models.values())), tokens=tokens)
        own = own_answers(settings, edge, problems, found)
        ended = [e for answer in own.values() for e in answer.responses["sampled"].finished]
        if 2 * ended.count(False) > len(ended):
            share = 100 * ended.count(False) / len(ended)
            name = edge.partition(".")[2] or edge
            truncated.append(f"{share:.0f} % of {name}, which ends with {ends(sampler.chat)}")
    if truncated:
        ctx.warn(
            f"more than half of a model's responses at temperature 1 were cut at max_new_tokens = "
            f"{settings.max_new_tokens} ({'; '.join(truncated)}), and verifiers give a cut "
            "response 0; raise max_new_tokens, or look whether the model ends its responses"
        )
    return answers


def results(
    settings: Evaluate,
    ctx: Context,
    models: Mapping[str, Path],
    problems: Mapping[str, list[Problem]],
    answers: Mapping[Path, Mapping[str, Answers]],
    verifier_pool: VerifierPool,
    *,
    single: bool,
) -> dict[str, Any]:
    """What is said about the verified domains, `problems`: of a `single` student with an init what
    `statistics.evaluation` says, else what `statistics.candidates` says."""
    scores: dict[str, dict[str, Scores]] = {}
    for edge, path in models.items():
        of_model = {name: answers[path][name].scores for name in problems}
        scores[edge] = {name: found for name, found in of_model.items() if found is not None}
    constants = {
        name: best_constant(
            rows, {edge: answers[path][name].texts for edge, path in models.items()}, verifier_pool
        )
        for name, rows in problems.items()
    }
    how: dict[str, Any] = {
        "routes": routes_of(settings, problems),
        "constants": constants,
        "resamples": settings.bootstrap,
        "seed": settings.seed,
    }
    told_nothing = []
    for name in problems:
        values = [getattr(scores[edge][name], d) for edge in models for d in ("sampled", "greedy")]
        if len(np.unique(np.concatenate(values))) == 1:
            told_nothing.append(f"{name}: {values[0][0]:g} on all {len(values[0])} problems")
    if told_nothing:
        ctx.warn(
            f"every response of every model has the same score ({'; '.join(told_nothing)}), so "
            "nothing can be told from it; look at the transcripts and at the domain's verifier"
        )
    if single:
        return evaluation(scores, **how)
    students = {name: edge_name("students", name) for name in named(models, "students")}
    return candidates(
        scores,
        students=students or {"student": "student"},
        along={name: edge_name("along", name) for name in named(models, "along")},
        **how,
    )


def is_verified(rows: Sequence[Problem], verifier_pool: VerifierPool) -> bool:
    """Whether the domain of these problems has a verifier."""
    return rows[0]["domain"] not in verifier_pool.unverified


def is_single(settings: Evaluate, models: Mapping[str, Path], all_verified: bool) -> bool:
    """Whether it is about one student with its init, in verified domains, and nothing else."""
    roles = {role_of(edge) for edge in models}
    return all_verified and not settings.judges and {"student", "init"} <= roles <= SINGLE


def summary_of(result: Mapping[str, Any]) -> dict[str, float]:
    """The numbers for the record: accuracies at temperature 1, Norm, judges' scores, KL."""
    if "students" not in result:
        summary = {f"student/{n}": row["student"]["value"] for n, row in result["domains"].items()}
        return summary if result["norm"] is None else summary | {"norm": result["norm"]}
    summary = {}
    for student, view in result["students"].items():
        edge = student if student in result["models"] else edge_name("students", student)
        for name, row in view["domains"].items():
            summary[f"{student}/{name}"] = row["student"]["value"]
        if view["norm"] is not None:
            summary[f"norm/{student}"] = view["norm"]
        for name, row in result["judged"].items():
            for key in ("score", "win"):
                if row["models"][edge][key] is not None:
                    summary[f"{key}/{student}/{name}"] = row["models"][edge][key]["value"]
        for name, row in result["unverified"].items():
            if row["models"][edge]["kl_init"] is not None:
                summary[f"kl_init/{student}/{name}"] = row["models"][edge]["kl_init"]["value"]
    return summary


def own_answers(
    settings: Evaluate,
    edge: str,
    problems: Mapping[str, list[Problem]],
    answers: Mapping[str, Answers],
) -> Mapping[str, Answers]:
    """Those that a model is there to give: of a teacher in the domains that it teaches, of another
    model all."""
    if role_of(edge) != "teachers":
        return answers
    routes = routes_of(settings, problems)
    return {n: a for n, a in answers.items() if edge_name("teachers", routes.get(n, "")) == edge}


def shown(problems: Sequence[Problem], answers: Mapping[str, Answers]) -> list[dict[str, Any]]:
    """The first problems with what each model, by edge, said and what that scored."""
    return [
        {
            "prompt": problem["prompt"],
            "answer": problem["answer"],
            "responses": {edge: answer.shown(number) for edge, answer in answers.items()},
        }
        for number, problem in enumerate(problems)
    ]


def fitting(
    settings: Evaluate | Best,
    ctx: Context,
    edges: Sequence[str],
    problems: dict[str, list[Problem]],
) -> dict[str, list[Problem]]:
    """The problems whose responses fit into the positions of the models of these edges."""
    readers = [Reader(name=f"model {edge!r}", chat=ctx.chat(edge)) for edge in edges]
    if isinstance(settings, Best):
        readers += judge_readers(settings.judge, ctx)
    else:
        for domain, judge in settings.judges.items():
            own = frozenset({domain})
            readers += [replace(reader, domains=own) for reader in judge_readers(judge, ctx)]
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


def _asked(problem: Problem) -> Hashable:
    """What a problem is in all of its modes; ids of a user's table may repeat."""
    return problem["id"], asked_key(asked(problem))


class Answers:
    """One model's answers to one domain."""

    def __init__(self, sampled: Batch, greedy: Batch, *, verified: bool) -> None:
        self.count = len(greedy)
        self.num_tokens = sampled.num_tokens + greedy.num_tokens
        self.responses = {"sampled": responses_of(sampled), "greedy": responses_of(greedy)}
        self.scores: Scores | None = None
        self.behaviour: dict[str, Any] | None = None
        """Where nothing is verified: KL, lengths, share of truncated responses."""
        self.judged: dict[str, Sequence[float]] = {}
        """Decoding to a judge's score of each response, where there is a judge."""
        if verified:
            # One per response -> [problems, samples]; samples of a problem are neighbours.
            by_problem = sampled["reward_B"].reshape(self.count, -1)
            self.scores = Scores(
                sampled=by_problem.mean(dim=1).numpy(),
                greedy=greedy["reward_B"].numpy(),
                problems=[_asked(problem) for problem in greedy.problems],
            )
        else:
            self.responses = {d: replace(r, verdicts=None) for d, r in self.responses.items()}

    @property
    def texts(self) -> Sequence[str]:
        """The greedy responses."""
        return self.responses["greedy"].texts

    def shown(self, problem: int) -> dict[str, Any]:
        """The first sampled response to a problem and the greedy one, with scores."""
        found: dict[str, Any] = {}
        for decoding, responses in self.responses.items():
            row = problem * (len(responses) // self.count)
            score = None if responses.verdicts is None else responses.verdicts[row]
            found |= {decoding: responses.texts[row], f"{decoding}_score": score}
            if decoding in self.judged:
                found[f"{decoding}_judged"] = self.judged[decoding][row]
        return found


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
    problems: list[Problem], texts: Mapping[str, Sequence[str]], verifier_pool: VerifierPool
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
        # Without a verifier a judge alone can say what a response is worth.
        if settings.judge is not None or name not in verifier_pool.unverified
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
    worths = {name: [b["reward_B"] for b in of_it] for name, of_it in answers.items()}
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
    means, problems = {}, {}
    for name, batch, worth_B in zip(domains, answers, worths, strict=True):
        length_B = batch.sampled_len_B.double()
        net_B = worth_B - settings.length_weight * length_B / settings.max_new_tokens
        count = int(batch["group_B"].max()) + 1
        means[name] = net_B.reshape(count, -1).mean(dim=1).numpy()
        # Modes of one problem are rows of their own.
        problems[name] = [_asked(p) for p in batch.problems[:: len(batch) // count]]
    interval = mean_interval(
        means, resamples=settings.bootstrap, seed=settings.seed, problems=problems
    )
    means_B = (verified_mean(batch["reward_B"]) for batch in answers)
    rewards = {n: r for n, r in zip(domains, means_B, strict=True) if r is not None}
    length = sum(batch.num_tokens for batch in answers) / sum(map(len, answers))
    reward = {"reward": float(np.mean(list(rewards.values())))} if rewards else {}
    return interval | reward | {"response_length": length, "rewards": rewards}


def take_over(source: Path, out: Path) -> None:
    """The files of a model in another place without copying, where the file system allows it."""
    pointer = read_pointer(source) if is_adapter(source) else None
    if pointer is not None:
        write_pointer(pointer, out)
    for name in model_files(source):
        path, target = source / name, out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        # What a link of an outside checkpoint points at may change; links keep pointing at it.
        if path.is_symlink():
            target.symlink_to(path.resolve())
            continue
        try:
            os.link(path, target)
        except OSError:
            shutil.copyfile(path, target)
