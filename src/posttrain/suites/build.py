"""Makes a domain's artifact: train.jsonl, validation.jsonl, heldout.jsonl, domain.json, README.md
and, for a python verifier, verifier.py; for an oracle of the user's, oracle.py. Where these read
files beside them, they stand in directories of their own, verifier/ and oracle/, with these files.

One JSON object per line: {"id", "domain", "prompt", "answer", "demo", "meta"}, and where the
domain has them "thought" (the steps), "direct" (the answer without steps), "rubric" (the criteria
of an answer), "messages" (what the model is shown, where that is more than one text) and "demos"
(further demonstrations). Every answer is shown to the verifier here, before any stage spends
compute on a problem that nobody can solve; a domain without a verifier has nothing to check.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.engine.errors import ConfigError, StageError
from posttrain.engine.fingerprint import file_digest
from posttrain.engine.jsonl import write_jsonl
from posttrain.engine.text import in_markdown, plain_text
from posttrain.rewards.formats import find_format
from posttrain.rewards.gym import FULL_SCORE, create_gym
from posttrain.rewards.pool import VerifierPool
from posttrain.rewards.spec import is_verified
from posttrain.rewards.watching import Watched, undeclared
from posttrain.suites.checked import tables_of
from posttrain.suites.location import CHANGED
from posttrain.suites.split import SPLITS, prompt_digest, split_of

CHUNK = 20_000
"""Items per reasoning-gym dataset object; some datasets prepare all items of a size up front."""
PATIENCE = 5_000
"""Draws without a new problem for any split that still wants one, after which there are no more."""
NUM_CONSTANT_CHECKS = 8
"""Problems whose right and wrong responses the verifier has to tell apart."""
NONSENSE = ("?", "~ # ~", "qzxv kjwq", "? " * 500)
"""What no answer takes for right, all of it: short and long, with letters and without."""
NUM_DEMO_CHECKS = 200
"""Demonstrations per split that the verifier has to judge while the domain is built."""

Problem = dict[str, Any]


def build_domain(
    config: Mapping[str, Any], runtime: Mapping[str, Any], out: Path, data: Mapping[str, str]
) -> dict[str, Any]:
    """Writes the artifact into the directory `out`; the others are the parts of `domain_node`.

    Returns:
        train, validation, heldout (numbers of problems) and duplicates (dropped rows or draws); of
        tables also what `posttrain.suites.checked` tells of their rows. Where there is a verifier,
        top_answer_share (of the commonest answer among the held-out problems), and demo_score (mean
        score of the demonstrations that were checked) where there are demonstrations, and
        constant_score only where the verifier tells nothing apart.

    Raises:
        ConfigError: a table is wrong or changed since the plan, or there are too few problems.
        StageError: an answer, a demonstration or the user's verifier is broken.
    """
    name = config["domain"]
    where = f"domain {name}"
    facts: dict[str, Any]
    if config["source"]["kind"] == "procedural":
        splits, duplicates = _procedural(config, where)
        facts = {"duplicates": duplicates}
    else:
        splits, facts = _table(config, runtime, data, where)
    own_files = _copy_own_files(runtime, out, data, where)
    counts = {split: len(splits[split]) for split in SPLITS}
    for split in SPLITS:
        write_jsonl(out / f"{split}.jsonl", splits[split])
    record = {
        "format": 1,
        "name": name,
        "config": config,
        "data": dict(data),
        "counts": counts,
    } | ({"files": own_files} if own_files else {})
    (out / "domain.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    metrics: dict[str, Any] = {**counts, **facts}
    if is_verified(config):
        # In a process of its own where the verifier is slow, as stages will ask it.
        watched = _watched(runtime, out)
        with VerifierPool({name: out}, num_workers=1, watched=watched) as pool:
            demo_score = _check(
                splits,
                pool,
                strict=config["source"]["kind"] == "procedural",
                python="verifier" in own_files,
            )
            constant = constant_score(splits["train"], pool)
        if pool.opened:
            raise ConfigError(undeclared(f"{where}: verifier", own_files["verifier"], pool.opened))
        if constant is not None:
            metrics["constant_score"] = constant
        top = Counter(problem["answer"] for problem in splits["heldout"]).most_common(1)
        if top:
            metrics["top_answer_share"] = round(top[0][1] / counts["heldout"], 4)
        if demo_score is not None:
            metrics["demo_score"] = round(demo_score, 4)
    if "oracle" in own_files:
        with VerifierPool(
            {name: out}, num_workers=1, by="oracle", watched=_watched(runtime, out)
        ) as pool:
            constant_score(splits["train"], pool)
        if pool.opened:
            raise ConfigError(undeclared(f"{where}: oracle", own_files["oracle"], pool.opened))
    (out / "README.md").write_text(_readme(config, splits, metrics), encoding="utf-8")
    return metrics


def _copy_own_files(
    runtime: Mapping[str, Any], out: Path, data: Mapping[str, str], where: str
) -> dict[str, str]:
    """Copies the user's own files: verifier.py and oracle.py, into a directory of their own where
    they read files that lie beside them. Returns what the user calls them: a message about a copy
    is to name the file that the user can mend."""
    own_files: dict[str, str] = {}
    for part in ("verifier", "oracle"):
        file = runtime.get(f"{part}_file")
        if file is None:
            continue
        own_files[part] = Path(file).name
        read: Mapping[str, str] = runtime.get(f"{part}_data", {})
        directory = out / part if read else out
        copies = {part: (file, directory / f"{part}.py")}
        copies |= {f"{part}/{name}": (path, directory / name) for name, path in read.items()}
        for key, (source, copy) in copies.items():
            if file_digest(Path(source)) != data[key]:
                raise ConfigError(f"{where}: {part}: {source} {CHANGED}")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
    return own_files


def _watched(runtime: Mapping[str, Any], out: Path) -> Watched | None:
    """The suite's directory, but for what is declared and the artifact itself."""
    if "base_dir" not in runtime:
        return None
    read = [*runtime.get("verifier_data", {}).values(), *runtime.get("oracle_data", {}).values()]
    return Watched(root=runtime["base_dir"], declared=[*read, str(out)])


