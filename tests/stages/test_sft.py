"""Supervised stages: sft and pretrain learn the demonstrations, and every setting counts."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.backends.checkpoint import LanguageModel, chat_of, load
from posttrain.backends.saved_types import recast
from posttrain.backends.tiny import character_tokenizer, new_model
from posttrain.engine.errors import ConfigError
from posttrain.schedules import learning_rate
from posttrain.stages import context
from posttrain.stages.config import build_config
from posttrain.stages.context import Context
from posttrain.stages.data import Pool
from posttrain.stages.settings.offline import Pretrain, Sft
from posttrain.stages.supervised import fresh_model

RunStage = Callable[..., Any]
BASE: dict[str, Any] = {"steps": 5, "batch_size": 8, "lr": 0.01, "warmup_steps": 1}
TINY: dict[str, Any] = {
    **BASE,
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "head_dim": 8,
    "intermediate_size": 32,
    "max_positions": 32,
}


@pytest.fixture
def sft(
    run_stage: RunStage, models: Mapping[str, str], domains: Mapping[str, str]
) -> Callable[..., Any]:
    def run(**changes: Any) -> Any:
        return run_stage("sft", BASE | changes, {"start": models["start"], **domains})

    return run


@pytest.fixture
def pretrain(run_stage: RunStage, domains: Mapping[str, str]) -> Callable[..., Any]:
    def run(**changes: Any) -> Any:
        return run_stage("pretrain", TINY | changes, dict(domains))

    return run


def test_metrics_and_lines(sft: Callable[..., Any]) -> None:
    ran = sft()
    assert [line["step"] for line in ran.lines] == [1, 2, 3, 4, 5]
    for line in ran.lines:
        assert set(line) == {"step", "total", "tokens", "seconds", "loss", "grad_norm", "lr"}
        assert all(math.isfinite(value) for value in line.values())
    assert ran.metrics == {"loss": ran.lines[-1]["loss"], "tokens": ran.lines[-1]["tokens"]}
    # 4 rows of 3 characters and 4 of 6 per step, and an end token each.
    assert ran.lines[0]["tokens"] == 4 * 4 + 4 * 7


def test_the_loss_is_that_of_the_response_tokens(
    sft: Callable[..., Any], models: Mapping[str, str], domains: Mapping[str, str]
) -> None:
    """Step 1 against transformers' own loss, row by row, on labels that leave out the prompt."""
    problems = {
        name: [
            json.loads(line)
            for line in Path(domains[f"domains.{name}"], "train.jsonl").read_text().splitlines()
        ]
        for name in ("short", "words")
    }
    model = AutoModelForCausalLM.from_pretrained(models["start"])
    tokenizer = AutoTokenizer.from_pretrained(models["start"])
    total, tokens = 0.0, 0
    for row in Pool(problems, seed=0).draw(0, 24):
        prompt = [{"role": "user", "content": row["prompt"]}]
        answer = [*prompt, {"role": "assistant", "content": row["demo"]}]
        start = len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True).input_ids)
        ids = torch.tensor([tokenizer.apply_chat_template(answer).input_ids])
        labels = ids.clone()
        labels[:, :start] = -100
        with torch.no_grad():
            loss = model(input_ids=ids, labels=labels).loss.item()
        total, tokens = total + loss * (ids.shape[1] - start), tokens + ids.shape[1] - start
    line = sft(steps=1, batch_size=24).lines[0]
    assert line["tokens"] == tokens
    assert line["loss"] == pytest.approx(total / tokens, rel=1e-5)


def test_the_loss_falls(sft: Callable[..., Any]) -> None:
    ran = sft(steps=40)
    assert ran.lines[-1]["loss"] < 0.5 * ran.lines[0]["loss"]


SETTINGS: list[dict[str, Any]] = [
    {"seed": 1},
    {"steps": 6},
    {"steps": None, "epochs": 0.1},
    {"batch_size": 6},
    {"lr": 0.02},
    {"lr_decay": "constant"},
    {"lr_decay": "linear"},
    {"lr_decay": {"kind": "cosine", "end": 0.5}},
    {"warmup_steps": 2},
    {"optimizer": {"beta1": 0.5}},
    {"optimizer": {"beta2": 0.5}},
    {"optimizer": {"weight_decay": 0.5}},
    {"optimizer": {"max_grad_norm": 0.01}},
]
MORE: list[dict[str, Any]] = [
    {"loss_on": "response"},
    {"hidden_size": 24},
    {"num_layers": 2},
    {"num_heads": 1},
    {"head_dim": 16},
    {"intermediate_size": 48},
    {"max_positions": 48},
]


def test_every_setting_of_sft_changes_the_result(sft: Callable[..., Any], same: Any) -> None:
    results = {"base": sft()} | {str(changes): sft(**changes) for changes in SETTINGS}
    names = list(results)
    alike = [
        (one, other)
        for i, one in enumerate(names)
        for other in names[i + 1 :]
        if same(results[one], results[other])
    ]
    assert alike == []


