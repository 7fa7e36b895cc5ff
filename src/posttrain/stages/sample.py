"""Stages that sample training problems without training: `sample` keeps what models say, `profile`
how often a model is right, which is what difficulty filters and curricula go by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from posttrain.backends.prompting import Problem, in_modes
from posttrain.engine import exact
from posttrain.engine.graph import edge_name
from posttrain.engine.jsonl import write_jsonl
from posttrain.rewards.pool import VerifierPool
from posttrain.rl.batch import Batch
from posttrain.rl.seeds import step_seed
from posttrain.stages.context import Context
from posttrain.stages.lengths import Reader, fit_prompts
from posttrain.stages.rollout import rollout, rollout_rows, verifiers
from posttrain.stages.rows import pick
from posttrain.stages.settings.data import Profile, Sample
from posttrain.stages.signs import Responses

PROMPTS_PER_CALL = 64


def run(settings: Sample, ctx: Context) -> dict[str, float]:
    """Write rollouts.jsonl: problem, response, reward (null in a domain without a verifier),
    finished, num_tokens, model, temperature, and the
    sampled token ids with whose they are (`sampled_ids.py`)."""
    verifier_pool = verifiers(ctx)
    seen = Responses()
    domains = list(ctx.domains)
    rows: list[dict[str, Any]] = []
    done, total = 0, sum(len(settings.routes[name]) for name in domains)
    models = {
        name: edge_name("models", name) for name in sorted(set(chain(*settings.routes.values())))
    }
    problems_of = fitting_problems(settings, ctx, models, begun=settings.prefix)
    for number, name in enumerate(domains):
        problems = problems_of[name]
        for place, model in enumerate(settings.routes[name]):
            tokens = 0
            for batch in responses(
                settings,
                ctx,
                edge_name("models", model),
                problems,
                verifier_pool,
                group_size=settings.k,
                number=number + place * len(domains),
                prefix=settings.prefix,
            ):
                tokens += batch.num_tokens
                seen.add(batch)
                rows += rollout_rows(batch, model=model, temperature=settings.temperature)
            done += 1
            ctx.log(done, total, tokens=tokens, **mean_reward(rows))
    # The first model of a domain stands for all of them.
    of = {name: edge_name("models", settings.routes[name][0]) for name in domains}
    seen.tell(ctx, settings.max_new_tokens, of)
    write_jsonl(ctx.out / "rollouts.jsonl", rows)
    return {"rows": len(rows), **mean_reward(rows)}


def run_profile(settings: Profile, ctx: Context) -> dict[str, float]:
    """Write profile.jsonl: id, domain, rate (mean reward) and samples (how many) per problem."""
    verifier_pool = verifiers(ctx)
    seen = Responses()
    rows: list[dict[str, Any]] = []
    problems_of = fitting_problems(settings, ctx, {"": "model"})
    for number, name in enumerate(ctx.domains):
        tokens = 0
        for batch in responses(
            settings,
            ctx,
            "model",
            problems_of[name],
            verifier_pool,
            group_size=settings.n,
            number=number,
        ):
            tokens += batch.num_tokens
            seen.add(batch)
            # One per response -> one per problem.
            rates = [
                exact.mean(group) for group in batch["reward_B"].reshape(-1, settings.n).tolist()
            ]
            rows += [
                pick(problem, "id", "domain", "mode") | {"rate": rate, "samples": settings.n}
                for problem, rate in zip(batch.problems[:: settings.n], rates, strict=True)
            ]
        ctx.log(number + 1, len(ctx.domains), tokens=tokens, reward=mean(rows, "rate"))
    seen.tell(ctx, settings.max_new_tokens, dict.fromkeys(ctx.domains, "model"))
    write_jsonl(ctx.out / "profile.jsonl", rows)
    return {
        "rows": len(rows),
        "rate": mean(rows, "rate"),
        "unsolved_share": sum(row["rate"] == 0 for row in rows) / len(rows),
        "solved_share": sum(row["rate"] >= 1 for row in rows) / len(rows),
    }


def mean_reward(rows: list[dict[str, Any]]) -> dict[str, float]:
    """`reward`, the mean over the verified responses; nothing where there is none."""
    verified = [row for row in rows if row["reward"] is not None]
    return {"reward": mean(verified, "reward")} if verified else {}


def mean(rows: list[dict[str, Any]], field: str) -> float:
    """The mean of a field over all rows."""
    return float(sum(row[field] for row in rows) / len(rows))


def chosen_problems(settings: Sample | Profile, ctx: Context, domain: str) -> list[Problem]:
    """`num_prompts` training problems from `first_prompt` on, round the end, each in each mode.

    None is there twice in a mode.
    """
    problems = ctx.problems(domain, "train")
    count = min(settings.num_prompts, len(problems))
    chosen = [problems[(settings.first_prompt + i) % len(problems)] for i in range(count)]
    return in_modes(chosen, settings.modes)


def fitting_problems(
    settings: Sample | Profile, ctx: Context, models: Mapping[str, str], begun: str = ""
) -> dict[str, list[Problem]]:
    """By domain the chosen problems whose responses fit into the positions of its models, which
    have the edges `models`; a response begins with the text `begun`."""
    routes = settings.routes if isinstance(settings, Sample) else dict.fromkeys(ctx.domains, ("",))
    readers = [
        Reader(
            name=f"model {name!r}" if name else "the model",
            chat=ctx.chat(edge),
            domains=frozenset(domain for domain, names in routes.items() if name in names),
        )
        for name, edge in models.items()
    ]
    problems = {name: chosen_problems(settings, ctx, name) for name in ctx.domains}
    new_tokens = settings.max_new_tokens
    return fit_prompts(problems, settings, ctx, readers, new_tokens=new_tokens, begun=begun)


def responses(
    settings: Sample | Profile,
    ctx: Context,
    edge: str,
    problems: list[Problem],
    verifier_pool: VerifierPool,
    *,
    group_size: int,
    number: int,
    prefix: str = "",
) -> Iterator[Batch]:
    """What the model of an edge says to `problems`, verified, some prompts at a time.

    Draws of one stage with another `number`, and of another `first_prompt`, share no random
    numbers.
    """
    sampler = ctx.sampler(edge, precision=settings.precision)
    for start in range(0, len(problems), PROMPTS_PER_CALL):
        yield rollout(
            sampler,
            problems[start : start + PROMPTS_PER_CALL],
            verifier_pool,
            group_size=group_size,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=step_seed(settings.seed, (number << 20) + settings.first_prompt + start),
            prefix=prefix,
        )