def _procedural(config: Mapping[str, Any], where: str) -> tuple[dict[str, list[Problem]], int]:
    """Draws until every split is full. Returns the problems by split and the repeated draws."""
    source, name = config["source"], config["domain"]
    text_format = find_format(source["format"], where=where)
    wanted: dict[str, int] = source["counts"]
    splits: dict[str, list[Problem]] = {split: [] for split in SPLITS}
    seen: set[str] = set()
    duplicates = 0
    idle = 0
    for item in _items(source, where):
        if all(len(splits[split]) == wanted[split] for split in SPLITS):
            return splits, duplicates
        if idle == PATIENCE:
            break
        idle += 1
        if not text_format.fits(item):
            continue
        problem = text_format.key(item)
        key = prompt_digest(problem)
        if key in seen:
            duplicates += 1
            continue
        seen.add(key)
        split = split_of(problem)
        if len(splits[split]) == wanted[split]:
            continue
        idle = 0
        if item["answer"] is None:
            raise ConfigError(
                f"{where}: reasoning-gym's {source['dataset']} gives no reference answers, so "
                "there would be no demonstrations to start from; choose another dataset"
            )
        row = {
            "id": f"{name}-{key[:12]}",
            "domain": name,
            "prompt": text_format.prompt(item),
            "answer": str(item["answer"]),
            "demo": text_format.demo(item),
            "meta": {"entry": _as_json(item, source["dataset"], where)},
        }
        # A row without thoughts has no such field.
        steps = {"thought": text_format.thought(item), "direct": text_format.direct(item)}
        splits[split].append(row | {f: text for f, text in steps.items() if text is not None})
    short = ", ".join(f"{len(splits[s])} of {wanted[s]} for {s}" for s in SPLITS)
    raise ConfigError(
        f"{where}: reasoning-gym's {source['dataset']} with params {dict(source['params'])} ran "
        f"out of distinct problems: {len(seen)} found, and {PATIENCE} draws in a row brought none "
        f"that was wanted ({short}; about 75 % of the problems belong to train, 10 % to "
        "validation, 15 % to heldout). Ask for fewer, or widen params"
    )


def _items(source: Mapping[str, Any], where: str) -> Iterator[dict[str, Any]]:
    """reasoning-gym items without end."""
    for chunk in itertools.count():
        seed = source["seed"] + chunk * CHUNK
        dataset = create_gym(
            source["dataset"], source["params"], seed=seed, size=CHUNK, where=where
        )
        for index in range(CHUNK):
            yield dataset[index]


