"""The model and tokenizer from nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from posttrain.backends.checkpoint import LanguageModel
from posttrain.backends.tiny import SPECIAL, character_tokenizer, new_model


def tiny(seed: int = 0, texts: tuple[str, ...] = ()) -> LanguageModel:
    return new_model(
        character_tokenizer(texts),
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        head_dim=8,
        intermediate_size=32,
        max_positions=48,
        seed=seed,
    )


def test_the_vocabulary_is_ascii_and_what_the_texts_hold() -> None:
    plain, more = character_tokenizer([]), character_tokenizer(["größe", "größer\n"])
    assert len(plain) == len(SPECIAL) + 95
    assert len(more) == len(plain) + 3
    assert more.get_vocab() == character_tokenizer(["\nö", "ßq"]).get_vocab()
    assert {t: i for t, i in more.get_vocab().items() if i < len(plain)} == plain.get_vocab()


@pytest.mark.parametrize("text", ["r Monkey", "  two  spaces ", "1=2, (3) 'don ' t' .", "größe\n"])
def test_text_survives_the_round_trip(text: str) -> None:
    tokenizer = character_tokenizer(["größe\n"])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text


def test_a_seed_makes_one_model() -> None:
    one, same, other = tiny(3), tiny(3), tiny(4)
    pairs = zip(one.model.parameters(), same.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    embedding = one.model.get_input_embeddings().weight
    assert not torch.equal(embedding, other.model.get_input_embeddings().weight)


def test_sizes_are_those_asked_for_and_the_head_is_tied() -> None:
    language_model = tiny()
    config = language_model.model.config
    assert (config.hidden_size, config.num_hidden_layers, config.head_dim) == (16, 2, 8)
    assert config.max_position_embeddings == 48
    assert config.vocab_size == len(language_model.tokenizer)
    model = language_model.model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert language_model.stop_ids == (language_model.tokenizer.eos_token_id,)
    assert language_model.tokenizer.eos_token == "<|end|>"


def test_thinking_adds_two_tokens_after_all_others(tmp_path: Path) -> None:
    """Ids of the others stay; the tokens survive saving, and decoding keeps them."""
    plain = character_tokenizer(["größe"])
    character_tokenizer(["größe"], thinking=True).save_pretrained(tmp_path)
    thinking = AutoTokenizer.from_pretrained(tmp_path)
    vocabulary = thinking.get_vocab()
    assert [vocabulary.pop(tag) for tag in ("<think>", "</think>")] == [len(plain), len(plain) + 1]
    assert vocabulary == plain.get_vocab()
    text = "<think>1<2</think>größe"
    ids = thinking(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len("1<2größe") + 2
    assert thinking.decode(ids, skip_special_tokens=True) == text
    assert "<think>" not in plain.get_vocab()
