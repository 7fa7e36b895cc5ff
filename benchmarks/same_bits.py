"""Whether a change of the code left every number as it was: weights, metrics, rollouts and data.

    python benchmarks/same_bits.py --before 8499444                 # against this tree
    python benchmarks/same_bits.py --before 8499444 --only 'rl_*'   # some cases and what they need
    python benchmarks/same_bits.py --before 8499444 --snapshot DIR  # keep the older numbers there
    python benchmarks/same_bits.py --before ba26e27 --same-names    # a commit with today's settings

Each stage of `same_bits_cases.py` runs on the CPU with one thread, at the commit (in a temporary
worktree) and in this tree. Of the artifacts of both stores every tensor, every line of metrics and
every row of data has to be the same. Of a row or a metrics line that has other fields in one of the
two, those that both have are compared; the others are told at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CASES = Path(__file__).with_name("same_bits_cases.py")

UNCOMPARED = {"README.md", "record.json", "code.diff", "samples.jsonl"}
"""Files that name fingerprints, versions and times, hold the code, or have rows when there is
time."""
RESULTS = {"best.json", "evaluation.json", "tokenizer_config.json"}
"""Files with one object, whose fields are compared as those of a row are."""
TIMES = {"seconds", "tokens_per_second"}
"""Fields of a line of metrics that say how long something took."""

RENAMED = {"kept_share": "train_fraction"}
"""Field of a row or metric before -> its name after, where it was given another one."""

SUITE = """
name = "digits"
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

Snapshot = dict[str, dict[str, Any]]
"""Artifact name -> {"kind", "weights": tensor -> hash, "metrics": lines, "files": name -> rows of a
.jsonl file or the hash of another one}, or {"kind", "error"} for one that could not be made."""


def main() -> int:
    """Run both sides, print the table; 1 if anything differs."""
    arguments = _arguments()
    if arguments.worker:
        return work(arguments.worker, arguments.side, arguments.only)
    saved = None
    if arguments.snapshot is not None:
        saved = arguments.snapshot / f"same_bits-{arguments.before}-{_cases_digest()}.json"
    with tempfile.TemporaryDirectory(prefix="same-bits-") as folder:
        room = Path(folder)
        if saved is not None and saved.exists():
            before = json.loads(saved.read_text(encoding="utf-8"))
        else:
            with worktree(arguments.before, room / "tree") as tree:
                names = "after" if arguments.same_names else "before"
                before = make(tree, "before", room, arguments.only, names)
        if saved is not None and not saved.exists():
            if arguments.only:
                raise SystemExit("a snapshot has all cases: leave --only out, or --snapshot")
            saved.parent.mkdir(parents=True, exist_ok=True)
            saved.write_text(json.dumps(before), encoding="utf-8")
        after = make(ROOT, "after", room, arguments.only)
    if arguments.only:
        before = {name: before[name] for name in before if name in after}
    return show(before, after)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--before", metavar="COMMIT", help="the commit to compare with")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="cases, or globs")
    parser.add_argument(
        "--same-names", action="store_true", help="COMMIT has today's names of settings already"
    )
    parser.add_argument("--snapshot", type=Path, metavar="DIR", help="keep the numbers of COMMIT")
    # How the script calls itself with the code of one side.
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--side", default="before", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.worker and not arguments.before:
        parser.error("give --before COMMIT")
    return arguments


def _cases_digest() -> str:
    """Of the older expressions: with others a snapshot would be of other stages."""
    text = CASES.read_text(encoding="utf-8").partition("\nBEFORE: ")[2]
    return hashlib.sha256((text + SUITE).encode()).hexdigest()[:8]


# -- making ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def worktree(commit: str, path: Path) -> Iterator[Path]:
    """The files of a commit, for as long as they are needed."""
    git = ("git", "-C", str(ROOT), "worktree")
    subprocess.run([*git, "add", "--quiet", "--detach", str(path), commit], check=True)
    try:
        yield path
    finally:
        subprocess.run([*git, "remove", "--force", str(path)], check=True)


