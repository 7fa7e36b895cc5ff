"""One thread for every test and its child processes, and what tests of several folders share: small
models, two small domains, and a way to run one stage on them.

The models are a few thousand parameters: a second thread gains nothing, and on busy cores two
threads that wait for each other are ten times slower. Heavy imports stand in the functions, so that
folders of tests without a model start at once.
"""

from __future__ import annotations

import os

# Before anything imports torch, which reads it once.
os.environ["OMP_NUM_THREADS"] = "1"

import json
import math
import signal
import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain.backends.checkpoint import LanguageModel
    from posttrain.rewards.spec import VerifierSpec


def _config(kind: str, vocabulary: int, positions: int) -> Any:
    from transformers import GPT2Config, LlamaConfig, Qwen3Config

    if kind == "gpt2":
        return GPT2Config(
            vocab_size=vocabulary,
            n_positions=positions,
            n_embd=32,
            n_layer=2,
            n_head=4,
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=None,
        )
    shape: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": positions,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if kind == "llama":
        # Grouped queries: four heads share one head of keys and values; the head is not tied.
        return LlamaConfig(num_key_value_heads=1, tie_word_embeddings=False, **shape)
    return Qwen3Config(num_key_value_heads=2, head_dim=8, tie_word_embeddings=True, **shape)


@pytest.fixture(scope="session", autouse=True)
def heed_ctrl_c() -> None:
    """A shell lets what it starts in the background ignore SIGINT, and every process below would.
    Tests that press Ctrl-C need one that does not."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., LanguageModel]:
    """`make(kind, ...)`: a random model of two layers whose distributions are far from uniform.

    `kind` is qwen3 (tied head, grouped queries), llama (own head, one key-value head) or gpt2
    (learned positions, dropout in training). `stop` are the stop token ids.
    """

    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    from posttrain.backends.checkpoint import LanguageModel
    from posttrain.backends.tiny import character_tokenizer

    def make(
        kind: str = "qwen3",
        *,
        stop: int | list[int] | None = None,
        positions: int = 64,
        vocabulary: int | None = None,
        seed: int = 0,
    ) -> LanguageModel:
        tokenizer = character_tokenizer([])
        torch.manual_seed(seed)
        config = _config(kind, vocabulary or len(tokenizer), positions)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        ends = tokenizer.eos_token_id if stop is None else stop
        model.generation_config = GenerationConfig(
            eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
        )
        return LanguageModel(model=model, tokenizer=tokenizer)

    return make


# Every punctuation character ends a response: a random model then ends many rows early, at many
# lengths. No prompt or demonstration holds one.
STOP = [4, *(5 + ord(character) - 32 for character in string.punctuation)]


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What a stage left behind."""

    metrics: dict[str, Any]
    out: Path
    lines: list[dict[str, float]]
    """metrics.jsonl, parsed."""

    def weights(self) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        (path,) = self.out.glob("*model.safetensors")
        return load_file(path)


RunStage = Callable[..., Ran]


def write_domain(
    path: Path, name: str, length: int, verifier: VerifierSpec, *, demos: bool = True
) -> Path:
    """A domain artifact with 120 problems `<name> <word>`, demonstrated by the word itself."""
    import numpy as np

    from posttrain.suites.build import build_domain
    from posttrain.suites.domain import Domain, Table, domain_node

    generator = np.random.default_rng(len(name))
    words = {"".join(generator.choice(list("abcdefgh"), size=length)) for _ in range(400)}
    rows = [
        {"prompt": f"{name} {word}", "answer": word, "demo": word} for word in sorted(words)[:120]
    ]
    path.mkdir()
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = Table(train="rows.jsonl", demo="demo" if demos else None)
    node = domain_node(Domain(name=name, source=table, verifier=verifier), path)
    build_domain(node.config, node.runtime, path, node.data)
    write_record(path, name, "domain")
    return path


