"""Checkpoints as Hugging Face directories: what is saved is what others load, and bad ones are
refused with the file and the way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from posttrain.backends.checkpoint import (
    LanguageModel,
    chat_of,
    is_scalar,
    load,
    output_head,
    read_chat,
    save,
)
from posttrain.engine.errors import ConfigError

MakeModel = Callable[..., LanguageModel]
IDS = torch.tensor([[7, 8, 9, 30, 31]])


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def saved(make_model: MakeModel, tmp_path: Path) -> Path:
    save(make_model(), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
def test_transformers_loads_what_was_saved(
    make_model: MakeModel, kind: str, tmp_path: Path
) -> None:
    language_model = make_model(kind, stop=[4, 9])
    save(language_model, tmp_path / "deep" / "model")
    path = tmp_path / "deep" / "model"
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    again = load(path)
    with torch.no_grad():
        expected = language_model.model(input_ids=IDS).logits
        assert torch.equal(model(input_ids=IDS).logits, expected)
        assert torch.equal(again.model(input_ids=IDS).logits, expected)
    assert again.stop_ids == (4, 9)
    assert tokenizer.get_vocab() == language_model.tokenizer.get_vocab()
    assert tokenizer.chat_template == language_model.tokenizer.chat_template
    assert tokenizer("r Abc").input_ids == language_model.tokenizer("r Abc").input_ids
    assert not list(path.glob("*.bin")) and not list(path.glob("*.py"))


@pytest.mark.parametrize("known", [True, False])
def test_code_in_a_checkpoint_never_runs(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """Neither where transformers has the architecture itself nor where only the code would."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ran = tmp_path / "ran"
    (saved / "planted.py").write_text(
        f"open({str(ran)!r}, 'w').close()\nclass Config: pass\nclass Model: pass\nclass Tok: pass\n"
    )
    classes = {"AutoConfig": "planted.Config", "AutoModelForCausalLM": "planted.Model"}
    edit(saved / "config.json", auto_map=classes, **({} if known else {"model_type": "planted"}))
    edit(saved / "tokenizer_config.json", auto_map={"AutoTokenizer": ["planted.Tok", None]})
    if known:
        assert load(saved).model.config.model_type == "qwen3"
    else:
        with pytest.raises(ConfigError, match="cannot load this checkpoint"):
            load(saved)
    assert not ran.exists()


def test_saving_twice_gives_the_same_bytes(make_model: MakeModel, tmp_path: Path) -> None:
    save(make_model(), tmp_path / "one")
    save(load(tmp_path / "one"), tmp_path / "two")
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
def test_the_head_turns_hidden_states_into_logits(make_model: MakeModel, kind: str) -> None:
    language_model = make_model(kind)
    model = language_model.model
    head = output_head(model, language_model.ids)
    assert head.weight_VD is model.get_output_embeddings().weight, "nothing to cut, no copy"
    with torch.no_grad():
        hidden = model.base_model(input_ids=IDS).last_hidden_state
        logits = torch.nn.functional.linear(hidden, head.weight_VD, head.bias_V)
        torch.testing.assert_close(logits, model(input_ids=IDS).logits)


def test_a_turn_ends_by_what_generation_config_tokenizer_and_template_say(
    make_model: MakeModel, tmp_path: Path
) -> None:
    """The template writes <|end|>, id 4, and so does a saved generation config."""
    assert make_model().stop_ids == (4,)
    assert make_model(stop=[9, 4]).stop_ids == (4, 9)
    language_model = make_model(stop=9)
    assert language_model.stop_ids == (4, 9)
    save(language_model, tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [4, 9]
    language_model.model.generation_config.eos_token_id = None
    assert language_model.stop_ids == (language_model.tokenizer.eos_token_id,)
    language_model.tokenizer.eos_token = None
    assert language_model.stop_ids == (4,), "the template still writes it"
    language_model.tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=r"nothing would ever end a response.*set eos_token_id"):
        _ = language_model.stop_ids


