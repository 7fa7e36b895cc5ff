"""What each kind of stage computes, by its settings: named in the table of kinds as `work`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from posttrain.engine.graph import edge_name, named, role_of
from posttrain.estimate.parts import Part, Rows, View, Work

PROMPTS_PER_CALL = 64
"""As `stages/sample.py` has it."""
TEACHER_TOKENS = 1024
"""Tokens that teachers read together while the student samples (`stages/teachers.py`)."""
READ_PER_CALL = 512
"""Rows that a reference or a judge reads at once, about."""


def nothing(view: View) -> Work:
    """A stage without a model: its rows are handled one by one."""
    data = view.data("data", "rollouts", "prompts", "profile")
    return Work(rows=data.count, kept_rows=data.count, kept_tokens=data.prompt + data.response)


def domain(view: View) -> Work:
    """Making or reading the problems of a domain."""
    count = float(sum(sum(view.problems(split).values()) for split in SPLITS))
    return Work(rows=count, kept_rows=count, kept_tokens=100)


SPLITS = ("train", "validation", "heldout")


def model(view: View) -> Work:
    """Linking a checkpoint: nothing is computed or copied."""
    return Work()


def merge(view: View) -> Work:
    """Reading some models and writing one."""
    return Work(saves=True)


def pretrain(view: View) -> Work:
    """Learning documents, from nothing."""
    rows = view.prompts()
    if view.settings.loss_on == "all":
        # Every token but the first.
        rows = replace(rows, prompt=1.0, response=rows.prompt + rows.response - 1)
    return _imitating(view, rows, view.settings.steps, edge="")


def sft(view: View) -> Work:
    """Learning demonstrations."""
    rows = view.data("data")
    if view.settings.hint is not None:
        rows = replace(rows, count=2 * rows.count)
    steps = view.settings.num_steps(round(rows.count), round(view.number("batch_size")))
    return _imitating(view, rows, steps, edge="start")


def _imitating(view: View, rows: Rows, steps: float, *, edge: str) -> Work:
    learn = _learn(rows, edge=edge, calls=steps, rows=view.number("batch_size"))
    parts = [learn, *_aux(view, edge, steps)]
    return Work(parts=parts, saves=True, steps=steps, read_rows=rows.count)


def dpo(view: View) -> Work:
    """Learning from pairs, which a reference reads first."""
    pairs = view.data("data")
    steps = view.settings.num_steps(round(pairs.count), round(view.number("batch_size")))
    learn = _learn(pairs, calls=steps, rows=2 * view.number("batch_size"), group=2.0)
    parts = [learn, *_aux(view, "start", steps)]
    if view.settings.loss.kind != "simpo":
        edge = "reference" if "reference" in view.inputs else "start"
        parts.append(_score(edge, pairs, rows=2 * pairs.count, group=2.0))
    return Work(parts=parts, saves=True, steps=steps, read_rows=2 * pairs.count)


def reward_model(view: View) -> Work:
    """Learning which response of a pair is better."""
    pairs, settings = view.data("data"), view.settings
    kept = pairs.count * (1 - settings.holdout)
    steps = settings.num_steps(round(kept), round(view.number("batch_size")))
    learn = _learn(pairs, calls=steps, rows=2 * view.number("batch_size"), group=2.0)
    held = _score("start", pairs, rows=2 * pairs.count * settings.holdout, group=2.0)
    return Work(parts=[learn, held], saves=True, steps=steps, read_rows=2 * pairs.count)


def rl(view: View) -> Work:
    """Sampling groups, reading them with what judges and holds, and learning from them."""
    s, steps = view.settings, float(view.settings.steps)
    group = view.number("group_size")
    sampled = _sampled(view, steps, view.number("prompts_per_step") * group, group)
    share = view.measured("train_fraction", 1.0)
    updates = float(s.num_minibatches)
    learned = _as_learned(sampled, rows=sampled.rows * share, updates=updates)
    parts = [sampled, learned]
    if s.kl is not None:
        parts.append(_as_read(sampled, "start"))
    if s.num_minibatches > 1 and s.correction is not None:
        parts.append(replace(_as_read(learned, "start"), policy=True))
    if s.uses_critic:
        edge = "critic" if "critic" in view.inputs else "start"
        values = replace(_as_read(sampled, edge), policy=True)
        parts += [replace(learned, edge=edge, policy=False), values]
    how = getattr(s.draw, "reprofile", None)
    if how is not None and how.every:
        rows = how.prompts * how.samples * len(named(view.inputs, "domains"))
        calls = steps // how.every
        parts.append(replace(sampled, calls=calls, rows=rows, group=how.samples))
    parts += [_as_read(sampled, edge) for edge in _judges(view, view.config.get("reward"))]
    parts += _aux(view, "start", steps * s.num_minibatches)
    return Work(
        parts=parts,
        saves=True,
        steps=steps,
        read_rows=view.prompts().count,
        kept_rows=steps * sampled.rows,
        kept_tokens=sampled.prompt + 2 * sampled.response,
    )


def distill(view: View) -> Work:
    """Sampling, reading with the teacher of each row, and learning from that."""
    s, steps = view.settings, float(view.settings.steps)
    group = view.number("samples_per_prompt")
    sampled = _sampled(view, steps, view.number("prompts_per_step") * group, group)
    exact = s.estimator.kind not in ("sampled_token", "top_k")
    learned = replace(_as_learned(sampled, updates=float(s.num_minibatches)), pair=exact)
    taught = [name for route in s.routes.values() for name in _names(route)]
    # They read while the student samples, some rows at a time.
    times = max(1, math.ceil(sampled.read / TEACHER_TOKENS))
    read = replace(sampled, calls=steps * times, rows=sampled.rows / times)
    teachers = [
        _as_read(
            replace(read, rows=read.rows * taught.count(name) / len(taught)),
            edge_name("teachers", name),
        )
        for name in dict.fromkeys(taught)
    ]
    aux = _aux(view, "start", steps * s.num_minibatches)
    parts = [sampled, learned, *teachers, *aux]
    return Work(parts=parts, saves=True, steps=steps, read_rows=view.prompts().count)


def evaluate(view: View) -> Work:
    """Every model answers the same problems, sampled and greedily."""
    s = view.settings
    roles = ("domains", "judges")
    models = {source: edge for edge, source in view.inputs.items() if role_of(edge) not in roles}
    parts: list[Part] = []
    for edge in models.values():
        parts += _answered(view, edge, s.split, s.num_problems, [s.samples, 1])
    rows = 2.0 * len(models) * sum(view.problems(s.split).values())
    read = sum(part.rows for part in parts if part.edge == next(iter(models.values()), ""))
    for edge in _judges(view, view.config.get("judges")):
        rows_read = _score(edge, _rows_of(parts), rows=read * len(models), group=s.samples)
        parts.append(rows_read)
    return Work(parts=parts, rows=rows)


def best(view: View) -> Work:
    """Every candidate answers validation problems."""
    s = view.settings
    parts: list[Part] = []
    for edge in (edge_name("candidates", name) for name in named(view.inputs, "candidates")):
        parts += _answered(view, edge, "validation", s.num_problems, [s.samples or 1])
    for edge in _judges(view, view.config.get("judge")):
        parts.append(_score(edge, _rows_of(parts), rows=sum(p.calls * p.rows for p in parts)))
    return Work(parts=parts)


def harness(view: View) -> Work:
    """Tasks of lm-eval: the model is read; what it is asked is known when the tasks are loaded. No
    recipe has such a stage, so that no plan tells of it."""
    return Work(parts=[])


def sample(view: View) -> Work:
    """Models answer training problems of their domains."""
    s = view.settings
    parts = [
        _chosen(view, edge_name("models", name), domain, s.k)
        for domain, names in s.routes.items()
        for name in names
    ]
    rows = sum(part.calls * part.rows for part in parts)
    tokens = sum(part.prompt + 2 * part.response for part in parts) / max(1, len(parts))
    return Work(parts=parts, kept_rows=rows, kept_tokens=tokens)


def profile(view: View) -> Work:
    """A model answers the same problems several times."""
    domains = named(view.inputs, "domains")
    return Work(parts=[_chosen(view, "model", name, view.settings.n) for name in domains])


def score(view: View) -> Work:
    """A judge reads rollouts."""
    data = view.data("rollouts", "data")
    parts = [_score(e, data, rows=data.count) for e in _judges(view, view.config.get("judge"))]
    parts = [replace(part, policy=True) for part in parts]
    tokens = data.prompt + 2 * data.response
    return Work(parts=parts, rows=data.count, kept_rows=data.count, kept_tokens=tokens)


def pairs(view: View) -> Work:
    """Responses against each other, by a judge where there is one."""
    data = view.data("rollouts", "data")
    parts = [_score(e, data, rows=data.count) for e in _judges(view, view.config.get("judge"))]
    tokens = data.prompt + 4 * data.response
    return Work(parts=parts, rows=data.count, kept_rows=data.count / 2, kept_tokens=tokens)


# -- parts that several have -----------------------------------------------------------------------


def _sampled(view: View, calls: float, rows: float, group: float) -> Part:
    """What the policy says to the prompts of a step."""
    prompts, most = view.prompts(), view.number("max_new_tokens")
    return Part(
        do="sample",
        calls=calls,
        rows=rows,
        group=group,
        prompt=prompts.prompt,
        response=view.said("start", most),
        longest=prompts.longest + most,
    )


def _chosen(view: View, edge: str, domain: str, group: float) -> Part:
    """What a model says to the prompts of a domain that the settings choose."""
    s = view.settings
    count = min(s.num_prompts, view.problems("train").get(domain, s.num_prompts))
    count *= max(1, len(s.modes))
    at_once = min(count, PROMPTS_PER_CALL)
    prompts = view.prompts()
    return Part(
        do="sample",
        edge=edge,
        calls=count / max(1, at_once),
        rows=at_once * group,
        group=group,
        prompt=prompts.prompt,
        response=view.said(edge, s.max_new_tokens),
        longest=prompts.longest + s.max_new_tokens,
    )


def _answered(view: View, edge: str, split: str, most: int, each: list[int]) -> Iterator[Part]:
    """What a model says to the problems of a split, so many times each, one call for each domain
    and mode."""
    s, prompts = view.settings, view.prompts()
    counts = [min(most, count) for count in view.problems(split).values()]
    modes = max(1, len(s.modes))
    calls = float(modes * len(counts))
    for group in each:
        if calls:
            yield Part(
                do="sample",
                edge=edge,
                calls=calls,
                rows=group * sum(counts) / len(counts),
                group=group,
                prompt=prompts.prompt,
                response=view.said(edge, s.max_new_tokens),
                longest=prompts.longest + s.max_new_tokens,
            )


def _learn(
    data: Rows, *, edge: str = "start", calls: float, rows: float, group: float = 1.0
) -> Part:
    """Rows such as these, so many in each step."""
    return Part(
        do="learn",
        edge=edge,
        calls=calls,
        rows=rows,
        group=group,
        prompt=data.prompt,
        response=data.response,
        longest=data.longest,
    )


def _as_learned(sampled: Part, *, rows: float | None = None, updates: float) -> Part:
    """The rows of a step, learned from."""
    rows = sampled.rows if rows is None else rows
    return replace(sampled, do="learn", rows=rows, updates=updates)


def _as_read(rows: Part, edge: str) -> Part:
    """The same rows, read by another model."""
    return replace(rows, do="score", edge=edge, policy=False, updates=0.0, pair=False)


def _score(edge: str, data: Rows, *, rows: float, group: float = 1.0) -> Part:
    """Rows that a model reads, some hundred at a time."""
    calls = max(1.0, rows / READ_PER_CALL)
    return Part(
        do="score",
        edge=edge,
        calls=calls,
        rows=rows / calls,
        group=group,
        prompt=data.prompt,
        response=data.response,
        longest=data.longest,
        policy=False,
    )


def _rows_of(parts: list[Part]) -> Rows:
    """Rows such as the first of these has."""
    if not parts:
        return Rows(count=0, prompt=0, response=0, longest=0)
    first = parts[0]
    return Rows(
        count=first.rows, prompt=first.prompt, response=first.response, longest=first.longest
    )


def _aux(view: View, edge: str, calls: float) -> list[Part]:
    """The rows of losses beside the stage's own, of every optimiser step."""
    found: Mapping[str, Any] = getattr(view.settings, "aux", {})
    rows = view.data("aux") if found else None
    if rows is None:
        return []
    parts = [_learn(rows, edge=edge, calls=calls, rows=aux.batch_size) for aux in found.values()]
    # The step is that of the main loss.
    return [replace(part, updates=0.0, policy=False) for part in parts]


def _judges(view: View, judge: Any) -> list[str]:
    """The edges of the models that occur in the settings of a judge."""
    values: list[Any] = [judge]
    edges: dict[str, None] = {}
    while values:
        value = values.pop()
        if isinstance(value, Mapping):
            values += value.values()
        elif isinstance(value, list | tuple):
            values += value
        elif isinstance(value, str) and value in view.inputs and role_of(value) == "judges":
            edges[value] = None
    return list(edges)


def _names(route: Any) -> tuple[str, ...]:
    return (route,) if isinstance(route, str) else tuple(route)
