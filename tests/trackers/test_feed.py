"""What a tracker is told: names, steps, tables; and that a resumed run tells nothing twice."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from posttrain.trackers.base import About, Cell, Stage
from posttrain.trackers.feed import Feed

STAGES = [
    Stage(name="student", kind="distill", version=2, fingerprint="ab" * 32),
    Stage(name="evaluation", kind="evaluate", version=2, fingerprint="cd" * 32),
]
VALUE = {"value": 0.5, "low": 0.4, "high": 0.6}


class Fake:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.numbers: list[tuple[str, int, Mapping[str, float]]] = []
        self.tables: dict[str, list[dict[str, Cell]]] = {}
        self.ended = False

    def begin(self, about: About) -> None:
        self.about = about

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        self.numbers.append((stage, step, values))

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], step: int
    ) -> None:
        self.tables[name] = [dict(zip(columns, row, strict=True)) for row in rows]

    def finish(self) -> None:
        self.ended = True


@pytest.fixture
def about(tmp_path: Path) -> About:
    return About(project="p", name="p-1", config={}, directory=str(tmp_path), stages=STAGES)


def line(step: int, **values: float) -> dict[str, Any]:
    return {"step": step, "total": 9, "tokens": 10 * step, "seconds": 0.1 * step, **values}


def sample(step: int, **numbers: float) -> str:
    texts = {"prompt": "1+1=", "response": "2"}
    return json.dumps({"step": step, "domain": "add", "texts": texts, "numbers": numbers}) + "\n"


def artifact(path: Path, lines: int, **files: str) -> Path:
    path.mkdir()
    log = "".join(json.dumps(line(n, kl=1 / n)) + "\n" for n in range(1, lines + 1))
    (path / "metrics.jsonl").write_text(log)
    (path / "record.json").write_text(json.dumps({"metrics": {"kl": 0.25, "note": "text"}}))
    for name, text in files.items():
        (path / name.replace("_", ".")).write_text(text)
    return path


def test_steps_and_samples_as_they_come(about: About, tmp_path: Path) -> None:
    fake = Fake()
    feed = Feed(fake, about, tmp_path / "note.json")
    work = tmp_path / "work"
    (work / "out").mkdir(parents=True)
    feed.take("started", "student", 0.0, {"log": str(work / "log.txt")})
    feed.take("progress", "student", 1.0, line(1, kl=0.5, **{"kl/add": 0.5}))
    assert fake.numbers == [
        ("student", 1, {"tokens": 10, "seconds": 0.1, "kl": 0.5, "kl/add": 0.5})
    ]
    assert "student/samples" not in fake.tables
    # Half a line stands at the end while it is written.
    (work / "out/samples.jsonl").write_text(sample(2, reward=1.0) + sample(2, kl=0.1) + '{"st')
    feed.take("progress", "student", 2.0, line(2, kl=0.4))
    assert fake.tables["student/samples"] == [
        {"step": 2, "domain": "add", "prompt": "1+1=", "response": "2", "reward": 1.0, "kl": None},
        {"step": 2, "domain": "add", "prompt": "1+1=", "response": "2", "reward": None, "kl": 0.1},
    ]
    for payload in ({"waiting": "another run"}, {"unreadable": "x"}, line(2, kl=9.0)):
        feed.take("progress", "student", 2.0, payload)
    assert len(fake.numbers) == 2


def test_what_ended_is_told_whole_and_once(about: About, tmp_path: Path) -> None:
    path = artifact(tmp_path / "student", 4, samples_jsonl=sample(4, kl=0.2))
    note = tmp_path / "note.json"
    first = Fake()
    feed = Feed(first, about, note)
    feed.take("started", "student", 0.0, {"log": str(tmp_path / "gone/log.txt")})
    feed.take("progress", "student", 1.0, line(1, kl=1.0))
    feed.take("failed", "student", 1.0, {"error": "stopped"})
    feed.close()
    assert first.ended and first.tables["artifacts"][0]["status"] == "failed"

    second = Fake()
    feed = Feed(second, about, note)
    feed.take("cached", "student", 0.0, {"path": str(path), "reason": "same"})
    feed.close()
    assert [step for _, step, _ in second.numbers] == [2, 3, 4, 4]
    assert second.numbers[-1] == ("student", 4, {"final/kl": 0.25})
    assert second.tables["student/samples"][0]["step"] == 4
    assert second.tables["artifacts"][0]["status"] == "cached"

    third = Fake()
    feed = Feed(third, about, note)
    feed.take("cached", "student", 0.0, {"path": str(path), "reason": "same"})
    feed.close()
    assert not third.numbers and list(third.tables) == ["artifacts"]


def test_a_damaged_note_tells_all_again(about: About, tmp_path: Path) -> None:
    (tmp_path / "note.json").write_text("[not JSON")
    fake = Fake()
    feed = Feed(fake, about, tmp_path / "note.json")
    feed.take("progress", "student", 1.0, line(1, kl=1.0))
    assert len(fake.numbers) == 1


def test_an_evaluation_is_tables(about: About, tmp_path: Path) -> None:
    cells = {"init": VALUE, "student": VALUE, "teacher": None, "recovery": VALUE}
    one = {"domains": {"add": {**cells, "greedy": cells | {"recovery": None}}}}
    several = {"students": {"mopd": one, "merged": one}}
    for content, students in ((one, ["student"]), (several, ["mopd", "merged"])):
        path = artifact(tmp_path / students[0], 0, evaluation_json=json.dumps(content))
        fake = Fake()
        feed = Feed(fake, about, tmp_path / f"{students[0]}.note")
        feed.take("finished", "evaluation", 1.0, {"path": str(path), "metrics": {}})
        rows = fake.tables["evaluation/evaluation"]
        assert len(rows) == 4 * len(students)
        assert rows[0] == {
            **{"student": students[0], "domain": "add", "model": "init", "decoding": "sampled"},
            **{"accuracy": 0.5, "low": 0.4, "high": 0.6},
        }
        recovery = fake.tables["evaluation/recovery"]
        assert [row["student"] for row in recovery] == students
        assert recovery[0]["recovery"] == 0.5 and recovery[0]["decoding"] == "sampled"
