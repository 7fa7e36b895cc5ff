"""Verifiers in processes of their own: the scores of the ones in place, and what can go wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from posttrain.engine.errors import StageError
from posttrain.rewards.gym import SLOW, gym_datasets
from posttrain.rewards.pool import VerifierPool, is_slow
from posttrain.rewards.verifiers import load_verifier

PATIENCE = 30.0


def domain(folder: Path, verifier: str, code: str = "", **options: Any) -> Path:
    """A domain's artifact, as far as a verifier reads it."""
    folder.mkdir()
    config = {"verifier": {"name": verifier, "options": options}}
    (folder / "domain.json").write_text(json.dumps({"config": config}))
    (folder / "verifier.py").write_text(code)
    return folder


def problem(number: int, answer: str) -> dict[str, Any]:
    return {"id": f"p{number}", "prompt": "", "answer": answer, "demo": None, "meta": {}}


Made = Callable[..., VerifierPool]


@pytest.fixture
def python_pool(tmp_path: Path) -> Iterator[Made]:
    """A pool with one python verifier `score`, of domain "mine"."""
    pools = []

    def make(code: str, *, num_workers: int = 1, **options: float) -> VerifierPool:
        path = domain(tmp_path / f"mine{len(pools)}", "python:score", code)
        pools.append(VerifierPool({"mine": path}, num_workers=num_workers, **options))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def pids_of_workers() -> list[int]:
    """Processes whose parent is this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == os.getpid() and state != "Z":
            found.append(int(path.parent.name))
    return found


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.02)


PARTS = "def score(response, problem):\n    return len(response) / 7 if response else True\n"


def test_the_scores_are_those_of_the_verifiers_in_place(tmp_path: Path) -> None:
    """Bit for bit and in order: chunks of several domains, in place and elsewhere, by two
    workers."""
    paths = {
        "ours": domain(tmp_path / "ours", "python:score", PARTS),
        "maths": domain(tmp_path / "maths", "math"),
        "texts": domain(tmp_path / "texts", "exact"),
        "counts": domain(tmp_path / "counts", "reasoning_gym:countdown", format="plain"),
    }
    entry = {
        "question": "",
        "answer": "2 + 3",
        "metadata": {"numbers": [2, 3], "target": 5},
    }
    rows = {
        "ours": [("x" * (i % 8), problem(i, "")) for i in range(40)],
        "maths": [(f"it is $\\frac{{{i}}}{{2}}$", problem(i, "2")) for i in range(6)],
        "texts": [(str(i % 3), problem(i, "1")) for i in range(9)],
        "counts": [
            (text, problem(i, "2 + 3") | {"meta": {"entry": entry}})
            for i, text in enumerate(["2 + 3", "3+2", "2*3", "five", "__import__('os')"])
        ],
    }
    in_place = {name: load_verifier(path) for name, path in paths.items()}
    expected = {
        name: [in_place[name].score(text, row) for text, row in rows[name]] for name in paths
    }
    with VerifierPool(paths, num_workers=2) as pool:
        pending = {
            (name, start): pool.submit(name, *zip(*rows[name][start : start + 5], strict=True))
            for start in (35, 5, 0, 10, 15, 20, 25, 30)
            for name in rows
            if rows[name][start:]
        }
        for name in paths:
            found = [s for start in range(0, 40, 5) if (name, start) in pending
                     for s in pending[name, start].result(PATIENCE)]  # fmt: skip
            assert found == expected[name], name
    assert expected["maths"][4] == 1.0
    assert set(expected["counts"]) == {0.0, 1.0}
    assert len(set(expected["ours"])) == 7


def test_a_slow_verifier_does_not_hold_up_the_stage(python_pool: Made, tmp_path: Path) -> None:
    """It waits for a file that only the stage makes, after it has submitted."""
    signal = tmp_path / "go"
    pool = python_pool(
        "import pathlib, time\n"
        "def score(response, problem):\n"
        f"    while not pathlib.Path({str(signal)!r}).exists():\n"
        "        time.sleep(0.01)\n"
        "    return 1.0\n"
    )
    first = pool.submit("mine", ["a", "b"], [problem(0, ""), problem(1, "")])
    second = pool.submit("mine", ["c"], [problem(2, "")])
    assert not first.done()
    signal.touch()
    assert first.result(PATIENCE) == [1.0, 1.0]
    assert second.result(PATIENCE) == [1.0]


def test_workers_work_at_the_same_time(python_pool: Made, tmp_path: Path) -> None:
    """Each of two answers waits until the other one is being judged."""
    pool = python_pool(
        "import pathlib, time\n"
        "def score(response, problem):\n"
        f"    here = pathlib.Path({str(tmp_path)!r})\n"
        "    (here / response).touch()\n"
        "    while not all((here / name).exists() for name in ('one', 'two')):\n"
        "        time.sleep(0.01)\n"
        "    return 1.0\n",
        num_workers=2,
    )
    pending = [pool.submit("mine", [name], [problem(0, "")]) for name in ("one", "two")]
    assert [scores.result(PATIENCE) for scores in pending] == [[1.0], [1.0]]


def failure(pool: VerifierPool, *texts: str) -> str:
    rows = [problem(number, "") for number in range(len(texts))]
    with pytest.raises(StageError) as caught:
        pool.submit("mine", texts, rows).result(PATIENCE)
    assert caught.value.exit_code == 1
    return str(caught.value)


def test_what_the_users_code_raises_is_told_as_ever(python_pool: Made) -> None:
    pool = python_pool("def score(response, problem):\n    return 1 / int(response)\n")
    message = failure(pool, "1", "0", "2")
    assert "score() on problem p1 raised ZeroDivisionError: division by zero (line 2)" in message
    assert "Return 0.0 for a response that cannot be read" in message
    # The rows after it were not judged, and their replies are not taken for those of others.
    assert pool.submit("mine", ["4"], [problem(9, "")]).result(PATIENCE) == [0.25]


def test_code_that_leaves_is_an_error_not_an_end(python_pool: Made) -> None:
    pool = python_pool("import sys\ndef score(response, problem):\n    sys.exit(3)\n")
    assert "score() on problem p0 raised SystemExit: 3 (line 3); response was 'a'" in failure(
        pool, "a"
    )


@pytest.mark.parametrize(
    ("statement", "how"),
    [
        ("os.kill(os.getpid(), 11)", "crashed its process by signal 11 (SIGSEGV)"),
        ("os.kill(os.getpid(), 9)", "by signal 9 (SIGKILL) (if nobody sent it, memory ran out)"),
        ("os._exit(7)", "ended its process with status 7"),
    ],
)
def test_a_crash_names_the_response(python_pool: Made, statement: str, how: str) -> None:
    pool = python_pool(
        "import os\n"
        "def score(response, problem):\n"
        f"    if response == 'bad': {statement}\n"
        "    return 0.5\n"
    )
    message = failure(pool, "good", "bad", "good")
    assert "domain 'mine': its verifier python:score" in message
    assert how in message
    assert "over problem p1; response was 'bad'" in message
    assert pool.submit("mine", ["good"], [problem(9, "")]).result(PATIENCE) == [0.5]


def test_a_hang_names_the_response(python_pool: Made) -> None:
    pool = python_pool(
        "import time\n"
        "def score(response, problem):\n"
        "    while response == 'bad': time.sleep(0.01)\n"
        "    return 0.5\n",
        python_seconds=2.0,
    )
    message = failure(pool, "good", "bad")
    assert "python:score took longer than 2 s over problem p1; response was 'bad'" in message
    assert pool.submit("mine", ["good"], [problem(9, "")]).result(PATIENCE) == [0.5]


def test_an_expression_without_end_is_wrong(tmp_path: Path) -> None:
    path = domain(tmp_path / "mine", "reasoning_gym:countdown", format="plain")
    entry = {"question": "", "answer": "2 + 3", "metadata": {"numbers": [2, 3], "target": 5}}
    row = problem(0, "2 + 3") | {"meta": {"entry": entry}}
    with VerifierPool({"mine": path}, num_workers=1, runaway_seconds=3.0) as pool:
        texts = ["2 + 3", "9**9**9**9", "2 + 3"]
        assert pool.submit("mine", texts, [row] * 3).result(PATIENCE) == [1.0, 0.0, 1.0]


@pytest.fixture(scope="module")
def math_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VerifierPool]:
    path = domain(tmp_path_factory.mktemp("domains") / "maths", "math")
    with VerifierPool({"maths": path}, num_workers=1, runaway_seconds=2.0) as pool:
        yield pool


def test_math_is_asked_from_any_thread(math_pool: VerifierPool) -> None:
    scores: list[float] = []
    rows = [problem(0, "4")] * 2

    def ask() -> None:
        scores.extend(math_pool.submit("maths", ["it is 3", "it is 4"], rows).result())

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert scores == [0.0, 1.0]


def test_math_gives_up_on_a_runaway_expression_and_goes_on(math_pool: VerifierPool) -> None:
    texts = ["it is 42", "$9^{9^{9^9}}$", "it is 42"]
    rows = [problem(0, "42")] * 3
    assert math_pool.submit("maths", texts, rows).result(PATIENCE) == [1.0, 0.0, 1.0]


def test_math_gives_up_by_itself_where_it_can(tmp_path: Path) -> None:
    """After five seconds, by the alarm of the worker's main thread, and in the same process."""
    path = domain(tmp_path / "maths", "math")
    with VerifierPool({"maths": path}, num_workers=1) as pool:
        before = pids_of_workers()
        texts = ["it is 42", "$9^{9^{9^9}}$", "it is 42"]
        rows = [problem(0, "42")] * 3
        assert pool.submit("maths", texts, rows).result(PATIENCE) == [1.0, 0.0, 1.0]
        assert pids_of_workers() == before


