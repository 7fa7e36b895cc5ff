"""Modes and noise through the stages: one model answers with and without thinking."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from posttrain.backends.checkpoint import chat_of, load
from posttrain.engine.errors import ConfigError
from posttrain.rewards.spec import VerifierSpec
from posttrain.rewards.verifiers import load_verifier
from posttrain.stages.config import build_config
from posttrain.stages.reward_model import draw_batch
from posttrain.suites.build import build_domain
from posttrain.suites.domain import Domain, Table, domain_node

BOTH = ["think", "no_think"]
TINY: dict[str, Any] = {
    "steps": 150,
    "batch_size": 32,
    "lr": 0.01,
    "loss_on": "response",
    "hidden_size": 32,
    "num_layers": 1,
    "num_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "max_positions": 48,
    "thinking": True,
    "modes": BOTH,
}
SHORT: dict[str, Any] = {"steps": 3, "lr": 1e-3, "warmup_steps": 1}


def write_record(path: Path, name: str, kind: str) -> None:
    """As much of a record as a stage reads of its inputs."""
    record = {"format": 1, "name": name, "kind": kind, "fingerprint": "1" * 64}
    (path / "record.json").write_text(json.dumps(record))


@pytest.fixture(scope="module")
def last(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A domain that asks for the last letter of a word; its thoughts spell the word."""
    path = tmp_path_factory.mktemp("last")
    letters = "abcdef"
    words = [a + b + c for a in letters for b in letters for c in letters]
    rows = [
        {"prompt": w, "answer": w[-1], "demo": f"{w}={w[-1]}", "steps": w, "short": w[-1]}
        for w in words
    ]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    domain = Domain(
        name="last",
        source=Table(train="rows.jsonl", demo="demo", thought="steps", direct="short"),
        verifier=VerifierSpec(name="exact"),
    )
    node = domain_node(domain, path)
    build_domain(node.config, node.runtime, path, node.data)
    write_record(path, "last", "domain")
    without = replace(domain, source=Table(train="rows.jsonl", demo="demo"))
    assert set(domain_node(without, path).config["source"]) == set(
        domain_node(domain, path).config["source"]
    ) - {"thought", "direct"}
    return {"domains.last": str(path)}


@pytest.fixture
def thinker(
    run_stage: Callable[..., Any], last: Mapping[str, str]
) -> Callable[..., Mapping[str, str]]:
    """`thinker()`: the inputs of a stage that starts from a model that has learned both modes."""

    def make(edge: str = "start", **changes: Any) -> Mapping[str, str]:
        ran = run_stage("pretrain", TINY | changes, last)
        write_record(ran.out, "base", "pretrain")
        return {edge: str(ran.out), **last}

    return make


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_model_answers_in_both_modes(
    run_stage: Callable[..., Any], thinker: Callable[..., Mapping[str, str]]
) -> None:
    """It thinks where it is asked to, at length, and answers at once where it is not; what it
    says goes on as data with its mode, and is scored by the answer alone."""
    inputs = thinker("models.last")
    settings = {"k": 2, "num_prompts": 40, "max_new_tokens": 12, "routes": {"last": ["last"]}}
    ran = run_stage("sample", settings | {"modes": BOTH}, inputs)
    rows = read(ran.out / "rollouts.jsonl")
    by_mode = {mode: [row for row in rows if row["mode"] == mode] for mode in BOTH}
    assert [len(found) for found in by_mode.values()] == [80, 80]
    assert len({row["id"] for row in rows}) == 40
    share = {
        m: sum("</think>" in r["response"] for r in found) / 80 for m, found in by_mode.items()
    }
    assert share["think"] > 0.9 and share["no_think"] < 0.1
    length = {m: sum(len(r["response"]) for r in found) / 80 for m, found in by_mode.items()}
    assert length["think"] > length["no_think"] + 15
    judge = load_verifier(Path(inputs["domains.last"]))
    problems = {p["id"]: p for p in read(Path(inputs["domains.last"], "train.jsonl"))}
    for row in rows:
        _, tag, answer = row["response"].rpartition("</think>")
        in_mode = bool(tag) == (row["mode"] == "think") and not (not tag and "<think>" in answer)
        right = float(answer.strip() == row["answer"] and in_mode)
        assert row["reward"] == right * row["finished"]
        problem = problems[row["id"]] | {"mode": row["mode"]}
        assert judge.score(row["response"], problem) == right
    rewards = {mode: sum(row["reward"] for row in found) for mode, found in by_mode.items()}
    assert all(0 < right < 80 for right in rewards.values())

    plain = read(run_stage("sample", settings, inputs).out / "rollouts.jsonl")
    assert len(plain) == 80 and not any("mode" in row for row in plain)

    write_record(ran.out, "rollouts", "sample")
    source = {"rollouts": str(ran.out)}
    data = run_stage("select", {}, source)
    selected = read(data.out / "data.jsonl")
    assert {row["mode"] for row in selected} == set(BOTH)
    assert all(("</think>" in r["demo"]) == (r["mode"] == "think") for r in selected)
    write_record(data.out, "selection", "select")
    sft = SHORT | {"batch_size": 8}
    run_stage("sft", sft, {"start": inputs["models.last"], "data": str(data.out)})


