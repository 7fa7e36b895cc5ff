"""mix and dedup: which rows of which source, how often, and what counts as the same."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from posttrain.algorithms import Near
from posttrain.engine.errors import ConfigError
from posttrain.stages.config import build_config
from posttrain.stages.curation import first_of_similar, grams, jaccard, row_counts


def rows_of(ran: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ran.out / "data.jsonl").read_text().splitlines()]


def data(name: str, count: int, length: int = 1) -> list[dict[str, Any]]:
    return [
        {"id": f"{name}{i}", "domain": name, "prompt": f"p{i}", "demo": name * length}
        for i in range(count)
    ]


@pytest.fixture
def put(tmp_path: Path) -> Callable[..., str]:
    def put(rows: Sequence[Mapping[str, Any]]) -> str:
        folder = tmp_path / f"data-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "data.jsonl").write_text(text)
        (folder / "record.json").write_text(
            '{"format": 1, "name": "data", "kind": "mix", "fingerprint": "2222"}'
        )
        return str(folder)

    return put


@pytest.fixture
def mix(
    run_stage: Callable[..., Any], put: Callable[..., str], models: Mapping[str, str]
) -> Callable[..., Any]:
    def run(weights: Sequence[float], *sources: Any, **settings: Any) -> Any:
        inputs = {f"data.{i}": put(rows) for i, rows in enumerate(sources)}
        parts = [{"edge": edge, "weight": w} for edge, w in zip(inputs, weights, strict=True)]
        if settings.get("by") == "tokens":
            inputs["tokenizer"] = models["start"]
        return run_stage("mix", {"parts": parts} | settings, inputs)

    return run


def count(ran: Any) -> dict[str, int]:
    return dict(Counter(row["domain"] for row in rows_of(ran)))


def test_shares_of_rows(mix: Callable[..., Any]) -> None:
    """Weights 1 to 3: of 10 and 90 rows at most 10 and 30, or 8 and 25 of 33."""
    a, b = data("a", 10), data("b", 90)
    whole = mix([1, 3], a, b)
    assert count(whole) == {"a": 10, "b": 30}
    assert whole.metrics == {"rows": 40, "most_passes": 1.0, "parts_used_up": 1}
    assert len({row["id"] for row in rows_of(whole)}) == 40
    assert count(mix([1, 3], a, b, rows=33)) == {"a": 8, "b": 25}
    more = mix([1, 3], a, b, rows=80)
    assert count(more) == {"a": 20, "b": 60}
    assert set(Counter(row["id"] for row in rows_of(more)).values()) == {1, 2}
    assert more.metrics["most_passes"] == 2


def test_shares_of_tokens(mix: Callable[..., Any]) -> None:
    """Demonstrations of 1 + 1 and 4 + 1 characters: equal tokens are five rows to two."""
    a, b = data("a", 50), data("b", 50, length=4)
    assert count(mix([1, 1], a, b, by="tokens", rows=35)) == {"a": 25, "b": 10}
    assert count(mix([1, 1], a, b, by="tokens")) == {"a": 50, "b": 20}
    assert count(mix([1, 1], a, b, by="rows", rows=35)) == {"a": 18, "b": 17}


def test_order_follows_from_the_seed(mix: Callable[..., Any]) -> None:
    a, b = data("a", 20), data("b", 20)
    first, again, other = (rows_of(mix([1, 1], a, b, seed=s, rows=20)) for s in (0, 0, 1))
    assert first == again
    assert {row["id"] for row in first} != {row["id"] for row in other}
    assert [row["domain"] for row in first] != sorted(row["domain"] for row in first)


def test_a_source_too_small_to_count_is_an_error(mix: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"data.0 has so small a weight \(0.001 of 1.001\)"):
        mix([0.001, 1], data("a", 10), data("b", 10), rows=20)
    with pytest.raises(ConfigError, match=r"its source data\.1 has no rows"):
        mix([1, 1], data("a", 10), [])


def test_row_counts_add_up() -> None:
    assert row_counts(10, [1 / 3, 1 / 3, 1 / 3], [1, 1, 1], [9, 9, 9]) == [4, 3, 3]
    assert sum(row_counts(101, [0.15, 0.25, 0.6], [3.0, 7.5, 1.1], [9, 9, 9])) == 101


def test_demonstrations_of_domains_are_a_source(
    run_stage: Callable[..., Any], put: Callable[..., str], domains: Mapping[str, str]
) -> None:
    parts = [
        {"domains": ["short", "words"], "weight": 1},
        {"edge": "data.0", "weight": 1},
    ]
    ran = run_stage("mix", {"parts": parts, "rows": 40}, {"data.0": put(data("a", 9)), **domains})
    found = count(ran)
    assert found["a"] == 20 and found["short"] + found["words"] == 20
    own = next(row for row in rows_of(ran) if row["domain"] == "short")
    assert own["prompt"] == f"short {own['demo']}"


def test_a_source_may_be_noisy(run_stage: Callable[..., Any], domains: Mapping[str, str]) -> None:
    """The verifier of `short` finds every word wrong, so that any slip will do."""
    inputs = {"domains.short": domains["domains.short"]}
    for noise, wrong in ((0.0, 0), (1.0, 30)):
        part = {"domains": ["short"], "weight": 1, "demo_noise": noise}
        rows = rows_of(run_stage("mix", {"parts": [part], "rows": 30}, inputs))
        assert sum(row["prompt"] != f"short {row['demo']}" for row in rows) == wrong


def test_a_mix_is_learned_in_its_shares(
    mix: Callable[..., Any], run_stage: Callable[..., Any], models: Mapping[str, str]
) -> None:
    """Nine rows of `a` to one of `b` in every epoch of sft, which draws evenly over domains where
    the data is no mix: then the loss is another one."""
    mixed = mix([9, 1], data("abc", 18), data("xyz", 2))
    (mixed.out / "record.json").write_text(
        '{"format": 1, "name": "mix", "kind": "mix", "fingerprint": "2222"}'
    )
    start = {"start": models["start"]}
    settings = {"steps": 1, "batch_size": 20, "lr": 1e-3}
    as_mixed = run_stage("sft", settings, start | {"data": str(mixed.out)})
    rows = [{k: v for k, v in row.items() if k != "pool"} for row in rows_of(mixed)]
    (mixed.out / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    even = run_stage("sft", settings, start | {"data": str(mixed.out)})
    (mixed.out / "data.jsonl").write_text(
        "".join(json.dumps(row | {"domain": "one"}) + "\n" for row in rows)
    )
    alone = run_stage("sft", settings, start | {"data": str(mixed.out)})
    assert as_mixed.metrics["loss"] == pytest.approx(alone.metrics["loss"], rel=1e-5)
    assert abs(as_mixed.metrics["loss"] - even.metrics["loss"]) > 1e-3


@pytest.fixture
def dedup(run_stage: Callable[..., Any], put: Callable[..., str]) -> Callable[..., Any]:
    def run(*sources: Any, **settings: Any) -> Any:
        several = {f"data.{i}": put(rows) for i, rows in enumerate(sources)}
        inputs = several if len(sources) > 1 else {"data": several["data.0"]}
        return run_stage("dedup", settings, inputs)

    return run


def row(prompt: str, demo: str, **changes: Any) -> dict[str, Any]:
    return {"id": prompt, "domain": "d", "prompt": prompt, "demo": demo} | changes


ROWS = [
    row("add 1 and 2", "3"),
    row("add 1 and 2", "3", id="again"),
    row("add 1 and 2", "three"),
    row("add 1 and 2!", "3"),
    row("sort b a", "a b"),
    row("add 1 and 2", "3", mode="think"),
    row("repeat 3", "3"),
]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0, 2, 3, 4, 5, 6]),
        ({"of": "prompt"}, [0, 3, 4, 6]),
        ({"of": "demo"}, [0, 2, 4, 5]),
        ({"of": "prompt", "near": {"similarity": 0.8}}, [0, 4, 6]),
        ({"of": "prompt", "near": {"similarity": 0.9}}, [0, 3, 4, 6]),
        ({"of": "prompt", "near": {"similarity": 0.8, "ngram": 2}}, [0, 4, 6]),
        ({"of": "prompt", "near": {"similarity": 0.9, "ngram": 2}}, [0, 4, 6]),
    ],
)
def test_the_first_of_equals_stays(
    dedup: Callable[..., Any], settings: dict[str, Any], expected: list[int]
) -> None:
    """Of 11 and 12 characters 7 of 8 5-grams are shared, Jaccard .875, and 10 of 11 2-grams, .91.
    The same row in another mode is another thing to learn."""
    ran = dedup(ROWS, **settings)
    assert rows_of(ran) == [ROWS[i] for i in expected]
    assert ran.metrics == {"rows": len(expected), "kept_share": len(expected) / len(ROWS)}


def test_data_of_several_stages(dedup: Callable[..., Any]) -> None:
    assert rows_of(dedup(ROWS[:1], ROWS[1:3])) == [ROWS[0], ROWS[2]]


def test_near_duplicates_are_those_of_a_plain_search() -> None:
    """Against every pair compared, on texts that are often alike, at thresholds that are reached
    exactly (.5, .8)."""
    draw = random.Random(0)
    texts = ["".join(draw.choice("ab") for _ in range(draw.randint(1, 14))) for _ in range(300)]
    for near, n in itertools.product((0.3, 0.5, 0.8, 0.95), (1, 2, 5)):
        first: list[int] = []
        for i, text in enumerate(texts):
            found = grams(text, n)
            if all(jaccard(found, grams(texts[j], n)) < near for j in first):
                first.append(i)
        assert first_of_similar(texts, Near(near, n)) == first
        assert 0 < len(first) < 300


def test_modes_of_near_duplicates_stay_apart(dedup: Callable[..., Any]) -> None:
    rows = [row("add 1 and 2", "3", mode=mode) for mode in ("think", "no_think")]
    assert rows_of(dedup(rows, near={"similarity": 0.5})) == rows


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("mix", {"by": "words"}, "field 'by': 'words' is not allowed"),
        ("mix", {"rows": 0}, "field 'rows': 0 is not allowed"),
        ("mix", {"parts": [{"weight": 0}]}, "field 'parts.0.weight': 0 is not allowed"),
        ("dedup", {"near": {"ngram": 3}}, "field 'near.similarity': a value is needed"),
        ("dedup", {"near": {"similarity": 1.0}}, "field 'near.similarity': 1.0 is not allowed"),
    ],
)
def test_bad_settings_are_named(kind: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(kind, "mine", settings)
