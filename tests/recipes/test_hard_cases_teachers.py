"""Hard cases of the recipe language: teachers, branches, and stages of their own.

As in `test_hard_cases_lines.py`: the edges are those of the store's records.
"""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.slow

LEARN: dict[str, Any] = {"steps": 2, "lr": 1e-3, "warmup_steps": 1, "batch_size": 8}
STEP: dict[str, Any] = {
    "steps": 2,
    "lr": 1e-3,
    "warmup_steps": 1,
    "prompts_per_step": 6,
    "max_new_tokens": 4,
}
RL: dict[str, Any] = STEP | {"group_size": 4}
ALL = {f"domains.{name}": name for name in ("reasoning", "general", "judging")}
HINT = "{prompt} {answer}"


def test_case_07_earlier_stages_teach(bench: Any) -> None:
    """Case 7, GLM-5: three earlier stages of the student's own line are its teachers, the last of
    them being where it starts."""
    r = bench.recipe(7)
    sft = r.sft(start=bench.base(r), data=r.demos(r.domains), **LEARN)
    first = r.rl(start=sft, prompts=r.prompts("reasoning"), name="first", **RL)
    second = r.rl(start=first, prompts=r.prompts("general"), name="second", **RL)
    teachers = {"judging": sft, "reasoning": first, "general": second}
    student = r.distill(start=second, teachers=teachers, prompts=r.prompts(r.domains), **STEP)
    made = bench.run(r, student)
    assert (
        made["student"].edges
        == {
            "start": "second",
            "teachers.sft": "sft",
            "teachers.first": "first",
            "teachers.second": "second",
        }
        | ALL
    )
    assert made["second"].edges == {"start": "first", "domains.general": "general"}
    assert made["first"].edges == {"start": "sft", "domains.reasoning": "reasoning"}
    start = made["student"].rows("metrics.jsonl")[0]
    assert start["kl/general"] < 1e-6 < min(start["kl/reasoning"], start["kl/judging"])


def test_case_08_the_teacher_is_the_student_with_a_hint(bench: Any) -> None:
    """Case 8, Composer 2.5: the teacher has the student's weights and another prompt."""
    r = bench.recipe(8)
    sft = r.sft(start=bench.base(r), data=r.demos("reasoning", hint=HINT), **LEARN)
    given: dict[str, Any] = {"start": sft, "prompts": r.prompts("reasoning"), **STEP}
    plain = r.distill(teachers={"reasoning": "self"}, name="plain", **given)
    hinted = r.distill(teachers={"reasoning": "self"}, hints={"reasoning": HINT}, **given)
    made = bench.run(r, r.merge([plain, hinted]))
    for name in ("plain", "student"):
        assert made[name].edges == {
            "start": "sft",
            "teachers.self": "sft",
            "domains.reasoning": "reasoning",
        }
    assert made["student"].config["hints"] == {"reasoning": HINT}
    assert made["merged"].edges == {"models.plain": "plain", "models.student": "student"}
    apart = {name: made[name].rows("metrics.jsonl")[0]["kl"] for name in ("plain", "student")}
    assert apart["plain"] < 1e-6 and apart["student"] > 1e-3


def test_case_09_a_second_round_with_old_and_new_teachers(bench: Any) -> None:
    """Case 9, Nemotron 3 Ultra: the second round starts from the first one's student; one teacher
    is trained anew from there, the others stay."""
    r = bench.recipe(9)
    base = bench.base(r)
    teachers = {d: r.rl(start=base, prompts=r.prompts(d), name=f"{d}_1", **RL) for d in r.domains}
    given: dict[str, Any] = {"prompts": r.prompts(r.domains), **STEP}
    first = r.distill(start=base, teachers=teachers, name="student_1", **given)
    anew = r.rl(start=first, prompts=r.prompts("reasoning"), name="reasoning_2", **RL)
    mixed = {**teachers, "reasoning": anew}
    made = bench.run(r, r.distill(start=first, teachers=mixed, name="student_2", **given))
    assert (
        made["student_1"].edges
        == {
            "start": "base",
            "teachers.reasoning_1": "reasoning_1",
            "teachers.general_1": "general_1",
            "teachers.judging_1": "judging_1",
        }
        | ALL
    )
    assert (
        made["student_2"].edges
        == {
            "start": "student_1",
            "teachers.reasoning_2": "reasoning_2",
            "teachers.general_1": "general_1",
            "teachers.judging_1": "judging_1",
        }
        | ALL
    )
    assert made["reasoning_2"].edges["start"] == "student_1"
    for edge in ("teachers.general_1", "teachers.judging_1"):
        assert made["student_1"].artifact.inputs[edge] == made["student_2"].artifact.inputs[edge]


def test_case_10_teachers_from_unequal_lines(bench: Any) -> None:
    """Case 10, Nemotron 3 Ultra: one teacher from SFT only, one from SFT and RL, one from three
    stages of RL."""
    r = bench.recipe(10)
    sft = r.sft(start=bench.base(r), data=r.demos(r.domains), **LEARN)
    tuned = r.sft(start=sft, data=r.demos("judging"), name="tuned", **LEARN)
    light = r.sft(start=sft, data=r.demos("general"), name="light", **LEARN)
    chat = r.rl(start=light, prompts=r.prompts("general"), name="chat", **RL)
    swe = sft
    for i in (1, 2, 3):
        swe = r.rl(start=swe, prompts=r.prompts("reasoning"), name=f"swe_{i}", **RL)
    teachers = {"judging": tuned, "general": chat, "reasoning": swe}
    made = bench.run(
        r, r.distill(start=sft, teachers=teachers, prompts=r.prompts(r.domains), **STEP)
    )
    assert (
        made["student"].edges
        == {
            "start": "sft",
            "teachers.tuned": "tuned",
            "teachers.chat": "chat",
            "teachers.swe_3": "swe_3",
        }
        | ALL
    )
    lines = {"tuned": ["sft"], "chat": ["light", "sft"], "swe_3": ["swe_2", "swe_1", "sft"]}
    for name, line in lines.items():
        passed = []
        while name != "sft":
            name = made[name].edges["start"]
            passed.append(name)
        assert passed == line


def test_case_15_another_context_is_another_stage(bench: Any) -> None:
    """Case 15, Nemotron 3 Super: what needs longer responses and another learning rate is a stage
    after the mixed one, not a weight in its mix."""
    r = bench.recipe(15)
    blend = r.rl(start=bench.base(r), prompts=r.prompts(r.domains), name="blend", **RL)
    settings = RL | {"max_new_tokens": 16, "lr": 2e-4, "prompts_per_step": 4}
    swe = r.rl(start=blend, prompts=r.prompts("reasoning"), name="swe", **settings)
    made = bench.run(r, swe)
    assert made["blend"].edges == {"start": "base"} | ALL
    assert made["swe"].edges == {"start": "blend", "domains.reasoning": "reasoning"}
    fields = ("max_new_tokens", "lr", "prompts_per_step")
    found = {n: [made[n].config[f] for f in fields] for n in ("blend", "swe")}
    assert found == {"blend": [4, 1e-3, 6], "swe": [16, 2e-4, 4]}
    longest = {n: max(row["num_tokens"] for row in made[n].rows("rollouts.jsonl")) for n in found}
    assert longest["blend"] <= 4 < longest["swe"] <= 16