def make(
    tree: Path, side: str, room: Path, only: Sequence[str], names: str | None = None
) -> Snapshot:
    """Run the cases with the code of a tree, in the names of settings of the side `names`; what
    came out of it."""
    began = time.monotonic()
    folder = room / side
    folder.mkdir()
    write_suite(folder)
    environment = os.environ | {
        "PYTHONPATH": str(tree / "src"),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [
        sys.executable,
        str(Path(__file__)),
        "--worker",
        str(folder),
        "--side",
        names or side,
    ]
    subprocess.run([*command, *(["--only", *only] if only else [])], env=environment, check=True)
    failed = json.loads((folder / "failed.json").read_text(encoding="utf-8"))
    found: Snapshot = snapshot(folder / "store") | failed
    print(f"{side}: {len(found)} artifacts, {time.monotonic() - began:.0f} s", flush=True)
    return found


def write_suite(folder: Path) -> None:
    """Three domains of 120 problems, of whose answers a model that writes digits gets some right
    by chance; `judging` asks which of two digits is the greater one, as judges ask."""
    tables: dict[str, list[dict[str, str]]] = {"reasoning": [], "general": [], "judging": []}
    for i in range(100, 220):
        drawn = zlib.crc32(str(i).encode())
        a, b = str(drawn % 10), str((drawn + 1 + drawn // 10 % 9) % 10)
        for name, answer in {"reasoning": a + b, "general": a}.items():
            row = {"prompt": f"{name[0]} {i}", "answer": answer, "demo": answer, "thought": b}
            tables[name].append(row)
        verdict = "1" if a > b else "2"
        tables["judging"].append({"prompt": f"c r {i}|{a}|{b}", "answer": verdict, "demo": verdict})
    for name, rows in tables.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (folder / "digits.toml").write_text(SUITE, encoding="utf-8")


def work(folder: Path, side: str, only: Sequence[str]) -> int:
    """In a process with the code of one side: make the cases one after another in one store."""
    import posttrain.cli
    from same_bits_cases import cases

    source = os.environ["PYTHONPATH"]
    if not posttrain.cli.__file__.startswith(source):
        raise SystemExit(f"posttrain was imported from {posttrain.cli.__file__}, not from {source}")
    failed = {}
    options = ["--suite", str(folder / "digits.toml"), "--store", str(folder / "store")]
    options += ["--set", f"side={side}", "--jobs", "1", "--device", "cpu", "--no-report"]
    for name, kind in cases().items():
        if only and not any(fnmatchcase(name, pattern) for pattern in only):
            continue
        told = io.StringIO()
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
            code = posttrain.cli.main(["run", str(CASES), "--set", f"target={name}", *options])
        if code:
            error = " ".join(told.getvalue().split())
            failed[name] = {"kind": kind, "error": error}
            print(f"{side}: {name} failed: {error}", file=sys.stderr, flush=True)
    (folder / "failed.json").write_text(json.dumps(failed), encoding="utf-8")
    return 0


# -- reading ---------------------------------------------------------------------------------------


def snapshot(store: Path) -> Snapshot:
    """The numbers of all artifacts of a store, oldest first: a cause stands before its effects."""
    paths = store.glob("artifacts/*/*/record.json")
    records = [(json.loads(path.read_text(encoding="utf-8")), path.parent) for path in paths]
    found: Snapshot = {}
    for record, folder in sorted(records, key=lambda one: (one[0]["created"], one[0]["name"])):
        if record["name"] in found:
            raise SystemExit(f"{store}: there are two artifacts named {record['name']!r}")
        found[record["name"]] = {"kind": record["kind"]} | _numbers(folder)
    return found


def _numbers(folder: Path) -> dict[str, Any]:
    numbers: dict[str, Any] = {"weights": {}, "metrics": [], "files": {}}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in UNCOMPARED):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".safetensors":
            numbers["weights"] |= {f"{name}: {k}": v for k, v in tensors(path).items()}
        elif name == "metrics.jsonl":
            lines = _rows(path)
            numbers["metrics"] = [
                {k: v for k, v in line.items() if k not in TIMES} for line in lines
            ]
        elif path.suffix == ".jsonl":
            numbers["files"][name] = _rows(path)
        elif name in RESULTS:
            numbers["files"][name] = [json.loads(path.read_text(encoding="utf-8"))]
        else:
            numbers["files"][name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return numbers


def _rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, with 0, 1, ... in the order of their coming for the ids of problems,
    which are hashes."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    first: dict[Any, int] = {}
    for row in rows:
        if "id" in row:
            row["id"] = first.setdefault(row["id"], len(first))
    return rows


def tensors(path: Path) -> dict[str, str]:
    """Tensor -> sha256 of its type, shape and bytes, of a safetensors file."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    found = {}
    for name, tensor in header.items():
        if name != "__metadata__":
            start, end = (8 + size + offset for offset in tensor["data_offsets"])
            content = f"{tensor['dtype']}{tensor['shape']}".encode() + data[start:end]
            found[name] = hashlib.sha256(content).hexdigest()
    return found


# -- comparing -------------------------------------------------------------------------------------


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, str]:
    """For weights, metrics and files of an artifact the first difference, "" where there is none.

    The fields that only one of the two has stand under `only`.
    """
    failures = [
        f"{side} failed: {numbers['error']}"
        for side, numbers in {"before": before, "after": after}.items()
        if "error" in numbers
    ]
    if failures:
        return {"weights": "; ".join(failures), "metrics": "", "files": "", "only": ""}
    if before["kind"] != after["kind"]:
        kinds = f"kind {before['kind']} before, {after['kind']} after"
        return {"weights": kinds, "metrics": "", "files": "", "only": ""}
    only: dict[str, set[str]] = {"before": set(), "after": set()}
    files = _first_of_all(before["files"], after["files"], only)
    return {
        "weights": _first_of_all(before["weights"], after["weights"], only),
        "metrics": _first_row(before["metrics"], after["metrics"], only),
        "files": files,
        "only": "; ".join(f"only {k}: {', '.join(sorted(v))}" for k, v in only.items() if v),
    }


def _first_of_all(
    before: Mapping[str, Any], after: Mapping[str, Any], only: dict[str, set[str]]
) -> str:
    """The first difference of two sets of tensors or files."""
    for name in dict.fromkeys([*before, *after]):
        if name not in before or name not in after:
            return f"{name} is only there {'before' if name in before else 'after'}"
        if isinstance(before[name], list) and isinstance(after[name], list):
            row = _first_row(before[name], after[name], only)
            if row:
                return f"{name} {row}"
        elif before[name] != after[name]:
            return f"{name} differs"
    return ""


def _first_row(
    before: Sequence[Mapping[str, Any]],
    after: Sequence[Mapping[str, Any]],
    only: dict[str, set[str]],
) -> str:
    """The first difference of rows in the fields that both have."""
    for number, (old, new) in enumerate(zip(before, after, strict=False), 1):
        old = {RENAMED.get(name, name): value for name, value in old.items()}
        only["before"] |= old.keys() - new.keys()
        only["after"] |= new.keys() - old.keys()
        shared = [name for name in old if name in new]
        if not shared:
            return f"line {number}: no field in common"
        for name in shared:
            # As text: NaN is the same as NaN, and 1 is not the same as 1.0.
            was, now = json.dumps(old[name]), json.dumps(new[name])
            if was != now:
                return f"line {number}, {name}: {was[:60]} before, {now[:60]} after"
    if len(before) != len(after):
        return f"{len(before)} lines before, {len(after)} after"
    return ""


def show(before: Snapshot, after: Snapshot) -> int:
    """Print the table; 1 where something differs or could not be made."""
    names = list(dict.fromkeys([*before, *after]))
    width = max(map(len, names), default=0)
    missing = {"error": "there is no such artifact"}
    differing = 0
    only: dict[str, str] = {}
    print(f"\n{'case':<{width}}  {'kind':<12}  {'weights':<8} {'metrics':<8} files")
    for name in names:
        one, other = before.get(name, missing), after.get(name, missing)
        kind = one.get("kind") or other.get("kind", "")
        found = compare(one, other)
        only |= {name: found["only"]} if found["only"] else {}
        parts = [found[part] for part in ("weights", "metrics", "files")]
        there = [one.get(part) or other.get(part) for part in ("weights", "metrics", "files")]
        words = [
            "differs" if p else "same" if t else "-" for p, t in zip(parts, there, strict=True)
        ]
        if "error" in one or "error" in other:
            words = ["failed", "-", "-"]
        print(f"{name:<{width}}  {kind:<12}  {words[0]:<8} {words[1]:<8} {words[2]}")
        for part in filter(None, parts):
            print(f"{'':<{width}}  {part}")
        differing += any(parts)
    for name, told in only.items():
        print(f"{name}: not compared, {told}")
    print(f"\n{len(names)} artifacts, {differing} differ")
    return 1 if differing or not names else 0


if __name__ == "__main__":
    sys.exit(main())
