"""What `real.py` measured, as a page with figures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.engine.store import Store
from posttrain.report.gather import domain_colours, gather
from posttrain.report.lineage import lineage_svg
from posttrain.report.plots import ladder_plot

REPORT_STYLE = Path(__file__).resolve().parents[2] / "src" / "posttrain" / "report" / "report.css"
GIB = 2**30
Result = Mapping[str, Any]


def markdown(result: Result, figures: Sequence[str]) -> str:
    """The page."""
    where = result["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in where["packages"].items())
    smoke = ", SMOKE: one step of every stage, the numbers mean nothing" if result["smoke"] else ""
    parts = [
        f"# A real language model, {result['date']}{smoke}",
        f"{result['base']} on the suite `words`; {where['cpu']}, {where['cores']} cores, Python "
        f"{where['python']}, {packages}; seed 0, bfloat16, held-out problems. Accuracies are "
        "temperature 1 / greedy, in %.",
        *sections(result["evaluations"]),
        "## What it cost",
        cost_table(result),
    ]
    parts += [f"![{name}]({name})" for name in figures]
    return "\n\n".join(parts) + "\n"


def sections(evaluations: Mapping[str, Any]) -> list[str]:
    """Headings and tables of the accuracies."""
    comparison = evaluations["beside"]
    return [
        "## Every model in every domain",
        accuracy_table(comparison),
        "## What RL added to each specialist",
        gain_table(comparison),
        "## The students",
        student_table(comparison),
        pair_table(comparison),
        "## What was forgotten",
        forgetting_table(comparison),
        "Questions that no stage was trained on:",
        knowledge_table(evaluations["forgetting"]),
    ]


def accuracy_table(comparison: Result) -> str:
    """Models by domains, in the order in which they were made."""
    models, domains = comparison["models"], list(comparison["routes"])
    rows = [
        [title(edge)] + [both(models[edge][name]) for name in domains]
        for edge in sorted(models, key=lambda edge: place(edge, models))
    ]
    return table(["model", *domains], rows)


def gain_table(comparison: Result) -> str:
    """Of each specialist its own domain before and after RL."""
    rows = []
    for domain, view in first_student(comparison)["domains"].items():
        before = comparison["along"][f"{domain}_before_rl"][domain]
        after = {"sampled": view["teacher"], "greedy": view["greedy"]["teacher"]}
        scores = (within(part[how]) for how in DECODINGS for part in (before, after))
        rows.append([domain, *scores])
    heads = ["domain", "SFT", "and RL", "SFT, greedy", "and RL, greedy"]
    return table(heads, rows)


def student_table(comparison: Result) -> str:
    """Of each student its mean over domains, and how much of the teachers' gain it has."""
    rows = []
    for name, view in comparison["students"].items():
        means = [mean(comparison["models"][edge_of(comparison, name)], how) for how in DECODINGS]
        norms = [
            "-" if part["norm"] is None else
            f"{part['norm']:.2f} [{part['norm_low']:.2f}, {part['norm_high']:.2f}]"
            for part in (view, view["greedy"])
        ]  # fmt: skip
        rows.append([name, *(f"{100 * value:.1f}" for value in means), *norms])
    return table(["student", "mean", "mean, greedy", "Norm", "Norm, greedy"], rows)


def pair_table(comparison: Result) -> str:
    """Differences of the students, mean over domains."""
    rows = [
        [f"{pair['first']} - {pair['second']}", within(pair["all"]), within(pair["all"]["greedy"])]
        for pair in comparison["pairs"]
        if pair["all"] is not None
    ]
    return table(["difference, points", "temperature 1", "greedy"], rows)


