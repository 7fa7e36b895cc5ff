"""The main job, measured: time, memory and what was recovered, over seeds, against the targets.

    python benchmarks/mopd.py --seeds 0 1 2                  # the default setting
    python benchmarks/mopd.py --seeds 0 --budget long        # the longer one

Every seed starts from an empty store. Memory is the largest sum, over the run, of the proportional
set sizes of all its processes (shared pages counted once; Linux only). Writes
results/mopd_<budget>_<date>.json and a Markdown table beside it. Accuracies are on held-out
problems, which no training stage and no tuning has seen.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from suite.machine import machine

HERE = Path(__file__).resolve().parent
LIMITS = {
    "short": {"seconds": 240, "norm": 0.85, "min_recovery": 0.6},
    "long": {"seconds": 1500, "norm": 0.93, "min_recovery": 0.8},
}
GIB = 2**30


def main() -> None:
    """Run all seeds and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", choices=list(LIMITS), default="short")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    runs = [measure(seed, arguments.budget) for seed in arguments.seeds]
    result = {
        "benchmark": "mopd",
        "budget": arguments.budget,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": machine(),
        "rows": rows(runs, arguments.budget),
        "runs": runs,
    }
    stem = f"mopd_{arguments.budget}_{result['date']}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / f"{stem}.md").write_text(markdown(result))
    print(markdown(result))


def measure(seed: int, budget: str) -> dict[str, Any]:
    """One run from an empty store, and the same command again."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "posttrain", "run", "mopd", "--json"),
            *("--seed", str(seed), "--set", f"budget={budget}"),
            *("--store", f"{folder}/store", "--report", f"{folder}/report.html"),
        ]
        first, seconds, peak = watch(command)
        again, seconds_again, _ = watch(command)
        specialists = first_evaluation(Path(folder) / "store", first)
    print(f"seed {seed}: {seconds:.0f} s, {peak / GIB:.2f} GiB", file=sys.stderr)
    return {
        "seed": seed,
        "seconds": round(seconds, 1),
        "peak_gib": round(peak / GIB, 3),
        "seconds_cached": round(seconds_again, 2),
        "cached_again": all(stage["status"] == "cached" for stage in again["stages"]),
        "stages": {stage["name"]: stage["seconds"] for stage in first["stages"]},
        "evaluation": specialists,
    }


def watch(command: list[str]) -> tuple[dict[str, Any], float, int]:
    """The JSON object that a run prints last, its wall-clock time, and its peak memory in bytes."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak = 0
    ended = threading.Event()

    def look() -> None:
        nonlocal peak
        while not ended.wait(0.5):
            peak = max(peak, sum(map(proportional_bytes, family(process.pid))))

    watcher = threading.Thread(target=look)
    watcher.start()
    output, errors = process.communicate()
    seconds = time.monotonic() - began
    ended.set()
    watcher.join()
    if process.returncode:
        sys.exit(f"{' '.join(command)}\nfailed with {process.returncode}:\n{errors[-3000:]}")
    return json.loads(output.splitlines()[-1]), seconds, peak


def family(root: int) -> list[int]:
    """The process and everything that descends from it."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue  # it ended while we looked
            parents.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found, open_ends = [], [root]
    while open_ends:
        pid = open_ends.pop()
        found.append(pid)
        open_ends += parents.get(pid, [])
    return found


def proportional_bytes(pid: int) -> int:
    """Memory of a process with shared pages split among their users; 0 if it has ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:"))


def first_evaluation(store: Path, result: dict[str, Any]) -> dict[str, Any]:
    """The whole evaluation.json of a run: both decodings, constants, forgetting."""
    artifact = next(s["artifact"] for s in result["stages"] if s["kind"] == "evaluate")
    path = next(p for p in store.glob("artifacts/evaluate/*") if artifact.endswith(p.name))
    return dict(json.loads((path / "evaluation.json").read_text()))


