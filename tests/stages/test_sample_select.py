"""sample and select: scored responses, and which of them become demonstrations."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from posttrain.algorithms import ShortestCorrect
from posttrain.engine.errors import ConfigError
from posttrain.rewards.verifiers import load_verifier
from posttrain.stages.select import choose

BASE: dict[str, Any] = {
    "k": 3,
    "num_prompts": 70,
    "max_new_tokens": 6,
    "routes": {"short": ["one"], "words": ["two"]},
}


@pytest.fixture
def sample(
    run_stage: Callable[..., Any], models: Mapping[str, str], domains: Mapping[str, str]
) -> Callable[..., Any]:
    def run(**changes: Any) -> Any:
        inputs = {f"models.{name}": models[name] for name in ("one", "two")} | dict(domains)
        return run_stage("sample", BASE | changes, inputs)

    return run


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_prompt_is_sampled_k_times_and_scored(
    sample: Callable[..., Any], domains: Mapping[str, str]
) -> None:
    ran = sample()
    rows = rows_of(ran.out / "rollouts.jsonl")
    assert ran.metrics["rows"] == len(rows) == 2 * 70 * 3
    assert ran.metrics["reward"] == pytest.approx(sum(r["reward"] for r in rows) / len(rows))
    assert set(Counter((row["domain"], row["id"]) for row in rows).values()) == {3}
    assert {(row["domain"], row["model"]) for row in rows} == {
        ("short", "one"),
        ("words", "two"),
    }
    assert {row["temperature"] for row in rows} == {1.0}
    judges = {name: load_verifier(Path(domains[f"domains.{name}"])) for name in ("short", "words")}
    for row in rows:
        score = judges[row["domain"]].score(row["response"], row)
        assert row["reward"] == (score if row["finished"] else 0)
    assert {row["finished"] for row in rows} == {True, False}
    assert [line["step"] for line in ran.lines] == [1, 2]


def test_every_setting_changes_the_rollouts(sample: Callable[..., Any]) -> None:
    changes = [{}, {"seed": 1}, {"k": 2}, {"num_prompts": 60}, {"max_new_tokens": 4}]
    changes += [{"temperature": 0.5}, {"temperature": 0.0}]
    changes += [{"routes": {"short": ["two"], "words": ["one"]}}, {"first_prompt": 7}]
    changes += [{"routes": {"short": ["one", "two"], "words": ["two"]}}, {"prefix": "ab"}]
    texts = {(sample(**change).out / "rollouts.jsonl").read_text() for change in changes}
    assert len(texts) == len(changes)
    assert (sample().out / "rollouts.jsonl").read_text() in texts


def test_several_models_of_one_domain(sample: Callable[..., Any]) -> None:
    """The first model's rows are those that it gives alone; the second draws other numbers."""
    alone = rows_of(sample().out / "rollouts.jsonl")
    ran = sample(routes={"short": ["one", "two"], "words": ["two"]})
    rows = rows_of(ran.out / "rollouts.jsonl")
    assert rows[:210] == alone[:210] and rows[420:] == alone[210:]
    assert {(row["domain"], row["model"]) for row in rows[210:420]} == {("short", "two")}
    assert [line["step"] for line in ran.lines] == [1, 2, 3]
    twin = sample(routes={"short": ["two"], "words": ["two"]})
    assert rows[210:420] != rows_of(twin.out / "rollouts.jsonl")[:210]


def test_rounds_draw_other_prompts(sample: Callable[..., Any]) -> None:
    """89 prompts of `short`: from the eightieth on 70 are the last 9 and the first 61."""

    def ids(**settings: Any) -> list[str]:
        rows = rows_of(sample(k=1, **settings).out / "rollouts.jsonl")
        return [row["id"] for row in rows if row["domain"] == "short"]

    every = ids(num_prompts=1000)
    assert len(every) == len(set(every)) == 89
    assert ids(first_prompt=80) == every[80:] + every[:61]
    assert ids(first_prompt=89 + 5, num_prompts=1000) == every[5:] + every[:5]


def test_a_prefix_begins_every_response(
    sample: Callable[..., Any], models: Mapping[str, str]
) -> None:
    """What the model then says is what it says after these words of its own."""
    from posttrain.backends.local import LocalBackend

    rows = rows_of(sample(prefix="ab", temperature=0.0, k=1).out / "rollouts.jsonl")
    sampler = LocalBackend().sampler(Path(models["one"]))
    chat = sampler.chat
    ids = chat.prompt(rows[0]["prompt"]) + chat.tokenizer("ab")["input_ids"]
    drawn = sampler.sample([ids], group_size=1, max_new_tokens=6, temperature=0.0, seed=0)
    assert rows[0]["response"] == "ab" + chat.decode(drawn.responses()[0])
    assert rows[0]["num_tokens"] == drawn.num_tokens
    assert all(row["response"].startswith("ab") for row in rows)


def test_batches_of_prompts_do_not_share_random_numbers(sample: Callable[..., Any]) -> None:
    """70 prompts are sampled in two calls, whose first rows must not draw alike; greedy ones do."""
    rows = rows_of(sample(k=1).out / "rollouts.jsonl")
    assert len({row["response"] for row in rows[:70]}) > 35
    greedy = rows_of(sample(temperature=0.0).out / "rollouts.jsonl")
    by_prompt: dict[str, set[str]] = {}
    for row in greedy:
        by_prompt.setdefault(row["id"], set()).add(row["response"])
    assert all(len(responses) == 1 for responses in by_prompt.values())