def test_math_survives_the_death_of_its_process(tmp_path: Path) -> None:
    """It asks once more: the system may have killed an innocent process. Then the response, over
    which two have died, is wrong, and those after it are judged by a third one."""
    row = problem(0, "6")
    with VerifierPool({"maths": domain(tmp_path / "maths", "math")}, num_workers=1) as pool:
        worker = pool._workers[0]

        def busy() -> bool:
            process = worker._process
            state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
            return worker._ready and process.poll() is None and state == "R"

        def kill() -> int:
            process = worker._process
            os.kill(process.pid, 9)
            process.wait()
            return process.pid

        assert pool.submit("maths", ["it is 6"], [row]).result(PATIENCE) == [1.0]
        killed = [kill()]
        pending = pool.submit("maths", ["it is 6", "$9^{9^{9^9}}$", "it is 6"], [row] * 3)
        for _ in range(2):
            wait_for(lambda: worker._process.pid not in killed and busy(), "the computation")
            time.sleep(0.5)
            killed.append(kill())
        assert pending.result(PATIENCE) == [1.0, 0.0, 1.0]
        assert worker._process.pid not in killed


def test_a_problem_that_cannot_be_judged_is_named(math_pool: VerifierPool, tmp_path: Path) -> None:
    math_pool.check("maths", [problem(0, "1/2")])
    with pytest.raises(StageError, match=r"p1.*cannot read the reference answer '\?\?'"):
        math_pool.check("maths", [problem(0, "1/2"), problem(1, "??")])
    with pytest.raises(StageError, match=r"2 answers cannot be judged by:\n  .*p1.*\n  .*p2"):
        math_pool.check("maths", [problem(0, "1/2"), problem(1, "??"), problem(2, "-")])
    with VerifierPool({"texts": domain(tmp_path / "texts", "exact")}, num_workers=1) as pool:
        pool.check("texts", [problem(0, "a")])
        with pytest.raises(StageError, match="p1: the answer is empty"):
            pool.check("texts", [problem(0, "a"), problem(1, " ")])


