"""Several models in one evaluation, from the command line, with stages that were made before under
other names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

SEVERAL = """
    return r.evaluate(
        {"taught": student, "merged": r.merge(teachers, name="both")},
        teachers=teachers,
        init=s,
        along={"plain": start},
        judges={"sums": judges.format("[0-9]")},
        num_problems=6,
        bootstrap=100,
        transcripts=2,
        **SHORT,
    )
"""


def several(place: Path, **names: str) -> None:
    """The tiny recipe with an evaluation of several models, and other names of stages."""
    text = (place / "mini.py").read_text().partition("    return r.evaluate(")[0] + SEVERAL
    text = text.replace("import Recipe", "import Recipe, judges")
    text = text.replace("lr=lr)", f"lr=lr, name={names['sft']!r})")
    text = text.replace(
        "        start=s,\n        teachers", "        start=s, name={!r},\n        teachers"
    )
    (place / "several.py").write_text(text.replace("{!r}", repr(names["student"])))


def test_names_of_the_recipe_stand_in_report_and_terminal(
    done: Path, cli: Callable[..., Any]
) -> None:
    several(done, sft="first", student="pupil")
    ran = cli("run", "several.py", "--suite", "pairs.toml", "--json")
    stages = {stage["name"]: stage["status"] for stage in ran.json["stages"]}
    assert (stages["first"], stages["pupil"], stages["evaluation"]) == ("cached", "cached", "ran")
    made = Path(ran.json["stages"][-1]["artifact"]).name
    result = ran.json["evaluation"]
    assert list(result["students"]) == ["taught", "merged"]
    assert result["pairs"][0]["first"] == "taught"
    assert list(result["judged"]) == ["sums"]
    page = (done / "report.html").read_text()
    for text in ("<code>pupil</code>", "<code>first</code>, the start of taught", ">pupil<"):
        assert text in page
    assert "student is students.taught of" not in page
    assert "pupil is students.taught of evaluation" in page
    # Nothing runs under new names, but the page is about other names.
    several(done, sft="second", student="learner")
    again = cli("run", "several.py", "--suite", "pairs.toml")
    assert "(unchanged)" not in again.out
    assert "Students: taught (`learner`) and merged (`both`)." in again.out
    assert "Init is `second`." in again.out
    assert "taught \N{MINUS SIGN} merged" in again.out
    assert "Students: taught (`learner`) and merged (`both`)." in cli("show", made).out
    page = (done / "report.html").read_text()
    assert "<code>learner</code>" in page and "pupil" not in page
    assert "(unchanged)" in cli("run", "several.py", "--suite", "pairs.toml").out
