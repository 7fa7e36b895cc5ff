"""The digest of a tokenizer: what it depends on, and what it does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from posttrain.backends.checkpoint import LanguageModel, chat_of, read_chat, save
from posttrain.backends.tiny import TEMPLATE, character_tokenizer
from posttrain.backends.token_ids import tokens_digest


def bpe(*merges: tuple[str, str], prefix_space: bool = False, added: str = "<a>") -> Any:
    letters = [*pre_tokenizers.ByteLevel.alphabet()]
    vocabulary = {text: i for i, text in enumerate([*sorted(letters), "ab", "bc"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    core.decoder = decoders.ByteLevel()
    core.add_tokens([added])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=added)


def test_it_follows_from_what_turns_text_into_ids_and_back() -> None:
    ab, bc = ("a", "b"), ("b", "c")
    kinds = [
        bpe(ab, bc),
        bpe(bc, ab),  # the same tokens, merged in another order
        bpe(ab),
        bpe(ab, bc, prefix_space=True),
        bpe(ab, bc, added="<b>"),
        character_tokenizer([]),
        character_tokenizer(["é"]),
        character_tokenizer([], thinking=True),
    ]
    assert len({tokens_digest(tokenizer) for tokenizer in kinds}) == len(kinds)
    assert tokens_digest(bpe(ab, bc)) == tokens_digest(kinds[0])
    assert len(tokens_digest(kinds[0])) == 16


def test_templates_and_names_of_tokens_have_no_part_in_it() -> None:
    plain = bpe(("a", "b"))
    changed = bpe(("a", "b"))
    changed.chat_template = TEMPLATE
    changed.pad_token = "a"
    changed("a", padding="max_length", truncation=True, max_length=3)
    assert tokens_digest(changed) == tokens_digest(plain)


def test_it_stays_when_a_model_is_saved_and_read(
    make_model: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    model = make_model()
    save(model, tmp_path / "once")
    assert read_chat(tmp_path / "once").tokens_digest == chat_of(model).tokens_digest
