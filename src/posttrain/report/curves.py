"""Which training curves a report shows: metrics of many stages turned into small panels.

Colour means domain. Stages of one kind that learn one domain each (specialists) share their
panels; a stage that learns several draws a line per domain where it logs `<metric>/<domain>`. A
setting that has a schedule is a metric of its own, `setting/<name>`. Which panels a kind of stage
shows stands in the table of kinds (`posttrain.stages.kinds`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from posttrain.report.gather import StageFacts
from posttrain.report.wording import number
from posttrain.stages.kinds import KINDS

MAX_POINTS = 120
"""Longer curves are drawn as the means of that many runs of steps."""
LOG_SPAN = 10
INK = 0
"""Colour number of lines that belong to no single domain."""
COUNTERS = frozenset({"step", "total", "tokens", "seconds"})


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How a logged metric is called."""

    title: str
    hint: str = ""
    log: bool = False
    """Drawn on a logarithmic scale where the values span a factor of `LOG_SPAN`."""


METRICS = {
    "loss": Metric(title="Loss", log=True),
    "reward": Metric(title="Reward", hint="mean over the samples"),
    "kl": Metric(title="Reverse KL", hint="to the teacher, nats per token", log=True),
    "entropy": Metric(title="Entropy", hint="nats per token"),
    "response_length": Metric(title="Response length", hint="mean, tokens"),
    "clip_share": Metric(title="Clip share", hint="tokens whose gradient the clip stops"),
    "clip_low": Metric(title="Clipped below"),
    "clip_high": Metric(title="Clipped above"),
    "clipped": Metric(title="Clip share", hint="tokens whose advantage is clipped"),
    "correction_masked": Metric(
        title="Mask share", hint="tokens dropped: sampler and learner differ"
    ),
    "correction_truncated": Metric(title="Truncated ratios", hint="share of tokens"),
    "train_fraction": Metric(title="Rows with signal", hint="share that the step learns from"),
    "nucleus_size": Metric(title="Nucleus", hint="mean, tokens"),
    "draws": Metric(title="Draws per step"),
    "retired_share": Metric(title="Retired", hint="share of problems that are solved and rest"),
    "open_share": Metric(title="Open problems", hint="share that the curriculum admits"),
    "known_rate": Metric(title="Known pass rate", hint="mean of the problems drawn"),
    "profiled": Metric(title="Profiled anew", hint="problems"),
    "finished_share": Metric(title="Finished", hint="share of responses that ended by themselves"),
    "token_share": Metric(title="Token share", hint="of all tokens in the batch"),
    "kl_reference": Metric(title="KL to the start", hint="nats per token"),
    "student_mass": Metric(title="Student's mass on the teacher's top k"),
    "teacher_mass": Metric(title="Teacher's mass on its top k"),
    "advantage_abs": Metric(title="Advantage", hint="mean size"),
    "approx_kl": Metric(title="KL of the update", hint="nats per token"),
    "ratio": Metric(title="Probability ratio", hint="mean"),
    "sampler_ratio": Metric(title="Learner to sampler ratio", hint="mean"),
    "correction": Metric(title="Correction", hint="factor of a token's loss, mean"),
    "correction_square": Metric(title="Correction squared", hint="mean"),
    "critique_loss": Metric(title="Loss of the verdicts", hint="nats; .69 is a guess"),
    "critique_accuracy": Metric(title="Right verdicts", hint="share of comparisons"),
    "critique_pairs": Metric(title="Comparisons"),
    "judge": Metric(title="Parts of the reward", hint="mean score by each judge"),
    "aux": Metric(title="Auxiliary loss", hint="cross-entropy, nats per token"),
    "grad_norm": Metric(title="Gradient norm", hint="before clipping"),
    "lr": Metric(title="Learning rate"),
    "rows": Metric(title="Rows per teacher"),
    "accuracy": Metric(title="Preference accuracy", hint="pairs whose chosen reward is higher"),
    "margin": Metric(title="Reward margin", hint="chosen minus rejected, mean over pairs"),
    "reward_chosen": Metric(title="Reward of the chosen"),
    "reward_rejected": Metric(title="Reward of the rejected"),
    "logp_chosen": Metric(title="Log-probability of the chosen", hint="nats per response"),
    "logp_rejected": Metric(title="Log-probability of the rejected", hint="nats per response"),
    "nll": Metric(title="Cross-entropy of the chosen", hint="nats per token"),
    "reward_mean": Metric(title="Reward", hint="mean over the responses of the pairs"),
    "reward_std": Metric(title="Spread of the rewards", hint="standard deviation"),
    "label_accuracy": Metric(title="Label accuracy", hint="good ones above 0, bad ones not"),
    "value_loss": Metric(title="Value loss", hint="half the squared error to the return", log=True),
    "value": Metric(title="Value", hint="mean over tokens"),
    "return": Metric(title="Return", hint="what the critic learns, mean over tokens"),
    "value_clipped": Metric(title="Values held by the clip", hint="share of tokens"),
    "explained_variance": Metric(title="Explained variance", hint="of the returns, by the values"),
    "critic_grad_norm": Metric(title="Gradient norm of the critic", hint="before clipping"),
    "critic_lr": Metric(title="Learning rate of the critic"),
    "kl_baseline": Metric(title="KTO's baseline", hint="nats per response"),
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve."""

    label: str
    colour: int
    dash: int
    """0 is solid; several stages of one domain differ by it."""
    x: list[float]
    y: list[float]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One small plot."""

    key: str
    title: str
    hint: str
    lines: list[Line]
    log: bool


@dataclass(frozen=True, kw_only=True)
class Section:
    """The curves of the stages of one kind, or of one stage."""

    title: str
    panels: list[Panel]
    folded: list[Panel]
    constant: list[str]
    """Metrics that never change, in words: a plot of them would say nothing."""
    folded_constant: list[str]
    legend: list[Line]


def sections(stages: Sequence[StageFacts], colours: Mapping[str, int]) -> list[Section]:
    """All curves of a lineage, in the order of the table of kinds; others' kinds come last."""
    groups: dict[str, list[StageFacts]] = {}
    for stage in stages:
        title = stage.kind_row.section.replace("{stage}", stage.name)
        if title and len(stage.lines) > 1:
            groups.setdefault(title, []).append(stage)
    order = {name: place for place, name in enumerate(KINDS)}
    ranks = {
        title: min(order.get(stage.kind, len(order)) for stage in members)
        for title, members in groups.items()
    }
    return [_section(t, groups[t], colours) for t in sorted(groups, key=lambda t: ranks[t])]


def in_sentence(title: str) -> str:
    """A title inside a sentence: "Clip share" -> "clip share", but "KL to the start"."""
    return title if title[:2].isupper() else title[:1].lower() + title[1:]


def _section(title: str, stages: Sequence[StageFacts], colours: Mapping[str, int]) -> Section:
    kind = stages[0].kind_row
    keys = dict.fromkeys(
        _metric_of(key) for stage in stages for line in stage.lines for key in line
    )
    if "clip_low" in keys or "clip_high" in keys:
        keys["clip_share"] = None
    order = [key for key in kind.panels if key in keys]
    order += [key for key in keys if key not in order and key not in COUNTERS]
    # What is shown at first, and what is folded away: the panels, and the constants in words.
    panels: tuple[list[Panel], list[Panel]] = ([], [])
    constant: tuple[list[str], list[str]] = ([], [])
    for key in order:
        lines = [line for stage in stages for line in _lines(stage, stages, key, colours)]
        values = {y for line in lines for y in line.y}
        if not values:
            continue
        metric = METRICS.get(key, Metric(title=key.replace("setting/", "Setting ")))
        called = kind.titles.get(key, metric.title)
        folded = key not in kind.panels
        if len(values) == 1:
            constant[folded].append(f"{in_sentence(called)} {number(values.pop())}")
            continue
        panels[folded].append(
            Panel(
                key=key,
                title=called,
                hint=kind.hints.get(key, metric.hint),
                lines=lines,
                log=metric.log and 0 < LOG_SPAN * min(values) < max(values),
            )
        )
    return Section(
        title=title,
        panels=panels[False],
        folded=panels[True],
        constant=constant[False],
        folded_constant=constant[True],
        legend=_legend(panels[False] + panels[True]),
    )


def _metric_of(key: str) -> str:
    """The metric that a logged key belongs to: what stands before the domain, or the entry."""
    head, _, rest = key.partition("/")
    return f"{head}/{rest.partition('/')[0]}" if head == "setting" else head


def _lines(
    stage: StageFacts, stages: Sequence[StageFacts], key: str, colours: Mapping[str, int]
) -> list[Line]:
    """The curves of one metric in one stage: one per domain where it has those, else one."""
    logged = dict.fromkeys(k for line in stage.lines for k in line if k.startswith(f"{key}/"))
    if logged and len(stages) == 1:
        return _parts(stage, key, [name.removeprefix(f"{key}/") for name in logged], colours)
    parts = ("clip_low", "clip_high") if key == "clip_share" else (key,)
    points = _points(stage, parts)
    if not points:
        return []
    x, y = _thin(points)
    twins = [other.label for other in stages if other.domain == stage.domain]
    return [
        Line(
            label=stage.name if len(stages) > 1 else "all domains",
            colour=INK if stage.domain is None else colours[stage.domain],
            dash=twins.index(stage.label),
            x=x,
            y=y,
        )
    ]


def _parts(
    stage: StageFacts, key: str, names: Sequence[str], colours: Mapping[str, int]
) -> list[Line]:
    """The curves of a metric that is logged as `<key>/<name>`, names being domains or others."""
    # What is logged per teacher gets the colour of that teacher's domain.
    owner = {
        teacher: route.partition("/")[0]
        for route, teachers in stage.config.get("routes", {}).items()
        for teacher in ([teachers] if isinstance(teachers, str) else teachers)
    }
    keys = {name: f"{key}/{name}" for name in names}
    # Parts that belong to no domain, such as the judges of a reward, stand beside the whole.
    if any(name not in colours and name not in owner for name in names):
        keys = {"all": key} | keys
    found: list[Line] = []
    for label, full in keys.items():
        if points := _points(stage, (full,)):
            x, y = _thin(points)
            colour = colours.get(label) or colours.get(owner.get(label, ""), INK)
            dash = sum(line.colour == colour for line in found)
            found.append(Line(label=label, colour=colour, dash=dash, x=x, y=y))
    return found


def _points(stage: StageFacts, keys: Sequence[str]) -> list[tuple[float, float]]:
    """(step, sum of the metrics `keys`) for every line that has all of them."""
    return [
        (line["step"], sum(line[key] for key in keys))
        for line in stage.lines
        if "step" in line and all(key in line for key in keys)
    ]


def _thin(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """At most `MAX_POINTS` points, each the mean of as many neighbours."""
    width = -(-len(points) // MAX_POINTS)
    x, y = [], []
    for start in range(0, len(points), width):
        part = points[start : start + width]
        x.append(sum(step for step, _ in part) / len(part))
        y.append(sum(value for _, value in part) / len(part))
    return x, y


def overlaid(stages: Sequence[tuple[str, int, int, StageFacts]]) -> list[Panel]:
    """The panels of one stage of a sweep, a line for each of its variants.

    `stages` are variants of one kind as (label, colour, dash, facts). A metric that is the same
    everywhere has no panel.
    """
    found = []
    kind = stages[0][3].kind_row
    for key in kind.panels:
        lines = []
        for label, colour, dash, stage in stages:
            if points := _points(stage, (key,)):
                x, y = _thin(points)
                lines.append(Line(label=label, colour=colour, dash=dash, x=x, y=y))
        values = {y for line in lines for y in line.y}
        if len(values) < 2 or all(len(line.x) < 2 for line in lines):
            continue
        metric = METRICS.get(key, Metric(title=key))
        found.append(
            Panel(
                key=key,
                title=kind.titles.get(key, metric.title),
                hint=kind.hints.get(key, metric.hint),
                lines=lines,
                log=metric.log and 0 < LOG_SPAN * min(values) < max(values),
            )
        )
    return found


def _legend(panels: Iterable[Panel]) -> list[Line]:
    """Every line that occurs, once; empty where there is only one."""
    found = {(line.label, line.colour, line.dash): line for panel in panels for line in panel.lines}
    return list(found.values()) if len(found) > 1 else []
