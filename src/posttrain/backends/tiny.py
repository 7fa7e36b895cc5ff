"""A model and a tokenizer from nothing, for recipes that start by pre-training a tiny base.

Both are ordinary transformers objects: a Qwen3 configuration and a fast tokenizer with one token
per character and a chat template, so that everything downstream treats them like any checkpoint.

With `thinking`, the tokenizer has `<think>` and `</think>` as single tokens, after all others, and
its template knows `enable_thinking` as Qwen3's does (arXiv 2505.09388, section 4.3): a response
opens its own `<think>`, and where thinking is off the prompt ends with an empty block.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from posttrain.backends.checkpoint import LanguageModel
from posttrain.backends.prompting import CLOSE, OPEN

SPECIAL = ("<|pad|>", "<|unknown|>", "<|user|>", "<|assistant|>", "<|end|>")
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
THINKING_TEMPLATE = TEMPLATE.replace(
    "{{ '<|assistant|>' }}{% endif %}",
    "{{ '<|assistant|>' }}"
    "{% if enable_thinking is defined and not enable_thinking %}"
    f"{{{{ '{OPEN}{CLOSE}' }}}}"
    "{% endif %}{% endif %}",
)


def character_tokenizer(texts: Iterable[str], *, thinking: bool = False) -> PreTrainedTokenizerFast:
    """One token per character: printable ASCII and every other character that `texts` contain.

    `thinking` adds the two tokens of a thinking block and a template with `enable_thinking`. They
    are no special tokens: decoding keeps them.
    """
    ascii_characters = [chr(code) for code in range(32, 127)]
    others = sorted(set().union(*map(set, texts)) - set(ascii_characters))
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *ascii_characters, *others])}
    core = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<|unknown|>"))
    # Line ends too are characters, which `.` would not match.
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        unk_token="<|unknown|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=THINKING_TEMPLATE if thinking else TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    if thinking:
        tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in (OPEN, CLOSE)])
    return tokenizer


def new_model(
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    head_dim: int,
    intermediate_size: int,
    max_positions: int,
    seed: int,
) -> LanguageModel:
    """A randomly initialised Qwen3-architecture model with tied embeddings for `tokenizer`."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        head_dim=head_dim,
        intermediate_size=intermediate_size,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LanguageModel(model=model, tokenizer=tokenizer)
