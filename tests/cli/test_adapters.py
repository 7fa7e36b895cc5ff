"""Adapters from first stage to last: a recipe of them, exported, adopted, moved, resumed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain.backends.checkpoint import load
from posttrain.backends.outside.adapters import read_pointer
from posttrain.cli import main
from posttrain.engine.store import Store
from posttrain.stages import worker

from .conftest import write_suite

peft = pytest.importorskip("peft")

RECIPE = """
from posttrain import LoRA, Recipe

SHAPE = dict(hidden_size=16, num_layers=1, num_heads=1, head_dim=16, intermediate_size=16,
             max_positions=32)
LORA = LoRA(rank=2, alpha=4)
SHORT = dict(max_new_tokens=4)


def recipe(r: Recipe, base: str = "", only: str = ""):
    data = r.demos(r.domains)
    if base:
        start = r.model(base)
        return r.sft(start=start, data=data, steps=1, batch_size=4, lora=LORA, name="onward")
    start = r.pretrain(data=data, steps=2, batch_size=4, **SHAPE)
    s = r.sft(start=start, data=data, steps=5, batch_size=4, lr=0.02, warmup_steps=1, lora=LORA,
              name="tuned")
    if only == "tuned":
        return s
    teachers = {
        "sums": r.rl(start=s, prompts=r.prompts("sums"), steps=2, prompts_per_step=2, group_size=2,
                     lr=0.02, lora=LORA, name="sums_teacher", **SHORT),
        "copies": r.sft(start=s, data=r.demos("copies"), steps=3, batch_size=4, lr=0.02, lora=LORA,
                        name="copies_teacher"),
    }
    student = r.distill(start=s, teachers=teachers, prompts=r.prompts(r.domains), steps=2,
                        prompts_per_step=4, lr=0.02, lora=LORA, **SHORT)
    chosen = r.best([s, student], prompts=r.prompts(r.domains), num_problems=4, **SHORT)
    merged = r.merge([*teachers.values(), student])
    whole = r.sft(start=chosen, data=data, steps=1, batch_size=4, name="whole")
    return r.evaluate({"chosen": chosen, "merged": merged, "whole": whole}, teachers=teachers,
                      init=s, num_problems=6, bootstrap=100, transcripts=2, **SHORT)
"""
RUN = ("lora.py", "--suite", "pairs.toml", "--no-report", "--json")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the recipe has run; tests read it or copy it."""
    folder = tmp_path_factory.mktemp("trained")
    write_suite(folder)
    (folder / "lora.py").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["run", *RUN, "--jobs", "2"]) == 0
    return folder


@pytest.fixture
def here(trained: Path, place: Path) -> Path:
    """`place` with a copy of that store."""
    (place / "lora.py").write_text(RECIPE)
    shutil.copytree(trained / "posttrain-store", place / "posttrain-store")
    return place


def artifact(folder: Path, name: str, store: str = "posttrain-store") -> Path:
    return Store(folder / store).resolve(name).path


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=torch.arange(5, 20)[None]).logits


def test_every_stage_reads_and_writes_adapters(here: Path, cli: Callable[..., Any]) -> None:
    store = Store(here / "posttrain-store")
    base = store.resolve("base")
    for name in ("tuned", "sums_teacher", "copies_teacher", "student", "best"):
        found = store.resolve(name)
        assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= set(
            found.files
        )
        assert "model.safetensors" not in found.files
        pointer = read_pointer(found.path)
        assert pointer is not None and pointer["fingerprint"] == base.fingerprint
        config = (found.path / "adapter_config.json").read_text()
        assert str(here) not in config and json.loads(config)["base_model_name_or_path"] is None
        assert "library_name: peft" in (found.path / "README.md").read_text()
    for name in ("merged", "whole"):
        assert "model.safetensors" in store.resolve(name).files
    student = load_file(artifact(here, "student") / "adapter_model.safetensors")
    start = load_file(artifact(here, "tuned") / "adapter_model.safetensors")
    assert student.keys() == start.keys()
    assert any(not torch.equal(student[name], start[name]) for name in start)
    assert cli("verify").code == 0
    answer = cli("chat", "student", "--prompt", "1+1=", "--max-new-tokens", "2")
    assert answer.code == 0, answer.err