def test_every_setting_of_pretrain_changes_the_checkpoint(pretrain: Callable[..., Any]) -> None:
    changes = [{}, *(c for c in SETTINGS if "epochs" not in c), *MORE]
    results = {str(change): pretrain(**change).out for change in changes}
    files = {
        (out / "model.safetensors").read_bytes() + (out / "config.json").read_bytes()
        for out in results.values()
    }
    assert len(files) == len(changes)


def test_a_pretrained_model_is_of_the_size_asked_for_and_learns(
    pretrain: Callable[..., Any],
) -> None:
    ran = pretrain(steps=60, lr=0.02, max_positions=24)
    assert ran.lines[-1]["loss"] < 0.6 * ran.lines[0]["loss"]
    model = AutoModelForCausalLM.from_pretrained(ran.out)
    assert model.config.max_position_embeddings == 24
    assert ran.metrics["parameters"] == sum(p.numel() for p in model.parameters())
    assert ran.metrics["loss"] == ran.lines[-1]["loss"]


def test_pretraining_on_responses_counts_their_tokens_only(pretrain: Callable[..., Any]) -> None:
    everything, responses = pretrain().lines[0], pretrain(loss_on="response").lines[0]
    assert responses["tokens"] == 4 * 4 + 4 * 7
    # <|user|>, the name, a space, the word and <|assistant|>, of which the first is given.
    assert everything["tokens"] == responses["tokens"] + 4 * (6 + 3 + 1) + 4 * (6 + 6 + 1)


def test_pretraining_begins_with_the_weights_that_were_drawn(
    new_context: Callable[..., Context],
) -> None:
    """Written to a directory and read again by the backend: not a bit is lost."""
    settings = Pretrain(**{**TINY, "seed": 5, "thinking": True})
    demos = {"short": [{"prompt": "große", "demo": "a", "thought": "ø"}]}
    ctx = new_context()
    policy = ctx.learner(settings, fresh_model(settings, ctx, demos))
    tokenizer = character_tokenizer(["große", "ø"], thinking=True)
    sizes = {name: TINY[name] for name in set(TINY) - set(BASE)}
    expected = new_model(tokenizer, **sizes, seed=5).model.state_dict()
    found = {n.removeprefix("weight."): v for n, v in policy.state().items()}
    assert found.keys() <= expected.keys() and len(found) > 10
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert policy.chat.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert policy.chat.decode(policy.chat.response("", "große ø")) == "große ø"


def test_documents_longer_than_the_model_are_refused(pretrain: Callable[..., Any]) -> None:
    with pytest.raises(
        ConfigError, match=r"172 of 172 rows do not fit the 12 positions.*\d+ tokens.*on_long"
    ):
        pretrain(max_positions=12)


def test_rows_of_a_data_artifact_are_learned(
    run_stage: RunStage, models: Mapping[str, str], tmp_path: Path, same: Any
) -> None:
    rows = [
        {"id": str(i), "domain": name, "prompt": f"{name} {i}", "demo": str(i)}
        for i in range(20)
        for name in ("y", "x")
    ]
    data = tmp_path / "data"
    data.mkdir()
    inputs = {"start": models["start"], "data": str(data)}
    (data / "record.json").write_text(
        '{"format": 1, "name": "selection", "kind": "select", "fingerprint": "2222"}'
    )
    results = []
    for ordered in (rows, sorted(rows, key=lambda row: row["domain"])):
        (data / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ordered))
        results.append(run_stage("sft", BASE | {"steps": 30}, inputs))
    assert results[0].lines[-1]["loss"] < 0.7 * results[0].lines[0]["loss"]
    assert same(*results), "the order in which domains come must not matter"
    (data / "data.jsonl").write_text("")
    with pytest.raises(ConfigError, match="'my_sft': its data has no rows"):
        run_stage("sft", BASE, inputs)


def test_a_domain_without_demonstrations_is_refused(
    run_stage: RunStage, models: Mapping[str, str], undemonstrated: str, tmp_path: Path
) -> None:
    inputs = {"start": models["start"], "domains.bare": undemonstrated}
    with pytest.raises(ConfigError, match="domain 'bare' has no demonstration for problem"):
        run_stage("sft", BASE, inputs)
    assert not list(tmp_path.glob("work-*/metrics.jsonl"))


def test_epochs_are_passes_over_all_rows(
    sft: Callable[..., Any], domains: Mapping[str, str]
) -> None:
    num_rows = sum(
        len(Path(path, "train.jsonl").read_text().splitlines()) for path in domains.values()
    )
    ran = sft(steps=None, epochs=0.5, batch_size=10)
    assert len(ran.lines) == math.ceil(0.5 * num_rows / 10)


