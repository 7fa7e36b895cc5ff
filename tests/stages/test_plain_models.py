"""Whole stages on a model with recurrent layers: what is trained is what transformers loads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

MODEL: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "bos_token_id": None,
    "eos_token_id": None,
}


@pytest.fixture
def start(save_model: Callable[..., str]) -> str:
    """A random Qwen3-Next: one gated delta net, one attention layer, four experts."""
    import string

    from transformers import GenerationConfig, Qwen3NextConfig, Qwen3NextForCausalLM

    from posttrain.backends.checkpoint import LanguageModel
    from posttrain.backends.tiny import character_tokenizer

    torch.manual_seed(0)
    model = Qwen3NextForCausalLM(Qwen3NextConfig(**MODEL)).eval()
    ends = [4, *(5 + ord(character) - 32 for character in string.punctuation)]
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=0)
    return save_model(LanguageModel(model=model, tokenizer=character_tokenizer([])))


def test_sft_learns(run_stage: Any, domains: dict[str, str], start: str) -> None:
    short = {"domains.short": domains["domains.short"]}
    ran = run_stage("sft", {"steps": 12, "batch_size": 8, "lr": 3e-3}, {"start": start, **short})
    losses = [line["loss"] for line in ran.lines]
    assert len(losses) == 12
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_rl_samples_and_learns(run_stage: Any, domains: dict[str, str], start: str) -> None:
    settings = {
        "steps": 3, "prompts_per_step": 6, "group_size": 4, "max_new_tokens": 6, "lr": 1e-3,
        "kl": {"coef": 0.1},
    }  # fmt: skip
    ran = run_stage("rl", settings, {"start": start, **domains})
    assert len(ran.lines) == 3
    # The reference is the start: no divergence before the first update, some after it.
    divergences = [line["kl_reference"] for line in ran.lines]
    assert abs(divergences[0]) < 1e-4 < divergences[-1]
    from posttrain.backends.checkpoint import load

    before, after = load(start).model.state_dict(), load(ran.out).model.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert any("linear_attn" in name for name in moved) and any("self_attn" in n for n in moved)