def test_a_store_with_adapters_can_be_moved(here: Path, cli: Callable[..., Any]) -> None:
    (here / "posttrain-store").rename(here / "elsewhere")
    at = ("--store", "elsewhere")
    assert cli("verify", *at).code == 0
    assert cli("chat", "student", "--prompt", "1+1=", "--max-new-tokens", "2", *at).code == 0
    again = cli("run", *RUN, *at).json
    assert {stage["status"] for stage in again["stages"]} == {"cached"}


def test_an_export_is_read_by_peft_and_adopted_with_its_base(
    here: Path, cli: Callable[..., Any]
) -> None:
    expected = logits(load(artifact(here, "student")).model)
    exported = cli("export", "student", "out")
    assert exported.code == 0, exported.err
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(here / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(theirs), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(load(here / "out").model), expected, atol=1e-5, rtol=1e-5)

    # Moved, it is adopted with its history and its base in a store that had none of them.
    shutil.move(here / "out", here / "moved")
    adopted = cli("adopt", "moved", "--name", "theirs", "--copy", "--store", "new", "--json")
    assert adopted.json["history"][-1] == "student" and "tuned" in adopted.json["history"]
    shutil.rmtree(here / "moved")
    assert cli("verify", "--store", "new").code == 0
    found = logits(load(artifact(here, "theirs", "new")).model)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    onward = cli("run", *RUN, "--set", "base=theirs", "--store", "new")
    status = {stage["name"]: stage["status"] for stage in onward.json["stages"]}
    assert status["base"] == status["base_base"] == "cached" and status["onward"] == "ran"


def test_a_merged_export_is_a_whole_model(here: Path, cli: Callable[..., Any]) -> None:
    from transformers import AutoModelForCausalLM

    exported = cli("export", "student", "out", "--merged")
    assert exported.code == 0 and "merged into its base" in exported.out
    names = {path.name for path in (here / "out").iterdir()}
    assert not names & {"adapter_config.json", "adapter_base.json", "history.json"}
    model = AutoModelForCausalLM.from_pretrained(here / "out", dtype=torch.float32)
    expected = logits(load(artifact(here, "student")).model)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    assert "The adapter was merged" in (here / "out/README.md").read_text()
    rounded = cli("export", "student", "half", "--merged", "--dtype", "bfloat16")
    assert rounded.code == 0, rounded.err
    half = load_file(here / "half/model.safetensors")
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}
    refused = cli("export", "student", "no", "--dtype", "bfloat16")
    assert refused.code == 2 and "add --merged" in refused.err
    refused = cli("export", "base", "no", "--merged")
    assert refused.code == 2 and "is no adapter" in refused.err


