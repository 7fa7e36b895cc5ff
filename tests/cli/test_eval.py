"""Tasks of lm-eval against our sampler and scorer, on task files written here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain.engine.store import Store

pytest.importorskip("lm_eval")

GENERATE = """
task: local_sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], do_sample: false, max_gen_toks: 4}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 3.0}}
"""
CHOOSE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["{{{{answer}}}}", "9999"]
doc_to_target: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def own(done: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with two tasks over six sums."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(done / "cache"))
    folder = done / "own"
    folder.mkdir()
    rows = [{"question": f"{a}+{a}=", "answer": str(a + a)} for a in range(6)]
    data = folder / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sums.yaml").write_text(GENERATE.format(data=data))
    (folder / "choice.yaml").write_text(CHOOSE.format(data=data))
    return folder


def test_scores_are_an_artifact_that_all_read(
    cli: Callable[..., Any], done: Path, own: Path
) -> None:
    ask = ("--tasks", "local_sums,local_choice", "--include", own)
    found = cli("eval", "student", *ask, "--json").json
    store = Store(done / "posttrain-store")
    artifact, student = store.resolve(found["artifact"]), store.resolve("student")
    assert artifact.kind == "harness" and not found["cached"]
    assert artifact.inputs["model"]["fingerprint"] == student.fingerprint
    assert set(found["tasks"]) == {"local_sums", "local_choice"}
    sums, choice = found["tasks"]["local_sums"], found["tasks"]["local_choice"]
    assert (sums["problems"], sums["version"]) == (6, 3.0)
    # Each score is a mean over six questions, and its standard error that of such a mean.
    for value in (sums["metrics"]["exact_match"], choice["metrics"]["acc"]):
        right = value["value"] * 6
        assert right == pytest.approx(round(right)) and 0 <= right <= 6
        expected = (value["value"] * (1 - value["value"]) / 5) ** 0.5
        assert value["stderr"] == pytest.approx(expected)
    rows = [json.loads(line) for line in artifact.content("samples.jsonl").splitlines()]
    assert len(rows) == 12 and {row["task"] for row in rows} == set(found["tasks"])
    assert cli("eval", "student", *ask, "--json").json["cached"]
    assert cli("verify", "--json").json["ok"]
    # Another one of the same questions, for what stands side by side.
    assert cli("eval", "sft", *ask).code == 0
    both = cli("compare", "student", "sft", "--json").json["benchmarks"]
    assert {row["task"] for row in both[0]["rows"]} == {"local_choice", "local_sums"}
    assert all(None not in row["values"] for row in both[0]["rows"])
    assert "tasks of lm-eval" in cli("compare", "student", "sft").out
    assert cli("export", "student", "out").code == 0
    card = Path("out/README.md").read_text()
    assert "## Scores on tasks of lm-eval" in card and "| local_sums | exact_match |" in card
    assert cli("report", "evaluation").code == 0
    page = Path("report.html").read_text()
    assert 'id="benchmarks"' in page and "local_choice" in page


def test_other_questions_are_another_artifact(
    cli: Callable[..., Any], done: Path, own: Path
) -> None:
    ask = ("eval", "sft", "--tasks", str(own / "sums.yaml"), "--json")
    first = cli(*ask).json
    few = cli(*ask, "--limit", "2", "--fewshot", "1").json
    assert few["artifact"] != first["artifact"] and few["tasks"]["local_sums"]["problems"] == 2
    data = own / "sums.jsonl"
    data.write_text(data.read_text().replace("0+0=", "1+2="))
    assert cli(*ask).json["artifact"] not in (first["artifact"], few["artifact"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("student", "--tasks", "no_such_task_at_all"), "has no such task"),
        (("student", "--tasks", ","), "names no task"),
        (("student", "--tasks", "missing.yaml"), "no such file"),
        (("student", "--tasks", "local_sums", "--include", "nowhere"), "no such directory"),
        (("evaluation", "--tasks", "local_sums"), "not a model"),
    ],
)
def test_mistakes(
    arguments: tuple[str, ...], said: str, cli: Callable[..., Any], done: Path
) -> None:
    found = cli("eval", *arguments)
    assert (found.code, found.out) == (2, "") and said in found.err
    assert "Traceback" not in found.err