def forgetting_table(comparison: Result) -> str:
    """Of each model its mean over the domains that it was not made for, less that of the SFT."""
    models, routes = comparison["models"], comparison["routes"]
    rows = []
    for domain, teacher in routes.items():
        others = [name for name in routes if name != domain]
        for edge in (f"along.{domain}_before_rl", f"teachers.{teacher}"):
            lost = [
                sum(models[edge][name][how] - models["init"][name][how] for name in others)
                / len(others)
                for how in DECODINGS
            ]
            rows.append([title(edge), *(f"{100 * value:+.1f}" for value in lost)])
    return table(["model", "other domains against the SFT, points", "greedy"], rows)


def knowledge_table(knowledge: Result) -> str:
    """Every model on the general questions."""
    models = knowledge["models"]
    rows = [
        ["base" if edge == "init" else title(edge), *(both(found) for found in by_domain.values())]
        for edge, by_domain in models.items()
    ]
    rows.sort(key=lambda row: row[0] != "base")
    return table(["model", *next(iter(models.values()))], rows)


def cost_table(result: Result) -> str:
    """Time, tokens and memory by kind of stage; time of stages that ran beside each other counts
    for each."""
    kinds: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for stage in result["stages"].values():
        kinds[stage["kind"]].append(stage)
    rows = []
    for kind, stages in kinds.items():
        seconds = sum(stage["seconds"] or 0 for stage in stages)
        tokens = sum(stage["tokens"] or 0 for stage in stages)
        peak = max(stage["peak_memory"] or 0 for stage in stages) / GIB
        counts = [f"{seconds:.0f}", f"{tokens:,}" if tokens else "-", f"{peak:.1f}"]
        rows.append([kind, str(len(stages)), *counts])
    wall = f"From the first stage to the report: {result['wall_seconds'] / 60:.0f} minutes."
    heads = ["kind", "stages", "seconds", "tokens", "peak GiB"]
    return table(heads, rows) + f"\n\n{wall}"


def write_figures(result: Result, store: Path, stem: Path) -> list[str]:
    """The lineage and a ladder per domain as SVG files beside the page; returns their names."""
    place = Store(store)
    stages = gather(place, place.resolve(result["comparison"]))
    pictures = {"lineage": lineage_svg(stages, domain_colours(stages))}
    comparison = result["evaluations"]["beside"]
    pictures |= {name: ladder_plot(comparison, name) for name in comparison["routes"]}
    names = []
    for name, svg in pictures.items():
        end = svg.index(">") + 1
        style = f"<style>{REPORT_STYLE.read_text(encoding='utf-8')}</style>"
        path = stem.with_name(f"{stem.name}_{name}.svg")
        path.write_text(f"{svg[:end]}{style}{svg[end:]}\n", encoding="utf-8")
        names.append(path.name)
    return names


DECODINGS = ("sampled", "greedy")
ORDER = ("along", "init", "teachers", "students")


def place(edge: str, models: Mapping[str, Any]) -> tuple[bool, int, int]:
    """Base first, then in the order of the recipe."""
    return edge != "along.base", ORDER.index(edge.partition(".")[0]), list(models).index(edge)


def title(edge: str) -> str:
    """What a model is called in the tables."""
    role, _, name = edge.partition(".")
    return {"init": "SFT"}.get(role, name.replace("_", " "))


def first_student(comparison: Result) -> Mapping[str, Any]:
    """What is said of the first student, with what it shares with the others."""
    view: Mapping[str, Any] = next(iter(comparison["students"].values()))
    return view


def edge_of(comparison: Result, name: str) -> str:
    """The key of a student among the models."""
    return next(edge for edge in comparison["models"] if edge == f"students.{name}")


def mean(by_domain: Mapping[str, Mapping[str, float]], how: str) -> float:
    """Mean accuracy over domains."""
    return sum(found[how] for found in by_domain.values()) / len(by_domain)


def both(found: Mapping[str, float]) -> str:
    """Both accuracies in %."""
    return " / ".join(f"{100 * found[how]:.1f}" for how in DECODINGS)


def within(value: Mapping[str, float]) -> str:
    """A value in % with its interval."""
    low, high = value["low"], value["high"]
    return f"{100 * value['value']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
