"""Every real tracker, read back: the same names, tables as tables, and a run that goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from posttrain.trackers.base import About, Stage, Tracker

STAGE = Stage(name="student", kind="sft", version=2, fingerprint="ab" * 32)
COLUMNS = ("step", "prompt", "reward")
ROWS = [(2, "<b>1|1</b>\n=", 1.0), (2, "two", None)]


@pytest.fixture
def about(tmp_path: Path) -> About:
    config = {"recipe": "p", "seed": 0, "stages": {"student": {"kind": "sft", "settings": {}}}}
    return About(project="p", name="p-1", config=config, directory=str(tmp_path), stages=[STAGE])


def tell(tracker: Tracker, about: About, *steps: int) -> None:
    tracker.begin(about)
    for step in steps:
        tracker.metrics("student", step, {"loss": 1 / step, "kl/add": 0.5})
    tracker.table("student/samples", COLUMNS, ROWS, steps[-1])
    tracker.finish()


def test_tensorboard(about: About, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from posttrain.trackers.to_tensorboard import TensorBoard

    tell(TensorBoard(), about, 1, 2)
    tell(TensorBoard(), about, 3)
    found = EventAccumulator(str(tmp_path / "tensorboard/p-1"))
    found.Reload()
    values = [(e.step, e.tensor_proto.float_val[0]) for e in found.Tensors("student/loss")]
    assert values == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert {"student/kl/add", "student/samples", "config"} <= set(found.Tags()["tensors"])
    text = found.Tensors("student/samples")[-1].tensor_proto.string_val[0].decode()
    assert text.splitlines()[0] == "| step | prompt | reward |"
    # What would be a tag or end the cell is written out.
    assert text.splitlines()[2] == "| 2 | &lt;b>1\\|1&lt;/b> = | 1 |"


def test_tensorboard_needs_no_torch(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    code = (
        "import sys; from posttrain.trackers.base import About\n"
        "from posttrain.trackers.to_tensorboard import TensorBoard\n"
        f"t = TensorBoard(); t.begin(About(project='p', name='n', config={{}}, "
        f"directory={str(tmp_path)!r})); t.metrics('s', 1, {{'x': 1.0}}); t.finish()\n"
        "assert not {'torch', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


READ_TRACKIO = """
import json
from trackio import Api
from trackio.sqlite_storage import SQLiteStorage
(run,) = Api().runs("p")
print(json.dumps({"config": run.config, "logs": SQLiteStorage.get_logs("p", run.name)}))
"""


def in_process(code: str, **environment: str) -> str:
    """Trackers keep a state of their own in the process: each test has one."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def told_in_process(place: str, about: About, steps: str, **environment: str) -> None:
    folder = str(Path(__file__).parent)
    code = (
        f"import sys; sys.path.insert(0, {folder!r})\n"
        "from pkgutil import resolve_name\nfrom test_adapters import *\n"
        f"tell(resolve_name({place!r})(), {about!r}, {steps})"
    )
    in_process(code, **environment)


def test_trackio(about: About, tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    import json

    environment = {"TRACKIO_DIR": str(tmp_path / "trackio")}
    place = "posttrain.trackers.to_trackio:Trackio"
    told_in_process(place, about, "1, 2", **environment)
    told_in_process(place, about, "3", **environment)
    found = json.loads(in_process(READ_TRACKIO, **environment).splitlines()[-1])
    losses = [(row["step"], row["student/loss"]) for row in found["logs"] if "student/loss" in row]
    assert losses == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    (table, *_) = [row["student/samples"] for row in found["logs"] if "student/samples" in row]
    assert table["_value"][0] == dict(zip(COLUMNS, ROWS[0], strict=True))
    assert found["config"]["stages"]["student"]["kind"] == "sft"


def test_wandb_offline(about: About, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    environment = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    told_in_process("posttrain.trackers.to_wandb:Wandb", about, "1, 2", **environment)
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    records = _wandb_records(path)
    run = next(r.run for r in records if r.HasField("run"))
    assert (run.run_id, run.project, run.display_name) == ("p-1", "p", "p-1")
    rows: list[dict[str, str]] = [
        {item.key or "/".join(item.nested_key): item.value_json for item in r.history.item}
        for r in records
        if r.HasField("history")
    ]
    losses = [(r["student/step"], r["student/loss"]) for r in rows if "student/loss" in r]
    assert losses == [("1", "1"), ("2", "0.5")] or losses == [("1", "1.0"), ("2", "0.5")]
    # Every stage has an axis of its own.
    axes = {
        (r.metric.glob_name or r.metric.name): r.metric.step_metric
        for r in records
        if r.HasField("metric")
    }
    assert axes["student/*"] == "student/step" or axes["student/loss"] == "student/step"
    assert list(path.parent.glob("files/media/table/student/samples_*.table.json"))


def _wandb_records(path: Path) -> list[Any]:
    """The records of a .wandb file: LevelDB's log format behind a header of seven bytes. In blocks
    of 32 kB stand chunks of (checksum 4, length 2, type 1, data); a block's last bytes, fewer than
    a chunk's head, are empty. Types 1 and 4 end a record."""
    from wandb.proto import wandb_internal_pb2

    content, place = path.read_bytes(), 7
    found, parts = [], b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            found.append(record)
            parts = b""
    return found
