"""Model cards: a head the Hub can read, and tables with the parents, data, settings and scores."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from posttrain.engine.record import Artifact
from posttrain.engine.store import Store
from posttrain.report.card import model_card, results
from posttrain.report.gather import scores_of


def card_of(store: Store, name: str) -> str:
    artifact = store.resolve(name)
    return model_card(artifact.record, scores_of(store, artifact))


def new_record(**fields: Any) -> dict[str, Any]:
    """What a card reads of a record."""
    return {
        "name": "x",
        "fingerprint": "0" * 64,
        "config": {},
        "inputs": {},
        "metrics": {},
    } | fields


def head(card: str) -> dict[str, Any]:
    _, text, _ = card.split("---\n", 2)
    return yaml.safe_load(text)


def table(card: str, title: str) -> list[list[str]]:
    """The cells of the first table under a heading."""
    lines = card[card.index(f"## {title}\n") :].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    return [[cell.strip() for cell in x.strip("|").split(" | ")] for x in lines[start:end]]


def test_head_is_yaml(store: Store, finished: Artifact):
    found = head(card_of(store, "student"))
    assert found["library_name"] == "transformers"
    assert found["tags"] == ["posttrain", "distill", "add", "letters", "reverse", "spiral"]


def test_a_reward_model_is_no_text_generator():
    card = model_card(new_record(kind="reward_model"))
    assert head(card)["pipeline_tag"] == "text-classification"
    assert "a reward model from preference pairs" in card
    assert "AutoModelForSequenceClassification.from_pretrained(path)" in card
    assert "generate(" not in card


def test_warnings_stand_above_how_it_was_made():
    card = model_card(new_record(kind="sft", warnings=["no row of <b> and [x](y) is kept"]))
    assert "## Warnings\n\n- no row of &lt;b> and \\[x\\](y) is kept\n\n## How it was made" in card


def test_names_that_mean_something_in_yaml_are_quoted():
    source = {"name": "no", "kind": "domain", "fingerprint": "1" * 64}
    card = model_card(new_record(kind="rl", inputs={"domains.no": source}))
    assert head(card)["tags"] == ["posttrain", "rl", "no"]


def test_parents_and_data(store: Store, finished: Artifact):
    card = card_of(store, "student")
    student = store.resolve("student")
    edges = {row[0]: row for row in table(card, "How it was made")[2:]}
    assert set(edges) == {"start", *(f"teachers.{d}_teacher" for d in head(card)["tags"][2:])}
    assert edges["start"][1:] == ["sft", "sft", f"`{student.inputs['start']['fingerprint'][:12]}`"]
    assert [row[0] for row in table(card, "Data")[2:]] == ["add", "letters", "reverse", "spiral"]
    assert student.fingerprint in card


def test_settings_and_metrics(store: Store, finished: Artifact):
    card = card_of(store, "student")
    assert ["routes.add", "add_teacher"] in table(card, "Settings")
    assert ["advantage_clip", "null"] in table(card, "Settings")
    assert ["tokens", "144k"] in table(card, "Metrics at the end of training")


def test_scores_of_student_and_teacher(store: Store, finished: Artifact, scores: Any):
    result = scores()
    rows = table(card_of(store, "student"), "Scores")
    assert rows[0] == ["domain", "temperature 1", "greedy", "recovery"]
    add = result["domains"]["add"]
    assert rows[2][1].startswith(f"{100 * add['student']['value']:.1f} (")
    assert rows[2][3] == f"{add['recovery']['value']:.2f}"
    rows = table(card_of(store, "add_teacher"), "Scores")
    assert rows[0] == ["domain", "temperature 1", "greedy"]
    assert rows[2][1].startswith(f"{100 * add['teacher']['value']:.1f} (")
    # Beside its own domain only the mean was kept.
    assert (
        rows[3][1] == f"{100 * result['models']['teachers.add_teacher']['letters']['sampled']:.1f}"
    )


def test_a_norm_over_some_domains_says_so(store: Store, finished: Artifact, scores: Any):
    item = {"name": "evaluation", "fingerprint": "2" * 64, "model": "student"}
    texts = [
        model_card(new_record(kind="distill"), [item | {"evaluation": scores(**options)}])
        for options in ({}, {"flat": "letters"})
    ]
    assert "Norm (mean recovery): 0." in texts[0]
    assert "Norm (mean recovery over 3 of 4 domains): 0." in texts[1]


def test_a_model_that_was_never_scored(store: Store, finished: Artifact):
    card = card_of(store, "base")
    assert "## Scores" not in card
    assert "It has no parents." in card
    assert "from_pretrained" in card


def test_bars_in_values_do_not_break_tables():
    card = model_card(new_record(kind="rl", config={"p": "a|b\nc"}))
    assert "| p | a\\|b c |" in card


@pytest.mark.parametrize("name", ["sft", "student"])
def test_scores_of_finds_the_edge(store: Store, finished: Artifact, name: str):
    found = scores_of(store, store.resolve(name))
    assert [(item["name"], item["model"]) for item in found] == [
        ("evaluation", {"sft": "init"}.get(name, name))
    ]


def outside(name: str, **origin: str) -> dict[str, Any]:
    return new_record(
        name=name, kind="model", fingerprint=name[0] * 64, provenance={"origin": origin}
    )


def linked(record: dict[str, Any], **edges: dict[str, Any]) -> dict[str, Any]:
    inputs = {
        edge.replace("__", "."): {k: one[k] for k in ("name", "kind", "fingerprint")}
        for edge, one in edges.items()
    }
    return record | {"inputs": inputs}


def loaded(card: str) -> Any:
    """The head as the Hub's own library reads it."""
    from huggingface_hub import ModelCard

    return ModelCard(card).data