def test_evaluation_reports_each_mode(
    run_stage: Callable[..., Any], thinker: Callable[..., Mapping[str, str]]
) -> None:
    inputs = dict(thinker("student"))
    inputs["init"] = inputs["teachers.guru"] = inputs["student"]
    settings = {"num_problems": 12, "samples": 2, "max_new_tokens": 12, "bootstrap": 100}
    settings |= {"routes": {"last": "guru"}, "transcripts": 2}
    ran = run_stage("evaluate", settings | {"modes": BOTH}, inputs)
    result = json.loads((ran.out / "evaluation.json").read_text())
    assert list(result["domains"]) == ["last/think", "last/no_think"]
    assert result["routes"] == {"last/think": "guru", "last/no_think": "guru"}
    assert {f"student/last/{mode}" for mode in BOTH} <= set(ran.metrics)
    transcripts = json.loads((ran.out / "transcripts.json").read_text())
    said = {name: rows[0]["responses"]["student"]["greedy"] for name, rows in transcripts.items()}
    assert "</think>" in said["last/think"] and "</think>" not in said["last/no_think"]
    # The best constant answer of either mode is one letter, which is right now and then.
    constants = [row["constant"] for row in result["domains"].values()]
    assert [0 < c["value"] < 0.5 for c in constants] == [True, True]
    assert "</think>" in constants[0]["response"]
    plain = run_stage("evaluate", settings, inputs)
    assert "student/last" in plain.metrics


def test_rl_and_distill_draw_every_mode(
    run_stage: Callable[..., Any], thinker: Callable[..., Mapping[str, str]]
) -> None:
    inputs = thinker()
    sampled = SHORT | {"prompts_per_step": 12, "max_new_tokens": 10}
    rl = run_stage("rl", sampled | {"group_size": 2, "modes": BOTH}, inputs)
    rows = read(rl.out / "rollouts.jsonl")
    assert {row["mode"] for row in rows} == set(BOTH)
    think = run_stage("rl", sampled | {"group_size": 2, "modes": ["think"]}, inputs)
    assert {row["mode"] for row in read(think.out / "rollouts.jsonl")} == {"think"}
    teachers = inputs | {"teachers.guru": inputs["start"]}
    runs = {
        modes: run_stage(
            "distill", sampled | {"routes": {"last": "guru"}, "modes": list(modes)}, teachers
        )
        for modes in (("think",), ("no_think",))
    }
    longer, shorter = (sum(line["tokens"] for line in ran.lines) for ran in runs.values())
    assert longer > 2 * shorter


def test_pairs_stay_within_a_mode_and_dpo_learns_them_in_it(
    run_stage: Callable[..., Any], thinker: Callable[..., Mapping[str, str]], tmp_path: Path
) -> None:
    inputs = thinker()
    rows = [
        {"id": i, "domain": "last", "prompt": "abc", "answer": "c", "response": text}
        | {"reward": reward, "finished": True, "mode": mode}
        for i in ("1", "2")
        for mode, text, reward in (
            ("think", "<think>abc</think>c", 1.0),
            ("think", "<think>abc</think>b", 0.0),
            ("no_think", "c", 1.0),
            ("no_think", "a", 0.0),
        )
    ]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_record(tmp_path, "rollouts", "sample")
    ran = run_stage("pairs", {}, {"rollouts": str(tmp_path)})
    write_record(ran.out, "pairs", "pairs")
    pairs = read(ran.out / "pairs.jsonl")
    assert [(p["mode"], p["chosen"], p["rejected"]) for p in pairs[:2]] == [
        ("think", "<think>abc</think>c", "<think>abc</think>b"),
        ("no_think", "c", "a"),
    ]
    assert len(pairs) == 4
    data = {"start": inputs["start"], "data": str(ran.out)}
    with_modes = run_stage("dpo", SHORT | {"batch_size": 4}, data)
    stripped = [{k: v for k, v in pair.items() if k != "mode"} for pair in pairs]
    (ran.out / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in stripped))
    without = run_stage("dpo", SHORT | {"batch_size": 4}, data)
    assert with_modes.lines[1]["loss"] != without.lines[1]["loss"]


