"""Every stage on CUDA gives what it gives on the CPU.

Each test runs twice: on a device that is only pretended (`tests/fake_cuda.py`), which shows that
all tensors are where they have to be, and on a real one where torch sees it.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import posttrain.stages.context
from posttrain.stages.worker import DEVICE

spec = importlib.util.spec_from_file_location(
    "fake_cuda", Path(__file__).parents[1] / "fake_cuda.py"
)
assert spec is not None and spec.loader is not None
fake_cuda = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fake_cuda)

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


@pytest.fixture(params=["pretended", pytest.param("real", marks=[pytest.mark.gpu, needs_cuda])])
def place(request: pytest.FixtureRequest) -> Any:
    """A context in which "cuda" can be asked for; `place.pretended` says what was done there."""
    return Place(fake_cuda.FakeCuda() if request.param == "pretended" else None)


class Place:
    def __init__(self, pretended: Any) -> None:
        self.pretended = pretended

    def __enter__(self) -> None:
        if self.pretended is not None:
            self.pretended.__enter__()

    def __exit__(self, *exception: object) -> None:
        if self.pretended is not None:
            self.pretended.__exit__(*exception)

    def computed(self, dtype: torch.dtype) -> bool:
        """Whether models were there and computed in this type; not known of a real device."""
        mode = self.pretended
        return mode is None or (mode.moved > 25 and mode.linear == {dtype})


RunStage = Callable[..., Any]
OPTIM: dict[str, Any] = {"steps": 2, "lr": 1e-3, "warmup_steps": 1}
ROLLOUT: dict[str, Any] = {"prompts_per_step": 8, "max_new_tokens": 6}
RL = OPTIM | ROLLOUT | {"group_size": 4}
DISTILL = OPTIM | ROLLOUT | {"routes": {"short": "one", "words": "two"}}
IN_REWARD = {"coef": 0.1, "where": "reward"}
GROUPS = {"samples_per_prompt": 2, "reward_weight": 0.5}
HYBRID: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "pretrain": ("pretrain", OPTIM | {"batch_size": 8}),
    "sft": ("sft", OPTIM | {"batch_size": 8}),
    "rl": ("rl", RL),
    "rl, kl in the loss": ("rl", RL | {"kl": {"coef": 0.1}, "num_minibatches": 2}),
    "rl, kl in the reward": (
        "rl",
        RL | {"kl": IN_REWARD, "correction": "icepop", "num_minibatches": 2},
    ),
    "rl, critic": (
        "rl",
        RL | {"advantage": "gae", "kl": IN_REWARD, "num_minibatches": 2},
    ),
    "distill": ("distill", DISTILL),
    "distill, reward": ("distill", DISTILL | GROUPS),
    "distill, top_k": ("distill", DISTILL | {"estimator": "top_k", "num_minibatches": 2}),
    "distill, sampled_token": (
        "distill",
        DISTILL | {"estimator": "sampled_token", "correction": "icepop", "aggregation": "token"},
    ),
    "distill, bfloat16 cache": (
        "distill",
        DISTILL | {"estimator": {"kind": "reverse_kl", "cache": "bfloat16"}},
    ),
}


BFLOAT16 = ("sft", "rl, kl in the loss", "distill")


def inputs_of(kind: str, models: Mapping[str, str], domains: Mapping[str, str]) -> dict[str, str]:
    inputs = dict(domains)
    if kind != "pretrain":
        inputs["start"] = models["start"]
    if kind == "distill":
        inputs |= {"teachers.one": models["one"], "teachers.two": models["two"]}
    return inputs


@pytest.mark.parametrize("case", CASES)
def test_training(
    place: Any,
    case: str,
    run_stage: RunStage,
    models: Mapping[str, str],
    domains: Mapping[str, str],
) -> None:
    kind, settings = CASES[case]
    inputs = inputs_of(kind, models, domains)
    here = run_stage(kind, settings, inputs)
    with place:
        there = run_stage(kind, settings, inputs, environment={DEVICE: "cuda"})
    assert place.computed(torch.float32)
    for one, other in zip(here.lines, there.lines, strict=True):
        del one["seconds"], other["seconds"]
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)
    ours, theirs = here.weights(), there.weights()
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], atol=1e-4), name


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("dpo", {"loss": "dpo"}),
        ("dpo", {"loss": "kto"}),
        ("reward_model", {"loss": {"kind": "bradley_terry", "centring": 0.1}, "per_prompt": True}),
        ("reward_model", {"loss": "pointwise"}),
    ],
)
def test_preferences(
    place: Any,
    kind: str,
    own: dict[str, Any],
    run_stage: RunStage,
    models: Mapping[str, str],
    tmp_path: Path,
) -> None:
    rows = [
        {
            "id": str(n),
            "domain": "short",
            "prompt": f"short {n}",
            "chosen": "A" * n,
            "rejected": "b",
        }
        for n in range(1, 7)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = {"format": 1, "name": "pairs", "kind": "pairs", "fingerprint": "2" * 64}
    (tmp_path / "record.json").write_text(json.dumps(record))
    settings = {"steps": 2, "lr": 1e-3, "batch_size": 4} | own
    inputs = {"start": models["start"], "data": str(tmp_path)}
    here = run_stage(kind, settings, inputs)
    with place:
        there = run_stage(kind, settings, inputs, environment={DEVICE: "cuda"})
    assert place.computed(torch.float32)
    for one, other in zip(here.lines, there.lines, strict=True):
        del one["seconds"], other["seconds"]
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("case", BFLOAT16)
def test_training_in_bfloat16(
    place: Any,
    case: str,
    run_stage: RunStage,
    models: Mapping[str, str],
    domains: Mapping[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind, settings = CASES[case]
    inputs, settings = inputs_of(kind, models, domains), settings | {"precision": "bfloat16"}
    here = run_stage(kind, settings, inputs)
    if place.pretended is not None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with place:
        there = run_stage(kind, settings, inputs, environment={DEVICE: "cuda"})
    assert place.computed(torch.bfloat16)
    # A CPU has its own attention and norms in bfloat16, which round elsewhere.
    assert here.lines[-1]["grad_norm"] == pytest.approx(there.lines[-1]["grad_norm"], rel=0.03)


@pytest.mark.parametrize("kind", ["gpt2", "qwen3_next"])
def test_other_decoders(
    place: Any,
    kind: str,
    run_stage: RunStage,
    make_model: Callable[..., Any],
    save_model: Callable[[Any], str],
    domains: Mapping[str, str],
) -> None:
    """A family without a fused decoder, and a recurrent model, both in lockstep."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    language_model = make_model("gpt2", stop=list(range(4, 60)))
    if kind == "qwen3_next":
        torch.manual_seed(0)
        model = Qwen3NextForCausalLM(Qwen3NextConfig(**HYBRID)).eval()
        model.generation_config = language_model.model.generation_config
        language_model = replace(language_model, model=model)
    inputs = {"start": save_model(language_model), **domains}
    here = run_stage("rl", RL, inputs)
    with place:
        there = run_stage("rl", RL, inputs, environment={DEVICE: "cuda"})
    assert place.computed(torch.float32)
    assert [line["tokens"] for line in here.lines] == [line["tokens"] for line in there.lines]
    # A CPU has its own attention and norms in bfloat16, which round elsewhere.
    assert here.lines[-1]["grad_norm"] == pytest.approx(there.lines[-1]["grad_norm"], rel=0.03)