def test_of_many_that_cannot_be_judged_ten_are_named(tmp_path: Path) -> None:
    with VerifierPool({"texts": domain(tmp_path / "texts", "exact")}, num_workers=1) as pool:
        with pytest.raises(StageError, match=r"25 answers .*; the first 10:") as error:
            pool.check("texts", [problem(number, "") for number in range(25)])
        assert len(str(error.value).splitlines()) == 11


def test_an_answer_that_all_nonsense_satisfies_is_named(tmp_path: Path) -> None:
    path = domain(tmp_path / "texts", "regex", from_answer=True)
    with VerifierPool({"texts": path}, num_workers=1) as pool:
        pool.check("texts", [problem(0, r"\d"), problem(1, "[a-z]")], ["?!", "abc"])
        with pytest.raises(StageError, match=r"^problem p1: with the answer '\.' .*such as '\?!'"):
            pool.check("texts", [problem(0, "a"), problem(1, ".")], ["?!", "abc"])


def test_what_a_verifier_prints_or_reads_does_not_get_into_the_replies(python_pool: Made) -> None:
    pool = python_pool(
        "import os, sys\n"
        "def score(response, problem):\n"
        "    print('{\"score\": 0}', flush=True)\n"
        "    os.write(1, b'noise')\n"
        "    return 1.0 if sys.stdin.read() == '' else 0.0\n"
    )
    assert pool.submit("mine", ["a", "b"], [problem(0, ""), problem(1, "")]).result(PATIENCE) == [
        1.0,
        1.0,
    ]


