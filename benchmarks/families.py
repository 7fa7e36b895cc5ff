# ruff: noqa: RUF001 -- DeepSeek writes its control tokens with wide bars
"""Model families as the outside world has them, made small: tokenizer, chat template, generation
config and architecture, with the rules of each that have surprised users of some framework.

    python benchmarks/families.py DIRECTORY          # every family as a checkpoint of its own

Nothing here is a copy of a published file. The templates are written anew by the rules of those
models (which tokens open and end a turn, who writes a system message, what reads the clock, who
thinks and where), the tokenizers are trained on a page of text, and the weights are random.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from templates import (
    DEEPSEEK_R1,
    GEMMA_3,
    GLM_4_5,
    GPT_OSS,
    LLAMA_2,
    LLAMA_3,
    MISTRAL,
    OLMO_3,
    QWEN_2_5,
    QWEN_3,
    SMOLLM_3,
)

CORPUS = (
    "You are a helpful assistant. Be brief. What is 3 plus 4? The answer is 7. How much is 12 "
    "minus 5? First I add the numbers, then I check the sum. Name a colour: red, blue, grey. "
    "Thank you, and what about the next one? Today it rains; yesterday it was sunny."
)
LEARNED = 60
"""Merges that each tokenizer learns from `CORPUS`."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of checkpoints."""

    name: str
    template: str
    special: Sequence[str]
    """Control tokens, in the order of their ids."""
    architecture: str
    """`model_type` of transformers."""
    eos: str
    """The tokenizer's end of sequence."""
    stops: Sequence[str]
    """`eos_token_id` of the generation config."""
    bos: str | None = None
    pad: str | None = None
    plain: Sequence[str] = ()
    """Added tokens that are no control tokens, such as thinking tags."""
    sentencepiece: Literal["each", "first", "none"] | None = None
    """Spaces are "▁" and unknown characters fall back to bytes, else bytes throughout. A "▁" is put
    before every text between control tokens, before the first alone, or before none."""
    spare_rows: int = 0
    """Rows of the output layer more than the tokenizer has tokens; of a negative number as many
    tokens are beyond the rows."""
    config: dict[str, Any] = field(default_factory=dict)
    """What its config has besides sizes."""
    note: str = ""
    """What has surprised people."""


FAMILIES = (
    Family(
        name="llama-2",
        template=LLAMA_2,
        architecture="llama",
        sentencepiece="each",
        special=("<unk>", "<s>", "</s>"),
        bos="<s>",
        eos="</s>",
        stops=("</s>",),
        note="no generation prompt: the assistant speaks after [/INST]; no pad token",
    ),
    Family(
        name="llama-3.2",
        template=LLAMA_3,
        architecture="llama",
        special=(
            "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
            "<|eom_id|>", "<|eot_id|>",
        ),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        stops=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        config={
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 10000.0, "factor": 2.0,
                "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256,
            }
        },
        note="the template reads the clock; three ends",
    ),
    Family(
        name="mistral-0.3",
        template=MISTRAL,
        architecture="mistral",
        sentencepiece="first",
        special=("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
        bos="<s>",
        eos="</s>",
        stops=("</s>",),
        config={"sliding_window": None},
        note="the system message stands in the last user turn; the roles alternate or it refuses",
    ),
    Family(
        name="qwen2.5-base",
        template=QWEN_2_5,
        architecture="qwen2",
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        stops=("<|endoftext|>",),
        spare_rows=37,
        config={"tie_word_embeddings": True},
        note="a base whose template ends turns by a token that its configs do not name",
    ),
    Family(
        name="qwen2.5",
        template=QWEN_2_5,
        architecture="qwen2",
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        eos="<|im_end|>",
        pad="<|endoftext|>",
        stops=("<|im_end|>", "<|endoftext|>"),
        spare_rows=101,
        note="rows of padding, fewer for the small models than for the large ones",
    ),
    Family(
        name="qwen3",
        template=QWEN_3,
        architecture="qwen3",
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        plain=("<think>", "</think>"),
        eos="<|im_end|>",
        pad="<|endoftext|>",
        stops=("<|im_end|>", "<|endoftext|>"),
        spare_rows=64,
        config={"tie_word_embeddings": True},
        note="thinks unless enable_thinking is false; thoughts of earlier turns are dropped",
    ),
    Family(
        name="gemma-3-1b",
        template=GEMMA_3,
        architecture="gemma3_text",
        sentencepiece="none",
        special=("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        plain=("<image_soft_token>",),
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        stops=("<eos>", "<end_of_turn>"),
        spare_rows=-1,
        config={"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"]},
        note="one token more than rows; windows; the tokenizer's end is not the turn's",
    ),
    Family(
        name="glm-4.5",
        template=GLM_4_5,
        architecture="glm4",
        special=(
            "<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>",
            "<|observation|>",
        ),
        plain=("<think>", "</think>", "/nothink"),
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        stops=("<|endoftext|>", "<|user|>", "<|observation|>"),
        note="the template writes no end after the assistant: the next role's token is the end",
    ),
    Family(
        name="deepseek-r1",
        template=DEEPSEEK_R1,
        architecture="qwen2",
        special=(
            "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>",
        ),
        plain=("<think>", "</think>"),
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        pad="<｜end▁of▁sentence｜>",
        stops=("<｜end▁of▁sentence｜>",),
        spare_rows=25,
        note="always thinks: the prompt opens the block, a finished turn shows none",
    ),
    Family(
        name="smollm3",
        template=SMOLLM_3,
        architecture="smollm3",
        special=("<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>"),
        plain=("<think>", "</think>"),
        eos="<|im_end|>",
        pad="<|im_end|>",
        stops=("<|im_end|>",),
        note="reads the clock; the mode stands in the system message; padding is the end",
    ),
    Family(
        name="gpt-oss",
        template=GPT_OSS,
        architecture="gpt_oss",
        special=(
            "<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>",
            "<|start|>", "<|end|>", "<|message|>", "<|call|>",
        ),
        bos="<|startoftext|>",
        eos="<|return|>",
        pad="<|endoftext|>",
        stops=("<|return|>", "<|endoftext|>", "<|call|>"),
        spare_rows=14,
        config={
            "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 128,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 150000.0, "factor": 8.0, "beta_fast": 32.0,
                "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 64,
            },
        },
        note="channels; <|return|> ends a turn, <|end|> a message; reads the clock and an effort",
    ),
    Family(
        name="olmo-3-think",
        template=OLMO_3,
        architecture="olmo3",
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"),
        eos="<|endoftext|>",
        pad="<|pad|>",
        stops=("<|im_end|>", "<|endoftext|>"),
        spare_rows=11,
        config={"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"]},
        note="<think> is text and no token; a turn ends by one token at the end, by another before",
    ),
)  # fmt: skip