def test_head_names_the_base_its_licence_and_the_data_of_the_hub():
    base = outside("qwen", hub="Qwen/Qwen3-0.6B", commit="a" * 40, license="apache-2.0")
    config = {"source": {"tables": {"train": "hub:openai/gsm8k:main@abc#train"}}}
    domain = new_record(name="math", kind="domain", fingerprint="d" * 64, config=config)
    sft = linked(
        new_record(name="sft", kind="sft", fingerprint="5" * 64), start=base, domains__math=domain
    )
    teacher = outside("teacher", hub="other/teacher", license="mit")
    student = linked(
        new_record(name="student", kind="distill", fingerprint="6" * 64),
        start=sft,
        teachers__t=teacher,
    )
    found = loaded(model_card(student, ancestors=[base, domain, sft, teacher]))
    # The teacher has given no weights.
    assert found.base_model == "Qwen/Qwen3-0.6B"
    assert found.to_dict()["base_model_relation"] == "finetune"
    assert found.license == "apache-2.0"
    assert found.datasets == ["openai/gsm8k"]


def test_a_merge_names_all_bases_and_a_licence_that_they_share():
    one = outside("one", path="/models/one", license="mit")
    two = outside("two", hub="me/two", license="mit")
    merged = linked(
        new_record(name="m", kind="merge", fingerprint="9" * 64), models__a=one, models__b=two
    )
    found = loaded(model_card(merged, ancestors=[one, two]))
    assert found.base_model == ["one", "me/two"]
    assert (found.license, found.to_dict()["base_model_relation"]) == ("mit", "merge")
    other = two | {"provenance": {"origin": {"hub": "me/two", "license": "other"}}}
    assert loaded(model_card(merged, ancestors=[one, other])).license is None


def test_a_model_from_outside_is_its_own_base_and_one_from_nothing_has_none():
    found = loaded(model_card(outside("qwen", hub="Qwen/Qwen3-0.6B"))).to_dict()
    assert found["base_model"] == "Qwen/Qwen3-0.6B" and "base_model_relation" not in found
    found = loaded(model_card(new_record(kind="pretrain"))).to_dict()
    assert not {"base_model", "license", "datasets", "model-index"} & found.keys()


def test_scores_are_in_the_index_of_the_hub(store: Store, finished: Artifact):
    results = loaded(card_of(store, "student")).eval_results
    evaluation = scores_of(store, store.resolve("student"))[0]["evaluation"]
    found = {(r.dataset_type, r.metric_name): r.metric_value for r in results}
    for domain, values in evaluation["models"]["student"].items():
        sampled = round(100 * values["sampled"], 2)
        assert found[domain, "temperature 1"] == pytest.approx(sampled)
    assert {r.metric_type for r in results} == {"accuracy"}
    assert len(found) == 2 * len(evaluation["domains"])


def test_settings_cannot_write_html_or_links():
    config = {"judge": "<script>alert(1)</script>", "note": "[x](javascript:y) a|b `c` under_score"}
    card = model_card(new_record(kind="sft", config=config))
    assert "<script>" not in card
    assert "\\[x\\](javascript:y) a\\|b \\`c\\` under_score" in card


def test_no_text_of_a_setting_is_taken_for_code_or_steers():
    config = {"a": "`<script>x</script>", "b": "`x` <img src=y>", "c": "\x1b[31m\u202e"}
    scored = {"split": "<script>", "routes": {}, "norm": None, "greedy": {}}
    scored["models"] = {"student": {"d": {"sampled": 0.5, "greedy": 0.5}}}
    row = {"student": None, "init": None, "recovery": None, "note": "<script>"}
    scored["domains"] = {"d": row | {"greedy": row}}
    item = {"name": "e", "fingerprint": "1" * 64, "model": "student", "evaluation": scored}
    stage = {"name": "s", "kind": "sft", "fingerprint": "2" * 64}
    made = {"provenance": {"source": "<script>", "stage": stage}}
    card = model_card(new_record(kind="model", name="<script>", config=config, **made), [item])
    body = card.split("---\n", 2)[2]
    assert "<script>" not in body and "<img" not in body
    assert "\\`&lt;script>x&lt;/script>" in card and "\\\\x1b\\[31m" in card


def test_the_index_says_the_same_result_once() -> None:
    """Evaluations that differ in other models alone, as those of a sweep."""

    def item(value: float) -> dict[str, Any]:
        found = {"sampled": value, "greedy": value}
        evaluation = {"models": {"student": {"add": found}}, "split": "validation"}
        return {"evaluation": evaluation, "model": "student"}

    (index,) = results({"name": "m"}, [item(0.5), item(0.5), item(0.25)])["model-index"]
    values = [[m["value"] for m in result["metrics"]] for result in index["results"]]
    assert values == [[50.0, 50.0], [25.0, 25.0]]
