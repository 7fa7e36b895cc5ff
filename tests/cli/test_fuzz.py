"""Every file that the command line reads, damaged in hundreds of ways: no traceback, an exit code
that is not 0 or the right result, nothing that steers the terminal, and the store as it was.

    pytest tests/cli/test_fuzz.py -s                                the counts
    FUZZ_DAMAGES=1000 FUZZ_SEED=1 pytest tests/cli/test_fuzz.py -s    thousands of trials
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import tomllib
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from posttrain.cli import main
from posttrain.engine.record import record_bytes, seal
from posttrain.engine.text import STEERING
from posttrain.stages import worker

from .damage import ANY, RAW, damages_of
from .test_step_checkpoints import RECIPE

STORE = Path("posttrain-store")
MINI = ("mini.py", "--suite", "pairs.toml")
PYTHON_SUITE = """
from posttrain.rewards.spec import VerifierSpec
from posttrain.suites.domain import Domain, Suite, Table


def suite():
    exact = VerifierSpec(name="exact")
    tables = {name: Table(train=f"{name}.jsonl", demo="demo") for name in ("sums", "copies")}
    return Suite(
        name="pairs",
        domains={n: Domain(name=n, source=t, verifier=exact) for n, t in tables.items()},
    )
"""
SEVERAL = """
from mini import SHORT, recipe as mini


def recipe(r):
    mini(r)
    teachers = {d: r.stage(f"{d}_teacher") for d in r.domains}
    return r.evaluate({"one": r.stage("student"), "two": r.stage("sft")}, teachers=teachers,
                      along=[r.stage("base")], init=r.stage("base"), num_problems=4, bootstrap=100,
                      transcripts=1, name="several", **SHORT)
"""
SHORT = ("--max-new-tokens", "2", "--temperature", "0")
DAMAGES, SEED = (int(os.environ.get(f"FUZZ_{n}", d)) for n, d in (("DAMAGES", 50), ("SEED", 12)))
"""How many damages for each group of files, and which."""
COUNTS: Counter[str] = Counter()
"""What became of all trials of this process, printed at its end."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str


@dataclass(frozen=True, kw_only=True)
class Target:
    """A file to damage, and the commands that read it."""

    path: Path
    commands: Sequence[Sequence[str]]
    whole: Callable[[bytes], bool] | None = None
    """Whether what stands in it could be meant: then other results are right as well."""
    told_by_verify: bool = False
    """Whether another result is right where `verify` says what is wrong."""
    forged: bool = False
    """Whether record and hashes are made anew for what it holds."""
    makes: Path | None = None
    """A directory that the commands may make."""
    damages: dict[str, Any] = field(default_factory=dict)
    """Ways to damage it; by default those that its name has."""


def command(*words: str) -> Outcome:
    """Run the command line in this process; an exception that it lets through is no outcome."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(words))
    return Outcome(code=code, out=out.getvalue(), err=err.getvalue())


def state(folder: Path = STORE) -> dict[str, str]:
    """Every file of the store with the digest of its bytes, but for what can be had again."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and "cache" not in path.parts
        and path.name not in ("names.json", "hashes.json", "store.lock")
        and path.suffix != ".lock"
    }


