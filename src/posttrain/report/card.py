"""The model card of a checkpoint: README.md with parents, data, settings, metrics and scores."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from posttrain.engine.graph import edge_name
from posttrain.engine.record import SHORT
from posttrain.report.candidates import view_of
from posttrain.report.scores import norm_coverage, split_name
from posttrain.report.wording import DASH, fixed, flat, number, percent, percent_range
from posttrain.stages.kinds import shown_kind


def model_card(record: Mapping[str, Any], scores: Sequence[Mapping[str, Any]] | None = None) -> str:
    """README.md of a checkpoint, with the YAML head that the Hugging Face Hub reads.

    `record` has its name, kind, fingerprint, config, inputs (edges to name, kind and fingerprint)
    and metrics; `scores` holds the evaluations that include this model, as `gather.scores_of` gives
    them.
    """
    kind = record["kind"]
    parents: dict[str, Mapping[str, str]] = {}
    data: dict[str, Mapping[str, str]] = {}
    for edge, source in record["inputs"].items():
        if "problems" in shown_kind(source["kind"]).makes:
            data[edge.removeprefix(edge_name("domains", ""))] = source
        else:
            parents[edge] = source
    writes_text = "reward_model" not in shown_kind(kind).makes
    parts = [
        _head(kind, data, writes_text=writes_text),
        f"# {record['name']}",
        f"Made by posttrain: {shown_kind(kind).card or kind}. "
        f"Fingerprint `{record['fingerprint']}`.",
        *(["## Scores", *_scores(scores)] if scores else []),
        *_titled("## Warnings", "\n".join(f"- {_plain(w)}" for w in record.get("warnings", ()))),
        "## How it was made",
        _table(
            ("edge", "stage", "kind", "fingerprint"),
            [
                (edge, s["name"], s["kind"], f"`{s['fingerprint'][:SHORT]}`")
                for edge, s in parents.items()
            ],
        )
        or "It has no parents.",
        *_titled(
            "## Data",
            _table(
                ("domain", "fingerprint"),
                [(domain, f"`{s['fingerprint'][:SHORT]}`") for domain, s in data.items()],
            ),
        ),
        *_titled("## Settings", _table(("setting", "value"), list(flat(record["config"]).items()))),
        *_titled(
            "## Metrics at the end of training",
            _table(("metric", "value"), [(key, number(v)) for key, v in record["metrics"].items()]),
        ),
        "## How to load it",
        _USE if writes_text else _USE_SCORES,
    ]
    return "\n\n".join(parts) + "\n"


_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this directory
model = AutoModelForCausalLM.from_pretrained(path)
tokenizer = AutoTokenizer.from_pretrained(path)
chat = [{"role": "user", "content": "..."}]
inputs = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""


_USE_SCORES = """```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

path = "."  # this directory
model = AutoModelForSequenceClassification.from_pretrained(path)
tokenizer = AutoTokenizer.from_pretrained(path)
chat = [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]
ids = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
# The reward is read at the token that ends the response; some templates write more after it.
last = len(ids) - ids[::-1].index(tokenizer.eos_token_id)
print(float(model(torch.tensor([ids[:last]])).logits))
```"""


def _head(kind: str, domains: Iterable[str], *, writes_text: bool) -> str:
    task = "text-generation" if writes_text else "text-classification"
    lines = ["---", "library_name: transformers", f"pipeline_tag: {task}"]
    # A JSON string is a YAML string, whatever is in it.
    lines += ["tags:", *(f"- {json.dumps(tag)}" for tag in ("posttrain", kind, *domains)), "---"]
    return "\n".join(lines)


def _scores(scores: Sequence[Mapping[str, Any]]) -> list[str]:
    found = []
    for item in scores:
        evaluation, model = view_of(item["evaluation"], item["model"])
        rows = [
            (
                domain,
                _accuracy(evaluation, model, domain, "sampled"),
                _accuracy(evaluation, model, domain, "greedy"),
                _recovery(row) if model == "student" else "",
            )
            for domain, row in evaluation["domains"].items()
        ]
        if not rows:
            # Nothing but domains without a verifier.
            continue
        columns = ("domain", "temperature 1", "greedy", "recovery")
        gained = model == "student" and any(r["init"] for r in evaluation["domains"].values())
        width = 4 if gained and evaluation["routes"] else 3
        norm = evaluation["norm"] if model == "student" else None
        coverage = norm_coverage(evaluation, "sampled")
        over = f" over {coverage} domains" if coverage else ""
        label = f"{item['name']}-{item['fingerprint'][:SHORT]}"
        found += [
            f"Accuracy in per cent on {split_name(evaluation)} problems, with 95 % bootstrap "
            f"intervals where they were computed (`{label}`, as {item['model']}).",
            _table(columns[:width], [row[:width] for row in rows]),
            *([] if norm is None else [f"Norm (mean recovery{over}): {fixed(norm, 2)}."]),
        ]
    return found


def _accuracy(evaluation: Mapping[str, Any], model: str, domain: str, decoding: str) -> str:
    text = percent(evaluation["models"][model][domain][decoding])
    row = evaluation["domains"][domain]
    cells = row if decoding == "sampled" else row["greedy"]
    role = "teacher" if model == f"teachers.{evaluation['routes'].get(domain)}" else model
    return f"{text} ({percent_range(cells[role])})" if cells.get(role) else text


def _recovery(row: Mapping[str, Any]) -> str:
    return fixed(row["recovery"]["value"], 2) if row["recovery"] else f"{DASH} ({row['note']})"


def _titled(title: str, body: str) -> list[str]:
    return [title, body] if body else []


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; empty without rows."""
    if not rows:
        return ""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _plain(text: str) -> str:
    """A text of a user or a model as Markdown shows it, on one line: no tag, no link, no table."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", text)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