def test_sft_learns_the_demonstrations_of_its_modes(
    run_stage: Callable[..., Any], thinker: Callable[..., Mapping[str, str]]
) -> None:
    """The loss of step 1 knows the mode: what the start has learned is cheap, the rest is not."""
    inputs = thinker(modes=["no_think"])
    settings = SHORT | {"batch_size": 16}
    first = {
        modes: run_stage("sft", settings | {"modes": list(modes)}, inputs).lines[0]
        for modes in ((), ("think",), ("no_think",))
    }
    assert first[("no_think",)]["loss"] < 0.5 < first[("think",)]["loss"]
    # An answer and an end; `<think>`, three letters, `</think>` more; a word, `=` and a letter.
    assert [first[m]["tokens"] for m in first] == [16 * 6, 16 * 7, 16 * 2]


@pytest.mark.parametrize("kind", ["sft", "pretrain"])
def test_noise_makes_some_demonstrations_wrong(
    run_stage: Callable[..., Any],
    thinker: Callable[..., Mapping[str, str]],
    last: Mapping[str, str],
    kind: str,
    same: Callable[..., bool],
) -> None:
    settings = SHORT | {"batch_size": 16}
    inputs: Mapping[str, str] = thinker(steps=2) if kind == "sft" else last
    if kind == "pretrain":
        settings = TINY | settings
    clean, also, noisy = (
        run_stage(kind, settings | {"demo_noise": noise}, inputs) for noise in (0.0, 0.0, 0.5)
    )
    assert same(clean, also) and not same(clean, noisy)
    assert same(noisy, run_stage(kind, settings | {"demo_noise": 0.5}, inputs))


def test_a_model_without_thinking_has_no_modes(
    run_stage: Callable[..., Any], models: Mapping[str, str], last: Mapping[str, str]
) -> None:
    inputs = {"start": models["start"], **last}
    with pytest.raises(ConfigError, match="chat template does not read enable_thinking"):
        run_stage("sft", SHORT | {"modes": ["think"]}, inputs)
    # One that is made with demonstrations in modes has them.
    assert build_config("pretrain", "base", {"steps": 1, "modes": ["think"]}).thinks
    with pytest.raises(ConfigError, match="name each mode once"):
        build_config("sft", "sft", {"steps": 1, "modes": ["think", "think"]})


def test_a_domain_without_thoughts_has_no_thinking_demonstration(
    run_stage: Callable[..., Any],
    thinker: Callable[..., Mapping[str, str]],
    domains: Mapping[str, str],
) -> None:
    start = thinker(steps=1)["start"]
    with pytest.raises(ConfigError, match=r"no thinking demonstration for problem .*`thought"):
        run_stage("sft", SHORT | {"modes": ["think"]}, {"start": start, **domains})
    run_stage("sft", SHORT | {"modes": ["no_think"]}, {"start": start, **domains})


def test_a_pretrained_thinker_can_be_loaded_again(
    thinker: Callable[..., Mapping[str, str]],
) -> None:
    chat = chat_of(load(Path(thinker(steps=1)["start"])))
    opened = chat.prompt("abc")
    assert chat.prompt("abc", "think") == opened
    assert len(chat.prompt("abc", "no_think")) == len(opened) + 2


def test_a_reward_model_reads_a_pair_in_its_mode(
    thinker: Callable[..., Mapping[str, str]],
) -> None:
    """The same texts in two modes are other rows: the prompt without thinking has two more."""
    chat = chat_of(load(Path(thinker(steps=1)["start"])))
    pair = {"id": "1", "domain": "last", "prompt": "abc", "chosen": "c", "rejected": "a"}
    draws = [{"pairs": [pair | mode]} for mode in ({}, {"mode": "think"}, {"mode": "no_think"})]
    batch, _ = draw_batch(draws, chat)
    assert batch.prompt_len_B.tolist() == [5, 5, 5, 5, 7, 7]
