"""Evaluations of several models, in the terminal, on the page and on model cards."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from posttrain.engine.store import Store
from posttrain.report import candidates
from posttrain.report.card import model_card
from posttrain.report.gather import gather, scores_of
from posttrain.report.html import report_is_current, write_report
from posttrain.report.plots import ladder_plot
from posttrain.report.roles import explained
from posttrain.report.terminal import evaluation_table
from posttrain.report.wording import RANGE

Make = Callable[..., dict[str, Any]]
SHAPES: list[dict[str, bool]] = [
    {},
    {"init": False},
    {"routed": False},
    {"init": False, "routed": False},
    {"verified": False},
    {"one": True},
    {"one": True, "init": False, "routed": False},
]


def draw(result: dict[str, Any], width: int) -> str:
    console = Console(width=width, record=True, color_system=None, file=io.StringIO())
    console.print(evaluation_table(result))
    return console.export_text()


def words_of(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", text).split())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("width", [44, 80, 160])
def test_nothing_is_cut_off(candidate_scores: Make, shape: dict[str, bool], width: int) -> None:
    result = candidate_scores(**shape)
    text = draw(result, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    flat = re.sub(r"\s+", "", text)
    for name, view in result["students"].items():
        assert name in flat
        for row in view["domains"].values():
            assert f"{100 * row['student']['value']:.1f}" in text
            if row["recovery"]:
                assert f"{row['recovery']['value']:.2f}" in text
    for pair in result["pairs"]:
        if pair["all"]:
            assert f"{100 * abs(pair['all']['value']):.1f}" in text
    assert ("Paired differences" in text) == bool(result["pairs"] and shape.get("verified", True))
    assert ("beats the init" in " ".join(text.split())) == (
        shape.get("init", True) and shape.get("verified", True)
    )
    assert "Recovery" not in text
    assert ("recovery" in text) == (
        all(shape.get(key, True) for key in ("init", "routed", "verified"))
    )
    assert ("KLtoinit" in flat) == shape.get("init", True)


def test_a_wide_terminal_has_a_column_per_student(candidate_scores: Make) -> None:
    lines = draw(candidate_scores(), 160).splitlines()
    header = next(line for line in lines if line.strip().startswith("domain"))
    assert header.split() == [
        *("domain", "init", "round1", "teacher", "mopd", "merged", "traces", "constant")
    ]
    place = header.index("mopd")
    recovered = next(line for line in lines if line.strip().startswith("recovery"))
    assert not recovered[len("   recovery") : place - 2].strip()
    assert re.match(r"\s*\d\.\d\d", recovered[place:])


def test_differences_are_bold_where_they_leave_out_0(candidate_scores: Make) -> None:
    found = {(d.first, d.second): d for d in candidates.differences(candidate_scores())}
    assert list(found) == [("mopd", "merged"), ("mopd", "traces"), ("merged", "traces")]
    over_all = candidates.all_domains(candidate_scores())
    assert over_all == "all verified domains"
    assert candidates.told_apart(found["mopd", "merged"].cells[over_all]["sampled"])
    assert not candidates.told_apart(found["mopd", "traces"].cells[over_all]["sampled"])


def test_who_is_who(
    candidate_scores: Make, commit_several: Callable[..., Any], empty_store: Store
) -> None:
    scores = candidate_scores()
    artifact, _ = commit_several(empty_store, scores)
    assert explained(scores, {}, gather(empty_store, artifact)) == [
        "Students: mopd (`student`), merged (`ties`) and `traces`.",
        "Init is `sft`, the start of mopd; all students are compared with it.",
        "Along the way: round1 (`m1`).",
        "Teachers: `add_teacher` for add (from outside), `letters_teacher` for letters.",
        "No teacher is compared with in reverse, spiral and chat.",
        "In mopd, chat is held by self, its own start `sft`.",
    ]
    # Without a lineage there are the names alone.
    assert explained(scores, {}) == []
    names = {"students.mopd": "student", "students.merged": "merged", "students.traces": "x"}
    names |= {"init": "sft", "along.round1": "m1"}
    assert explained(scores, names)[:2] == [
        "Students: mopd (`student`), `merged` and traces (`x`).",
        "Init is `sft`.",
    ]


def test_one_student_is_explained_too(
    candidate_scores: Make, commit_several: Callable[..., Any], empty_store: Store
) -> None:
    scores = candidate_scores(one=True, routed=False)
    artifact, _ = commit_several(empty_store, scores)
    assert explained(scores, {}, gather(empty_store, artifact)) == [
        "The student is `student`.",
        "Init is `sft`, the start of the student.",
        "chat is held by self, the student's own start `sft`.",
    ]


def test_self_of_a_student_that_was_extended_is_who_it_was(
    candidate_scores: Make, commit_several: Callable[..., Any], empty_store: Store
) -> None:
    scores = candidate_scores(one=True, routed=False)
    artifact, _ = commit_several(empty_store, scores)
    stages = gather(empty_store, artifact)
    labels = {stage.name: stage.label for stage in stages}
    for place, stage in enumerate(stages):
        if stage.name == "student":
            edges = dict(stage.edges) | {"teachers.self": labels["base"]}
            stages[place] = replace(stage, edges=edges)
    found = explained(scores, {}, stages)[-1]
    assert found == "chat is held by self, the start of what it extends, `base`."


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_page_of_every_shape(
    candidate_scores: Make,
    commit_several: Callable[..., Any],
    empty_store: Store,
    tmp_path: Path,
    shape: dict[str, bool],
) -> None:
    scores = candidate_scores(**shape)
    artifact, _ = commit_several(empty_store, scores)
    path = write_report(
        tmp_path / "r.html", store=empty_store, artifact=artifact, recipe="r", seed=0
    )
    text, words = path.read_text(encoding="utf-8"), words_of(path)
    verified, init, routed = (shape.get(key, True) for key in ("verified", "init", "routed"))
    several = len(scores["students"]) > 1
    # Every drawing is sound, and there is one ladder per verified domain.
    for drawing in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        ElementTree.fromstring(drawing)
    assert text.count("Accuracy of all models in ") == 4 * verified
    assert ("Recovery is (student" in words) == (verified and init and routed)
    assert ("Norm" in words.replace("gain, Norm", "").replace("gain or Norm", "")) == (
        verified and init and routed
    )
    assert ("Paired differences" in words) == (verified and several)
    assert ("beats the init" in words) == (verified and init)
    assert ("gain on init" in words) == (verified and init)
    assert ("Init is sft" in " ".join(re.sub(r"<[^>]+>", "", text).split())) == init
    assert ("KL is in nats per token" in words) == init
    assert ("Wins are" in words) == init
    assert ('id="forgetting"' in text) == (verified and routed)
    assert ("and the difference to init in points" in words) == (verified and routed and init)
    assert not re.search(r"\b(None|nan)\b", words)
    # Nothing is called right or wrong, and nothing is expected, where nobody verifies.
    shown = text[text.index('id="transcripts"') : text.index('id="settings"')]
    assert "say &lt;b&gt;hi" in shown and "judged 1.25" in " ".join(
        re.sub(r"<[^>]+>", "", shown).split()
    )
    assert "expected" not in shown and "wrong" not in shown and "right" not in shown


def test_names_are_those_of_the_recipe(
    candidate_scores: Make,
    commit_several: Callable[..., Any],
    empty_store: Store,
    tmp_path: Path,
) -> None:
    artifact, made = commit_several(empty_store, candidate_scores(), renamed="old_")
    fingerprints = made.fingerprints()
    names = {print_: f"new_{name.removeprefix('old_')}" for name, print_ in fingerprints.items()}
    path = tmp_path / "r.html"
    write_report(path, store=empty_store, artifact=artifact, recipe="r", seed=0, names=names)
    text = path.read_text(encoding="utf-8")
    assert "old_" not in text
    assert "new_sft is init of new_evaluation" in text
    assert report_is_current(path, artifact.fingerprint, names)
    assert not report_is_current(path, artifact.fingerprint, {})
    stages = gather(empty_store, artifact, names)
    assert {stage.name for stage in stages} == set(names.values())
    labels = {stage.label for stage in stages}
    assert all(set(stage.edges.values()) <= labels for stage in stages)


def test_ladder_has_every_model_in_order(candidate_scores: Make) -> None:
    scores = candidate_scores()
    drawing = ElementTree.fromstring(ladder_plot(scores, "add"))
    texts = [t.text for t in drawing.iter() if t.get("class") == "name"]
    assert texts == ["init", "round1", "teacher", "mopd", "merged", "traces"]
    circles = [c for c in drawing.iter() if c.tag.endswith("circle")]
    assert len(circles) == 12
    place = {c.get("class"): float(c.get("cx", 0)) for c in circles}
    assert place["along"] < place["teacher"]
    (ladder,) = [p for p in drawing.iter() if p.get("class") == "ladder"]
    assert len(ladder.get("points", "").split()) == 2


def test_long_names_stand_above_their_dots(candidate_scores: Make) -> None:
    scores = candidate_scores()
    name = "a_very_long_name_of_a_student_of_a_recipe"
    scores["students"] = {name: scores["students"]["mopd"]}
    scores["models"][f"students.{name}"] = scores["models"]["students.mopd"]
    drawing = ElementTree.fromstring(ladder_plot(scores, "add"))
    assert name in [t.text for t in drawing.iter() if t.get("class") == "name"]


def test_cards_of_a_student_and_of_a_model_along_the_way(
    candidate_scores: Make, commit_several: Callable[..., Any], empty_store: Store
) -> None:
    scores = candidate_scores()
    commit_several(empty_store, scores)
    found = {}
    for name in ("student", "m1", "sft"):
        artifact = empty_store.resolve(name)
        found[name] = model_card(artifact.record, scores_of(empty_store, artifact))
    row = scores["students"]["mopd"]["domains"]["add"]
    assert f"| add | {100 * row['student']['value']:.1f} (" in found["student"]
    assert f"| {row['recovery']['value']:.2f} |" in found["student"]
    assert "as students.mopd)" in found["student"]
    low = 100 * scores["along"]["round1"]["add"]["sampled"]["low"]
    assert f"({low:.1f}{RANGE}" in found["m1"] and "| recovery |" not in found["m1"]
    assert f"| add | {100 * row['init']['value']:.1f} (" in found["sft"]
    for text in found.values():
        assert "chat" not in text[text.index("## Scores") : text.index("## How it was made")]


def test_numbers_have_as_many_digits_as_tell_models_apart() -> None:
    cells = {"score": {"value": 0.0012}}, {"score": {"value": 0.0019}}
    rows = {"chat": {"models": {"a": cells[0], "b": cells[1]}}}
    # They differ by 7e-4: two digits of that are the fifth decimal.
    assert candidates.decimals(rows, "score") == 5
    assert candidates.decimals({"chat": {"models": {"a": cells[0]}}}, "score") == 2
    wide = {"chat": {"models": {"a": {"score": {"value": 120.0}}, "b": cells[0]}}}
    assert candidates.decimals(wide, "score") == 0
