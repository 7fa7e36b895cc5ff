"""The model card of a checkpoint: README.md with parents, data, settings, metrics and scores."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from posttrain.engine.ancestry import ADOPTED
from posttrain.engine.graph import edge_name, role_of
from posttrain.engine.record import SHORT
from posttrain.engine.text import in_markdown
from posttrain.report.benchmarks import Scored
from posttrain.report.candidates import view_of
from posttrain.report.scores import DECODING_NAMES, norm_coverage, split_name
from posttrain.report.wording import DASH, fixed, flat, number, percent, percent_range
from posttrain.stages.kinds import shown_kind


def model_card(
    record: Mapping[str, Any],
    scores: Sequence[Mapping[str, Any]] | None = None,
    ancestors: Iterable[Mapping[str, Any]] = (),
    *,
    benchmarks: Sequence[Scored] = (),
    repository: str | None = None,
    adapter: bool = False,
) -> str:
    """README.md of a checkpoint, with the YAML head that the Hugging Face Hub reads.

    `record` has its name, kind, fingerprint, config, inputs (edges to name, kind and fingerprint)
    and metrics; `scores` holds the evaluations that include this model, as `gather.scores_of` gives
    them. `ancestors` are the records of what it descends from, as far as they are known: the head
    names the models from outside and the Hub's data sets among them. `benchmarks` are its scores on
    tasks of lm-eval. `adapter` says that the weights are one of peft, which stands on a base.
    `repository` is the Hub id that the model will have; without one the card says how to load it
    from its directory.
    """
    kind = record["kind"]
    parents, data = _parents_and_data(record)
    warnings = [f"- {in_markdown(text)}" for text in record.get("warnings", ())]
    writes_text = "reward_model" not in shown_kind(kind).makes
    facts: dict[str, Any] = {**origins(record, ancestors)}
    if adapter and "base_model" in facts:
        facts["base_model_relation"] = "adapter"
    parts = [
        _head(kind, data, facts | results(record, scores or ()), writes_text, adapter),
        f"# {in_markdown(record['name'])}",
        f"Made by posttrain: {_how(record)}. Fingerprint `{record['fingerprint']}`.",
        *(["## Scores", *_scores(scores)] if scores else []),
        *_titled("## Scores on tasks of lm-eval", _of_benchmarks(benchmarks)),
        *_titled("## Warnings", "\n".join(warnings)),
        "## How it was made",
        _table(
            ("edge", "stage", "kind", "fingerprint"),
            [
                (edge, s["name"], s["kind"], f"`{s['fingerprint'][:SHORT]}`")
                for edge, s in parents.items()
            ],
        )
        or (
            "What it was made from is in the history of that stage."
            if _stopped(record)
            else "It has no parents."
        ),
        *_probed(record),
        *_titled(
            "## Data",
            _table(
                ("data", "kind", "fingerprint"),
                [(n, s["kind"], f"`{s['fingerprint'][:SHORT]}`") for n, s in data.items()],
            ),
        ),
        *_titled("## Settings", _table(("setting", "value"), list(flat(record["config"]).items()))),
        *_titled(
            "## Metrics at the end of training",
            _table(("metric", "value"), [(key, number(v)) for key, v in record["metrics"].items()]),
        ),
        "## How to load it",
        _use(writes_text, adapter).replace(
            _HERE, _HERE if repository is None else f'path = "{repository}"'
        ),
        *(["## Its history", _HISTORY.format(repository)] if repository else []),
    ]
    return "\n\n".join(parts) + "\n"


def _parents_and_data(
    record: Mapping[str, Any],
) -> tuple[dict[str, Mapping[str, str]], dict[str, Mapping[str, str]]]:
    """What a model was made from: models and the like by edge, data by its name."""
    parents: dict[str, Mapping[str, str]] = {}
    data: dict[str, Mapping[str, str]] = {}
    for edge, source in record["inputs"].items():
        made = shown_kind(source["kind"])
        if "problems" in made.makes:
            data[edge.removeprefix(edge_name("domains", ""))] = source
        elif made.is_data():
            data[source["name"]] = source
        else:
            parents[edge] = source
    return parents, data


def _of_benchmarks(benchmarks: Iterable[Scored]) -> str:
    rows = [row for scored in benchmarks for row in scored.rows()]
    return _table(("task", "metric", "score", "asked with"), rows)


def _stopped(record: Mapping[str, Any]) -> Mapping[str, str]:
    """The unfinished stage of which this is the step checkpoint; {} where it is none."""
    stage: Mapping[str, str] = record.get("provenance", {}).get("stage", {})
    return stage


def _probed(record: Mapping[str, Any]) -> list[str]:
    """That the teachers stayed as they were, where there were any."""
    times = record.get("provenance", {}).get("teachers_probed")
    if not times:
        return []
    often = "once" if times == 1 else f"{times} times"
    return [
        f"Its teachers were probed {often} while it learned, and said of the same tokens what they "
        "had said at first."
    ]


def _how(record: Mapping[str, Any]) -> str:
    """How the model was made, in words."""
    if stage := _stopped(record):
        kind = shown_kind(stage["kind"])
        place = in_markdown(record["provenance"]["source"])
        return (
            f"the step checkpoint {place} of a stage that was not "
            f"finished ({kind}, fingerprint {stage['fingerprint'][:SHORT]}), {kind.card or kind}"
        )
    return shown_kind(record["kind"]).card or record["kind"]


_HERE = 'path = "."  # this directory'
_HISTORY = (
    "`history.json` holds the record of this model and of everything that it descends from, each "
    "hashed into the next. `posttrain adopt hub:{} --name NAME` checks them and keeps them."
)
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


def _use(writes_text: bool, adapter: bool) -> str:
    """Code that loads a model; of an adapter with its base, as `posttrain export` names it."""
    code = _USE if writes_text else _USE_SCORES
    if not adapter:
        return code
    kind = "CausalLM" if writes_text else "SequenceClassification"
    auto, whole = f"AutoPeftModelFor{kind}", f"AutoModelFor{kind}"
    code = code.replace(
        f"from transformers import {whole}, AutoTokenizer",
        f"from peft import {auto}\nfrom transformers import AutoTokenizer",
    )
    more = "" if writes_text else ", num_labels=1"
    return code.replace(f"{whole}.from_pretrained(path)", f"{auto}.from_pretrained(path{more})")


def _head(
    kind: str,
    domains: Iterable[str],
    metadata: Mapping[str, Any],
    writes_text: bool,
    adapter: bool,
) -> str:
    task = "text-generation" if writes_text else "text-classification"
    library = "peft" if adapter else "transformers"
    lines = ["---", f"library_name: {library}", f"pipeline_tag: {task}"]
    # A JSON string is a YAML string, whatever is in it.
    lines += ["tags:", *(f"- {json.dumps(tag)}" for tag in ("posttrain", kind, *domains))]
    # And JSON is YAML.
    lines += [f"{key}: {json.dumps(value)}" for key, value in metadata.items()]
    lines.append("---")
    return "\n".join(lines)


_CODE = re.compile(r"`[0-9a-f]+`")
WEIGHTS = ("start", "models", "candidates", "base", ADOPTED)
"""Roles of the edges along which weights are handed on."""
HUB = re.compile(r"hub:([\w.-]+(?:/[\w.-]+)?)")


def origins(
    record: Mapping[str, Any], ancestors: Iterable[Mapping[str, Any]]
) -> dict[str, str | list[str]]:
    """`base_model`, its relation, `license` and `datasets`, each where it was read somewhere: the
    Hub ids, or names of the directories, of the models from outside whose weights went into this
    one; their licence where all have the same; the Hub ids of tables."""
    known = {one["fingerprint"]: one for one in (*ancestors, record)}
    bases = list(_bases(record, known, set()))
    found: dict[str, str | list[str]] = {}
    names = list(dict.fromkeys(filter(None, map(_base_name, bases))))
    if names:
        found["base_model"] = names[0] if len(names) == 1 else names
        if record not in bases:
            found["base_model_relation"] = "merge" if len(names) > 1 else "finetune"
    for key in ("license", "license_name", "license_link"):
        values = {base.get("provenance", {}).get("origin", {}).get(key) for base in bases}
        value = values.pop() if len(values) == 1 else None
        if value:
            found[key] = value
    # Of the model's own stages and of their data alike; the bases' data is not known.
    texts = json.dumps([one.get("config", {}) for one in known.values()])
    data = sorted(set(HUB.findall(texts)))
    return found | ({"datasets": data} if data else {})


def _bases(
    record: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]], seen: set[str]
) -> Iterator[Mapping[str, Any]]:
    """The records of the models from outside that the weights of one come from."""
    if record["fingerprint"] in seen:
        return
    seen.add(record["fingerprint"])
    kind = shown_kind(record["kind"])
    if kind.from_outside and kind.is_model():
        yield record
    for edge, source in record.get("inputs", {}).items():
        if role_of(edge) in WEIGHTS and source["fingerprint"] in known:
            yield from _bases(known[source["fingerprint"]], known, seen)


def _base_name(record: Mapping[str, Any]) -> str | None:
    origin = record.get("provenance", {}).get("origin", {})
    path = origin.get("path")
    return origin.get("hub") or (path and path.rstrip("/").rpartition("/")[2])


def results(
    record: Mapping[str, Any], scores: Iterable[Mapping[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """`model-index`, as the Hub reads it: the accuracies of this model, in per cent."""
    found: list[dict[str, Any]] = []
    for item in scores:
        evaluation, model = item["evaluation"], item["model"]
        for domain, values in evaluation["models"][model].items():
            metrics = [
                {"type": "accuracy", "name": name, "value": round(100 * values[decoding], 2)}
                for decoding, name in DECODING_NAMES.items()
                if values.get(decoding) is not None
            ]
            if not metrics:
                continue
            dataset = {"type": domain, "name": f"{domain} ({split_name(evaluation)})"}
            result = {"task": {"type": "text-generation"}, "dataset": dataset, "metrics": metrics}
            # Evaluations that differ in other models, as in a sweep, say the same of this one.
            if result not in found:
                found.append(result)
    return {"model-index": [{"name": record["name"], "results": found}]} if found else {}


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
        split = in_markdown(split_name(evaluation))
        label = f"{item['name']}-{item['fingerprint'][:SHORT]}"
        found += [
            f"Accuracy in per cent on {split} problems, with 95 % "
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


def _cell(text: str) -> str:
    # Fingerprints come as code.
    return text if _CODE.fullmatch(text) else in_markdown(text)
