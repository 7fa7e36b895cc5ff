"""Parameters counted by hand for published configs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain.estimate.memory import memory_of, trained_numbers
from posttrain.estimate.parts import Part, Work
from posttrain.estimate.shapes import Model, model_of_config, model_of_directory, model_of_pretrain

QWEN3_06B = {
    "model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28, "head_dim": 128,
    "num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": 3072,
    "vocab_size": 151936, "tie_word_embeddings": True, "dtype": "bfloat16",
}  # fmt: skip
LLAMA32_1B = {
    "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "head_dim": 64,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 8192,
    "vocab_size": 128256, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip
SMOLLM2_135M = {
    "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152,
}  # fmt: skip
QWEN2_05B = {
    "model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936,
    "tie_word_embeddings": True,
}  # fmt: skip


def found(config: dict[str, Any]) -> Model:
    model = model_of_config(config)
    assert model is not None
    return model


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        # 151936*1024 + 28*(2*1024*(2048+1024) + 3*1024*3072 + 2*1024 + 2*128) + 1024
        (QWEN3_06B, 596_049_920),
        # 128256*2048 + 16*(2*2048*(2048+512) + 3*2048*8192 + 2*2048) + 2048
        (LLAMA32_1B, 1_235_814_400),
        # 49152*576 + 30*(2*576*(576+192) + 3*576*1536 + 2*576) + 576
        (SMOLLM2_135M, 134_515_008),
        # 151936*896 + 24*(2*896*(896+128) + 896+2*128 + 3*896*4864 + 2*896) + 896
        (QWEN2_05B, 494_032_768),
        # An output layer of its own.
        (LLAMA32_1B | {"tie_word_embeddings": False}, 1_235_814_400 + 128256 * 2048),
    ],
)
def test_parameters_are_those_counted_by_hand(config: dict[str, Any], parameters: int) -> None:
    assert found(config).parameters == parameters


def test_weights_take_their_type_on_the_disk() -> None:
    assert found(QWEN3_06B).bytes == 2 * 596_049_920
    assert found(SMOLLM2_135M).bytes == 4 * 134_515_008


def test_of_experts_all_count_and_few_compute() -> None:
    moe = QWEN3_06B | {
        "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2,
        "moe_intermediate_size": 768,
    }  # fmt: skip
    # In place of 3*1024*3072: eight experts of 768, and what chooses among them.
    layer = 3 * 1024 * 768 * 8 + 1024 * 8 - 3 * 1024 * 3072
    assert found(moe).parameters == 596_049_920 + 28 * layer
    assert found(moe).layer_numbers == 2 * 1024 * (2048 + 1024) + 3 * 1024 * 768 * 2


def test_a_config_without_sizes_has_none() -> None:
    assert model_of_config({"model_type": "mystery"}) is None
    assert model_of_config({"hidden_size": 64, "num_hidden_layers": 2}) is None


def test_a_directory_counts_its_weights(
    tmp_path: Path, make_model: Callable[..., Any], save_model: Callable[..., str]
) -> None:
    from safetensors.torch import load_file

    directory = Path(save_model(make_model("qwen3")))
    tensors = load_file(directory / "model.safetensors")
    model = model_of_directory(directory)
    assert model is not None
    assert model.parameters == sum(tensor.numel() for tensor in tensors.values())
    config = json.loads((directory / "config.json").read_text())
    # And counting by the config alone agrees with what transformers made.
    assert found(config).parameters == model.parameters
    assert model_of_directory(tmp_path) is None


def test_a_model_from_nothing_has_the_numbers_of_the_built_in_recipe() -> None:
    sizes = {"hidden_size": 64, "num_layers": 3, "num_heads": 2, "head_dim": 32}
    # 100*64 + 3*(2*64*(64+64) + 3*64*256 + 2*64 + 2*32) + 64
    assert model_of_pretrain(sizes | {"intermediate_size": 256}).parameters == 203_648


def test_an_adapter_learns_few_numbers() -> None:
    model = found(SMOLLM2_135M)
    # Rank 16 times the widths on both sides of the seven products of a layer.
    widths = 2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536)
    assert trained_numbers(model, {"lora": {"rank": 16}}) == 30 * 16 * widths
    few = {"lora": {"rank": 8, "targets": ["q_proj", "v_proj"]}}
    assert trained_numbers(model, few) == 30 * 8 * (2 * 576 + 576 + 192)
    assert trained_numbers(model, {"lora": None}) == model.parameters


def test_a_reference_of_the_same_model_shares_what_an_adapter_stands_on() -> None:
    model = found(SMOLLM2_135M)
    rows = {"calls": 1, "rows": 16, "prompt": 20, "response": 50, "longest": 70}
    learn = Part(do="learn", **rows)
    work = {
        edge: Work(parts=(learn, Part(do="score", edge=edge, policy=False, **rows)))
        for edge in ("start", "reference")
    }

    def readers(edge: str, lora: Any) -> int:
        config = {"precision": "float32", "lora": lora}
        limits = {"budget_bytes": 2**34, "sampling": 2**34}
        memory = memory_of(work[edge], lambda _: model, config, **limits)
        assert memory is not None
        return memory.readers

    weights = 4 * model.parameters
    assert readers("start", {"rank": 16}) + weights == readers("start", None)
    assert readers("reference", {"rank": 16}) == readers("start", None)