def test_going_on_from_a_checkpoint(
    place: Any,
    run_stage: RunStage,
    models: Mapping[str, str],
    domains: Mapping[str, str],
    tmp_path: Path,
    same: Callable[[Any, Any], bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every step is saved; the second process finds the first step done."""
    inputs = {"start": models["start"], **domains}
    monkeypatch.setattr(posttrain.stages.context, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    settings = OPTIM | {"batch_size": 8, "steps": 3}
    whole = run_stage("sft", settings, inputs)
    work = tmp_path / "stopped"
    with place:
        begun = run_stage("sft", settings, inputs, work, environment={DEVICE: "cuda"})
        assert len(list(work.glob("step-*"))) == 1
        again = run_stage("sft", settings, inputs, work, environment={DEVICE: "cuda"})
    assert place.computed(torch.float32)
    assert same(begun, again)
    assert whole.metrics == pytest.approx(begun.metrics, rel=1e-3)


def test_answering(
    place: Any, run_stage: RunStage, models: Mapping[str, str], domains: Mapping[str, str]
) -> None:
    settings: dict[str, Any] = {"num_problems": 12, "max_new_tokens": 6, "bootstrap": 100}
    settings |= {"routes": {"short": "one", "words": "two"}}
    inputs = {"student": models["start"], "init": models["start"], **domains}
    inputs |= {"teachers.one": models["one"], "teachers.two": models["two"]}
    here = run_stage("evaluate", settings, inputs)
    with place:
        there = run_stage("evaluate", settings, inputs, environment={DEVICE: "cuda"})
    assert place.computed(torch.float32)
    files = [(ran.out / "transcripts.json").read_text() for ran in (here, there)]
    assert files[0] == files[1]
