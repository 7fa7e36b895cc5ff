"""The models that both sides run: random Qwen3 configurations whose responses end by themselves.

S has about 1 million parameters and 128 words, M about 25 million and 4,096. Their distributions
are close to uniform over the words, except for the end token, whose probability is about 1/32 at
every position: response lengths are then geometric, with a mean near 31 and a cap of 128 that is
reached. No side imposes a length.

How the end token gets its probability: every embedding has the same large first component, so the
last hidden state has one too. In a tied output layer that adds the same to every logit, which a
softmax does not see; the end token's row has a little more of it, and so a constant head start.

Legend: B rows, T positions, V vocabulary, D hidden size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

PROMPT_TOKENS = 32
MAX_NEW_TOKENS = 128
END_PROBABILITY = 1 / 32
PAD, END = "<pad>", "<end>"
PAD_ID, END_ID, FIRST_WORD_ID = 0, 1, 2
CONSTANT = 1.0
"""The first component of every embedding; the others have a standard deviation of 0.02."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model's shape."""

    name: str
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    intermediate: int

    @property
    def block_parameters(self) -> int:
        """Weights of all layers, without embedding and head."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.key_value_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_parameters(self) -> int:
        """Weights of the output layer, which is the embedding too."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All weights, without the norms."""
        return self.block_parameters + self.head_parameters


S = Size(
    name="S",
    vocabulary=128,
    hidden=128,
    layers=4,
    heads=4,
    key_value_heads=2,
    head_dim=32,
    intermediate=512,
)
M = Size(
    name="M",
    vocabulary=4096,
    hidden=512,
    layers=6,
    heads=8,
    key_value_heads=4,
    head_dim=64,
    intermediate=2048,
)

SMOLLM2 = Size(
    name="135M",
    vocabulary=49_152,
    hidden=576,
    layers=30,
    heads=9,
    key_value_heads=3,
    head_dim=64,
    intermediate=1536,
)
"""The shape of SmolLM2-135M."""


def new_model(
    size: Size, *, seed: int, positions: int = 512, ends: float = END_PROBABILITY
) -> Qwen3ForCausalLM:
    """A random model in float32 that ends a response with probability `ends` at every token."""
    config = Qwen3Config(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        head_dim=size.head_dim,
        intermediate_size=size.intermediate,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        eos_token_id=END_ID,
        bos_token_id=None,
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config).eval()
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )
    _set_end_probability(model, size, seed, ends)
    return model


@torch.no_grad()
def _set_end_probability(model: Qwen3ForCausalLM, size: Size, seed: int, ends: float) -> None:
    """Give the end token's row its head start, from what it lacks on random words."""
    embedding_VD = model.get_input_embeddings().weight
    embedding_VD[:, 0] = CONSTANT
    # Never drawn: the end token alone ends a response, and padding must not be learned from.
    embedding_VD[PAD_ID, 0] = 0.0
    tokens_BT = random_words(size, rows=4, tokens=PROMPT_TOKENS + 64, seed=seed)
    hidden_ND = model.base_model(input_ids=tokens_BT).last_hidden_state.flatten(0, 1)
    logits_NV = hidden_ND @ embedding_VD.T
    others_N = torch.cat([logits_NV[:, :END_ID], logits_NV[:, END_ID + 1 :]], 1).logsumexp(1)
    wanted_N = others_N + math.log(ends / (1 - ends))
    missing = (wanted_N - logits_NV[:, END_ID]).mean()
    embedding_VD[END_ID, 0] += missing / hidden_ND[:, 0].mean()


def random_words(size: Size, *, rows: int, tokens: int, seed: int) -> torch.Tensor:
    """`tokens_BT` (int64) without end and padding tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_WORD_ID, size.vocabulary, (rows, tokens), generator=generator)


def tokenizer(size: Size) -> PreTrainedTokenizerFast:
    """One token per word `w<id>`; text and ids are then the same thing on both sides."""
    words = [PAD, END, *(f"w{number}" for number in range(FIRST_WORD_ID, size.vocabulary))]
    core = Tokenizer(models.WordLevel(vocab={w: i for i, w in enumerate(words)}, unk_token=PAD))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        unk_token=PAD,
        padding_side="left",
        chat_template="{% for m in messages %}{{ m['content'] }} {% endfor %}",
        clean_up_tokenization_spaces=False,
    )


def text_of(ids: list[int]) -> str:
    """The words of these ids, as a tokenizer reads them back."""
    return " ".join(f"w{number}" for number in ids)


def save(size: Size, directory: Path, *, seed: int) -> Path:
    """A Hugging Face directory with the model of this seed; made once per directory."""
    path = directory / f"{size.name}-{seed}"
    if not path.exists():
        new_model(size, seed=seed).save_pretrained(path, safe_serialization=True)
        tokenizer(size).save_pretrained(path)
    return path