def test_a_stopped_stage_ends_with_the_same_bits_and_its_step_has_a_model(
    here: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = (artifact(here, "tuned") / "adapter_model.safetensors").read_bytes()
    only = (*RUN, "--set", "only=tuned", "--store", "again")
    with monkeypatch.context() as patch:
        stages = Path(__file__).with_name("stopping_stages.py")
        patch.setattr(worker, "EXECUTE", f"{stages}:run_job")
        assert cli("run", *only).code == 1
    state = next((here / "again/work").glob("*/step-*/state.safetensors"))
    names = list(load_file(state))
    assert names and all("lora_" in name for name in names if "/weight." in name)
    whole = sum(p.stat().st_size for p in artifact(here, "base").glob("model.safetensors"))
    assert state.stat().st_size < 3 * whole
    onward = cli("run", *RUN, "--set", "base=tuned@step", "--store", "again")
    assert onward.code == 0, onward.err
    kinds = {stage["name"]: stage["kind"] for stage in onward.json["stages"]}
    assert kinds["base"] == kinds["base_base"] == "model"
    assert cli("verify", "--store", "again").code == 0
    assert cli("run", *only).code == 0
    assert (artifact(here, "tuned", "again") / "adapter_model.safetensors").read_bytes() == expected


MISTAKES = {
    'tuned.trainable=["*mlp*"]': r"lora and trainable = .*leave trainable out",
    "student.lora.rank=3": r"'lora.rank': 3, and its start 'tuned' is an adapter with 2",
    "student.lora.dropout=0.1": r"lora.*dropout",
    "tuned.lora.rank=0": r"lora.rank",
}


@pytest.mark.parametrize("given", MISTAKES)
def test_mistakes_are_told_while_planning(place: Path, cli: Callable[..., Any], given: str) -> None:
    (place / "lora.py").write_text(RECIPE)
    refused = cli("plan", *RUN[:3], "--set", given)
    assert refused.code == 2
    assert re.search(MISTAKES[given], " ".join(refused.err.split())), refused.err


def test_a_plan_names_the_setting_that_changed(here: Path, cli: Callable[..., Any]) -> None:
    told = cli("plan", *RUN[:3], "--set", "whole.lora.rank=2", "--set", "whole.lora.alpha=4")
    assert "lora: none -> " in told.out or "lora" in told.out, told.out
    changed = [f"--set={name}.lora.rank=3" for name in ("tuned", "*_teacher", "student")]
    told = cli("plan", *RUN[:3], *changed)
    assert "lora.rank: 2 -> 3" in told.out


OTHERS = {
    "another kind": ({"peft_type": "IA3"}, r"peft_type = 'IA3'.*merge_and_unload"),
    "a task": ({"task_type": "TOKEN_CLS"}, r"task_type = 'TOKEN_CLS'"),
    "an init": ({"init_lora_weights": "pissa"}, r"init_lora_weights = 'pissa' changes"),
    "a feature": ({"layer_replication": [[0, 1]]}, r"layer_replication.*does not read"),
    "no base": ({"base_model_name_or_path": "gone"}, r"neither a directory nor a Hub id"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_adapters_of_others_that_cannot_be_read_are_told_while_planning(
    here: Path, cli: Callable[..., Any], case: str
) -> None:
    assert cli("export", "student", "out").code == 0
    changes, words = OTHERS[case]
    path = here / "out/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    if case == "no base":
        shutil.rmtree(here / "out/base")
    refused = cli("plan", *RUN[:3], "--set", "base=out")
    assert refused.code == 2
    assert re.search(words, " ".join(refused.err.split())), refused.err


def test_an_adapter_of_another_model_is_told_while_planning(
    here: Path, cli: Callable[..., Any]
) -> None:
    assert cli("export", "student", "out").code == 0
    weights = load_file(here / "out/adapter_model.safetensors")
    name = next(iter(weights))
    save_file(
        weights | {name: torch.zeros(2, 33)},
        here / "out/adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    refused = cli("plan", *RUN[:3], "--set", "base=out")
    assert refused.code == 2 and "2 x 33" in refused.err and "base=" in refused.err


def test_a_base_can_be_given_and_is_for_adapters(here: Path, cli: Callable[..., Any]) -> None:
    assert cli("export", "student", "out").code == 0
    shutil.move(here / "out/base", here / "below")
    (here / "given.py").write_text(
        "from posttrain import Recipe\n\n\n"
        "def recipe(r: Recipe, model: str = 'out', base: str = 'below'):\n"
        "    start = r.model(model, base=base)\n"
        "    return r.evaluate(start, num_problems=4, bootstrap=100, max_new_tokens=2)\n"
    )
    ran = cli("run", "given.py", *RUN[1:])
    assert ran.code == 0, ran.err
    refused = cli("plan", "given.py", *RUN[1:3], "--set", "model=below")
    assert refused.code == 2 and "base is for adapters" in refused.err