@pytest.fixture(scope="module")
def ground(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with a finished run, an unfinished stage, an export and suites of all forms, in
    which damaged files are put back."""
    folder = tmp_path_factory.mktemp("ground") / "place"
    shutil.copytree(finished, folder)
    stages = Path(__file__).with_name("stopping_stages.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("POSTTRAIN_STORE", raising=False)
        patch.setenv("COLUMNS", "110")
        # Else `ls` says another thing every second.
        patch.setattr("posttrain.commands.inspect.age", lambda created: "1 d")
        Path("short.py").write_text(RECIPE)
        with patch.context() as other:
            other.setattr(worker, "EXECUTE", f"{stages}:run_job")
            assert command("run", "short.py", *MINI[1:], "--no-report").code == 1
        assert command("export", "student", "exported").code == 0
        Path("several.py").write_text(SEVERAL)
        assert command("run", "several.py", *MINI[1:], "--no-report").code == 0
        Path("suite.py").write_text(PYTHON_SUITE)
        for name in ("sums", "copies"):
            rows = [json.loads(line) for line in Path(f"{name}.jsonl").read_text().splitlines()]
            Path(f"{name}.json").write_text(json.dumps(rows))
            lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
            Path(f"{name}.csv").write_text("\n".join(lines) + "\n")
        for end in ("json", "csv"):
            text = Path("pairs.toml").read_text().replace(".jsonl", f".{end}")
            Path(f"of_{end}.toml").write_text(text)
        yield folder
    print(f"\n{sum(COUNTS.values())} trials: {dict(sorted(COUNTS.items()))}")


def the(kind: str, name: str) -> Path:
    (found,) = STORE.glob(f"artifacts/{kind}/{name}-*")
    return found


def is_json(content: bytes) -> bool:
    """Whether Python reads it; some published configs hold Infinity."""
    try:
        json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    return True


def is_jsonl(content: bytes) -> bool:
    lines = content.removeprefix(b"\xef\xbb\xbf").splitlines()
    return all(is_json(line) for line in lines if line.strip())


def is_toml(content: bytes) -> bool:
    try:
        tomllib.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    return True


def is_text(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


LOOK = (
    *(("ls", "--json"), ("ls",), ("show", "student"), ("show", "evaluation", "--json")),
    *(
        ("lineage", "evaluation"),
        ("lineage", "evaluation", "--json"),
        ("gc", "--dry-run", "--json"),
    ),
    *(("plan", *MINI, "--json"), ("plan", *MINI), ("diff", "student", "sft", "--json")),
    *(("compare", "student", "sums_teacher", "--json"), ("compare", "student", "sums_teacher")),
    ("report", "evaluation", "--report", "new.html"),
)
"""Commands that read the whole store and change nothing in it."""


def records() -> list[Target]:
    paths = [the("evaluate", "evaluation"), the("distill", "student"), the("domain", "sums")]
    paths += [the("sft", "sft"), the("rl", "sums_teacher")]
    export = ("export", "student", "out")
    return [
        Target(
            path=path / "record.json",
            commands=(*LOOK, export),
            told_by_verify=True,
            makes=Path("out"),
        )
        for path in paths
    ]


def results() -> list[Target]:
    evaluation, student = the("evaluate", "evaluation"), the("distill", "student")
    commands = (
        *(("show", "evaluation"), ("report", "evaluation", "--report", "new.html")),
        *(("run", *MINI, "--report", "new.html"), ("run", *MINI, "--no-report", "--json")),
        *(("compare", "student", "sums_teacher"), ("export", "student", "out")),
        *(("ls",), ("show", "student")),
    )
    paths = [evaluation / "evaluation.json", evaluation / "transcripts.json"]
    paths += [evaluation / "metrics.jsonl", student / "metrics.jsonl"]
    several = the("evaluate", "several")
    of_several = (
        *(("show", "several"), ("report", "several", "--report", "new.html")),
        *(("compare", "several", "evaluation"), ("export", "student", "out")),
        ("run", "several.py", *MINI[1:], "--no-report", "--json"),
    )
    read_by = dict.fromkeys(paths, commands)
    read_by |= dict.fromkeys((several / p.name for p in paths[:2]), of_several)
    return [
        Target(
            path=path,
            commands=those,
            told_by_verify=not forged,
            forged=forged,
            makes=Path("out"),
        )
        for path, those in read_by.items()
        for forged in (False, True)
    ]


def remembered() -> list[Target]:
    commands = (("ls",), ("show", "student", "--json"), ("plan", *MINI, "--json"))
    paths = [STORE / "store.json", STORE / "names.json", STORE / "hashes.json"]
    paths += sorted(STORE.glob("cache/*.json"))
    for path in paths:
        # What there was nothing to remember in.
        if not path.exists():
            path.write_text('{"format": 1, "names": {"f": ["a", "b"]}, "files": {}}')
    return [Target(path=path, commands=commands, whole=is_json) for path in paths]


def work() -> list[Target]:
    (folder,) = (path.parent for path in STORE.glob("work/*/step.json"))
    commands = (
        *(("ls",), ("ls", "--json"), ("show", "tuned@step"), ("show", "tuned@step", "--json")),
        *(("gc", "--dry-run", "--unfinished"), ("plan", "short.py", *MINI[1:])),
    )
    waits = {"waiting": "fill in answers.csv", "file": [str(folder / "a.csv"), None, None]}
    (folder / "result.json").write_text(json.dumps(waits))
    names = [path.name for path in folder.iterdir() if path.suffix in (".json", ".jsonl")]
    assert {"stage.json", "step.json"} <= set(names), names
    return [
        Target(path=folder / name, commands=commands, whole=lambda content: True) for name in names
    ]


def exported() -> list[Target]:
    folder, chat = Path("exported"), ("chat", "exported", "--prompt", "1+1", *SHORT)
    plan = ("plan", *MINI, "--set", "base=exported", "--json")
    adopt = ("adopt", "exported", "--name", "mine", "--store", "other")
    names = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    found = [
        Target(
            path=folder / name,
            commands=(plan, chat, adopt),
            whole=is_json,
            makes=Path("other"),
        )
        for name in names
    ]
    found.append(
        Target(
            path=folder / "chat_template.jinja",
            commands=(plan, chat),
            whole=is_text,
            damages=ANY,
        )
    )
    more = [("ls",), ("show", "mine"), ("lineage", "mine"), ("verify",)]
    more.append(("report", "mine", "--report", "new.html"))
    stored = [adopt, *((*words, "--store", "other") for words in more)]
    history = Target(
        path=folder / "history.json", commands=stored, whole=is_json, makes=Path("other")
    )
    return [*found, history]


def inputs() -> list[Target]:
    def plan(suite: str) -> tuple[tuple[str, ...], ...]:
        return (("plan", "mini.py", "--suite", suite, "--json"),)

    return [
        Target(path=Path("pairs.toml"), commands=plan("pairs.toml"), whole=is_toml),
        Target(path=Path("sums.jsonl"), commands=plan("pairs.toml"), whole=is_jsonl),
        Target(path=Path("sums.json"), commands=plan("of_json.toml"), whole=is_json),
        Target(path=Path("sums.csv"), commands=plan("of_csv.toml"), whole=is_text, damages=ANY),
        Target(path=Path("suite.py"), commands=plan("suite.py"), whole=is_text, damages=ANY),
        Target(path=Path("mini.py"), commands=plan("pairs.toml"), whole=is_text, damages=ANY),
    ]


GROUPS = {
    "records": records,
    "results": results,
    "remembered": remembered,
    "work": work,
    "exported": exported,
    "inputs": inputs,
}


def forge(path: Path) -> None:
    """Make the record of an artifact anew for what a file of it holds now."""
    record = json.loads((path.parent / "record.json").read_bytes())
    content = path.read_bytes()
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    fields = {key: value for key, value in record.items() if key not in ("format", "digest")}
    fields["files"] = record["files"] | {path.name: entry}
    (path.parent / "record.json").write_bytes(record_bytes(seal(fields)))


def remove(path: Path | None) -> None:
    if path is not None:
        shutil.rmtree(path, ignore_errors=True)


def result_of(words: Sequence[str]) -> tuple[Outcome, bytes]:
    """What a command says, and the page that it writes."""
    page = Path("new.html")
    page.unlink(missing_ok=True)
    outcome = command(*words)
    return outcome, page.read_bytes() if page.exists() else b""


class Trials:
    """Damages one file after the other, and puts each back."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.content = target.path.read_bytes()
        self.record = target.path.parent / "record.json"
        self.of_record = self.record.read_bytes() if target.forged else b""
        self.right = {}
        remove(target.makes)
        for words in target.commands:
            self.right[tuple(words)] = result_of(words)
            if words[0] == "export":
                remove(target.makes)
        remove(target.makes)

    def faults(self, way: str, damaged: bytes, words: Sequence[Sequence[str]]) -> Iterator[str]:
        """What is wrong with how these commands meet the damaged file."""
        target = self.target
        target.path.write_bytes(damaged)
        try:
            if target.forged:
                forge(target.path)
            before = state()
            stop = False
            for one in words:
                if stop:
                    break
                where = f"{target.path} ({way}{', forged' * target.forged}), {' '.join(one)}"
                try:
                    found, page = result_of(one)
                except BaseException:
                    COUNTS["traceback"] += 1
                    lines = traceback.format_exc().splitlines()
                    yield f"{where}: {' | '.join(lines[-5:])[-700:]}"
                    continue
                COUNTS[f"exit {found.code}"] += 1
                if found.code and one[0] == "adopt":
                    if target.makes and list(target.makes.glob("artifacts/*/*")):
                        yield f"{where}: exit {found.code}, and something was adopted"
                    stop = True
                if "Traceback" in found.out + found.err or found.code not in (0, 1, 2):
                    yield f"{where}: exit {found.code}: {found.err[-300:]}"
                if STEERING.search(found.out + found.err):
                    yield f"{where}: steers the terminal: {found.out + found.err!r}"
                if found.code and not found.err and one[0] != "verify":
                    yield f"{where}: exit {found.code} without a word"
                if not found.code and not self.is_right(one, found, page, damaged):
                    yield f"{where}: exit 0 and another result: {found.out[-300:]}"
                if found.code and one[0] == "export" and target.makes and target.makes.exists():
                    yield f"{where}: exit {found.code}, and something was exported"
                if one[0] == "export":
                    remove(target.makes)
            if state() != before:
                yield f"{target.path} ({way}): the store was changed"
        finally:
            target.path.write_bytes(self.content)
            if target.forged:
                self.record.write_bytes(self.of_record)
            remove(target.makes)

    def is_right(self, words: Sequence[str], found: Outcome, page: bytes, damaged: bytes) -> bool:
        target = self.target
        if target.forged or (target.whole is not None and target.whole(damaged)):
            return True
        right, right_page = self.right[tuple(words)]
        if (found.out, page) == (right.out, right_page) or right.code:
            return True
        return target.told_by_verify and command("verify").code == 1


def damage_all(targets: Sequence[Target], count: int, seed: int, commands: int) -> list[str]:
    """The faults of `count` damages of these files, each met by so many commands."""
    draw = random.Random(seed)
    trials = [Trials(target) for target in targets]
    todo = [
        (trial, way, damage)
        for trial in trials
        for way, damage in (trial.target.damages or damages_of(trial.target.path.name)).items()
    ]
    faults: list[str] = []
    for trial, way, damage in (draw.sample(todo, len(todo)) * (count // len(todo) + 1))[:count]:
        damaged = damage(trial.content, draw)
        words = trial.target.commands
        # Those that adopt come before those that look at what was adopted.
        if not any(one[0] == "adopt" for one in words):
            words = draw.sample(list(words), min(commands, len(words)))
        faults += trial.faults(way, damaged, words)
        COUNTS["damages"] += 1
    return faults


@pytest.mark.parametrize("group", GROUPS)
def test_damaged_files(ground: Path, group: str) -> None:
    faults = damage_all(GROUPS[group](), count=DAMAGES, seed=SEED, commands=2)
    assert not faults, f"{len(faults)} faults:\n" + "\n".join(faults[:40])


@pytest.mark.parametrize(
    ("option", "keys"),
    [
        ("--set", ("student.steps", "student.lr", "base.*", "lr", "student.estimator")),
        ("--axis", ("student.lr", "size")),
    ],
)
def test_damaged_settings(ground: Path, option: str, keys: Sequence[str]) -> None:
    before = state()
    faults = []
    for key in keys:
        for way, raw in RAW.items():
            words = ("plan", *MINI) if option == "--set" else ("sweep", *MINI, "--no-report")
            given = (*words, option, f"{key}={raw}")
            try:
                # A sweep that is refused computes nothing; one that is not would.
                found = command(*given) if option == "--set" else command(*given, "--seeds", "x")
            except BaseException:
                faults.append(f"{key} ({way}): {traceback.format_exc()[-600:]}")
                continue
            COUNTS[f"exit {found.code}"] += 1
            if found.code not in (0, 2) or (found.code and not found.err):
                faults.append(f"{key} ({way}): exit {found.code}: {found.err[-300:]}")
    assert not faults, "\n".join(faults[:30])
    assert state() == before
