"""What the guide docs/own-data.md starts from: files of data as people have them, and a checkpoint.

    python make.py        # data/ and base/ in the current directory

Four skills of a tiny assistant. `sums` and `order` have answers that can be checked; `reverse` has
worked conversations as well; `chat` is small talk over several turns, where nothing can be checked.
The base is a randomly initialised Llama with one token per character and a chat template; your own
would be any checkpoint that transformers reads.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

COLOURS = ("red", "blue", "green", "grey", "pink", "white", "black", "brown")
SYSTEM = "Be kind."
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

Message = dict[str, str]


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def add(random: random.Random) -> tuple[str, str]:
    numbers = [random.randint(1, 9) for _ in range(random.choice((2, 3, 4)))]
    return "+".join(map(str, numbers)) + "=", str(sum(numbers))


def reverse(random: random.Random) -> tuple[str, str]:
    word = "".join(random.choice("abcdefghijklmnop") for _ in range(random.randint(5, 9)))
    return f"reverse {word}", word[::-1]


def order(random: random.Random) -> tuple[str, str]:
    digits = [random.choice("0123456789") for _ in range(random.randint(4, 7))]
    return f"sort {''.join(digits)}", "".join(sorted(digits))


def small_talk(random: random.Random) -> tuple[list[Message], str, str]:
    """One to three turns up to the last answer; a plain answer, and a warm one."""
    name = random.choice("BDKLMNRST") + random.choice("aeiou") + random.choice("klmnrst")
    name += random.choice(("", "a", "i", "o"))
    colour = random.choice(COLOURS)
    talk = [user(f"I am {name}.")]
    turns = random.randint(1, 3)
    if turns == 1:
        return talk, f"Hello {name}!", f"Hello, dear {name}!"
    talk.append(assistant(f"Hello {name}!"))
    if turns == 2:
        return [*talk, user("Who am I?")], f"You are {name}.", f"You are {name}!"
    talk += [user(f"I like {colour}."), assistant(f"{colour.capitalize()} is nice.")]
    talk.append(user("What do I like?"))
    return talk, f"You like {colour}.", f"You like {colour}, {name}."


def conversation(random: random.Random) -> list[Message]:
    """A row of the general SFT file: one to three tasks in a row, or small talk."""
    if random.random() < 0.3:
        talk, plain, _ = small_talk(random)
        return [system(SYSTEM), *talk, assistant(plain)]
    turns: list[Message] = []
    for _ in range(random.randint(1, 3)):
        asked, answer = random.choice((add, reverse, order))(random)
        turns += [user(asked), assistant(answer)]
    return turns


def preference(random: random.Random) -> dict[str, Any]:
    """Somebody prefers the warm answer to the plain one."""
    talk, plain, warm = small_talk(random)
    return {"prompt": [system(SYSTEM), *talk], "chosen": warm, "rejected": plain}


def chat(random: random.Random) -> dict[str, Any]:
    talk, plain, _ = small_talk(random)
    return {"messages": [*talk, assistant(plain)]}


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_data(folder: Path, *, rows: int = 3000, seed: int = 0) -> None:
    """All files; `rows` conversations in the SFT file, and as many problems in the others."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    sft = [{"messages": conversation(rng)} for _ in range(rows)]
    write_jsonl(folder / "sft.jsonl", sft)
    sums = [add(rng) for _ in range(rows)]
    write_jsonl(folder / "sums.jsonl", ({"question": q, "answer": a} for q, a in sums))
    pairs = [reverse(rng) for _ in range(rows)]
    turns = [{"messages": [user(q), assistant(a)], "word": a} for q, a in pairs]
    write_jsonl(folder / "reverse.jsonl", turns)
    with (folder / "order.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["prompt", "answer"])
        table.writerows(order(rng) for _ in range(rows))
    write_jsonl(folder / "chat.jsonl", (chat(rng) for _ in range(rows // 3)))
    write_jsonl(folder / "warm.jsonl", (preference(rng) for _ in range(rows // 4)))


def write_base(folder: Path, *, hidden_size: int = 64, layers: int = 3, seed: int = 0) -> None:
    """A checkpoint with a chat template, of random weights."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    characters = ["\n", *(chr(code) for code in range(32, 127))]
    vocabulary = {token: i for i, token in enumerate([*special, *characters])}
    core = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<|pad|>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=special[2:],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    write_data(Path("data"))
    write_base(Path("base"))
