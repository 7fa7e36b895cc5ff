"""What `real.py` is expected to take: tokens by stage, from its settings, and seconds from rates.

Every position of a row counts. Prompts of a group are read once. RL is counted as if no group were
left out, so it takes less where rewards are all alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from suite.real_page import table

LENGTHS = {
    "story": (107, 81),
    "legs": (67, 69),
    "equation": (67, 50),
    "order": (67, 40),
}
"""Domain to the mean tokens of a prompt, template included, and of a worked answer."""
LEARNED, SAMPLED, READ = 275, 450, 825
"""Tokens a second on two cores, in bfloat16, of a model of 135 million parameters. Read is what a
teacher does: a forward pass, a third of the operations of learning."""
OVERHEAD = 10
"""Seconds that a stage takes to load its models and to save."""


@dataclass
class Cost:
    """Stages of a sort, together."""

    stages: int = 0
    learned: float = 0.0
    sampled: float = 0.0
    read: float = 0.0
    names: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """On two cores."""
        work = self.learned / LEARNED + self.sampled / SAMPLED + self.read / READ
        return work + OVERHEAD * self.stages


def budget(settings: Mapping[str, Mapping[str, Any]], domains: list[str]) -> dict[str, Cost]:
    """Sort of stages to its cost. `settings` are the tables of settings.toml."""
    given = {key: value for values in settings.values() for key, value in values.items()}

    def of(stage: str, name: str) -> float:
        """A setting of a stage: the last one that is about it."""
        found = [
            value
            for key, value in given.items()
            if key.rpartition(".")[2] == name and fnmatchcase(stage, key.rpartition(".")[0])
        ]
        return float(found[-1])

    prompt = {d: LENGTHS[d][0] for d in domains}
    answer = {d: LENGTHS[d][1] for d in domains}
    both = sum(prompt[d] + answer[d] for d in domains) / len(domains)
    mean = sum(answer.values()) / len(domains)
    costs = {
        name: Cost()
        for name in ("general SFT", "light SFT", "RL", "distillation", "imitation", "evaluation")
    }

    def add(sort: str, **tokens: float) -> None:
        costs[sort].stages += 1
        for name, count in tokens.items():
            setattr(costs[sort], name, getattr(costs[sort], name) + count)

    add("general SFT", learned=of("sft", "steps") * of("sft", "batch_size") * both)
    for d in domains:
        stage = f"{d}_sft"
        rows = of(stage, "steps") * of(stage, "batch_size")
        add("light SFT", learned=rows * (prompt[d] + answer[d]))
        stage = f"{d}_teacher"
        prompts = of(stage, "steps") * of(stage, "prompts_per_step")
        sampled = prompts * of(stage, "group_size") * answer[d]
        add("RL", sampled=sampled, learned=sampled + prompts * prompt[d])
    for stage in ("student", "student_sampled"):
        rows = of(stage, "steps") * of(stage, "prompts_per_step")
        add("distillation", sampled=rows * mean, read=rows * both, learned=rows * both)
    rows = of("student_imitation", "steps") * of("student_imitation", "batch_size")
    add("imitation", learned=rows * both)
    add("imitation", sampled=of("traces", "num_prompts") * sum(answer.values()))
    students, general = 5, 16
    models = {"evaluation": 2 + len(domains), "comparison": 2 + 2 * len(domains) + students}
    for stage, count in models.items():
        asked = of(stage, "num_problems") * (of(stage, "samples") + 1)
        add("evaluation", sampled=count * asked * sum(answer.values()))
    asked = of("knowledge", "num_problems") * (of("knowledge", "samples") + 1)
    add("evaluation", sampled=(2 + len(domains) + students) * asked * general)
    return costs


def budget_table(costs: Mapping[str, Cost]) -> str:
    """The costs and their sum."""
    rows = [
        [name, str(cost.stages)]
        + [f"{round(count, -3):,.0f}" for count in (cost.learned, cost.sampled, cost.read)]
        + [f"{cost.seconds / 60:.0f}"]
        for name, cost in costs.items()
    ]
    total = sum(cost.seconds for cost in costs.values()) / 60
    rows.append(["all", str(sum(cost.stages for cost in costs.values())), "", "", ""])
    rows[-1].append(f"{total:.0f}")
    heads = ["stages of", "stages", "tokens learned", "sampled", "read by teachers", "minutes"]
    return table(heads, rows)
