"""Fixtures and small builders for the engine tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain.engine.graph import Graph, Node
from posttrain.engine.record import Artifact
from posttrain.engine.runner import Event, run
from posttrain.engine.store import Store

TOYS = f"{Path(__file__).with_name('toy_stages.py')}:execute"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def toys() -> str:
    """The `execute` argument for the toy stages."""
    return TOYS


@pytest.fixture
def make_graph() -> Callable[..., Graph]:
    """Graph of nodes whose target is the last one."""

    def make(*nodes: Node) -> Graph:
        return Graph(nodes={node.name: node for node in nodes}, target=nodes[-1].name)

    return make


@pytest.fixture
def run_all(store: Store) -> Callable[..., list[Event]]:
    def run_all(graph: Graph, **options: Any) -> list[Event]:
        return list(run(graph, store, **{"execute": TOYS, **options}))

    return run_all


@pytest.fixture
def commit(store: Store) -> Callable[..., Artifact]:
    """Commit a node of a graph by hand, with the text of its files, after its inputs."""

    def commit(graph: Graph, name: str, files: dict[str, str], **metrics: float) -> Artifact:
        fingerprints = graph.fingerprints()
        work = store.begin(fingerprints[name])
        assert work is not None
        for file, text in files.items():
            (work.out / file).parent.mkdir(parents=True, exist_ok=True)
            (work.out / file).write_text(text)
        inputs = {}
        for edge, source in graph.nodes[name].inputs.items():
            found = store.find(fingerprints[source])
            assert found is not None
            inputs[edge] = found
        return store.commit(graph.nodes[name], work, inputs=inputs, metrics=metrics, provenance={})

    return commit


@pytest.fixture
def chain(make_graph: Callable[..., Graph]) -> Graph:
    """first -> second -> third."""
    return make_graph(
        Node(name="first", kind="add", config={"value": 1}),
        Node(name="second", kind="add", config={"value": 2}, inputs={"start": "first"}),
        Node(name="third", kind="add", config={"value": 3}, inputs={"start": "second"}),
    )


@pytest.fixture
def committed(chain: Graph, commit: Callable[..., Artifact]) -> list[Artifact]:
    """The chain, committed by hand."""
    return [commit(chain, name, {"value.txt": name}, score=0.5) for name in chain.order()]
