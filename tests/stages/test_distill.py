"""The distill stage: routing, estimators, weights, and what is refused before any step."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from posttrain.backends.checkpoint import LanguageModel
from posttrain.engine.errors import ConfigError
from posttrain.rl.batch import Batch
from posttrain.stages import distill as stage
from posttrain.stages.config import build_config
from posttrain.stages.distill import loss_weights
from posttrain.stages.settings.distill import Distill

RunStage = Callable[..., Any]
ROUTES = {"short": "first", "words": "second"}
BASE: dict[str, Any] = {
    "steps": 5,
    "prompts_per_step": 12,
    "max_new_tokens": 6,
    "lr": 0.01,
    "warmup_steps": 1,
    "routes": ROUTES,
}
ESTIMATORS = ("sampled_token", "top_k", "reverse_kl")
EXACT = (
    {"estimator": "reverse_kl"},
    {"estimator": "forward_kl"},
    {"estimator": {"kind": "jsd", "beta": 0.3}},
    {"estimator": {"kind": "top_k", "k": 100}},
)


@pytest.fixture
def distill(
    run_stage: RunStage, models: Mapping[str, str], domains: Mapping[str, str]
) -> Callable[..., Any]:
    """Distil `start` from two teachers with BASE and the given changes."""

    def run(*, first: str = models["one"], second: str = models["two"], **changes: Any) -> Any:
        inputs = {"start": models["start"], "teachers.first": first, "teachers.second": second}
        return run_stage("distill", BASE | changes, {**inputs, **domains})

    return run


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_metrics_are_named_as_documented_and_finite(
    distill: Callable[..., Any], estimator: str
) -> None:
    ran = distill(estimator=estimator, correction="icepop", reward_weight=0.5, samples_per_prompt=2)
    expected = {"step", "total", "tokens", "seconds", "lr", "grad_norm", "loss", "kl", "entropy"}
    expected |= {f"{name}/{d}" for name in ("kl", "entropy", "token_share") for d in ROUTES}
    expected |= {"rows/first", "rows/second", "response_length", "finished_share", "reward"}
    expected |= {"correction_masked", "correction_truncated", "sampler_ratio", "correction"}
    expected |= {"top_k": {"student_mass", "teacher_mass"}}.get(estimator, set())
    expected |= {"sampled_token": {"advantage_abs", "clipped"}}.get(estimator, set())
    for line in ran.lines:
        assert expected <= set(line)
        assert all(math.isfinite(value) for value in line.values())
        assert line["rows/first"] == line["rows/second"] == 12
        shares = {name: line[f"token_share/{name}"] for name in ROUTES}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
        for name in ("kl", "entropy"):
            mean = sum(shares[domain] * line[f"{name}/{domain}"] for domain in ROUTES)
            assert line[name] == pytest.approx(mean, rel=1e-3, abs=1e-5)
        assert 0 < line["entropy"] < math.log(100)
        assert line["sampler_ratio"] == pytest.approx(1, abs=1e-4)
    assert ran.metrics == {"kl": ran.lines[-1]["kl"], "tokens": ran.lines[-1]["tokens"]}


@pytest.mark.parametrize("updates", [1, 3])
def test_the_logged_loss_is_what_is_descended(distill: Callable[..., Any], updates: int) -> None:
    """With token means and no weights it is the mean KL per token."""
    token = distill(aggregation="token", num_minibatches=updates).lines
    assert [line["loss"] for line in token] == pytest.approx([line["kl"] for line in token])
    constant = distill(aggregation={"kind": "constant", "constant": 4}, steps=1).lines[0]
    mean_sum = constant["kl"] * constant["response_length"]
    assert constant["loss"] == pytest.approx(mean_sum / 4, rel=1e-4)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_student_comes_nearer_to_each_teacher(
    distill: Callable[..., Any], estimator: str
) -> None:
    ran = distill(steps=30, prompts_per_step=32, estimator=estimator, lr=0.01)
    for name in ROUTES:
        first = sum(line[f"kl/{name}"] for line in ran.lines[:3])
        last = sum(line[f"kl/{name}"] for line in ran.lines[-3:])
        assert last < 0.8 * first, name


SETTINGS: list[dict[str, Any]] = [
    {"seed": 1},
    {"steps": 6},
    {"lr": 0.02},
    {"lr_decay": {"kind": "cosine", "end": 0.5}},
    {"lr_decay": "linear"},
    {"warmup_steps": 2},
    {"optimizer": {"beta1": 0.5}},
    {"optimizer": {"beta2": 0.5}},
    {"optimizer": {"weight_decay": 0.5}},
    {"optimizer": {"max_grad_norm": 1e-9}},
    {"prompts_per_step": 10},
    {"samples_per_prompt": 2},
    {"max_new_tokens": 5},
    {"temperature": 0.7},
    {"num_minibatches": 2},
    {"aggregation": "token"},
    {"aggregation": "token", "balance": "tokens"},
    {"aggregation": "constant"},
    {
        "aggregation": {"kind": "constant", "constant": 50},
        "optimizer": {"max_grad_norm": 100.0},
    },
    {"domain_weights": {"short": 0.5}},
    {"domain_weights": {"words": 0.0}},
    {"estimator": "forward_kl"},
    {"estimator": "jsd"},
    {"estimator": {"kind": "jsd", "beta": 0.2}},
    {"estimator": {"kind": "reverse_kl", "cache": "bfloat16"}},
    {"estimator": "top_k"},
    {"estimator": {"kind": "top_k", "k": 8}},
    {"estimator": "sampled_token"},
    {"estimator": {"kind": "sampled_token", "clip": 0.5}},
    {"estimator": {"kind": "sampled_token", "clip": None}},
    {"reward_weight": 0.5, "samples_per_prompt": 2},
    {"reward_weight": 1.5, "samples_per_prompt": 2},
    {"estimator": "sampled_token", "correction": {"kind": "truncated", "high": 1.0}},
    {
        "estimator": "sampled_token",
        "correction": {"kind": "truncated", "high": 1.0, "sequence": True},
    },
    {"estimator": "sampled_token", "correction": {"kind": "icepop", "high": 1.0}},
    {"estimator": "sampled_token", "correction": {"kind": "icepop", "low": 1.0}},
    {"routes": {"short": "second", "words": "first"}},
    {"routes": {"short": "first", "words": "first"}},
]


def test_every_setting_changes_the_result(distill: Callable[..., Any], same: Any) -> None:
    results = {"base": distill()} | {str(changes): distill(**changes) for changes in SETTINGS}
    names = list(results)
    alike = [
        (one, other)
        for i, one in enumerate(names)
        for other in names[i + 1 :]
        if same(results[one], results[other])
    ]
    assert alike == []


@pytest.mark.parametrize("settings", EXACT)
def test_a_student_that_is_its_teacher_stays_what_it_is(
    run_stage: RunStage,
    models: Mapping[str, str],
    domains: Mapping[str, str],
    settings: dict[str, Any],
) -> None:
    """One domain, so that student and teacher compute the same batch, bit for bit: the loss is 0,
    the gradient is 0, and Adam, which would blow any rounding up to a full step, does nothing."""
    inputs = dict.fromkeys(("start", "teachers.self"), models["start"])
    inputs["domains.short"] = domains["domains.short"]
    ran = run_stage("distill", BASE | settings | {"routes": {"short": "self"}}, inputs)
    start = load_file(f"{models['start']}/model.safetensors")
    for line in ran.lines:
        assert abs(line["kl"]) < 1e-6
        assert line["grad_norm"] < 1e-6
    changed = [n for n, value in ran.weights().items() if not torch.equal(start[n], value)]
    assert changed == []


@pytest.mark.parametrize("settings", EXACT)
def test_with_several_domains_only_rounding_is_left(
    distill: Callable[..., Any], models: Mapping[str, str], settings: dict[str, Any]
) -> None:
    first = distill(first=models["start"], second=models["start"], **settings).lines[0]
    other = distill(**settings).lines[0]
    for name in ROUTES:
        assert abs(first[f"kl/{name}"]) < 1e-5 < other[f"kl/{name}"]
    assert first["grad_norm"] < 1e-5 * other["grad_norm"] + 1e-5


def test_the_logged_kl_is_the_reverse_one(distill: Callable[..., Any]) -> None:
    """At step 1 nothing has been learned yet, so only the loss depends on the divergence."""
    lines = [
        distill(steps=1, estimator=divergence).lines[0]
        for divergence in ("reverse_kl", "forward_kl", "jsd")
    ]
    for line in lines[1:]:
        assert line["loss"] != pytest.approx(lines[0]["loss"], rel=0.01)
        for name in ("kl", "kl/short", "kl/words", "entropy"):
            assert line[name] == pytest.approx(lines[0][name], rel=1e-6)


def test_a_narrow_cache_rounds_the_teacher_only(distill: Callable[..., Any]) -> None:
    wide, narrow = (
        distill(steps=1, estimator={"kind": "reverse_kl", "cache": cache}).lines[0]
        for cache in ("float32", "bfloat16")
    )
    assert narrow["entropy"] == wide["entropy"]
    assert narrow["kl"] != wide["kl"]
    assert narrow["kl"] == pytest.approx(wide["kl"], rel=0.02)


@pytest.mark.parametrize("estimator", ["reverse_kl", "top_k"])
def test_one_loss_call_serves_all_teachers(
    distill: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, estimator: str
) -> None:
    """The batch fits one micro-batch: one call per step, whatever the number of domains."""
    name = {"reverse_kl": "full_vocabulary"}.get(estimator, estimator)
    original, calls = getattr(stage, name), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(args[0]))
        return original(*args, **kwargs)

    monkeypatch.setattr(stage, name, counted)
    ran = distill(steps=2, estimator=estimator)
    assert sum(calls) == ran.lines[-1]["tokens"]
    assert len(calls) == 2


def test_the_self_teacher_holds_its_domain(
    distill: Callable[..., Any], models: Mapping[str, str]
) -> None:
    """`words` is to stay where it is while `short` moves to its teacher."""
    ran = distill(steps=20, prompts_per_step=32, second=models["start"], lr=0.005)
    assert abs(ran.lines[0]["kl/words"]) < 1e-5
    assert ran.lines[-1]["kl/words"] < 0.25 * ran.lines[-1]["kl/short"]


def test_each_row_is_read_by_its_own_teacher(
    run_stage: RunStage, models: Mapping[str, str], domains: Mapping[str, str]
) -> None:
    """At step 1 the student is the same everywhere, so a domain's KL depends on its teacher alone:
    that of both domains together is that of each alone."""
    together: dict[str, float] = {}
    for routes in ({"short": "first", "words": "second"}, {"short": "first"}, {"words": "second"}):
        inputs = {"start": models["start"]}
        inputs |= {f"domains.{name}": domains[f"domains.{name}"] for name in routes}
        inputs |= {"teachers.first": models["one"], "teachers.second": models["two"]}
        changes = {"routes": routes, "steps": 1, "prompts_per_step": 400 * len(routes)}
        line = run_stage("distill", BASE | changes, inputs).lines[0]
        for name in routes:
            value = together.setdefault(name, line[f"kl/{name}"])
            # Other prompts and random numbers, but 400 rows each.
            assert line[f"kl/{name}"] == pytest.approx(value, rel=0.15)
    assert together["short"] != pytest.approx(together["words"], rel=0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"correction": "icepop"}, "there is nothing to correct"),
        ({"estimator": "top_k", "correction": "truncated"}, "there is nothing to correct"),
        ({"estimator": "sampled_token", "num_minibatches": 2}, "no longer the student's own"),
        (
            {"reward_weight": 1.0, "samples_per_prompt": 2, "num_minibatches": 2},
            "no longer the student's own",
        ),
    ],
)
def test_corrections_go_with_policy_gradients(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config("distill", "student", {"steps": 1} | settings)


def test_masked_tokens_do_not_learn(distill: Callable[..., Any], models: Mapping[str, str]) -> None:
    """Sampler and learner never agree to the last bit: bounds [1, 1] mask nearly every token."""
    usual, strict = (
        distill(estimator="sampled_token", correction={"kind": "icepop"} | bounds).lines
        for bounds in ({}, {"low": 1.0, "high": 1.0})
    )
    for loose, tight in zip(usual, strict, strict=True):
        assert loose["correction_masked"] == 0
        assert 0.3 < tight["correction_masked"] <= 1


def test_the_reward_pulls_beside_the_teacher(distill: Callable[..., Any]) -> None:
    """The same teachers, with a reward that outweighs them and without one."""
    settings = {"steps": 25, "samples_per_prompt": 4, "prompts_per_step": 16, "warmup_steps": 0}
    ran = distill(**settings, reward_weight=30.0)
    assert "reward" not in distill().lines[0]
    first = sum(line["reward"] for line in ran.lines[:3])
    assert sum(line["reward"] for line in ran.lines[-3:]) > first + 0.3


def with_domains(lengths: list[int], domains: list[int]) -> Batch:
    """Responses of these lengths to problems of these domains."""
    batch = Batch.from_tokens([[1]] * len(lengths), [[2] * n for n in lengths], pad_id=0)
    batch["domain_B"] = torch.tensor(domains)
    return batch


def test_weights_by_hand() -> None:
    """4 rows of `a` with 2 tokens and 2 of `b` with 12: shares of rows 2/3 and 1/3, of tokens 1/4
    and 3/4, so the balance is 8/3 and 4/9; with weights 1 and 3 that makes 8/3 and 4/3."""
    batch = with_domains([2, 12, 2, 2, 12, 2], [0, 1, 0, 0, 1, 0])
    settings = Distill(
        steps=1, aggregation="token", balance="tokens", domain_weights={"b": 3.0}, routes={}
    )
    weight_B = loss_weights(settings, ["a", "b"], batch)
    torch.testing.assert_close(weight_B, torch.tensor([8 / 3, 4 / 3, 8 / 3, 8 / 3, 4 / 3, 8 / 3]))
    plain = Distill(steps=1, domain_weights={"b": 3.0})
    assert loss_weights(plain, ["a", "b"], batch).tolist() == [1, 3, 1, 1, 3, 1]


def test_rows_that_are_averaged_are_in_balance_already() -> None:
    settings = Distill(steps=1, aggregation="sequence", balance="tokens")
    batch = Batch.from_tokens([[1], [1]], [[2], [2, 3, 4]], pad_id=0)
    batch["domain_B"] = torch.tensor([0, 1])
    assert loss_weights(settings, ["a", "b"], batch).tolist() == [1.0, 1.0]
    by_sum = Distill(steps=1, aggregation="constant", balance="tokens")
    assert loss_weights(by_sum, ["a", "b"], batch).tolist() == pytest.approx([2.0, 2 / 3])


def test_balance_survives_a_domain_without_rows() -> None:
    settings = Distill(steps=1, aggregation="token", balance="tokens")
    assert loss_weights(settings, ["a", "b"], with_domains([2, 4], [0, 0])).tolist() == [1, 1]


def test_a_domain_of_weight_zero_teaches_nothing(
    distill: Callable[..., Any], models: Mapping[str, str], same: Any
) -> None:
    """The teacher of a domain that counts nothing may be any other: nothing changes."""
    settings = {"domain_weights": {"words": 0.0}}
    assert same(distill(**settings), distill(**settings, second=models["one"]))
    assert not same(distill(), distill(second=models["one"]))


def other_template(path: Path) -> None:
    file = path / "chat_template.jinja"
    file.write_text(file.read_text() + " ")


def other_token(path: Path) -> None:
    file = path / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))


def other_stop(path: Path) -> None:
    file = path / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 4}))


def test_teachers_of_another_tongue_are_refused_before_the_first_step(
    distill: Callable[..., Any], models: Mapping[str, str], tmp_path: Path
) -> None:
    shutil.copytree(models["two"], tmp_path / "other")
    other_token(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"teacher 'second'.*token 'a' has id"):
        distill(second=str(tmp_path / "other"))
    assert not list(tmp_path.glob("work-*/metrics.jsonl"))


@pytest.mark.parametrize("change", [other_template, other_stop])
def test_what_ends_a_teachers_turn_and_how_it_lays_prompts_out_is_its_own(
    distill: Callable[..., Any],
    models: Mapping[str, str],
    tmp_path: Path,
    change: Callable[[Path], None],
) -> None:
    shutil.copytree(models["two"], tmp_path / "other")
    plain = distill(second=models["two"])
    change(tmp_path / "other")
    ran = distill(second=str(tmp_path / "other"))
    # The template's space at the end changes what this teacher reads, and nothing else.
    one, other = plain.lines[0], ran.lines[0]
    assert one["kl/short"] == other["kl/short"]
    assert (one["kl/words"] == other["kl/words"]) == (change is other_stop)


@pytest.mark.parametrize("estimator", ["sampled_token", "top_k", "reverse_kl"])
@pytest.mark.parametrize("wider", ["teacher", "student"])
def test_rows_of_padding_are_no_part_of_a_divergence(
    run_stage: Callable[..., Any],
    make_model: Callable[..., LanguageModel],
    save_model: Callable[[LanguageModel], str],
    domains: Mapping[str, str],
    estimator: str,
    wider: str,
) -> None:
    """One model with and without 28 loud rows beyond its tokens: nothing is left to learn."""
    narrow, wide = (
        make_model("llama", stop=list(range(4, 30))),
        make_model("llama", stop=list(range(4, 30)), vocabulary=128),
    )
    rows = narrow.model.state_dict()
    with torch.no_grad():
        for name, value in wide.model.state_dict().items():
            value[: len(rows[name])] = rows[name]
        wide.model.lm_head.weight[100:] = 3.0
    student, teacher = (narrow, wide) if wider == "teacher" else (wide, narrow)
    inputs = {"start": save_model(student), "teachers.t": save_model(teacher), **domains}
    settings = BASE | {"routes": {"short": "t", "words": "t"}, "steps": 1, "estimator": estimator}
    line = run_stage("distill", settings, inputs).lines[0]
    for name in ("kl/short", "kl/words"):
        assert abs(line[name]) < 1e-5


def test_a_teacher_of_another_size_and_architecture_will_do(
    distill: Callable[..., Any],
    make_model: Callable[..., LanguageModel],
    save_model: Callable[[LanguageModel], str],
    models: Mapping[str, str],
) -> None:
    generation = json.loads(Path(models["one"], "generation_config.json").read_text())
    second = save_model(make_model("gpt2", stop=generation["eos_token_id"]))
    for estimator in ESTIMATORS:
        ran = distill(second=second, estimator=estimator)
        assert ran.lines[0]["kl/words"] > 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"estimator": {"kind": "top_k", "clip": 1.0}}, "'estimator.clip': unknown option"),
        ({"estimator": {"kind": "jsd", "beta": 1.0}}, "'estimator.beta'"),
        (
            {"estimator": {"kind": "sampled_token", "cache": "bfloat16"}},
            "'estimator.cache': unknown",
        ),
        ({"estimator": "kl"}, "choices: .*reverse_kl"),
        ({"aggregation": {"kind": "sequence", "constant": 8}}, "'aggregation.constant': unknown"),
        ({"reward_weight": 0.5}, "set samples_per_prompt to 2 or more"),
        ({"domain_weights": {"word": 2.0}}, "'word' is not a domain .* choices: short, words"),
        ({"domain_weights": {"words": -1.0}}, "domain_weights.words"),
        ({"estimator": "k1"}, "estimator = k1: .* zero gradient .* use sampled_token"),
        ({"teachers": {}}, "unknown option"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config("distill", "student", BASE | changes)


def test_teachers_by_mode_and_teachers_in_turn(distill: Callable[..., Any]) -> None:
    """Of 12 prompts 6 are of each domain; where a domain has two teachers each reads half."""
    both = distill(steps=1, routes={"short": ("first", "second"), "words": "second"}).lines[0]
    assert (both["rows/first"], both["rows/second"]) == (3, 9)
    config = build_config(
        "distill",
        "s",
        {"steps": 1, "routes": {"a/think": ("x", "y"), "a/no_think": "z", "b": "x"}},
    )
    assert isinstance(config, Distill)
    assert config.teachers == ["x", "y", "z"]
    assert config.teachers_of("a", "think") == ("x", "y")
    assert config.teachers_of("a", "no_think") == ("z",)
    assert config.teachers_of("b", "think") == config.teachers_of("b") == ("x",)


@pytest.mark.parametrize("kind", ["truncated", "icepop"])
@pytest.mark.parametrize(
    "policy_gradient",
    [
        {"estimator": "sampled_token", "num_minibatches": 2},
        {"reward_weight": 0.5, "samples_per_prompt": 2, "num_minibatches": 2},
    ],
)
def test_whole_responses_are_corrected(
    distill: Callable[..., Any], kind: str, policy_gradient: dict[str, Any]
) -> None:
    """In the first update student and sampler agree, and a factor of a response is at most 1 with
    this bound, whatever the later update has moved."""
    correction = {"kind": kind, "high": 1.0, "sequence": True}
    (line,) = distill(steps=1, correction=correction, **policy_gradient).lines
    assert line["sampler_ratio"] == pytest.approx(1, abs=0.2)
    assert line["sampler_ratio_bounded"] == 0
    assert 0 < line["correction"] <= 1
    assert line["correction_square"] <= line["correction"]
    cut = {"truncated": "correction_truncated", "icepop": "correction_masked"}[kind]
    assert 0 < line[cut] < 1
    assert math.isfinite(line["loss"])
