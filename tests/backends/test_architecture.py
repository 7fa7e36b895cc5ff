"""Which path a model takes, and which models are refused because their numbers would be wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    BartConfig,
    Gemma2Config,
    GPTNeoConfig,
    Llama4TextConfig,
    MistralConfig,
    Qwen2Config,
    RwkvConfig,
)

from posttrain.backends.architecture import (
    PACKABLE,
    backbone,
    check_plain,
    has_full_attention,
    path_of,
)
from posttrain.backends.checkpoint import LanguageModel, load, save
from posttrain.backends.local import LocalSampler, LocalScorer
from posttrain.engine.errors import ConfigError
from posttrain.rl.batch import Batch

MakeModel = Callable[..., LanguageModel]


def test_full_attention_follows_from_the_config() -> None:
    for config in (MistralConfig(), Gemma2Config(), GPTNeoConfig(), Llama4TextConfig()):
        assert not has_full_attention(config)
    assert has_full_attention(Qwen2Config())
    assert has_full_attention(MistralConfig(sliding_window=None))
    # A window that no sequence can outgrow is full attention.
    assert has_full_attention(MistralConfig(sliding_window=64, max_position_embeddings=64))
    assert not has_full_attention(MistralConfig(sliding_window=63, max_position_embeddings=64))


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
def test_the_common_families_are_packed(make_model: MakeModel, kind: str) -> None:
    assert path_of(make_model(kind).model) == "packed"


def test_windows_decide_and_so_does_how_a_mask_is_used(make_family: MakeModel) -> None:
    full = ["full_attention"] * 4
    assert path_of(make_family("mistral").model) == "plain"
    assert path_of(make_family("mistral", sliding_window=None).model) == "packed"
    assert path_of(make_family("qwen2").model) == "plain"
    assert path_of(make_family("qwen2", use_sliding_window=False, layer_types=full).model) == (
        "packed"
    )
    model = make_family("mistral", sliding_window=None).model
    model.set_attn_implementation("eager")
    assert path_of(model) == "plain"


LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "v_head_dim": 8}
LATENT |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "n_group": 1, "topk_group": 1}
OF_THEIR_OWN: dict[str, dict[str, int]] = {
    "cwm": {"bos_token_id": 1, "eos_token_id": 2},
    "dots1": {"n_shared_experts": 1},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "glm4_moe_lite": LATENT,
}
PROMPTS = [[11, 12, 13], [20, 21, 22, 23, 25, 26, 27, 29, 30, 31], [30], [41, 42, 43]]


@pytest.mark.parametrize("kind", sorted(PACKABLE))
def test_packed_families_read_and_sample_what_the_plain_path_does(
    make_family: MakeModel, kind: str
) -> None:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {kind}")
    known = vars(CONFIG_MAPPING[kind]())
    changes: dict[str, Any] = {}
    if "layer_types" in known:
        changes["layer_types"] = ["full_attention"] * 4
    elif "sliding_window" in known:
        changes["sliding_window"] = None
    language_model = make_family(kind, **(changes | OF_THEIR_OWN.get(kind, {})))
    model = language_model.model
    assert path_of(model) == "packed"
    generator = torch.Generator().manual_seed(1)
    responses = [torch.randint(5, 95, (n,), generator=generator).tolist() for n in (2, 9, 12, 4)]
    rollouts = Batch.from_tokens(PROMPTS, responses, pad_id=0)
    packed = LocalScorer(language_model).hidden(rollouts)
    with torch.no_grad():
        padded_BTD = backbone(model)(input_ids=rollouts.tokens_BT, use_cache=False)[0]
    plain = padded_BTD[:, :-1][rollouts.sampled_BT[:, 1:]]
    assert (packed - plain).abs().max() <= 1e-5 * max(1.0, float(plain.abs().max()))
    lengths: dict[str, Any] = {"group_size": 2, "max_new_tokens": 10, "temperature": 0.0}
    slots, lockstep = (
        LocalSampler(language_model, max_rows=5, fast_paths=fast).sample(PROMPTS, seed=0, **lengths)
        for fast in (True, False)
    )
    assert slots.responses() == lockstep.responses()


def refused(config: Any) -> str:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    with pytest.raises(ConfigError) as error:
        check_plain(model, "my-model")
    assert str(error.value).startswith(f"my-model: the model ({config.model_type}) ")
    return str(error.value)


SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2}


def test_models_that_would_compute_wrong_numbers_are_refused(make_family: MakeModel) -> None:
    bart = BartConfig(
        vocab_size=50, d_model=16, decoder_layers=1, encoder_layers=1, decoder_attention_heads=2,
        encoder_attention_heads=2, decoder_ffn_dim=16, encoder_ffn_dim=16,
    )  # fmt: skip
    assert "encoder-decoder" in refused(bart) or "no decoder of its own" in refused(bart)
    assert "does not keep its state" in refused(RwkvConfig(attention_hidden_size=16, **SMALL))
    for kind, reason in {
        "nanochat": "changes its logits",
        "bert-generation": "lets a token see later ones",
        "moshi": "gives other hidden states with its transformers cache than without",
        "deepseek_v32": "attends to keys that an index picks",
        "zamba2": "bounds the step sizes",
    }.items():
        extra: dict[str, Any] = {}
        if kind == "deepseek_v32":
            extra = {"head_dim": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
            extra |= {"kv_lora_rank": 16, "q_lora_rank": 16, "n_group": 1, "topk_group": 1}
        model = make_family(kind, **extra).model
        assert path_of(model) == "plain"
        with pytest.raises(ConfigError, match=rf"m: the model \({kind}\) {reason}"):
            check_plain(model, "m")


@pytest.mark.parametrize("kind", ["mistral", "mamba", "qwen3_next", "gpt_neo"])
def test_plain_models_are_loaded_and_saved(
    make_family: MakeModel, kind: str, tmp_path: Path
) -> None:
    language_model = make_family(kind)
    save(language_model, tmp_path)
    again = load(tmp_path)
    ours, theirs = language_model.model.state_dict(), again.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_loading_refuses_what_the_plain_path_cannot_compute(
    make_family: MakeModel, tmp_path: Path
) -> None:
    save(make_family("bert"), tmp_path)
    with pytest.raises(ConfigError, match=r"\(bert\) changes its logits .*docs/suites\.md"):
        load(tmp_path)
