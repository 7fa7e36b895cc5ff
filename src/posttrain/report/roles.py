"""What init, teachers, students and "self" are in one evaluation, in sentences.

Names of stages stand in backticks: `sft`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from posttrain.engine.graph import edge_name
from posttrain.report.gather import StageFacts
from posttrain.report.scores import Evaluation, all_routes

SELF = "self"


def explained(
    evaluation: Evaluation, names: Mapping[str, str], stages: Sequence[StageFacts] = ()
) -> list[str]:
    """Who is who: `names` are those of the stages by edge; empty without them.

    With `stages`, the lineage of the evaluation, also how the students come from init, which
    models are from outside, and which domains a student held by its own start.
    """
    # By label where the lineage is known, since several stages of it may have one name.
    shown = {stage.label: stage for stage in stages}
    edges = stages[-1].edges if stages else names
    if not edges:
        return []
    alone = "student" in edges
    # A record has its inputs by the alphabet, an evaluation its students in their order.
    students = {
        name: edges["student" if alone else edge_name("students", name)]
        for name in evaluation.get("students", ["student"])
    }
    found = []
    if alone:
        found.append(f"The student is `{_name(students['student'], shown)}`.")
    else:
        found.append(f"Students: {_listed(_called(n, s, shown) for n, s in students.items())}.")
    if "init" in edges:
        relation = _relation(edges["init"], students, shown)
        found.append(f"Init is `{_name(edges['init'], shown)}`{relation}.")
    along = {name: edges[edge_name("along", name)] for name in evaluation.get("along", ())}
    if along:
        found.append(f"Along the way: {_listed(_called(n, s, shown) for n, s in along.items())}.")
    if "students" in evaluation:
        domains = list(next(iter(evaluation["students"].values()))["domains"])
        domains += list(evaluation["unverified"])
    else:
        domains = list(evaluation["domains"])
    found += _teachers(evaluation, edges, shown, domains)
    for name, model in (along | students).items():
        held = _held(shown.get(model), domains)
        if held:
            only = alone and not along
            where = "" if only else f"In {name}, "
            verb = "is" if len(held) == 1 else "are"
            found.append(f"{where}{_listed(held)} {verb} held by self{_self(model, shown, only)}.")
    return found


def _name(key: str, shown: Mapping[str, StageFacts]) -> str:
    """The name of a stage by its label; without a lineage the key is the name."""
    return shown[key].name if key in shown else key


def _called(name: str, key: str, shown: Mapping[str, StageFacts]) -> str:
    """ "merged (`ties`)"; only the name where both are the same."""
    stage = _name(key, shown)
    return f"`{name}`" if name == stage else f"{name} (`{stage}`)"


def _listed(parts: Iterable[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    *most, last = list(parts)
    return f"{', '.join(most)} and {last}" if most else last


def _start(label: str, shown: Mapping[str, StageFacts]) -> str:
    """The label of the stage that a stage started from; empty where that is not known."""
    return shown[label].edges.get("start", "") if label in shown else ""


def _self(label: str, shown: Mapping[str, StageFacts], only: bool) -> str:
    """Which model a student's teacher "self" is: its start, or, where it goes on with the training
    of another stage, that one's."""
    start = _start(label, shown)
    own = shown[label].edges.get(edge_name("teachers", SELF), start)
    if not own:
        return ""
    whose = "the student's own start" if only else "its own start"
    if own != start:
        whose = "the start of what it extends,"
    return f", {whose} `{_name(own, shown)}`"


def _relation(init: str, students: Mapping[str, str], shown: Mapping[str, StageFacts]) -> str:
    """What init is to the students: where they started, further above, or neither."""
    if not shown:
        return ""
    starts = [name for name, stage in students.items() if _start(stage, shown) == init]
    if len(starts) == len(students):
        return ", the start of the student" if len(students) == 1 else ", the start of all students"
    above = []
    for name, stage in students.items():
        passed: list[str] = [stage]
        while passed[-1] and passed[-1] != init:
            passed.append(_start(passed[-1], shown))
        above += [name] if passed[-1] == init else []
    if len(above) == len(students):
        who = "the student descends" if len(students) == 1 else "all students descend"
        return f", from which {who}"
    if starts:
        return f", the start of {_listed(starts)}; all students are compared with it"
    return f", which the {'student is' if len(students) == 1 else 'students are'} compared with"


def _teachers(
    evaluation: Evaluation,
    edges: Mapping[str, str],
    shown: Mapping[str, StageFacts],
    domains: Sequence[str],
) -> list[str]:
    """Who teaches what, and which domains nobody teaches."""
    by_teacher: dict[str, list[str]] = {}
    routes = all_routes(evaluation)
    for domain in domains:
        if domain in routes:
            teacher = edges.get(f"teachers.{routes[domain]}", routes[domain])
            by_teacher.setdefault(teacher, []).append(domain)
    if not by_teacher:
        return []
    parts = []
    for teacher, taught in by_teacher.items():
        outside = teacher in shown and shown[teacher].kind == "model"
        parts.append(
            f"`{_name(teacher, shown)}` for {_listed(taught)}{' (from outside)' if outside else ''}"
        )
    word = "Teacher" if len(parts) == 1 else "Teachers"
    untaught = [domain for domain in domains if domain not in routes]
    alone = [f"No teacher is compared with in {_listed(untaught)}."] if untaught else []
    return [f"{word}: {', '.join(parts)}.", *alone]


def _held(student: StageFacts | None, domains: Sequence[str]) -> list[str]:
    """The domains that a distilled student held by itself alone."""
    routes = {} if student is None else student.config.get("routes", {})
    if student is None or student.kind != "distill":
        return []
    return [
        domain
        for domain in domains
        if routes.get(domain, routes.get(domain.partition("/")[0])) in (SELF, [SELF], (SELF,))
    ]
