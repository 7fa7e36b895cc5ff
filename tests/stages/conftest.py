"""Stages run through the worker on two small domains and a random model, in this process."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from posttrain.backends.checkpoint import LanguageModel, save
from posttrain.engine.process import Job
from posttrain.rewards.spec import VerifierSpec
from posttrain.stages.config import build_config
from posttrain.suites.domain import Domain, Table, build_domain, domain_node
from posttrain.worker import run_job

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
        return load_file(self.out / "model.safetensors")


RunStage = Callable[..., Ran]


def write_domain(
    path: Path, name: str, length: int, verifier: VerifierSpec, *, demos: bool = True
) -> Path:
    """A domain artifact with 120 problems `<name> <word>`, demonstrated by the word itself."""
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
    path = tmp_path_factory.mktemp("bare") / "bare"
    return str(write_domain(path, "bare", 4, VerifierSpec(name="exact"), demos=False))


@pytest.fixture(scope="session")
def models(
    tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., LanguageModel]
) -> dict[str, str]:
    """Checkpoints: start, and two teachers called one and two."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("start", "one", "two")):
        save(make_model(stop=STOP, seed=seed), root / name)
        write_record(root / name, name, "model")
    return {name: str(root / name) for name in ("start", "one", "two")}


@pytest.fixture
def save_model(tmp_path: Path) -> Callable[[LanguageModel], str]:
    """`save_model(language_model)` makes an artifact of it; returns the directory."""

    def save_model(language_model: LanguageModel) -> str:
        path = tmp_path / f"model-{len(list(tmp_path.glob('model-*')))}"
        save(language_model, path)
        write_record(path, "own", "model")
        return str(path)

    return save_model


@pytest.fixture
def run_stage(tmp_path: Path) -> Iterator[RunStage]:
    """`run(kind, settings, inputs)` runs one stage to its end in a work directory of its own."""

    def run(
        kind: str, settings: Mapping[str, Any], inputs: Mapping[str, str], work: Path | None = None
    ) -> Ran:
        number = len(list(tmp_path.glob("work-*")))
        work = tmp_path / f"work-{number}" if work is None else work
        (work / "out").mkdir(parents=True, exist_ok=True)
        job = Job(
            name=f"my_{kind}",
            kind=kind,
            version=1,
            fingerprint="0" * 64,
            config=build_config(kind, f"my_{kind}", settings).model_dump(mode="json"),
            data={},
            runtime={},
            inputs=inputs,
            work=str(work),
            out=str(work / "out"),
            threads=1,
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

    def same(one: Ran, other: Ran) -> bool:
        ours, theirs = one.weights(), other.weights()
        assert ours.keys() == theirs.keys()
        return all(torch.equal(ours[name], theirs[name]) for name in ours)

    return same
