"""A small run of the MOPD recipe made up of random numbers, committed through the real store."""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.engine.graph import Graph, Node
from posttrain.engine.record import Artifact
from posttrain.engine.store import Store
from posttrain.rl.statistics import Scores, candidates, evaluation

DOMAINS = ("add", "letters", "reverse", "spiral")
HOSTILE = "<script>alert('prompt')</script> & \"quotes\""
FACTS = {
    "started": "2026-10-03T09:14:22+00:00",
    "host": "workbench",
    "platform": "Linux-6.1-x86_64",
    "python": "3.11.9",
    "cpu_count": 2,
    "argv": ["posttrain", "run", "mopd", "--set", "student.steps=120"],
    "packages": {"torch": "2.13.0", "transformers": "5.23.0"},
    "git": [
        {
            "root": "/src/posttrain",
            "commit": "4f2a9c1d7e6b5a4930281f1e2d3c4b5a69788796",
            "branch": "main",
            "dirty": True,
            "diff_sha256": "ab" * 32,
        }
    ],
    "threads": 1,
    "resumed_at_step": None,
}


def scores_of(means: Mapping[str, tuple[float, ...]], *, seed: int, problems: int) -> Any:
    """`scores` for `statistics.evaluation`: per model one mean accuracy per domain."""
    generator = np.random.default_rng(seed)
    difficulty = {name: generator.normal(size=problems) for name in DOMAINS}
    found: dict[str, dict[str, Scores]] = {}
    for model, values in means.items():
        found[model] = {}
        for name, mean in zip(DOMAINS, values, strict=True):
            shift = math.log(max(mean, 1e-3) / max(1 - mean, 1e-3)) * 1.2
            chance = 1 / (1 + np.exp(difficulty[name] - shift))
            found[model][name] = Scores(
                sampled=generator.binomial(2, chance) / 2,
                greedy=generator.binomial(1, np.minimum(1, chance * 1.1)).astype(float),
            )
    return found


def make_evaluation(
    *, flat: str | None = None, constant: float = 0.04, problems: int = 300, routed: bool = True
) -> dict[str, Any]:
    """An evaluation.json; in domain `flat` the teacher is no better than the init."""
    means = {
        "init": (0.21, 0.33, 0.17, 0.26),
        "student": (0.74, 0.81, 0.88, 0.66),
        "teachers.add_teacher": (0.78, 0.20, 0.05, 0.11),
        "teachers.letters_teacher": (0.02, 0.86, 0.03, 0.08),
        "teachers.reverse_teacher": (0.06, 0.15, 0.93, 0.02),
        "teachers.spiral_teacher": (0.04, 0.18, 0.06, 0.79),
    }
    if flat:
        column = DOMAINS.index(flat)
        for model in ("student", f"teachers.{flat}_teacher"):
            row = list(means[model])
            row[column] = means["init"][column]
            means[model] = tuple(row)
    if not routed:
        means = {model: means[model] for model in ("init", "student")}
    constants = {name: {"value": constant, "response": "4-1=3"} for name in DOMAINS}
    return evaluation(
        scores_of(means, seed=3, problems=problems),
        routes={name: f"{name}_teacher" for name in DOMAINS} if routed else {},
        constants=constants,
        resamples=300,
        seed=0,
    ) | {"split": "heldout", "samples": 2}