ROWS = [
    {"id": "1", "domain": "d", "prompt": "p", "response": text, "reward": reward, "finished": done}
    for text, reward, done in [
        ("long and right", 1.0, True),
        ("half", 0.5, True),
        ("right", 1.0, True),
        ("right", 1.0, True),
        ("right but cu", 1.0, False),
        ("wrong", 0.0, True),
        ("also right", 1.0, True),
    ]
]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"how": "correct"}, ["long and right", "right", "also right"]),
        ({"how": {"kind": "correct", "max_per_prompt": 2}}, ["long and right", "right"]),
        ({"how": "best"}, ["long and right", "right", "also right"]),
        ({"how": {"kind": "best", "max_per_prompt": 1}}, ["long and right"]),
        ({"how": "shortest_correct"}, ["right"]),
    ],
)
def test_selection_by_hand(
    run_stage: Callable[..., Any], tmp_path: Path, settings: dict[str, Any], expected: list[str]
) -> None:
    source = tmp_path / "rollouts"
    source.mkdir()
    (source / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    ran = run_stage("select", settings, {"rollouts": str(source)})
    rows = rows_of(ran.out / "data.jsonl")
    assert [row["demo"] for row in rows] == expected
    assert {(row["id"], row["domain"], row["prompt"]) for row in rows} == {("1", "d", "p")}
    assert ran.metrics == {
        "rows": len(expected),
        "kept_share": pytest.approx(len(expected) / len(ROWS)),
    }


def test_problems_of_two_domains_with_one_id_stay_apart(
    run_stage: Callable[..., Any], tmp_path: Path
) -> None:
    source = tmp_path / "rollouts"
    source.mkdir()
    rows = [ROWS[2], ROWS[2] | {"domain": "e"}]
    (source / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ran = run_stage("select", {"how": "shortest_correct"}, {"rollouts": str(source)})
    assert [row["domain"] for row in rows_of(ran.out / "data.jsonl")] == ["d", "e"]


def test_nothing_to_select_is_an_error(run_stage: Callable[..., Any], tmp_path: Path) -> None:
    source = tmp_path / "rollouts"
    source.mkdir()
    (source / "rollouts.jsonl").write_text(json.dumps(ROWS[5]) + "\n" + json.dumps(ROWS[4]) + "\n")
    with pytest.raises(ConfigError, match="keeps none of 2 rollouts"):
        run_stage("select", {}, {"rollouts": str(source)})


def test_selected_rollouts_train_a_model(
    sample: Callable[..., Any], run_stage: Callable[..., Any], models: Mapping[str, str]
) -> None:
    """Rejection sampling as a whole: sample, select, sft."""
    rollouts = sample(k=6)
    selected = run_stage("select", {"how": "correct"}, {"rollouts": str(rollouts.out)})
    (selected.out / "record.json").write_text(
        '{"format": 1, "name": "selection", "kind": "select", "fingerprint": "2222"}'
    )
    settings = {"steps": 30, "batch_size": 16, "lr": 0.01, "warmup_steps": 0}
    ran = run_stage("sft", settings, {"start": models["one"], "data": str(selected.out)})
    assert ran.lines[-1]["loss"] < ran.lines[0]["loss"]


def test_the_shortest_is_one() -> None:
    assert choose(ShortestCorrect(), [ROWS[:2]]) == [ROWS[0]]


def test_a_verifier_in_a_process_of_its_own_gives_the_same_rollouts(
    run_stage: Callable[..., Any],
    models: Mapping[str, str],
    domains: Mapping[str, str],
    tmp_path: Path,
) -> None:
    """The rule of `short` as a user's function; the processes that run it are gone afterwards."""
    inputs = {"models.one": models["one"], "domains.short": domains["domains.short"]}
    settings = BASE | {"num_prompts": 20, "routes": {"short": ["one"]}}
    in_place = run_stage("sample", settings, inputs)

    ours, pids = tmp_path / "ours", tmp_path / "pids"
    shutil.copytree(domains["domains.short"], ours)
    record = json.loads((ours / "domain.json").read_text())
    record["config"]["verifier"] = {"name": "python:score", "options": {}}
    (ours / "domain.json").write_text(json.dumps(record))
    (ours / "verifier.py").write_text(
        "import os, re\n"
        "def score(response, problem):\n"
        f"    with open({str(pids)!r}, 'a') as file: print(os.getpid(), file=file)\n"
        "    return re.search('^[0-9A-Z]', response) is not None\n"
    )
    elsewhere = run_stage("sample", settings, inputs | {"domains.short": str(ours)})
    rows = (in_place.out / "rollouts.jsonl").read_text()
    assert (elsewhere.out / "rollouts.jsonl").read_text() == rows
    assert '"reward": 1.0' in rows
    workers = set(pids.read_text().split()) - {str(os.getpid())}
    assert len(workers) == 1
    assert not any(Path("/proc", pid).exists() for pid in workers)
