"""The tables in the terminal, as text and as styles."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from posttrain.report.terminal import evaluation_table
from posttrain.report.wording import RANGE
from posttrain.rl.statistics import Scores, evaluation

Make = Callable[..., dict[str, Any]]


def draw(result: dict[str, Any], width: int) -> list[str]:
    console = Console(width=width, record=True, color_system=None, file=io.StringIO())
    console.print(evaluation_table(result))
    return console.export_text().splitlines()


def row(lines: list[str], start: str, *, after: str = "") -> str:
    """The first line beginning with `start`, after the line beginning with `after`."""
    texts = [line.strip() for line in lines]
    begin = next(i for i, text in enumerate(texts) if text.startswith(after))
    return next(text for text in texts[begin + 1 :] if text.startswith(start))


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_nothing_is_cut_off(scores: Make, width: int):
    lines = draw(scores(flat="letters", constant=0.62), width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "…" not in text
    for value in ("20.3", "77.2", "70.2", "0.88", "62.0", "Norm", "minimum"):
        assert value in text


@pytest.mark.parametrize("width", [80, 120])
def test_score_rows(scores: Make, width: int):
    result = scores()
    lines = draw(result, width)
    add = result["domains"]["add"]
    for cells, line in ((add, row(lines, "add")), (add["greedy"], row(lines, "greedy"))):
        for model in ("init", "teacher", "student"):
            assert f"{100 * cells[model]['value']:.1f}" in line
        assert f"{cells['recovery']['value']:.2f}" in line
        low, high = cells["recovery"]["low"], cells["recovery"]["high"]
        assert f"{low:.2f}{RANGE}{high:.2f}" in line
    assert row(lines, "add").endswith("4.0")
    assert f"{result['norm']:.2f}" in row(lines, "Norm (mean)")
    assert f"{result['min_recovery']:.2f}" in row(lines, "minimum")
    assert f"{result['greedy']['norm']:.2f}" in row(lines, "greedy", after="Norm (mean)")
    assert f"{result['greedy']['min_recovery']:.2f}" in row(lines, "greedy", after="minimum")


def test_intervals_have_a_decimal_where_there_is_room(scores: Make):
    student = scores()["domains"]["add"]["student"]
    wide, narrow = (row(draw(scores(), width), "add") for width in (120, 80))
    assert f"{100 * student['low']:.1f}{RANGE}{100 * student['high']:.1f}" in wide
    assert f"{100 * student['low']:.0f}{RANGE}{100 * student['high']:.0f}" in narrow


def test_values_stand_under_each_other(scores: Make):
    lines = draw(scores(), 80)
    column = [
        line.index(".") for line in lines if re.match(r" (add|letters|reverse|spiral) ", line)
    ]
    assert len(set(column[:4])) == 1


def test_suppressed_recovery_is_a_dash_with_a_reason(scores: Make):
    lines = draw(scores(flat="letters"), 120)
    assert "—" in row(lines, "letters")
    assert not re.search(r"\b\d\.\d\d\b", row(lines, "letters"))
    assert any("letters: no recovery, teacher and init cannot be told apart" in x for x in lines)
    assert not any("no recovery" in line for line in draw(scores(), 120))


def test_a_norm_over_some_domains_says_so(scores: Make):
    lines = draw(scores(flat="letters"), 120)
    assert row(lines, "Norm (mean)").split()[2:5] == ["over", "3", "of"]
    assert row(lines, "greedy", after="Norm (mean)").split()[1:4] == ["over", "3", "of"]
    assert " of " not in row(lines, "minimum")
    assert " of " not in row(draw(scores(), 120), "Norm (mean)")
    older = scores(flat="letters")
    del older["norm_domains"], older["greedy"]["norm_domains"]
    assert " of " not in row(draw(older, 120), "Norm (mean)")


def test_constant_close_to_the_teacher_is_pointed_out(scores: Make):
    lines = draw(scores(constant=0.62), 160)
    warned = [line for line in lines if "always answering '4-1=3'" in line]
    # The teachers reach 77.2, 86.2, 94.2 and 82.8.
    assert len(warned) == 1
    assert warned[0].strip().startswith("add: ")


def test_forgetting_marks_the_own_domain(scores: Make):
    result = scores()
    console = Console(width=100, record=True, file=io.StringIO(), force_terminal=True)
    console.print(evaluation_table(result))
    html = console.export_html(inline_styles=True)
    own = f"{100 * result['models']['teachers.reverse_teacher']['reverse']['sampled']:.1f}"
    line = next(text for text in html.splitlines() if "reverse_teacher" in text)
    assert re.search(rf"font-weight: bold\">\s*{re.escape(own)}", line)
    bold = re.findall(r"font-weight: bold\">\s*([\d.]+)", line)
    assert bold == [own]


def test_forgetting_has_init_teachers_and_student_in_order(scores: Make):
    lines = draw(scores(), 80)
    start = next(i for i, line in enumerate(lines) if line.startswith("Every model"))
    names = [line.split()[0] for line in lines[start + 4 :] if line.strip()]
    teachers = [f"{name}_teacher" for name in ("add", "letters", "reverse", "spiral")]
    assert names == ["init", *teachers, "student"]


def test_many_long_names_still_fit():
    names = [f"a_rather_long_domain_name_{number}" for number in range(9)]

    def model(own: set[str]) -> dict[str, Scores]:
        known = {name: np.full(8, float(name in own)) for name in names}
        return {name: Scores(sampled=score, greedy=score) for name, score in known.items()}

    result = evaluation(
        {"init": model(set()), "student": model(set(names))}
        | {f"teachers.{name}": model({name}) for name in names},
        routes={name: name for name in names},
        constants={name: {"value": 0.0, "response": ""} for name in names},
        resamples=100,
        seed=0,
    ) | {"split": "validation", "samples": 1}
    lines = draw(result, 80)
    assert max(map(len, lines)) <= 80
    assert "…" not in "\n".join(lines)
    assert "on validation problems" in lines[0]
    # The matrix numbers its columns and says which is which.
    assert "9 a_rather_long_domain_name_8" in " ".join(" ".join(lines).split())


def test_without_teachers_there_is_no_recovery(scores: Make):
    text = "\n".join(draw(scores(routed=False), 80))
    assert "recovery" not in text
    assert "teacher" not in text
    assert "Norm" not in text
    assert "70.2" in text


def test_a_norm_of_zero_is_a_number(scores: Make):
    result = scores() | {"norm": 0.0, "min_recovery": -0.004}
    lines = draw(result, 120)
    assert row(lines, "Norm (mean)").split()[2] == "0.00"
    assert row(lines, "minimum").split()[1] == "0.00"