def weights_file(tensors: Mapping[str, tuple[str, tuple[int, ...]]], *, cut: int = 0) -> bytes:
    """A safetensors file of zeros, made by hand: name to type and shape; `cut` bytes too short."""
    sizes = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I32": 4, "U8": 1, "F8_E4M3": 1}
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + sizes[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(end - cut)


def write_record(path: Path, name: str, kind: str) -> None:
    """As much of a record as a stage reads of its inputs."""
    record = {"format": 1, "name": name, "kind": kind, "fingerprint": "1" * 64}
    (path / "record.json").write_text(json.dumps(record))


@pytest.fixture(scope="session")
def domains(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Inputs of a stage: a domain of short words and one of longer ones.

    A response of `short` is right when it starts with a digit or a capital letter, one of `words`
    when a small letter stands in it: both happen by chance.
    """
    from posttrain.rewards.spec import VerifierSpec

    root = tmp_path_factory.mktemp("domains")
    patterns = {"short": (3, "^[0-9A-Z]"), "words": (6, "[a-z]")}
    return {
        f"domains.{name}": str(
            write_domain(
                root / name, name, length, VerifierSpec(name="regex", options={"pattern": pattern})
            )
        )
        for name, (length, pattern) in patterns.items()
    }


@pytest.fixture(scope="session")
def undemonstrated(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A domain without demonstrations, scored by the exact answer."""
    from posttrain.rewards.spec import VerifierSpec

    path = tmp_path_factory.mktemp("bare") / "bare"
    return str(write_domain(path, "bare", 4, VerifierSpec(name="exact"), demos=False))


@pytest.fixture
def data(tmp_path: Path) -> str:
    """A data artifact of the two domains whose rows no domain has, and pairs in the same place."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [
        {"id": str(i), "domain": name, "prompt": f"{name} {i}", "demo": f"{i % 7}{name}"}
        for i in range(30)
        for name in ("words", "short")
    ]
    pairs = [row | {"chosen": row["demo"], "rejected": f"no{row['demo']}"} for row in rows]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    record = {"format": 1, "name": "data", "kind": "select", "fingerprint": "2" * 64}
    (folder / "record.json").write_text(json.dumps(record))
    return str(folder)


@pytest.fixture(scope="session")
def models(
    tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., LanguageModel]
) -> dict[str, str]:
    """Checkpoints: start, and two teachers called one and two."""
    from posttrain.backends.checkpoint import save

    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("start", "one", "two")):
        save(make_model(stop=STOP, seed=seed), root / name)
        write_record(root / name, name, "model")
    return {name: str(root / name) for name in ("start", "one", "two")}


@pytest.fixture
def save_model(tmp_path: Path) -> Callable[[LanguageModel], str]:
    """`save_model(language_model)` makes an artifact of it; returns the directory."""

    from posttrain.backends.checkpoint import save

    def save_model(language_model: LanguageModel) -> str:
        path = tmp_path / f"model-{len(list(tmp_path.glob('model-*')))}"
        save(language_model, path)
        write_record(path, "own", "model")
        return str(path)

    return save_model


@pytest.fixture
def run_stage(tmp_path: Path) -> Iterator[RunStage]:
    """`run(kind, settings, inputs)` runs one stage to its end in a work directory of its own."""

    import torch

    from posttrain.engine.process import Job
    from posttrain.stages.config import build_config
    from posttrain.stages.worker import run_job

    def run(
        kind: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        work: Path | None = None,
        *,
        environment: Mapping[str, str] | None = None,
        threads: int = 1,
    ) -> Ran:
        number = len(list(tmp_path.glob("work-*")))
        work = tmp_path / f"work-{number}" if work is None else work
        (work / "out").mkdir(parents=True, exist_ok=True)
        job = Job(
            name=f"my_{kind}",
            kind=kind,
            version=1,
            fingerprint="0" * 64,
            config=build_config(kind, f"my_{kind}", settings).to_json(),
            data={},
            runtime={},
            inputs=inputs,
            work=str(work),
            out=str(work / "out"),
            threads=threads,
            hashes=str(tmp_path / "hashes.json"),
            environment=environment or {},
        )
        metrics = run_job(job)
        log = work / "metrics.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return Ran(metrics=metrics, out=work / "out", lines=lines)

    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    yield run
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def same() -> Callable[[Ran, Ran], bool]:
    """Whether two stages ended with the same bits."""

    import torch

    def same(one: Ran, other: Ran) -> bool:
        ours, theirs = one.weights(), other.weights()
        assert ours.keys() == theirs.keys()
        return all(torch.equal(ours[name], theirs[name]) for name in ours)

    return same