def test_a_step_without_learning_rate_would_change_nothing_and_is_refused() -> None:
    for changes in ({"lr": 0.0}, {"steps": 0}, {"batch_size": 0}, {"epochs": 1.0}):
        with pytest.raises(ConfigError, match="stage 'mine'"):
            build_config("sft", "mine", BASE | changes)
    with pytest.raises(ConfigError, match="exactly one of steps and epochs"):
        build_config("sft", "mine", BASE | {"steps": None})


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ({"kind": "linear", "end": 0.2}, [0.5, 1.0, 1.0, 0.733333, 0.466667, 0.2]),
        ({"kind": "cosine", "end": 0.2}, [0.5, 1.0, 1.0, 0.8, 0.4, 0.2]),
    ],
)
def test_learning_rates_by_hand(decay: Any, expected: list[float]) -> None:
    """Two steps of warm-up, then four of which the first has progress 0 and the last 1, towards
    0.2: linear 1 - 0.8 p, cosine 0.2 + 0.8 (1 + cos(pi p)) / 2."""
    settings = Sft(steps=6, lr=1.0, lr_decay=decay, warmup_steps=2)
    rates = [learning_rate(settings, step, 6) for step in range(6)]
    assert rates == pytest.approx(expected, abs=1e-6)


def test_warm_up_takes_at_most_half_of_the_stage() -> None:
    settings = Sft(steps=4, lr=1.0, warmup_steps=10)
    rates = [learning_rate(settings, step, 4) for step in range(4)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.05])
    assert learning_rate(Sft(steps=1, lr=1.0), 0, 1) == 1.0


def test_dropout_of_the_start_changes_nothing(
    run_stage: RunStage,
    make_model: Callable[..., LanguageModel],
    save_model: Callable[[LanguageModel], str],
    domains: Mapping[str, str],
    same: Any,
) -> None:
    """Without it a resumed stage could not find the random numbers again."""
    inputs = {"start": save_model(make_model("gpt2")), **domains}
    torch.manual_seed(0)
    one = run_stage("sft", BASE, inputs)
    torch.manual_seed(1)
    assert same(one, run_stage("sft", BASE, inputs))
    assert load_file(one.out / "model.safetensors")


def test_a_disk_that_is_full_at_the_last_checkpoint_fails_the_stage(
    sft: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only checkpoint is begun after the last step, so that no later step can tell of it."""

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(context, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    monkeypatch.setattr(context, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        sft(steps=1)


def test_a_result_has_the_type_of_its_start_or_the_one_asked_for(
    run_stage: RunStage, models: Mapping[str, str], domains: Mapping[str, str], tmp_path: Path
) -> None:
    """It learns in float32 and is rounded once, at the end."""
    start = tmp_path / "start"
    shutil.copytree(models["start"], start)
    recast(start, "bfloat16")
    inputs = {"start": str(start), **domains}
    found = {
        dtype: run_stage("sft", BASE | {"save_dtype": dtype}, inputs).weights()
        for dtype in ("base", "float32", "float16")
    }
    for dtype, weights in found.items():
        expected = getattr(torch, {"base": "bfloat16"}.get(dtype, dtype))
        for name, weight in weights.items():
            assert torch.equal(weight, found["float32"][name].to(expected)), (dtype, name)
            assert weight.dtype == expected
    (ran,) = [run_stage("sft", BASE, {"start": models["start"], **domains})]
    assert {weight.dtype for weight in ran.weights().values()} == {torch.float32}


def test_rows_as_long_as_scaled_positions_are_learned(
    run_stage: RunStage, models: Mapping[str, str], domains: Mapping[str, str], tmp_path: Path
) -> None:
    """8 positions are too few for any row; scaled eight times they are enough for all."""
    start = tmp_path / "start"
    shutil.copytree(models["start"], start)
    config = json.loads((start / "config.json").read_text()) | {"max_position_embeddings": 8}
    (start / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="do not fit the 8 positions"):
        run_stage("sft", BASE, {"start": str(start), **domains})
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8}
    config["rope_parameters"] = config["rope_parameters"] | yarn
    (start / "config.json").write_text(json.dumps(config))
    assert run_stage("sft", BASE, {"start": str(start), **domains}).metrics["loss"] > 0


def test_a_base_model_learns_to_end_its_turns_and_is_saved_with_that_end(
    run_stage: Callable[..., Any],
    make_model: Callable[..., LanguageModel],
    save_model: Callable[[LanguageModel], str],
    domains: Mapping[str, str],
) -> None:
    """Its generation config ends texts with id 9 alone; the template ends turns with id 4."""
    base = make_model(stop=9)
    base.tokenizer.eos_token = base.tokenizer.convert_ids_to_tokens(9)
    start = save_model(base)
    generation = Path(start, "generation_config.json")
    generation.write_text(json.dumps(json.loads(generation.read_text()) | {"eos_token_id": 9}))
    ran = run_stage("sft", BASE, {"start": start, **domains})
    saved = json.loads((ran.out / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [4, 9]
    assert chat_of(load(ran.out)).response("q", "a")[-1] == 4
