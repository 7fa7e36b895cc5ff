"""Stages with a checkpoint whose chat template opens the thinking block in every prompt."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from posttrain.backends.checkpoint import chat_of, load
from posttrain.engine.errors import ConfigError
from posttrain.rewards.spec import VerifierSpec
from posttrain.stages.judging import comparison_prompt, verdict_ids
from posttrain.suites.build import build_domain
from posttrain.suites.domain import Domain, Table, domain_node

R1 = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "<|assistant|>{{ m['content'].split('</think>')[-1] }}<|end|>"
    "{% else %}<|user|>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)


@pytest.fixture
def inputs(tmp_path: Path, models: Mapping[str, str]) -> dict[str, str]:
    """A model that always thinks, and a domain whose verifier likes any text that says a thing."""
    model, domain = tmp_path / "model", tmp_path / "domain"
    shutil.copytree(models["one"], model)
    (model / "chat_template.jinja").write_text(R1)
    domain.mkdir()
    rows = [
        {"prompt": f"q {n}", "answer": "[0-9a-z]", "demo": f"no {n}</think>{n}"} for n in range(90)
    ]
    (domain / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    node = domain_node(
        Domain(
            name="any",
            source=Table(train="rows.jsonl", demo="demo"),
            verifier=VerifierSpec(name="regex", options={"from_answer": True}),
        ),
        domain,
    )
    build_domain(node.config, node.runtime, domain, node.data)
    record = {"format": 1, "name": "any", "kind": "domain", "fingerprint": "1" * 64}
    (domain / "record.json").write_text(json.dumps(record))
    return {"models.any": str(model), "domains.any": str(domain)}


def ends_by_itself(model: str) -> None:
    """The model of the fixture ends at many characters, which ends turns early."""
    path = Path(model) / "generation_config.json"
    config = json.loads(path.read_text())
    end = load(model).tokenizer.eos_token_id
    path.write_text(json.dumps(config | {"eos_token_id": end}))


def test_a_thought_that_never_ended_is_paid_nothing(
    run_stage: Callable[..., Any], inputs: dict[str, str]
) -> None:
    settings = {"k": 4, "num_prompts": 40, "max_new_tokens": 8, "routes": {"any": ["any"]}}
    ran = run_stage("sample", settings, inputs)
    rows = [json.loads(line) for line in (ran.out / "rollouts.jsonl").read_text().splitlines()]
    assert all(row["response"].startswith("<think>") for row in rows)
    # Text that the verifier would like, in turns that ended.
    guesses = [row for row in rows if row["finished"] and len(row["response"]) > len("<think>")]
    assert guesses and not any("</think>" in row["response"] for row in guesses)
    assert {row["reward"] for row in rows} == {0.0}


def test_what_such_a_model_learned_to_say_is_paid_for_its_answer(
    run_stage: Callable[..., Any], inputs: dict[str, str]
) -> None:
    ends_by_itself(inputs["models.any"])
    start = {"start": inputs["models.any"], "domains.any": inputs["domains.any"]}
    taught = run_stage("sft", {"steps": 120, "batch_size": 16, "lr": 2e-2}, start)
    settings = {"k": 1, "num_prompts": 10, "max_new_tokens": 30, "temperature": 0.1}
    for modes in ((), ("think",)):
        more = {"routes": {"any": ["any"]}, "modes": modes}
        ran = run_stage("sample", settings | more, inputs | {"models.any": str(taught.out)})
        rows = [json.loads(line) for line in (ran.out / "rollouts.jsonl").read_text().splitlines()]
        assert {row["response"][:9] for row in rows} == {"<think>no"}
        assert sum(row["reward"] for row in rows) == len(rows)
    with pytest.raises(ConfigError, match="always thinks"):
        run_stage("sample", settings | more | {"modes": ("no_think",)}, inputs)


def test_a_verdict_of_such_a_model_is_read_behind_the_block(inputs: dict[str, str]) -> None:
    ends_by_itself(inputs["models.any"])
    chat = chat_of(load(inputs["models.any"]))
    prompt = comparison_prompt(chat, None, {"prompt": "q", "answer": "a"}, ("a", "<|end|>b"))
    assert chat.text(prompt).endswith("<|assistant|><think></think>")
    first, second = verdict_ids(chat)
    assert chat.text([first, second]) == "12"
    # A response that writes control tokens does not speak for the judge.
    assert sum(token in chat.stop_ids for token in prompt) == 0
