"""score, pairs and best with a judge: what it is shown, and what becomes of what it says."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from posttrain import judges
from posttrain.engine.errors import ConfigError, StageError, Waiting
from posttrain.rewards.oracle import Oracle
from posttrain.rewards.pool import VerifierPool
from posttrain.stages import judging
from posttrain.stages.config import build_config

OWN = """
def mark(response, problem, num_tokens, step):
    return num_tokens + 100 * (step is None) - problem["answer"].count("x")
"""
TEXTS = ("abc", "A bc", "7", "x" * 9)
SHORT = judges.length(budget=10) * -1.0


def spec(judge: judges.Judge) -> dict[str, Any]:
    return judge.to_json()


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def rollouts(domains: Mapping[str, str], tmp_path: Path) -> list[dict[str, Any]]:
    """Four responses each to six problems of `short`; `A bc` and `7` are right."""
    rows = []
    for problem in rows_of(Path(domains["domains.short"]) / "train.jsonl")[:6]:
        about = {key: problem[key] for key in ("id", "domain", "prompt", "answer")}
        for text in TEXTS:
            row = {"response": text, "reward": float(text[0] in "A7"), "finished": True}
            rows.append(about | row | {"num_tokens": len(text) + 1, "model": "m"})
    return rows


@pytest.fixture
def ask(
    run_stage: Callable[..., Any],
    domains: Mapping[str, str],
    rollouts: list[dict[str, Any]],
    tmp_path: Path,
) -> Callable[..., Any]:
    def ask(kind: str, judge: judges.Judge, work: Path | None = None, **settings: Any) -> Any:
        folder = tmp_path / "rollouts"
        folder.mkdir(exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rollouts)
        (folder / "rollouts.jsonl").write_text(text)
        inputs = {"rollouts": str(folder), "domains.short": domains["domains.short"]}
        return run_stage(kind, {"judge": spec(judge)} | settings, inputs, work)

    return ask


def test_rows_gain_a_score(ask: Callable[..., Any], rollouts: list[dict[str, Any]]) -> None:
    """The verifier's reward minus a tenth per token above 10, none here but one of 10 + 0."""
    ran = ask("score", judges.verifier() - 0.5 * judges.length(budget=5))
    rows = rows_of(ran.out / "rollouts.jsonl")
    assert [{k: v for k, v in row.items() if k != "score"} for row in rows] == rollouts
    for row in rows:
        over = max(0, row["num_tokens"] - 5) / 5
        assert row["score"] == pytest.approx(row["reward"] - 0.5 * over)
    assert ran.metrics["rows"] == 24
    assert ran.metrics["score"] == pytest.approx(sum(row["score"] for row in rows) / 24)


@pytest.mark.parametrize("judge", [judges.verifier() - judges.length(budget=3), judges.oracle()])
def test_many_rows_are_asked_about_in_parts(
    ask: Callable[..., Any],
    rollouts: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    judge: judges.Judge,
) -> None:
    """Six groups of four, rows of a group apart: with five rows per call two groups at a time, but
    all at once where a score is relative to all of them."""
    rollouts.sort(key=lambda row: row["response"])
    ranked = judges.normalised(judge, judges.length(budget=4))
    whole = rows_of(ask("score", ranked).out / FILE)
    monkeypatch.setattr(judging, "ROWS_PER_CALL", 5)
    parts = ask("score", ranked)
    assert [(line["step"], line["total"]) for line in parts.lines] == [(1, 3), (2, 3), (3, 3)]
    assert rows_of(parts.out / FILE) == whole
    assert len(ask("score", judges.whitened(judge)).lines) == 1


def test_the_seed_is_the_annotators(ask: Callable[..., Any]) -> None:
    found = [
        [row["score"] for row in rows_of(ask("score", judges.oracle(), seed=s).out / FILE)]
        for s in (0, 0, 1)
    ]
    assert found[0] == found[1] != found[2]


FILE = "rollouts.jsonl"


def test_a_reward_model_is_no_language_model(ask: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="itself"):
        ask("score", judges.itself())


def test_pairs_by_the_score_of_a_judge(ask: Callable[..., Any]) -> None:
    """The shortest response has 2 tokens and the longest 10: costs .2 and 1 where each token
    counts a tenth (budget 10, concave with q = 0 is linear)."""
    judge = -1.0 * judges.length(budget=10, shape="concave", k=1.0, q=0.0)
    rows = rows_of(ask("pairs", judge).out / "pairs.jsonl")
    assert {(row["chosen"], row["rejected"]) for row in rows} == {("7", "x" * 9)}
    assert all(row["margin"] > 0 and "strength" not in row for row in rows)