def test_a_generation_config_that_names_all_ends_stays_as_it_is(
    make_model: MakeModel, tmp_path: Path
) -> None:
    save(make_model(stop=[9, 4]), tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [9, 4]


def test_padding_is_the_stop_token_where_a_tokenizer_has_none(make_model: MakeModel) -> None:
    language_model = make_model(stop=9)
    assert language_model.pad_id == language_model.tokenizer.pad_token_id
    language_model.tokenizer.pad_token = None
    assert language_model.pad_id == 4


def test_half_precision_weights_are_loaded_for_training(
    make_model: MakeModel, tmp_path: Path
) -> None:
    language_model = make_model()
    language_model.model.to(torch.bfloat16)
    save(language_model, tmp_path)
    assert load(tmp_path).model.dtype == torch.float32
    assert load(tmp_path, dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json, model\.safetensors and tokenizer files"):
        load(tmp_path)


def test_damaged_weights_are_refused(saved: Path) -> None:
    content = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match="transformers cannot load this checkpoint"):
        load(saved)


def test_weights_of_another_shape_are_refused(saved: Path) -> None:
    edit(saved / "config.json", intermediate_size=48)
    with pytest.raises(ConfigError, match="transformers cannot load this checkpoint"):
        load(saved)


def test_missing_weights_are_refused_rather_than_drawn_at_random(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lack 1 of the tensors.* model\.layers\.1\.mlp\.up"):
        load(saved)


def test_a_token_without_a_row_is_refused_where_a_text_has_it(
    make_model: MakeModel, tmp_path: Path
) -> None:
    language_model = make_model()
    language_model.tokenizer.add_tokens(["<|more|>"])
    save(language_model, tmp_path)
    for chat in (chat_of(load(tmp_path)), read_chat(tmp_path)):
        assert chat.num_ids == 100
        assert chat.prompt("fine") and chat.response("fine", "fine")
        for encode in (chat.prompt, chat.begin):
            with pytest.raises(ConfigError, match=r"text '.*a <\|more\|> b.* token '<\|more\|>'"):
                encode("a <|more|> b")


def test_a_model_that_bends_its_logits_is_refused(saved: Path) -> None:
    edit(saved / "config.json", logit_scale=0.5)
    with pytest.raises(ConfigError, match=r"logit_scale = 0\.5"):
        load(saved)
    edit(saved / "config.json", logit_scale=1.0)
    assert load(saved).stop_ids


def test_a_generation_config_that_could_not_be_saved_again_is_mended_or_refused(
    saved: Path, tmp_path: Path
) -> None:
    """Published checkpoints give a temperature without do_sample; saving them again fails, which
    would cost a whole stage."""
    path = saved / "generation_config.json"
    edit(path, temperature=0.6, top_p=0.9)
    save(load(saved), tmp_path / "again")
    again = GenerationConfig.from_pretrained(tmp_path / "again")
    assert (again.temperature, again.top_p, again.do_sample) == (0.6, 0.9, True)
    edit(path, length_penalty=0.5, num_beams=1)
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        load(saved)


def test_a_tokenizer_without_tokens_is_refused(saved: Path) -> None:
    """transformers makes an empty one without a word: every character is unknown to it."""
    (saved / "tokenizer.json").unlink()
    (saved / "merges.txt").write_text("a b\n")
    (saved / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "eos_token": "[SEP]"})
    )
    with pytest.raises(ConfigError, match=r"BertTokenizer .*\(none\) that knows 0 tokens"):
        load(saved)
    with pytest.raises(ConfigError, match="BertTokenizer"):
        read_chat(saved)


def test_a_tokenizer_in_vocab_txt_is_read_as_transformers_reads_it(saved: Path) -> None:
    (saved / "tokenizer.json").unlink()
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(33, 127))]
    (saved / "vocab.txt").write_text("\n".join(tokens) + "\n")
    (saved / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "eos_token": "[SEP]"})
    )
    assert load(saved).tokenizer.decode([tokens.index("q")]) == "q"


def test_what_cannot_be_loaded_names_the_files_of_tokens(saved: Path) -> None:
    (saved / "tokenizer.json").rename(saved / "tekken.json")
    with pytest.raises(ConfigError, match=r"cannot load this checkpoint .*tokens: tekken\.json"):
        load(saved)


@pytest.mark.parametrize(
    "wrong",
    [
        {"hidden_size": "many"},
        {"num_attention_heads": None},
        {"rope_parameters": {"rope_type": "none such"}},
        {"num_attention_heads": 0},
        {"layer_types": 3},
        {"eos_token_id": {"a": 1}},
    ],
)
def test_nonsense_in_a_config_is_told_in_words(saved: Path, wrong: dict[str, Any]) -> None:
    edit(saved / "config.json", **wrong)
    with pytest.raises(ConfigError, match="cannot load this checkpoint"):
        load(saved)


def test_a_config_ties_what_the_bytes_tie(saved: Path, tmp_path: Path) -> None:
    """transformers unties a head with numbers of its own; a server goes by the config."""
    assert load(saved).model.config.tie_word_embeddings is True
    tensors = load_file(saved / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding + 1}, saved / "model.safetensors")
    save(load(saved), tmp_path / "apart")
    config = json.loads((tmp_path / "apart" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    held = load_file(tmp_path / "apart" / "model.safetensors")
    assert torch.equal(held["lm_head.weight"], embedding + 1)
    with torch.no_grad():
        ours, theirs = (load(p).model(input_ids=IDS).logits for p in (saved, tmp_path / "apart"))
    assert torch.equal(ours, theirs)

    save_file(tensors | {"lm_head.weight": embedding.clone()}, saved / "model.safetensors")
    save(load(saved), tmp_path / "one")
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(tmp_path / "one" / "model.safetensors")


def test_a_nested_config_that_bends_its_logits_is_refused(tmp_path: Path, saved: Path) -> None:
    text = {"final_logit_softcapping": 30.0, "vocab_size": 100, "model_type": "gemma3_text"}
    content = {"model_type": "gemma3", "text_config": text, "architectures": ["Gemma3ForCausalLM"]}
    (saved / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"final_logit_softcapping = 30\.0"):
        load(saved)


def test_tensors_that_are_no_part_of_the_model_are_known(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    tower = {"vision_tower.weight": torch.zeros(2, 2)}
    save_file(tensors | tower, saved / "model.safetensors")
    assert load(saved).left_out == ("vision_tower.weight",)


def test_a_config_whose_architectures_are_no_names_is_of_no_reward_model() -> None:
    for names in (None, 1.5, [], [1.5], [None, "LlamaForCausalLM"]):
        assert not is_scalar(SimpleNamespace(architectures=names))
    assert is_scalar(SimpleNamespace(architectures=["LlamaForSequenceClassification"]))
