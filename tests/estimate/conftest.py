"""A cache of its own for every test, and stores with earlier runs."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.estimate.building import GIB

from posttrain.engine.graph import Graph
from posttrain.engine.store import Store
from posttrain.estimate.about import Machine


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def machine() -> Machine:
    return Machine(jobs=1, cores=1, total=8 * GIB, memory=6 * GIB)


Commit = Callable[..., None]


@pytest.fixture
def commit(store: Store) -> Commit:
    """Puts stages of a graph into the store, as if they had been run."""

    def put(
        graph: Graph,
        name: str,
        *,
        seconds: float,
        files: Mapping[str, bytes] | None = None,
        lines: list[dict[str, Any]] | None = None,
        **facts: Any,
    ) -> None:
        node = graph.nodes[name]
        work = store.begin(graph.fingerprints()[name])
        assert work is not None
        for file, content in (files or {}).items():
            (work.out / file).write_bytes(content)
        if lines:
            text = "".join(json.dumps(one) + "\n" for one in lines)
            (work.path / "metrics.jsonl").write_text(text)
        prints = graph.fingerprints()
        inputs = {edge: store.find(prints[source]) for edge, source in node.inputs.items()}
        made = {"seconds": seconds, "host": platform.node(), "device": "cpu", **facts}
        store.commit(node, work, inputs=inputs, metrics={}, provenance=made)

    return put
