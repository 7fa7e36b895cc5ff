"""What a record says of how an artifact came to be, and what an export makes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml


def test_texts_memory_and_tokens(cli: Callable[..., Any], done: Path) -> None:
    record = cli("show", "sft", "--json").json
    facts = record["provenance"]
    for name, file in (("recipe", "mini.py"), ("suite", "pairs.toml")):
        assert facts["texts"][name]["text"] == (done / file).read_text()
        assert facts["texts"][name]["path"].endswith(f"/{file}")
    assert 10_000_000 < facts["peak_memory"] < 100_000_000_000
    assert facts["tokens"] == record["metrics"]["tokens"]
    said = " ".join(cli("show", "sft").out.split())
    assert "peak_memory" in said and "mini.py (its text: --json)" in said


def test_where_a_base_is_from(cli: Callable[..., Any], done: Path) -> None:
    cli("export", "sft", "outside")
    (done / "outside" / "README.md").write_text(
        "---\nlicense: 'mit'\nlicense_name: [a]\n---\nlicense: no\n"
    )
    cli("adopt", "outside", "--name", "mine")
    origin = {"path": str(done / "outside"), "license": "mit"}
    assert cli("show", "mine", "--json").json["provenance"]["origin"] == origin
    assert "license mit" in cli("show", "mine").out

    # Without adoption the stage of the run has it.
    (done / "posttrain-store" / "names.json").unlink(missing_ok=True)
    run = ("run", "mini.py", "--suite", "pairs.toml", "--set", "base=outside", "--no-report")
    other = cli(*run, "--store", "other", "--set", "steps=1", "--json").json
    made = {stage["name"]: stage["artifact"] for stage in other["stages"]}
    facts = cli("show", "base", "--json", "--store", "other").json["provenance"]
    assert facts["origin"] == origin
    for name in ("sft", "student"):
        head = yaml.safe_load((Path(made[name]) / "README.md").read_text().split("---\n")[1])
        assert head["base_model"] == "outside" and head["license"] == "mit"
    cli("export", "student", "taken", "--store", "other")
    head = yaml.safe_load((done / "taken" / "README.md").read_text().split("---\n")[1])
    assert (head["base_model"], head["base_model_relation"]) == ("outside", "finetune")
    (index,) = head["model-index"]
    assert {r["dataset"]["type"] for r in index["results"]} == {"sums", "copies"}