@functools.cache
def _candidates(
    *, init: bool = True, verified: bool = True, routed: bool = True, one: bool = False
) -> dict[str, Any]:
    """An evaluation.json of three students (or `one`) and a model along the way, with a domain
    that nobody verifies and a judge who scores it."""
    means = {
        "init": (0.21, 0.33, 0.17, 0.26),
        "along.round1": (0.5, 0.61, 0.55, 0.4),
        "students.mopd": (0.74, 0.81, 0.88, 0.66),
        "students.merged": (0.54, 0.61, 0.68, 0.36),
        "students.traces": (0.73, 0.80, 0.89, 0.60),
        "teachers.add_teacher": (0.78, 0.20, 0.05, 0.11),
        "teachers.letters_teacher": (0.02, 0.86, 0.03, 0.08),
    }
    if one:
        means = {"student": means["students.mopd"]} | {
            model: row for model, row in means.items() if not model.startswith(("stu", "along"))
        }
    dropped = ("init",) * (not init) + ("teachers",) * (not routed)
    scores = {
        model: by_domain if verified else {}
        for model, by_domain in scores_of(means, seed=3, problems=200).items()
        if not model.startswith(dropped or ("-",))
    }
    students = {n.partition(".")[2] or n: n for n in scores if n.startswith("student")}
    domains = DOMAINS if verified else ()
    result = candidates(
        scores,
        students=students,
        along={"round1": "along.round1"} if "along.round1" in scores else {},
        routes={n: f"{n}_teacher" for n in domains[:2]} if routed else {},
        constants={name: {"value": 0.04, "response": "4-1=3"} for name in domains},
        resamples=300,
        seed=0,
    )
    rows: dict[str, Any] = {}
    judged: dict[str, Any] = {}
    for number, model in enumerate(scores):
        value = {"value": 0.1 * number, "low": 0.1 * number - 0.05, "high": 0.1 * number + 0.05}
        plain = model != "init" and init
        rows[model] = {
            "length": {"value": 30.0 + number, "low": 28.0, "high": 33.5},
            "truncated": 0.02 * number,
            "kl_init": value if plain else None,
            "kl_teacher": None,
        }
        win = {"value": 0.55, "low": 0.48, "high": 0.61} if plain else None
        score = {"value": -1.2 + number, "low": -1.5 + number, "high": -0.9 + number}
        judged[model] = {"score": score, "win": win, "greedy": {"score": score, "win": win}}
    result["unverified"] = {"chat": {"num_problems": 60, "teacher": None, "models": rows}}
    result["judged"] = {
        "chat": {"num_problems": 60, "judge": ["scalar.rm"], "compares": False, "unit": False}
        | {"models": judged}
    }
    return result | {"split": "heldout", "samples": 2}


def make_candidates(**shape: bool) -> dict[str, Any]:
    """`_candidates`, to change at will."""
    return copy.deepcopy(_candidates(**shape))


def make_transcripts() -> dict[str, list[dict[str, Any]]]:
    """A transcripts.json whose texts try to break out of the page."""
    models = ["init", "student", *(f"teachers.{name}_teacher" for name in DOMAINS)]
    found = {}
    for name in DOMAINS:
        rows = []
        for number in range(4):
            responses = {
                model: {
                    "sampled": f"4-{number}=3-7={model}",
                    "sampled_score": float((place + number) % 2),
                    "greedy": f"4-{number}=3-7=\n-4 <b>{model}</b>",
                    "greedy_score": 0.5 if place == 1 and number == 2 else float(place != 0),
                }
                for place, model in enumerate(models)
            }
            prompt = HOSTILE if number == 0 else f"{name[0]} 4-{number}-7"
            rows.append({"prompt": prompt, "answer": "-4", "responses": responses})
        found[name] = rows
    return found


