"""Random models of many families, each of a few thousand parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from posttrain.backends.checkpoint import LanguageModel

# Names of one thing in many configs; a config takes those that it knows.
SHAPE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "intermediate_size": 64,
    "n_inner": 64,
    "ffn_dim": 64,
    "word_embed_proj_dim": 32,
    "num_hidden_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "num_layers": 4,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rotary_dim": 4,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "max_seq_len": 64,
    "sliding_window": 6,
    "window_size": 6,
    "attention_chunk_size": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "intermediate_size_mlp": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "state_size": 8,
    "expand": 2,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "mamba_d_ssm": 64,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "chunk_size": 8,
    "n_groups": 1,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
WINDOW = ["sliding_attention", "full_attention"] * 2
RECURRENT = ["linear_attention", "full_attention"] * 2

# What a family needs beside its shape. All of them go the plain path.
PLAIN: dict[str, dict[str, Any]] = {
    # Windows and chunks.
    "mistral": {},
    "qwen2": {"use_sliding_window": True, "layer_types": WINDOW},
    "gemma3_text": {"layer_types": WINDOW, "tie_word_embeddings": False},
    "gpt_oss": {"layer_types": WINDOW},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "llama4_text": {"layer_types": ["chunked_attention", "full_attention"] * 2},
    # Recurrent layers, alone or among attention, and convolutions.
    "mamba": {},
    "mamba2": {"head_dim": 16},
    "falcon_mamba": {},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "bamba": {"attn_layer_indices": [1, 3]},
    "falcon_h1": {},
    "granitemoehybrid": {"layer_types": RECURRENT},
    "nemotron_h": {"n_groups": 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "qwen3_next": {"layer_types": RECURRENT},
    "qwen3_5_text": {"layer_types": RECURRENT},
    "olmo_hybrid": {"layer_types": RECURRENT},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    # Full attention, but positions or masks of their own.
    "bloom": {},
    "mpt": {},
    "falcon": {"alibi": True, "new_decoder_architecture": False},
    "gptj": {},
    "opt": {"tie_word_embeddings": False},
}


def family_config(kind: str, **changes: Any) -> Any:
    """A small config of a model type; `changes` go before what `PLAIN` says."""
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[kind]
    renamed = config_class.attribute_map
    known = set(vars(config_class())) | set(renamed)
    shape = {name: value for name, value in SHAPE.items() if name in known}
    # A config that renames hidden_size to n_embd would take the one and then the other.
    shape = {name: value for name, value in shape.items() if renamed.get(name) not in shape}
    return config_class(**(shape | PLAIN.get(kind, {}) | changes))


@pytest.fixture(scope="session")
def make_family() -> Callable[..., LanguageModel]:
    """`make(kind, ...)`: a random model of a transformers model type, far from uniform.

    Every fourth token ends a response, so that rows end at many lengths.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    from posttrain.backends.checkpoint import LanguageModel
    from posttrain.backends.tiny import character_tokenizer

    def make(kind: str, *, stop: list[int] | None = None, **changes: Any) -> LanguageModel:
        tokenizer = character_tokenizer([])
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(family_config(kind, **changes)).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                # Larger than usual, so that a token depends on all before it.
                torch.nn.init.normal_(parameter, std=0.7 / min(parameter.shape[-1], 64) ** 0.5)
        torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.5)
        model.generation_config = GenerationConfig(
            eos_token_id=list(range(4, 100, 4)) if stop is None else stop,
            pad_token_id=tokenizer.pad_token_id,
        )
        return LanguageModel(model=model, tokenizer=tokenizer)

    return make