def test_closing_ends_the_workers_in_the_middle_of_an_answer(
    python_pool: Made, tmp_path: Path
) -> None:
    before = set(pids_of_workers())
    begun = tmp_path / "begun"
    pool = python_pool(
        "import pathlib, time\n"
        "def score(response, problem):\n"
        f"    pathlib.Path({str(begun)!r}).touch()\n"
        "    time.sleep(600)\n",
        num_workers=2,
    )
    pending = [pool.submit("mine", ["a"], [problem(0, "")]) for _ in range(5)]
    wait_for(begun.exists, "the first answer")
    assert len(set(pids_of_workers()) - before) == 2
    pool.close()
    assert set(pids_of_workers()) <= before
    assert all(scores.done() for scores in pending)


def test_a_worker_ends_when_its_stage_is_gone(tmp_path: Path) -> None:
    """Killed with -9, in the middle of an answer, and without anybody who signals the group."""
    path = domain(
        tmp_path / "mine",
        "python:score",
        "import os, pathlib, time\n"
        "def score(response, problem):\n"
        f"    pathlib.Path({str(tmp_path / 'part')!r}).write_text(str(os.getpid()))\n"
        f"    os.rename({str(tmp_path / 'part')!r}, {str(tmp_path / 'pid')!r})\n"
        "    while True: pass\n",
    )
    program = (
        "import sys, pathlib\n"
        "from posttrain.rewards.pool import VerifierPool\n"
        "pool = VerifierPool({'mine': pathlib.Path(sys.argv[1])}, num_workers=1)\n"
        "pool.submit('mine', ['a'], [{'id': 'p'}]).result()\n"
    )
    stage = subprocess.Popen([sys.executable, "-c", program, str(path)])
    wait_for((tmp_path / "pid").exists, "the first answer")
    worker = Path("/proc", (tmp_path / "pid").read_text())
    assert worker.exists()
    stage.kill()
    stage.wait()
    wait_for(lambda: not worker.exists() or ") Z " in (worker / "stat").read_text(), "its end")


def test_quick_verifiers_start_no_process(tmp_path: Path) -> None:
    before = pids_of_workers()
    paths = {"texts": domain(tmp_path / "texts", "exact")}
    with VerifierPool(paths, num_workers=4) as pool:
        done = pool.submit("texts", ["a", "b"], [problem(0, "a")] * 2)
        assert done.done()
        assert done.result() == [1.0, 0.0]
        assert pids_of_workers() == before
        broken = pool.submit("texts", ["a"], [{"id": "p0"}])
        with pytest.raises(KeyError):
            broken.result()


def test_which_verifiers_are_slow() -> None:
    assert set(SLOW) < set(gym_datasets())
    names = ("math", "python:score", "reasoning_gym:countdown")
    assert all(map(is_slow, names))
    assert not any(map(is_slow, ("exact", "regex", "choice", "reasoning_gym:chain_sum")))


def test_workers_import_no_torch() -> None:
    code = "import sys, posttrain.rewards.pool; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
