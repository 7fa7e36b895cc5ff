"""Every shipped recipe, run to its report: time, scores, and whether it beats its SFT checkpoint.

    python benchmarks/recipes.py                        # all of them
    python benchmarks/recipes.py --only llama2 qwen3    # these; the others keep their last row
    python benchmarks/recipes.py --page                 # only write docs/recipes.md again

The bases that recipes share are made first; a recipe's time is that of `posttrain run NAME` with
those in the store; where it had run there already, the time of that run, from its start to the
commit of the evaluation. Recipes share the store, as a user's would; the stages of a recipe that
another one had made already are listed under `cached`. Scores are on held-out problems. Writes
results/recipes_<date>.json with a Markdown table beside it, results/recipes_latest.json with the
newest row of each recipe, and docs/recipes.md with the lineage pictures that it shows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from posttrain.engine.store import Store
from posttrain.language.loader import shipped_recipes
from suite.machine import machine
from suite.recipe_page import markdown, write_page, write_picture

HERE = Path(__file__).resolve().parent
LATEST = HERE / "results" / "recipes_latest.json"
BASES = HERE / "suite" / "bases.py"
LIMIT_SECONDS = 240


def main() -> None:
    """Run what was asked for and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(shipped_recipes()), metavar="NAME")
    parser.add_argument("--store", type=Path, help="keep the store here; default: a fresh one")
    parser.add_argument("--page", action="store_true", help="run nothing, write the page again")
    arguments = parser.parse_args()
    kept = json.loads(LATEST.read_text())["rows"] if LATEST.exists() else {}
    if arguments.page:
        write_page(kept)
        return
    with tempfile.TemporaryDirectory() as folder:
        store = arguments.store or Path(folder) / "store"
        make_bases(store)
        fresh = {}
        for name in arguments.only or shipped_recipes():
            try:
                fresh[name] = measure(name, store)
            except RuntimeError as error:
                print(f"{name}: {error}", file=sys.stderr)
                continue
            save(kept | fresh)
    write_page(kept | fresh)


def make_bases(store: Path) -> None:
    """The models that recipes start from, so that no recipe pays for them."""
    for size in ("tiny", "mini"):
        for thinking in ("false", "true"):
            settings = ("--set", f"size={size}", "--set", f"thinking={thinking}")
            run(str(BASES), store, *settings)


def measure(name: str, store: Path) -> dict[str, Any]:
    """One recipe to its report."""
    began = time.monotonic()
    result = run(name, store)
    seconds = time.monotonic() - began
    own = [stage for stage in result["stages"] if stage["kind"] not in ("domain", "pretrain")]
    evaluation = result["evaluation"]
    row = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": machine(),
        "seconds": round(seconds, 1),
        "stages": len(own),
        "cached": [stage["name"] for stage in own if stage["status"] == "cached"],
        "gain": evaluation["gain"],
        "gain_greedy": evaluation["greedy"]["gain"],
        "norm": evaluation["norm"],
        "domains": {
            domain: {model: found[model]["value"] for model in ("init", "student")}
            for domain, found in evaluation["domains"].items()
        },
    }
    last = Path(next(stage["artifact"] for stage in own if stage["kind"] == "evaluate")).name
    if len(row["cached"]) == len(own):
        row["seconds"] = round(seconds_of(store, last), 1)
    write_picture(name, store, last)
    gain = evaluation["gain"]
    print(f"{name}: {seconds:.0f} s, gain {gain['value']:+.3f}", file=sys.stderr)
    return row


def seconds_of(folder: Path, artifact: str) -> float:
    """How long the run took that made this evaluation, from its start to its last commit."""
    found = Store(folder).resolve(artifact)
    began = datetime.fromisoformat(found.provenance["started"])
    return (datetime.fromisoformat(found.created) - began).total_seconds()


def run(recipe: str, store: Path, *more: str) -> dict[str, Any]:
    """What `posttrain run --json` prints."""
    report = store.parent / "report.html"
    command = [sys.executable, "-m", "posttrain", "run", recipe, "--json", *more]
    command += ["--store", str(store), "--report", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"failed with {done.returncode}:\n{done.stderr[-1500:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def save(rows: dict[str, Any]) -> None:
    """Write what is there so far, so that a recipe that fails loses nothing."""
    LATEST.write_text(json.dumps({"benchmark": "recipes", "rows": rows}, indent=1) + "\n")
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    today = {name: row for name, row in rows.items() if row["date"] == date}
    stem = LATEST.parent / f"recipes_{date}"
    result = {"benchmark": "recipes", "limit_seconds": LIMIT_SECONDS, "rows": today}
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    stem.with_suffix(".md").write_text(f"# Every recipe, {date}\n\n{markdown(today)}\n")


if __name__ == "__main__":
    main()