def curve(kind: str, steps: int, domains: list[str], seed: int) -> list[dict[str, float]]:
    """Lines of a metrics.jsonl as that kind of stage logs them."""
    generator = np.random.default_rng(seed)
    lines = []
    for step in range(1, steps + 1):
        done = step / steps
        noise = float(generator.normal())
        line: dict[str, float] = {
            "step": step,
            "total": steps,
            "tokens": step * 2400,
            "seconds": step * 0.41,
        }
        if kind == "evaluate":
            lines.append(line)
            continue
        line |= {"lr": 1e-3 * (1 - 0.95 * done), "grad_norm": 0.8 + 0.1 * noise}
        if kind in ("pretrain", "sft"):
            line["loss"] = 0.3 + 2.2 * math.exp(-4 * done) + 0.04 * noise
        if kind == "rl":
            line |= {
                "reward": min(1, max(0, 0.35 + 0.45 * done + 0.03 * noise)),
                "response_length": 9 + 3 * done + 0.2 * noise,
                "finished_share": 0.98,
                "train_fraction": 0.8 - 0.3 * done,
                "entropy": 0.6 - 0.4 * done + 0.02 * noise,
                "clip_low": 0.01 * abs(noise),
                "clip_high": 0.02 * abs(noise),
                "correction_masked": 0.0,
            }
        if kind == "distill":
            line |= {"loss": 0.5 * math.exp(-5 * done), "correction_masked": 0.004}
            line["response_length"] = 10 + noise * 0.2
            line |= {f"rows/{name}_teacher": 64 + step % 3 for name in domains}
            for place, name in enumerate(domains):
                line[f"kl/{name}"] = (0.3 + 0.1 * place) * math.exp(-4 * done) + 0.004
                line[f"entropy/{name}"] = 0.5 - 0.2 * done
                line[f"token_share/{name}"] = 1 / len(domains)
            line["kl"] = float(np.mean([line[f"kl/{name}"] for name in domains]))
        lines.append(line)
    return lines


def mopd_graph(*, steps: int = 60) -> Graph:
    """The shape of the MOPD recipe."""
    data = {f"domains.{name}": name for name in DOMAINS}
    nodes = [Node(name=n, kind="domain", config={"domain": n, "counts": 4000}) for n in DOMAINS]
    nodes.append(
        Node(name="base", kind="pretrain", config={"steps": steps, "lr": 4e-3}, inputs=data)
    )
    nodes.append(
        Node(name="sft", kind="sft", config={"steps": steps}, inputs={"start": "base"} | data)
    )
    teachers = {}
    for name in DOMAINS:
        own = {f"domains.{name}": name}
        light = Node(
            name=f"{name}_sft",
            kind="sft",
            config={"steps": steps, "seed": 1},
            inputs={"start": "sft"} | own,
        )
        teacher = Node(
            name=f"{name}_teacher",
            kind="rl",
            config={"steps": steps, "clip_high": 0.2},
            inputs={"start": light.name} | own,
        )
        nodes += [light, teacher]
        teachers[f"teachers.{teacher.name}"] = teacher.name
    routes = {name: f"{name}_teacher" for name in DOMAINS}
    nodes.append(
        Node(
            name="student",
            kind="distill",
            config={"steps": steps, "routes": routes, "advantage_clip": None},
            inputs={"start": "sft"} | teachers | data,
        )
    )
    nodes.append(
        Node(
            name="evaluation",
            kind="evaluate",
            config={"samples": 2, "split": "heldout", "routes": routes},
            inputs={"student": "student", "init": "sft"} | teachers | data,
        )
    )
    return Graph(nodes={node.name: node for node in nodes}, target="evaluation")


