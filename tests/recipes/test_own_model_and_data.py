"""A user's own checkpoint and own problems through the whole MOPD recipe, by the command line.

The model is a small Llama with a byte-level BPE tokenizer, BOS and a chat template, the problems
are three JSONL files with three verifiers, and all the package is told is a suite file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SUITE = """
name = "mine"

[domains.letters]
train = "letters.jsonl"
prompt = "question"
answer = "solution"
demo = "worked"
verifier = "exact"
case_sensitive = false

[domains.colours]
train = "colours.jsonl"
demo = "demo"
verifier = "choice"

[domains.sums]
train = "sums.jsonl"
validation = "sums_validation.jsonl"
heldout = "sums_heldout.jsonl"
demo = "demo"
id = "name"
verifier = "math"
"""
SMALL = {
    "*.steps": 2,
    "*.batch_size": 8,
    "*.prompts_per_step": 6,
    "*_teacher.group_size": 4,
    "*.max_new_tokens": 12,
    "evaluation.num_problems": 6,
    "evaluation.samples": 1,
    "evaluation.bootstrap": 200,
}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_problems(folder: Path) -> list[str]:
    """Three domains in JSONL; returns all their texts."""
    words = ["pear", "Grape", "fig", "lemon", "cherry", "apricot", "plum", "Olive", "date", "nut"]
    letters = [
        {"question": f"Letter {i + 1} of {word + tail}?", "solution": (word + tail)[i]}
        for word in words
        for tail in ("", "s", "let", "tree")
        for i in range(3)
    ]
    letters = [row | {"worked": row["solution"], "source": "mine"} for row in letters]
    colours = []
    for i, colour in enumerate(["red", "green", "blue", "grey", "pink"]):
        for j, other in enumerate(words):
            a, b = (colour, other) if (i + j) % 2 else (other, colour)
            letter = "A" if a == colour else "B"
            text = f"Which is a colour? (A) {a} (B) {b}"
            colours.append({"prompt": text, "answer": letter, "demo": f"The answer is {letter}"})
    sums = [
        {"name": f"s{a}-{b}", "prompt": f"{a} + {b} = ?", "answer": a + b, "demo": f"${a + b}$"}
        for a in range(10)
        for b in range(11, 31)
    ]
    write(folder / "letters.jsonl", letters)
    write(folder / "colours.jsonl", colours)
    write(folder / "sums.jsonl", sums[::2])
    write(folder / "sums_validation.jsonl", sums[1::4])
    write(folder / "sums_heldout.jsonl", sums[3::4])
    return [str(value) for row in (*letters, *colours, *sums) for value in row.values()]


def write_model(folder: Path, texts: list[str]) -> None:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|eos|>", "<|pad|>", "<|start|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        additional_special_tokens=special[3:],
        chat_template=TEMPLATE,
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    # As published chat models have it: both tokens end a response, and sampling is suggested.
    model.generation_config = GenerationConfig(
        eos_token_id=[4, 1], pad_token_id=2, do_sample=True, temperature=0.6
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def posttrain(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("POSTTRAIN")}
    return subprocess.run(
        [sys.executable, "-m", "posttrain", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_own_model_and_own_data_through_mopd(tmp_path: Path) -> None:
    write_model(tmp_path / "my-model", write_problems(tmp_path))
    (tmp_path / "suite.toml").write_text(SUITE)
    settings = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    command = ["run", "mopd", "--suite", "suite.toml", "--set", "base=./my-model", *settings]
    command += ["--store", "store", "--json"]

    done = posttrain(tmp_path, *command)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert set(told["evaluation"]["domains"]) == {"letters", "colours", "sums"}
    kinds = {stage["name"]: stage["kind"] for stage in told["stages"]}
    assert {stage["status"] for stage in told["stages"]} == {"ran"}
    assert sorted(kinds.values()) == sorted(
        ["model", "domain", "domain", "domain", "sft", "distill", "evaluate"]
        + 3 * ["sft"]
        + 3 * ["rl"]
    )

    (folder,) = (tmp_path / "store" / "artifacts" / "evaluate").iterdir()
    evaluation = json.loads((folder / "evaluation.json").read_text())
    for name, domain in evaluation["domains"].items():
        assert domain["num_problems"] == 6
        assert evaluation["routes"][name] == f"{name}_teacher"
        assert 0 <= domain["student"]["value"] <= 1
    (tmp_path / "report.html").read_text().index("letters")

    (student,) = (tmp_path / "store" / "artifacts" / "distill").iterdir()
    check_checkpoint(student, tmp_path / "my-model")
    check_lineage(tmp_path)

    again = posttrain(tmp_path, *command)
    assert again.returncode == 0, again.stderr
    stages = json.loads(again.stdout.splitlines()[-1])["stages"]
    assert {stage["status"] for stage in stages} == {"cached"}


def check_checkpoint(student: Path, start: Path) -> None:
    """It loads as any checkpoint does, has learned, and speaks as its start did."""
    model = AutoModelForCausalLM.from_pretrained(student)
    before = AutoModelForCausalLM.from_pretrained(start).float()
    assert isinstance(model, LlamaForCausalLM)
    pairs = zip(model.parameters(), before.parameters(), strict=True)
    assert any(not torch.equal(a.float(), b) for a, b in pairs)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
    assert model.generation_config.eos_token_id == [4, 1]
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (student, start))
    assert ours.get_vocab() == theirs.get_vocab()
    message = [{"role": "user", "content": "1 + 2 = ?"}]
    ids = ours.apply_chat_template(message, add_generation_prompt=True).input_ids
    assert ids == theirs.apply_chat_template(message, add_generation_prompt=True).input_ids
    assert ids[0] == ours.bos_token_id
    out = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)
    assert out.shape[1] > len(ids)
    assert "sums_teacher" in (student / "README.md").read_text()


def check_lineage(folder: Path) -> None:
    """The student descends from the user's model and data, and every byte is what it was."""
    told = posttrain(folder, "lineage", "student", "--store", "store", "--json")
    assert told.returncode == 0, told.stderr
    for name in ("base", "sft", "sums_sft", "letters_teacher", "colours"):
        assert f'"{name}"' in told.stdout
    checked = posttrain(folder, "verify", "student", "--store", "store")
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('answer = "solution"', 'answer = "reply"'), "reply"),
        (('verifier = "choice"', 'verifier = "choise"'), "choice"),
        (("colours.jsonl", "colors.jsonl"), "colours.jsonl"),
    ],
)
def test_mistakes_in_the_suite_cost_no_compute(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    write_problems(tmp_path)
    (tmp_path / "suite.toml").write_text(SUITE.replace(*change))
    done = posttrain(tmp_path, "run", "mopd", "--suite", "suite.toml", "--store", "store")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "store").exists()
