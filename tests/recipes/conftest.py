"""What recipes in tests share.

The hard cases of the language: a suite of three small domains, one store, and a base model that is
made once and found there by every later recipe. Others: a suite of two domains, and how to run a
recipe in a store of its own.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from posttrain.backends.checkpoint import LanguageModel, save
from posttrain.engine import ancestry
from posttrain.engine.record import Artifact
from posttrain.engine.runner import run
from posttrain.engine.store import Store
from posttrain.language.handles import Stage
from posttrain.recipe import Recipe
from posttrain.rewards.comparisons import QUESTION
from posttrain.rewards.spec import VerifierSpec
from posttrain.stages.worker import EXECUTE, PRELOAD
from posttrain.suites.domain import Domain, Suite, Table
from posttrain.suites.load import load_suite

SUITE = """
name = "hard"
[domains.reasoning]
train = "reasoning.jsonl"
demo = "demo"
thought = "thought"
verifier = "regex"
pattern = "^[0-4]"
[domains.general]
train = "general.jsonl"
demo = "demo"
thought = "thought"
verifier = "regex"
pattern = "^[3-7]"
[domains.judging]
train = "judging.jsonl"
demo = "demo"
verifier = "exact"
"""


def write_suite(folder: Path) -> Path:
    """A suite of three tables of 120 problems; returns its file.

    The answers are digits as good as random, so that a model which has learned to write digits is
    right by chance. `judging` asks which of two digits is the greater one, as judges ask.
    """
    tables: dict[str, list[dict[str, str]]] = {"reasoning": [], "general": [], "judging": []}
    for i in range(100, 220):
        drawn = zlib.crc32(str(i).encode())
        a, b = str(drawn % 10), str((drawn + 1 + drawn // 10 % 9) % 10)
        for name, answer in {"reasoning": a + b, "general": a}.items():
            row = {"prompt": f"{name[0]} {i}", "answer": answer, "demo": answer, "thought": b}
            tables[name].append(row)
        verdict = "1" if a > b else "2"
        prompt = QUESTION.format(prompt=f"r {i}", a=a, b=b)
        tables["judging"].append({"prompt": prompt, "answer": verdict, "demo": verdict})
    for name, rows in tables.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    path = folder / "hard.toml"
    path.write_text(SUITE)
    return path


@dataclass(frozen=True)
class Made:
    """What a stage left in the store."""

    artifact: Artifact

    @property
    def edges(self) -> dict[str, str]:
        """Edge to the name of the stage that it comes from, as the record has it."""
        return {edge: source["name"] for edge, source in self.artifact.inputs.items()}

    @property
    def config(self) -> dict[str, Any]:
        """The settings in the record."""
        return dict(self.artifact.config)

    @property
    def weights(self) -> str:
        """The sha256 of the weights."""
        return str(self.artifact.files["model.safetensors"]["sha256"])

    def read(self, file: str) -> Any:
        """The object in a JSON file."""
        return json.loads((self.artifact.path / file).read_text(encoding="utf-8"))

    def rows(self, file: str) -> list[dict[str, Any]]:
        """The objects in a file of JSON lines."""
        text = (self.artifact.path / file).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]


@dataclass(frozen=True)
class Bench:
    """Builds and runs the recipes of the hard cases."""

    suite: Suite
    folder: Path
    store: Store

    def recipe(self, case: int) -> Recipe:
        """A builder over the suite. Its seed is the number of the case: a stage that two cases
        have in common would otherwise be found in the store under the first one's name."""
        return Recipe(self.suite, self.folder, seed=case, store=self.store)

    def base(self, r: Recipe, **settings: Any) -> Stage:
        """A model that answers with digits, the same for every recipe that changes nothing."""
        size = {"hidden_size": 32, "num_layers": 1, "intermediate_size": 64}
        long = {"steps": 30, "lr": 5e-3, "batch_size": 32, "seed": 0}
        return r.pretrain(**{"data": r.demos(r.domains)} | size | long | settings)

    def run(self, r: Recipe, target: Stage) -> dict[str, Made]:
        """Run a recipe to its end; returns the lineage of its target. Raises what `run` raises."""
        made = {
            event.name: event.payload["path"]
            for event in run(r.graph(target), self.store, execute=EXECUTE, preload=PRELOAD)
            if event.kind in ("finished", "cached")
        }
        return self.lineage(self.store, self.store.load(Path(made[target.name])))

    def lineage(self, store: Store, artifact: Artifact) -> dict[str, Made]:
        """An artifact and all that it descends from, by the names of the stages, from the records
        of a store."""
        found = ancestry.lineage(store, artifact)
        assert not any(ancestor.missing for ancestor in found)
        return {a.artifact.name: Made(a.artifact) for a in found if a.artifact is not None}


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("hard")
    suite, directory = load_suite(str(write_suite(folder)))
    return Bench(suite, directory, Store(folder / "store"))


@pytest.fixture
def make_suite(tmp_path: Path) -> Callable[[str, str], Suite]:
    """`make_suite(first, second)`: 120 problems each, to repeat a number or its last digit."""

    def make(first: str, second: str) -> Suite:
        domains = {}
        answers: dict[str, Callable[[int], str]] = {first: str, second: lambda i: str(i % 10)}
        for name, answer in answers.items():
            rows = [
                {"prompt": f"{name} {i}", "answer": answer(i), "demo": answer(i)}
                for i in range(100, 220)
            ]
            path = tmp_path / f"{name}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            table = Table(train=path.name, demo="demo")
            domains[name] = Domain(name=name, source=table, verifier=VerifierSpec(name="exact"))
        return Suite(name="mine", domains=domains)

    return make


@pytest.fixture
def two_domains(make_suite: Callable[[str, str], Suite]) -> Suite:
    """The domains `whole` and `last`."""
    return make_suite("whole", "last")


@pytest.fixture
def execute(tmp_path: Path) -> Callable[[Recipe, Stage], dict[str, Artifact]]:
    """Run a recipe to its end; returns the artifacts by name."""

    def execute(r: Recipe, target: Stage) -> dict[str, Artifact]:
        store = Store(tmp_path / "store")
        kinds = {e.kind for e in run(r.graph(target), store, execute=EXECUTE, preload=PRELOAD)}
        assert "finished" in kinds and "failed" not in kinds
        return {artifact.name: artifact for artifact in store.list()}

    return execute


@pytest.fixture
def make_recipe(tmp_path: Path) -> Callable[..., Recipe]:
    """A builder over three domains in one small table."""
    rows = [{"prompt": f"{i} apples", "answer": str(i), "demo": str(i)} for i in range(100)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table, verifier = Table(train="rows.jsonl", demo="demo"), VerifierSpec(name="exact")
    domains = {
        name: Domain(name=name, source=table, verifier=verifier) for name in ("add", "sort", "turn")
    }

    def make(**options: Any) -> Recipe:
        return Recipe(Suite(name="mine", domains=domains), tmp_path, **options)

    return make


@pytest.fixture
def checkpoint(tmp_path: Path, make_model: Callable[..., LanguageModel]) -> Callable[..., str]:
    """`checkpoint(name, extra=token)` saves a model, with one more token in its tokenizer."""

    def make(name: str, extra: str | None = None) -> str:
        language_model = make_model()
        if extra is not None:
            language_model.tokenizer.add_tokens([extra])
        save(language_model, tmp_path / name)
        return str(tmp_path / name)

    return make