def commit_graph(
    store: Store, graph: Graph, *, scores: dict[str, Any], transcripts: dict[str, Any]
) -> Artifact:
    """Commit every stage of a graph with made-up results; returns the target's artifact."""
    made: dict[str, Artifact] = {}
    fingerprints = graph.fingerprints()
    for number, name in enumerate(graph.order()):
        node = graph.nodes[name]
        work = store.begin(fingerprints[name])
        assert work is not None
        metrics: dict[str, Any] = {"rows": 4000}
        if node.kind != "domain":
            domains = [e.removeprefix("domains.") for e in node.inputs if "domains." in e]
            total = 6 if node.kind == "evaluate" else node.config["steps"]
            lines = curve(node.kind, total, domains, number)
            (work.path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
            summary = {"pretrain": "loss", "sft": "loss", "rl": "reward", "distill": "kl"}
            metrics = {"tokens": lines[-1]["tokens"]}
            if node.kind in summary:
                metrics[summary[node.kind]] = lines[-1][summary[node.kind]]
                (work.out / "model.safetensors").write_text(name)
        if node.kind == "evaluate":
            metrics = {"norm": scores["norm"]} if "norm" in scores else {}
            (work.out / "evaluation.json").write_text(json.dumps(scores))
            (work.out / "transcripts.json").write_text(json.dumps(transcripts))
        else:
            (work.out / "out.txt").write_text(name)
        made[name] = store.commit(
            node,
            work,
            inputs={edge: made[source] for edge, source in node.inputs.items()},
            metrics=metrics,
            provenance=FACTS | {"seconds": 3.25 * (number + 1)},
        )
    return made[graph.target]


@pytest.fixture
def empty_store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Holds `finished` and is only read."""
    return Store(tmp_path_factory.mktemp("run") / "store")


@pytest.fixture
def scores() -> Callable[..., dict[str, Any]]:
    """`make_evaluation`."""
    return make_evaluation


@pytest.fixture
def candidate_scores() -> Callable[..., dict[str, Any]]:
    """`make_candidates`."""
    return make_candidates


@pytest.fixture(scope="session")
def finished(store: Store) -> Artifact:
    """The evaluation at the end of a whole made-up run."""
    return commit_graph(
        store, mopd_graph(), scores=make_evaluation(), transcripts=make_transcripts()
    )


@pytest.fixture
def graph() -> Graph:
    """The shape of the MOPD recipe."""
    return mopd_graph()


@pytest.fixture
def commit() -> Callable[..., Artifact]:
    """`commit_graph`."""
    return commit_graph


def commit_candidates(
    store: Store, scores: dict[str, Any], *, renamed: str = "", held: bool = True
) -> tuple[Artifact, Graph]:
    """Commit what leads to `make_candidates()`; `renamed` is put before the name of every stage.

    `mopd` holds the domain `chat` by its own start where it is `held`.
    """

    def node(name: str, kind: str, config: dict[str, Any], **inputs: str) -> Node:
        edges = {edge.replace("__", "."): renamed + source for edge, source in inputs.items()}
        return Node(name=renamed + name, kind=kind, config=config, inputs=edges)

    steps = {"steps": 3}
    routes = {"add": "add_teacher"} | ({"chat": "self"} if held else {})
    data = {"domains__add": "add", "domains__chat": "chat"}
    made = [
        *(node(name, "domain", {"domain": name}) for name in ("add", "chat")),
        node("base", "model", {"steps": 1}),
        node("sft", "sft", steps, start="base"),
        node("add_teacher", "model", {"steps": 2}),
        node("letters_teacher", "rl", steps, start="sft"),
        node("m1", "distill", steps | {"routes": {"add": "add_teacher"}}, start="sft", **data),
        node("student", "distill", steps | {"routes": routes}, start="sft", **data),
        node("ties", "merge", steps, models__a="add_teacher", models__b="letters_teacher"),
        node("traces", "sft", steps | {"seed": 2}, start="m1"),
    ]
    students = {"mopd": "student", "merged": "ties", "traces": "traces"}
    edges = {f"students__{name}": model for name, model in students.items()}
    known = {
        "init": "sft",
        "along__round1": "m1",
        "student": "student",
        **edges,
        "teachers__add_teacher": "add_teacher",
        "teachers__letters_teacher": "letters_teacher",
    }
    used = {e: s for e, s in known.items() if e.replace("__", ".") in scores["models"]}
    made.append(node("evaluation", "evaluate", {"samples": 2}, **used))
    graph = Graph(nodes={n.name: n for n in made}, target=renamed + "evaluation")
    transcripts = {
        "chat": [
            {
                "prompt": "say <b>hi</b>",
                "answer": None,
                "responses": {
                    model: {"sampled": f"hi {model}", "greedy": "hi"}
                    | {"sampled_score": None, "greedy_score": None, "sampled_judged": 1.25}
                    for model in scores["models"]
                },
            }
        ]
    }
    return commit_graph(store, graph, scores=scores, transcripts=transcripts), graph


@pytest.fixture
def commit_several() -> Callable[..., tuple[Artifact, Graph]]:
    """`commit_candidates`."""
    return commit_candidates