def rows(runs: list[dict[str, Any]], budget: str) -> list[dict[str, Any]]:
    """Targets and what was reached, each the worst seed unless it says mean."""
    limit = LIMITS[budget]
    domains = [run["evaluation"]["domains"] for run in runs]

    def gain(row: dict[str, Any]) -> float:
        return float(row["teacher"]["value"] - row["init"]["value"])

    sampled = min(gain(row) for by in domains for row in by.values())
    greedy = min(sorted(gain(row["greedy"]) for row in by.values())[1] for by in domains)
    constant = min(
        row["teacher"]["value"] - row["constant"]["value"] for by in domains for row in by.values()
    )
    recoveries = [row["recovery"] for by in domains for row in by.values()]
    lowest = min(r["value"] if r else float("-inf") for r in recoveries)
    norm = statistics.mean(run["evaluation"]["norm"] or 0.0 for run in runs)
    forgotten = statistics.mean(
        run["evaluation"]["models"]["init"][other]["sampled"]
        - run["evaluation"]["models"][f"teachers.{teacher}"][other]["sampled"]
        for run in runs
        for own, teacher in run["evaluation"]["routes"].items()
        for other in run["evaluation"]["domains"]
        if other != own
    )
    return [
        row(
            "seconds from an empty store, worst",
            max(r["seconds"] for r in runs),
            "<=",
            limit["seconds"],
        ),
        row("peak memory, GiB, worst", max(r["peak_gib"] for r in runs), "<=", 3.0),
        row("seconds when all is cached, worst", max(r["seconds_cached"] for r in runs), "<=", 2.0),
        row("least gain of a specialist, temperature 1", sampled, ">=", 0.10),
        row("second least gain of a specialist, greedy", greedy, ">=", 0.08),
        row("least lead of a specialist over a constant answer", constant, ">=", 0.20),
        row("Norm, temperature 1, mean over seeds", norm, ">=", limit["norm"]),
        row("least recovery of a domain, temperature 1", lowest, ">=", limit["min_recovery"]),
        row("loss of a specialist on a foreign domain, mean", forgotten, ">=", 0.10),
    ]


def row(name: str, value: float, sense: str, target: float) -> dict[str, Any]:
    """One line of the result table."""
    met = value <= target if sense == "<=" else value >= target
    return {
        "path": name,
        "ours": round(value, 3),
        "sense": sense,
        "target": target,
        "met": met,
    }


def markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    where = result["machine"]
    lines = [
        f"# MOPD, budget {result['budget']}, {result['date']}",
        "",
        f"{where['cpu']}, {where['cores']} cores, Python {where['python']}, "
        + ", ".join(f"{name} {number}" for name, number in where["packages"].items())
        + f"; seeds {', '.join(str(run['seed']) for run in result['runs'])}; held-out problems.",
        "",
        "| | reached | target | met |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {r['path']} | {r['ours']:g} | {r['sense']} {r['target']:g} | "
        f"{'yes' if r['met'] else 'no'} |"
        for r in result["rows"]
    ]
    lines += [
        "",
        "Temperature 1 / greedy.",
        "",
        "| seed | domain | SFT | specialist | student | recovery | constant answer |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in result["runs"]:
        for name, domain in run["evaluation"]["domains"].items():
            pairs = [
                f"{domain[who]['value']:.3f} / {domain['greedy'][who]['value']:.3f}"
                for who in ("init", "teacher", "student")
            ]
            recovery = " / ".join(
                f"{r['value']:.2f} [{r['low']:.2f}, {r['high']:.2f}]" if r else "-"
                for r in (domain["recovery"], domain["greedy"]["recovery"])
            )
            lines.append(
                f"| {run['seed']} | {name} | {' | '.join(pairs)} | {recovery} | "
                f"{domain['constant']['value']:.3f} |"
            )
    lines += ["", "| seed | seconds | GiB | Norm T=1 | Norm greedy |", "|---|---|---|---|---|"]
    for run in result["runs"]:
        evaluation = run["evaluation"]
        greedy = evaluation["greedy"]["norm"]
        lines.append(
            f"| {run['seed']} | {run['seconds']:.0f} | {run['peak_gib']:.2f} | "
            f"{evaluation['norm']:.3f} | {'-' if greedy is None else f'{greedy:.3f}'} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