def _as_json(item: dict[str, Any], dataset: str, where: str) -> dict[str, Any]:
    """The parts of an item that `score_answer` reads, as they come back from a JSON file."""
    entry = {key: item[key] for key in ("question", "answer", "metadata")}
    try:
        decoded: dict[str, Any] = json.loads(json.dumps(entry, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{where}: items of reasoning-gym's {dataset} cannot be stored as JSON ({error}); "
            "choose another dataset"
        ) from error
    return decoded


def _table(
    config: Mapping[str, Any], runtime: Mapping[str, Any], data: Mapping[str, str], where: str
) -> tuple[dict[str, list[Problem]], dict[str, int]]:
    """Reads the user's tables. Returns the problems by split and what there is to tell of them."""
    tables = tables_of(config, runtime["files"])
    for split, place in tables.places.items():
        if place.path is not None and place.digest() != data[split]:
            raise ConfigError(f"{where}: {split}: {place.text} {CHANGED}")
    placement = tables.placed(keep=True)
    return placement.splits(), placement.facts()


def _check(
    splits: Mapping[str, list[Problem]], pool: VerifierPool, *, strict: bool, python: bool
) -> float | None:
    """Shows every answer and some demonstrations to the verifier.

    Returns the mean score of those demonstrations, None without any. `strict`: each has to score 1.
    """
    scores = []
    every = [problem for problems in splits.values() for problem in problems]
    if every:
        # A function of the user's own may take long, so it is shown less.
        few = max(1, len(every) // NUM_CONSTANT_CHECKS) if python else 1
        pool.check(every[0]["domain"], every, NONSENSE, nonsense_every=few)
    for problems in filter(None, splits.values()):
        chosen = problems[:: max(1, len(problems) // NUM_DEMO_CHECKS)]
        asked = [(problem, text) for problem in chosen for text in _responses_to_show(problem)]
        found = pool.scores([problem for problem, _ in asked], [text for _, text in asked])
        for (problem, text), score in zip(asked, found, strict=True):
            if text == problem["demo"]:
                scores.append(score)
            if strict and score < FULL_SCORE:
                raise StageError(
                    f"problem {problem['id']}: its demonstration {text!r} scores {score:g} "
                    f"under the domain's verifier, not 1; prompt: {problem['prompt']!r}"
                )
    return sum(scores) / len(scores) if scores else None


def constant_score(problems: Sequence[Problem], pool: VerifierPool) -> float | None:
    """The one score that the verifier gives to right and to wrong responses alike; None where it
    tells some apart.

    Right is a demonstration or else the answer, wrong that of a problem with another answer, and
    nonsense, short and long.
    """
    chosen = problems[:: max(1, len(problems) // NUM_CONSTANT_CHECKS)][:NUM_CONSTANT_CHECKS]
    asked: list[tuple[Problem, str]] = []
    for problem in chosen:
        others = (one for one in problems if one["answer"] != problem["answer"])
        other = next(others, None)
        texts = [problem["demo"] or problem["answer"], *NONSENSE]
        texts += [] if other is None else [other["demo"] or other["answer"]]
        asked += [(problem, text) for text in texts]
    found = pool.scores([problem for problem, _ in asked], [text for _, text in asked])
    return found[0] if found and min(found) == max(found) else None


def _responses_to_show(problem: Problem) -> list[str]:
    """The demonstrations of a problem; without one the answer, a response to be survived."""
    demo = problem["demo"]
    if demo is None:
        return [problem["answer"]]
    return list(dict.fromkeys((demo, problem.get("direct", demo))))


def _readme(
    config: Mapping[str, Any],
    splits: Mapping[str, list[Problem]],
    metrics: Mapping[str, Any],
) -> str:
    source = config["source"]
    if source["kind"] == "procedural":
        origin = (
            f"reasoning-gym `{source['dataset']}`, format `{source['format']}`, "
            f"seed {source['seed']}"
        )
    else:
        tables = (f"{split}: {in_markdown(text)}" for split, text in source["tables"].items())
        origin = "user's tables, " + ", ".join(tables)
    rows = [json.dumps(problem, ensure_ascii=False) for problem in splits["train"][:2]]
    samples = "\n\n".join(f"```json\n{row}\n```" for row in rows)
    numbers = "\n".join(f"| {key} | {value} |" for key, value in metrics.items())
    verifier = config["verifier"]
    name = verifier["name"].replace("`", "'")
    # Within a JSON text the same character.
    options = plain_text(json.dumps(verifier["options"])).replace("<", "\\u003c")
    return (
        f"# Domain {config['domain']}\n\n"
        f"Source: {origin}.\n"
        f"Verifier: `{name}` {options}.\n\n"
        "A problem belongs to one split only, by the hash of its text; no training stage draws "
        "from `heldout.jsonl`.\n\n"
        f"| | |\n|---|---|\n{numbers}\n\n"
        f"Two rows of `train.jsonl`:\n\n{samples}\n"
    )