def test_the_oracle_compares_pairs(ask: Callable[..., Any], domains: Mapping[str, str]) -> None:
    """All six pairs of each of six problems, as the annotator itself prefers; strengths filter."""
    rows = rows_of(ask("pairs", judges.oracle(noise=0.5), how="all").out / PAIRS)
    assert len(rows) == 36
    path = Path(domains["domains.short"])
    problems = {problem["id"]: problem for problem in rows_of(path / "train.jsonl")}
    with VerifierPool({"short": path}, num_workers=1, by="oracle") as pool:
        annotator = Oracle(qualities=pool.scores, noise=0.5, seed=0)
        for row in rows:
            answer = annotator.prefer(problems[row["id"]], row["chosen"], row["rejected"])
            assert answer == (0, row["strength"])
    assert {row["strength"] for row in rows} <= {1, 2, 3, 4} and len(
        {row["strength"] for row in rows}
    ) > 1
    clear = ask("pairs", judges.oracle(noise=0.5), how={"kind": "all", "min_margin": 3})
    assert rows_of(clear.out / PAIRS) == [row for row in rows if row["strength"] >= 3]


PAIRS = "pairs.jsonl"


def test_the_oracle_is_asked_about_the_best_and_the_worst(ask: Callable[..., Any]) -> None:
    """Without noise it prefers the one that it scored higher, one pair of each problem."""
    judge = judges.oracle(noise=0.0)
    scored = rows_of(ask("score", judge).out / FILE)
    best = {}
    for row in scored:
        best.setdefault(row["id"], []).append((row["score"], row["response"]))
    rows = rows_of(ask("pairs", judge).out / PAIRS)
    assert len(rows) == 6 and all(row["strength"] == 4 for row in rows)
    for row in rows:
        assert row["chosen"] == max(best[row["id"]])[1]
        assert (min(best[row["id"]])[0], row["rejected"]) in best[row["id"]]
    assert (
        len(
            rows_of(
                ask("pairs", judge, how={"kind": "best_against_worst", "min_margin": 4}).out / PAIRS
            )
        )
        == 6
    )


def test_random_pairs_are_judged(ask: Callable[..., Any]) -> None:
    settings = {"how": {"kind": "random", "max_per_prompt": 2}}
    rows = rows_of(ask("pairs", judges.oracle(), **settings).out / PAIRS)
    assert len(rows) == 12
    others = rows_of(ask("pairs", judges.oracle(noise=0.0), seed=1, **settings).out / PAIRS)
    unordered = [
        {(row["id"], frozenset((row["chosen"], row["rejected"]))) for row in found}
        for found in (rows, others)
    ]
    assert unordered[0] != unordered[1]
    settled = ask("pairs", judges.oracle(), chosen_max_tokens=5, **settings)
    assert rows_of(settled.out / PAIRS) == [r for r in rows if len(r["chosen"]) + 1 <= 5]


def test_people_are_asked_and_the_stage_goes_on(ask: Callable[..., Any], tmp_path: Path) -> None:
    """It writes a file, waits, and reads what was filled in; a tie is no pair."""
    file = tmp_path / "ask.jsonl"
    settings = {"how": "random"}
    judge = judges.human(str(file))
    with pytest.raises(Waiting, match="6 of 6 comparisons"):
        ask("pairs", judge, **settings)
    asked = rows_of(file)
    for number, row in enumerate(asked):
        row["preferred"] = ("a", "b", "tie")[number % 3]
        row["strength"] = 4 if number == 0 else None
    file.write_text("".join(json.dumps(row) + "\n" for row in asked))
    rows = rows_of(ask("pairs", judge, **settings).out / PAIRS)
    assert [(row["id"], row["chosen"], row.get("strength")) for row in rows] == [
        (row["id"], row[row["preferred"]], row["strength"])
        for row in asked
        if row["preferred"] != "tie"
    ]
    strong = rows_of(ask("pairs", judge, how={"kind": "random", "min_margin": 4}).out / PAIRS)
    assert [row["id"] for row in strong] == [asked[0]["id"]]