def family(name: str) -> Family:
    """The family of that name. Raises KeyError."""
    return {one.name: one for one in FAMILIES}[name]


def tokenizer_of(one: Family) -> PreTrainedTokenizerFast:
    """Its tokenizer, trained on `CORPUS`."""
    learned = _bytes_tokenizer()
    if one.sentencepiece is not None:
        learned = _words_tokenizer(one.special, one.sentencepiece)
    learned.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in one.special])
    learned.add_tokens([AddedToken(t, special=False, normalized=False) for t in one.plain])
    names = {"bos_token": one.bos, "eos_token": one.eos, "pad_token": one.pad}
    made = PreTrainedTokenizerFast(
        tokenizer_object=learned, **{name: token for name, token in names.items() if token}
    )
    made.chat_template = one.template.strip()
    return made


def _bytes_tokenizer() -> Tokenizer:
    """Byte-level BPE, as GPT-2's descendants have it."""
    made = Tokenizer(BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=len(alphabet) + LEARNED, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([CORPUS], trainer)
    return made


def _words_tokenizer(special: Sequence[str], marked: str) -> Tokenizer:
    """BPE over characters with "▁" for spaces and bytes for the rest, as SentencePiece has it."""
    trained = Tokenizer(BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = BpeTrainer(vocab_size=LEARNED + 60, show_progress=False)
    trained.train_from_iterator([CORPUS], trainer)
    model = json.loads(trained.to_str())["model"]
    # Control tokens have the first ids, then come the bytes.
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    merges = [tuple(merge) for merge in model["merges"]]
    made = Tokenizer(
        BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    spaces = normalizers.Replace(" ", "▁")
    made.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if marked == "each" else spaces
    )
    if marked == "first":
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence(
        steps if marked == "none" else [*steps, decoders.Strip(" ", 1, 0)]
    )
    return made


def write(one: Family, out: Path, *, hidden: int = 64, more_rows: int = 0, seed: int = 0) -> None:
    """Its checkpoint of random weights in bfloat16, with `more_rows` more rows of padding."""
    tokenizer = tokenizer_of(one)
    numbers = tokenizer.get_vocab()
    # A multiple of nothing: what remains after the tokens is padding, or lacks some of them.
    rows = len(tokenizer) + one.spare_rows + (more_rows if one.spare_rows >= 0 else 0)
    sizes = {
        "vocab_size": rows, "hidden_size": hidden, "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": hidden // 4, "max_position_embeddings": 512,
        "bos_token_id": numbers.get(one.bos), "eos_token_id": numbers[one.stops[0]],
        "pad_token_id": numbers.get(one.pad),
    }  # fmt: skip
    config = AutoConfig.for_model(one.architecture, **(sizes | one.config))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=numbers.get(one.bos),
        eos_token_id=[numbers[token] for token in one.stops],
        pad_token_id=numbers.get(one.pad),
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def sums(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations about sums: a system message, one turn or two, an answer to check."""
    draw, rows = random.Random(seed), []
    seen: set[str] = set()
    while len(rows) < count:
        a, b = draw.randint(1, 30), draw.randint(1, 30)
        question = f"What is {a} plus {b}?"
        if question in seen:
            continue
        seen.add(question)
        messages = [{"role": "system", "content": "Be brief."}]
        if len(rows) % 3 == 2:
            messages += [
                {"role": "user", "content": "Name a colour."},
                {"role": "assistant", "content": draw.choice(("red", "blue", "green"))},
            ]
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": str(a + b)},
        ]
        rows.append({"messages": messages, "answer": str(a + b)})
    return rows


if __name__ == "__main__":
    for each in FAMILIES:
        write(each, Path(sys.argv[1]) / each.name)
        print(each.name, flush=True)