@pytest.fixture
def best(
    run_stage: Callable[..., Any], models: Mapping[str, str], domains: Mapping[str, str]
) -> Callable[..., Any]:
    def run(judge: judges.Judge, *names: str, **inputs: str) -> Any:
        edges = {f"candidates.{name}": models[name] for name in names} | dict(domains)
        settings = {"num_problems": 8, "max_new_tokens": 6, "bootstrap": 100}
        return run_stage("best", settings | {"judge": spec(judge)}, edges | inputs)

    return run


def test_a_judge_decides_which_model_is_best(best: Callable[..., Any]) -> None:
    """By length alone the shortest answers win; by the verifier the score is the accuracy."""
    judge = -1.0 * judges.length(budget=6, shape="concave", k=1.0, q=0.0)
    ran = best(judge, "start", "one", "two")
    found = json.loads((ran.out / "best.json").read_text())["candidates"]
    lengths = {name: row["response_length"] for name, row in found.items()}
    assert ran.metrics["winner"] == min(lengths, key=lambda name: lengths[name])
    ran = best(judges.verifier(), "start", "one")
    for row in json.loads((ran.out / "best.json").read_text())["candidates"].values():
        assert row["value"] == pytest.approx(row["reward"])


def test_a_comparing_judge_compares_the_candidates(
    best: Callable[..., Any], models: Mapping[str, str]
) -> None:
    """Win shares of all answers to one problem: what one candidate wins the other one loses, which
    would not be so if each were judged among its own."""
    from posttrain.language.handles import Stage

    judge = judges.compare(Stage("judge", "sft"))
    ran = best(judge, "start", "one", **{"judges.judge": models["two"]})
    values = [ran.metrics[f"score/{name}"] for name in ("start", "one")]
    assert sum(values) == pytest.approx(1.0)
    assert values[0] != pytest.approx(0.5)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("score", {"judge": {"judge": "nobody"}}, "nobody"),
        ("score", {"judge": spec(judges.itself())}, r"judges.itself\(\) is for rl"),
        (
            "score",
            {"judge": spec({"schedule": "linear", "first": 1.0, "last": 0.0, "until": None}
                           * judges.verifier())},
            "a weight with a schedule",
        ),
        (
            "pairs",
            {"judge": spec(judges.oracle()), "how": {"kind": "all", "by": "reward"}},
            "a judge gives scores; leave by out",
        ),
        (
            "pairs",
            {"judge": spec(judges.oracle()), "how": "strong_against_weak"},
            "asks no judge; leave judge out",
        ),
    ],
)  # fmt: skip
def test_judges_that_cannot_be_asked(kind: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(kind, "mine", settings)


def test_score_logs_the_parts_of_a_reward_by_name(ask: Callable[..., Any]) -> None:
    """Two costs of one kind have names of their own; a reward that is one judge has no parts."""
    reward = judges.verifier() - judges.length(budget=3) - judges.length(budget=1)
    (line,) = ask("score", reward).lines
    parts = [line[f"judge/{name}"] for name in ("verifier", "length", "length.2")]
    assert line["score"] == pytest.approx(parts[0] - parts[1] - parts[2])
    assert parts[1] < parts[2]
    (line,) = ask("score", judges.verifier()).lines
    assert not [key for key in line if key.startswith("judge/")]


def test_a_judge_of_ones_own_scores_rollouts(ask: Callable[..., Any], tmp_path: Path) -> None:
    """It sees the problem and the number of tokens; rollouts of no training have no step."""
    (tmp_path / "own.py").write_text(OWN)
    own = judges.python(str(tmp_path / "own.py:mark"))
    rows = rows_of(ask("score", own).out / "rollouts.jsonl")
    assert [row["score"] for row in rows[:4]] == [len(text) + 101 for text in TEXTS]
    weighed = rows_of(ask("score", 0.5 * own - judges.finished()).out / "rollouts.jsonl")
    assert [row["score"] for row in weighed[:4]] == [(len(t) + 101) / 2 - 1 for t in TEXTS]


def test_a_judge_of_ones_own_may_not_read_what_it_does_not_declare(
    ask: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    (here / "table.txt").write_text("1")
    (here / "own.py").write_text("def mark(r, p):\n    return float(open('table.txt').read())\n")
    with pytest.raises(StageError, match=r"judges\.python: own\.py reads 'table\.txt'.*DATA_FILES"):
        ask("score", judges.python("own.py:mark"))
