"""reward_model: it learns what is preferred, every setting counts, and a stopped stage goes on.

Suffixes: B rows, P pairs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    MistralConfig,
)

from posttrain.algorithms import BradleyTerry, Pointwise, RewardLoss
from posttrain.backends.base import HeadLoss, LearnerSettings
from posttrain.backends.checkpoint import LanguageModel, chat_of
from posttrain.backends.local import LocalLearner
from posttrain.backends.scalar import load_scalar, save_scalar
from posttrain.engine.errors import ConfigError
from posttrain.stages.config import build_config
from posttrain.stages.data import Pool
from posttrain.stages.reward_model import (
    Draw,
    draw_batch,
    draws_of,
    hold_out,
    pairs_of,
    reward_loss,
)

RunStage = Callable[..., Any]
LEARNER = LearnerSettings(betas=(0.9, 0.98), weight_decay=0.0, max_grad_norm=1.0)
BASE: dict[str, Any] = {"steps": 5, "batch_size": 8, "lr": 0.003, "warmup_steps": 1}
WORDS = ["ab", "cde", "f", "gh", "edcb", "hg", "bbb"]


def all_pairs() -> list[dict[str, Any]]:
    """Two domains of 30 prompts. Four responses to each, ranked by how many capitals they have;
    of the six pairs every fifth is left out, as ties are."""
    found = []
    for i in range(30):
        for name in ("words", "short"):
            word = f"{WORDS[i % 7]}{WORDS[i % 5]}"
            ranked = [word.upper(), f"{word[:2].upper()}{word[2:]}", word, f"{word}xy"]
            for number, (better, worse) in enumerate(combinations(range(4), 2)):
                if (number + i) % 5:
                    found.append(
                        {"id": str(i), "domain": name, "prompt": f"{name} {WORDS[i % 7]}{i}"}
                        | {"chosen": ranked[better], "rejected": ranked[worse]}
                        | {"strength": worse - better + 1, "margin": (worse - better + 1) / 4}
                    )
    return found


def write_pairs(folder: Path, pairs: list[dict[str, Any]]) -> str:
    folder.mkdir()
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    record = {"format": 1, "name": "pairs", "kind": "pairs", "fingerprint": "2" * 64}
    (folder / "record.json").write_text(json.dumps(record))
    return str(folder)


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write_pairs(tmp_path / "pairs", all_pairs())


@pytest.fixture(scope="session")
def scored(models: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A reward model with a random score, on the body of the start."""
    path = tmp_path_factory.mktemp("scored")
    language_model = load_scalar(models["start"])
    torch.manual_seed(3)
    torch.nn.init.normal_(language_model.model.score.weight, std=0.3)
    save_scalar(language_model, path)
    record = {"format": 1, "name": "rm", "kind": "reward_model", "fingerprint": "3" * 64}
    (path / "record.json").write_text(json.dumps(record))
    return str(path)


@pytest.fixture
def train(run_stage: RunStage, models: Mapping[str, str], data: str) -> Callable[..., Any]:
    def run(start: str | None = None, work: Path | None = None, **changes: Any) -> Any:
        inputs = {"start": start or models["start"], "data": data}
        return run_stage("reward_model", BASE | changes, inputs, work)

    return run


def reward(directory: str | Path, prompt: str, response: str) -> float:
    """By transformers alone: one row through the chat template, without padding."""
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    ids = torch.tensor([tokenizer.apply_chat_template(chat).input_ids])
    with torch.no_grad():
        return float(model(input_ids=ids).logits)


def kept(per_prompt: bool, seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """The draws that a stage has after its hold-out."""
    by_domain = {
        name: [pair for pair in all_pairs() if pair["domain"] == name]
        for name in ("short", "words")
    }
    return draws_of(hold_out(by_domain, 0.1, seed=seed)[0], per_prompt=per_prompt)


def drawn(count: int, *, per_prompt: bool) -> list[list[dict[str, Any]]]:
    return [draw["pairs"] for draw in Pool(kept(per_prompt), seed=0).draw(0, count)]


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_lines_and_summary(train: Callable[..., Any]) -> None:
    """All rewards of the first step are 0: its loss is log 2, and no chosen reward is higher."""
    ran = train()
    assert [line["step"] for line in ran.lines] == [1, 2, 3, 4, 5]
    names = {"loss", "accuracy", "margin", "reward_mean", "reward_std", "grad_norm", "lr"}
    for line in ran.lines:
        assert set(line) == {"step", "total", "tokens", "seconds", *names}
        assert all(math.isfinite(value) for value in line.values())
    first, last = ran.lines[0], ran.lines[-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert [first[n] for n in ("accuracy", "margin", "reward_mean", "reward_std")] == [0, 0, 0, 0]
    pairs = [pair for draw in drawn(8, per_prompt=False) for pair in draw]
    tokens = sum(len(p["chosen"]) + len(p["rejected"]) + 2 for p in pairs)
    assert first["tokens"] == tokens
    heldout = {"heldout_accuracy", "heldout_margin", "heldout_pairs"}
    heldout |= {"heldout_accuracy/words", "heldout_accuracy/short"}
    assert set(ran.metrics) == {"loss", "accuracy", "margin", "tokens", *heldout}
    assert {n: last[n] for n in ("loss", "accuracy", "margin")}.items() <= ran.metrics.items()


@pytest.mark.parametrize(
    "loss",
    [
        BradleyTerry(),
        BradleyTerry(margins="strength"),
        BradleyTerry(margins="margin"),
        BradleyTerry(centring=0.1),
    ],
)
def test_the_first_step_against_transformers(
    train: Callable[..., Any], scored: str, loss: BradleyTerry
) -> None:
    """-log sigmoid(c - r - margin) + centring (c + r)^2, mean over pairs, row by row."""
    line = train(scored, batch_size=5, loss=loss).lines[0]
    margins = {
        "none": dict.fromkeys((1, 2, 3, 4), 0.0),
        "strength": {4: 1.0, 3: 2 / 3, 2: 1 / 3, 1: 0.0},
        # What the rows say: a quarter of their strength.
        "margin": {4: 1.0, 3: 0.75, 2: 0.5, 1: 0.25},
    }[loss.margins]
    losses, differences, rewards = [], [], []
    for (pair,) in drawn(5, per_prompt=False):
        c, r = (reward(scored, pair["prompt"], pair[side]) for side in ("chosen", "rejected"))
        losses.append(softplus(margins[pair["strength"]] - c + r))
        losses[-1] += loss.centring * (c + r) ** 2
        differences.append(c - r)
        rewards += [c, r]
    mean = sum(rewards) / 10
    expected = {
        "loss": sum(losses) / 5,
        "margin": sum(differences) / 5,
        "accuracy": sum(difference > 0 for difference in differences) / 5,
        "reward_mean": mean,
        "reward_std": math.sqrt(sum((x - mean) ** 2 for x in rewards) / 10),
    }
    assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_k_wise_is_the_mean_of_a_prompts_pairs_by_hand(
    train: Callable[..., Any], scored: str
) -> None:
    """Three prompts of 4 or 5 pairs each: every response is read, and counted as tokens, once."""
    line = train(scored, batch_size=3, per_prompt=True).lines[0]
    losses, right, tokens = [], [], 0
    for pairs in drawn(3, per_prompt=True):
        texts = {pair[side] for pair in pairs for side in ("chosen", "rejected")}
        tokens += sum(len(text) + 1 for text in texts)
        value = {text: reward(scored, pairs[0]["prompt"], text) for text in texts}
        found = [value[pair["chosen"]] - value[pair["rejected"]] for pair in pairs]
        assert len(found) in (4, 5)
        losses.append(sum(softplus(-difference) for difference in found) / len(found))
        right += [difference > 0 for difference in found]
    assert line["loss"] == pytest.approx(sum(losses) / 3, rel=1e-4)
    assert line["accuracy"] == pytest.approx(sum(right) / len(right), rel=1e-4)
    assert line["tokens"] == tokens


def test_pointwise_by_hand(train: Callable[..., Any], scored: str) -> None:
    """Chosen responses are good and rejected ones bad: the mean over both sides of each pair."""
    line = train(scored, batch_size=5, loss="pointwise").lines[0]
    losses, right = [], []
    for (pair,) in drawn(5, per_prompt=False):
        c, r = (reward(scored, pair["prompt"], pair[side]) for side in ("chosen", "rejected"))
        losses.append((softplus(-c) + softplus(r)) / 2)
        right += [c > 0, r <= 0]
    assert line["loss"] == pytest.approx(sum(losses) / 5, rel=1e-4)
    assert line["label_accuracy"] == pytest.approx(sum(right) / 10)


def test_pointwise_labels_are_shares_of_wins(models: Mapping[str, str]) -> None:
    """a > b, a > c and b > c: a wins 2 of 2, b 1 of 2, c none; the other draw has one pair and is
    filled up to three rows."""

    def pair(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
        return {"id": prompt, "prompt": prompt, "chosen": chosen, "rejected": rejected}

    draws = [
        {"pairs": [pair("p", "a", "b"), pair("p", "a", "c"), pair("p", "b", "c")]},
        {"pairs": [pair("q", "d", "e")]},
    ]
    batch, group_rows = draw_batch(draws, chat_of(load_scalar(models["start"])))
    assert group_rows == 3
    assert batch["filled_B"].tolist() == [True] * 5 + [False]
    assert batch.sampled_len_B.tolist() == [2, 2, 2, 2, 2, 0]
    chosen_P, rejected_P, place_P = pairs_of(batch)
    assert list(zip(chosen_P.tolist(), rejected_P.tolist(), strict=True)) == [
        *((0, 1), (0, 2), (1, 2)),
        (3, 4),
    ]
    weight_P = batch["pair_weight_BK"].flatten()[place_P]
    assert weight_P.tolist() == pytest.approx([1 / 3] * 3 + [1])
    assert batch["label_B"].tolist() == [1, 0.5, 0, 1, 0, 0]
    assert batch["label_weight_B"].tolist() == pytest.approx([1 / 3] * 3 + [1 / 2, 1 / 2, 0])


def test_whole_draws_in_any_order_keep_their_pairs_and_the_order_of_them(
    models: Mapping[str, str],
) -> None:
    """As a forward pass has them: the columns of rows say which two rows are a pair."""
    draws = Pool(kept(True), seed=0).draw(0, 4)
    chat = chat_of(load_scalar(models["start"]))
    batch, group_rows = draw_batch(draws, chat, margins="strength")
    batch["number_B"] = torch.arange(len(batch))

    def numbered(batch: Any) -> list[tuple[float, ...]]:
        chosen_P, rejected_P, place_P = pairs_of(batch)
        rows = (batch["number_B"][chosen_P], batch["number_B"][rejected_P])
        flat = (batch[f"pair_{name}_BK"].flatten()[place_P] for name in ("weight", "margin"))
        return list(zip(*(column.tolist() for column in (*rows, *flat)), strict=True))

    every = numbered(batch)
    assert len(every) == sum(len(draw["pairs"]) for draw in draws)
    index_B = torch.arange(len(batch)).reshape(4, group_rows)[[2, 0, 3]].flatten()
    left_out = range(group_rows, 2 * group_rows)
    assert numbered(batch.select(index_B)) == [row for row in every if row[0] not in left_out]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"per_prompt": True},
        {"loss": "pointwise"},
        {"loss": BradleyTerry(margins="strength", centring=0.01), "per_prompt": True},
    ],
)
def test_it_learns_the_preference_on_prompts_that_it_never_saw(
    train: Callable[..., Any], settings: dict[str, Any]
) -> None:
    ran = train(steps=60, lr=0.005, **settings)
    assert ran.metrics["heldout_pairs"] >= 20
    assert ran.metrics["heldout_accuracy"] > 0.85
    assert ran.lines[-1]["loss"] < ran.lines[0]["loss"]
    assert ran.metrics["heldout_margin"] > 0.1


def test_the_saved_model_gives_the_heldout_metrics(train: Callable[..., Any]) -> None:
    """All held-out pairs, by transformers alone."""
    ran = train(steps=8)
    by_domain = {
        name: [pair for pair in all_pairs() if pair["domain"] == name]
        for name in ("short", "words")
    }
    _, held = hold_out(by_domain, 0.1, seed=0)
    found = {}
    for domain, pairs in held.items():
        assert len({pair["id"] for pair in pairs}) == 3, "a tenth of 30 prompts"
        found[domain] = [
            reward(ran.out, pair["prompt"], pair["chosen"])
            - reward(ran.out, pair["prompt"], pair["rejected"])
            for pair in pairs
        ]
    every = [*found["short"], *found["words"]]
    expected = {
        "heldout_accuracy": sum(x > 0 for x in every) / len(every),
        "heldout_margin": sum(every) / len(every),
        "heldout_pairs": len(every),
    }
    for domain, margins in found.items():
        expected[f"heldout_accuracy/{domain}"] = sum(x > 0 for x in margins) / len(margins)
    assert {n: ran.metrics[n] for n in expected} == pytest.approx(expected, rel=1e-3)


SETTINGS: list[dict[str, Any]] = [
    {"seed": 1},
    {"precision": "bfloat16"},
    {"steps": 6},
    {"steps": None, "epochs": 0.5},
    {"batch_size": 6},
    {"lr": 0.006},
    {"lr_decay": "constant"},
    {"lr_decay": "linear"},
    {"lr_decay": {"kind": "cosine", "end": 0.5}},
    {"warmup_steps": 2},
    {"optimizer": {"beta1": 0.5}},
    {"optimizer": {"beta2": 0.5}},
    {"optimizer": {"weight_decay": 0.5}},
    {"optimizer": {"max_grad_norm": 0.001}},
    {"loss": "pointwise"},
    {"loss": "pointwise", "per_prompt": True},
    {"loss": BradleyTerry(margins="strength")},
    {"loss": BradleyTerry(margins="margin")},
    {"loss": BradleyTerry(centring=0.1)},
    {"per_prompt": True},
    {"holdout": 0.5},
    {"holdout": 0.0},
    {"optimizer": {"ema": 0.5}},
    {"trainable": ["score.*", "*.layers.1.*"]},
]


def test_every_setting_changes_the_weights(
    train: Callable[..., Any], same: Any, scored: str
) -> None:
    results = {"base": train()} | {str(changes): train(**changes) for changes in SETTINGS}
    results["start"] = train(scored)
    names = list(results)
    alike = [
        (one, other)
        for i, one in enumerate(names)
        for other in names[i + 1 :]
        if same(results[one], results[other])
    ]
    assert alike == []
    assert "heldout_accuracy" not in results[str({"holdout": 0.0})].metrics


@pytest.mark.parametrize("settings", [{}, {"per_prompt": True, "precision": "bfloat16"}])
def test_a_stopped_stage_ends_with_the_same_bits(
    train: Callable[..., Any], goes_on: Callable[..., Any], settings: dict[str, Any]
) -> None:
    """Stopped after step 3 with a checkpoint of step 2."""
    calm, resumed = goes_on(lambda work: train(work=work, **settings), saved=2, killed=3)
    assert calm.metrics == resumed.metrics


@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "mistral"])
@pytest.mark.parametrize(
    ("loss", "per_prompt"),
    [(BradleyTerry(), False), (BradleyTerry(centring=0.1), True), (Pointwise(), False)],
)
def test_micro_batches_of_whole_draws_change_only_rounding(
    make_model: Callable[..., LanguageModel],
    save_model: Callable[[LanguageModel], str],
    kind: str,
    loss: RewardLoss,
    per_prompt: bool,
) -> None:
    """Also where a row has its own bin (mistral, whose window no mask can express)."""
    draws = Pool(kept(per_prompt), seed=0).draw(0, 6)
    start = save_model(windowed(make_model) if kind == "mistral" else make_model(kind))
    results = [one_update(start, draws, loss, max_tokens=size) for size in (8192, 40)]
    assert results[0] == pytest.approx(results[1], rel=1e-3)
    assert results[0]["grad_norm"] > 0.01


def one_update(
    start: str, draws: list[Draw], loss: RewardLoss, *, max_tokens: int = 8192
) -> dict[str, float]:
    """The sums of one update without a step, of a model with a random score."""
    language_model = load_scalar(start)
    torch.manual_seed(0)
    torch.nn.init.normal_(language_model.model.score.weight)
    learner = LocalLearner(language_model, LEARNER, max_tokens=max_tokens)
    batch, group_rows = draw_batch(draws, learner.chat)
    return learner.update(
        batch.with_end_position(),
        HeadLoss(reward_loss, loss),
        count=len(draws),
        lr=0.0,
        group_rows=group_rows,
    )


def windowed(make_model: Callable[..., LanguageModel]) -> LanguageModel:
    tokenizer = make_model().tokenizer
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=6,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    return LanguageModel(model=AutoModelForCausalLM.from_config(config), tokenizer=tokenizer)


def test_the_order_of_a_draws_pairs_changes_only_rounding(models: Mapping[str, str]) -> None:
    draws = Pool(kept(True), seed=0).draw(0, 4)
    turned = [{"pairs": draw["pairs"][::-1]} for draw in draws[::-1]]
    results = [one_update(models["start"], given, BradleyTerry()) for given in (draws, turned)]
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_no_prompt_is_both_learned_from_and_held_out() -> None:
    by_domain = {"d": [{"id": str(i % 10), "prompt": f"p{i % 10}", "row": i} for i in range(40)]}
    learned, held = hold_out(by_domain, 0.25, seed=0)
    ids = [{pair["id"] for pair in part["d"]} for part in (learned, held)]
    assert not ids[0] & ids[1] and len(ids[1]) == 2 and len(ids[0]) == 8
    assert len(learned["d"]) + len(held["d"]) == 40
    assert hold_out(by_domain, 0.25, seed=1)[1] != held
    assert hold_out(by_domain, 0.0, seed=0) == (by_domain, {})
    alone = {"d": by_domain["d"][:1]} | {"e": by_domain["d"]}
    learned, held = hold_out(alone, 0.1, seed=0)
    assert len(learned["d"]) == 1 and set(held) == {"e"}
    with pytest.raises(ConfigError, match=r"holdout = 0.1: the pairs of each domain are all of"):
        hold_out({"d": by_domain["d"][:1]}, 0.1, seed=0)


def test_modes_of_a_prompt_are_prompts_of_their_own_but_held_out_together(
    make_model: Callable[..., LanguageModel],
) -> None:
    language_model = make_model()
    language_model.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '+' if enable_thinking else '-' }}{% endif %}"
    )
    by_domain = {
        "d": [
            {"id": f"{i}", "domain": "d", "prompt": f"p{i}", "mode": mode}
            | {"chosen": "a", "rejected": "b"}
            for i in range(4)
            for mode in ("think", "no_think")
        ]
    }
    draws = draws_of(by_domain, per_prompt=True)["d"]
    assert [len(draw["pairs"]) for draw in draws] == [1] * 8
    batch, _ = draw_batch(draws[:2], chat_of(language_model))
    starts = [
        language_model.tokenizer.decode(row[:length])
        for row, length in zip(batch.tokens_BT, batch.prompt_len_B, strict=True)
    ]
    assert starts == ["p0+", "p0+", "p0-", "p0-"]
    _, held = hold_out(by_domain, 0.25, seed=0)
    assert len(held["d"]) == 2 and len({pair["id"] for pair in held["d"]}) == 1


def test_pairs_without_a_strength_are_named(
    run_stage: RunStage, models: Mapping[str, str], tmp_path: Path
) -> None:
    pairs = all_pairs()
    pairs[3] |= {"strength": 5}
    inputs = {"start": models["start"], "data": write_pairs(tmp_path / "bad", pairs)}
    with pytest.raises(ConfigError, match=r"margins = strength: .*has strength = 5; it takes 1"):
        run_stage("reward_model", BASE | {"loss": BradleyTerry(margins="strength")}, inputs)
    del pairs[4]["margin"]
    inputs["data"] = write_pairs(tmp_path / "worse", pairs)
    with pytest.raises(ConfigError, match=r"margins = margin: the pair of problem .*has no margin"):
        run_stage("reward_model", BASE | {"loss": BradleyTerry(margins="margin")}, inputs)


def test_single_responses_are_refused(
    run_stage: RunStage, models: Mapping[str, str], tmp_path: Path
) -> None:
    row = {"id": "1", "domain": "d", "prompt": "p", "response": "r", "desirable": True}
    inputs = {"start": models["start"], "data": write_pairs(tmp_path / "single", [row])}
    with pytest.raises(ConfigError, match=r"learns from pairs, .*single responses.*loss = 'kto'"):
        run_stage("reward_model", BASE, inputs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"loss": {"kind": "pointwise", "centring": 0.1}},
            "field 'loss.*centring': unknown option",
        ),
        ({"loss": "bradley"}, "field 'loss': there is no 'bradley'; did you mean 'bradley_terry'"),
        (
            {"loss": {"kind": "bradley_terry", "centring": -0.1}},
            "field 'loss.*centring': -0.1 is not allowed",
        ),
        ({"holdout": 1.0}, "field 'holdout': 1.0 is not allowed"),
        ({"epochs": 1.0}, "exactly one of steps and epochs"),
        ({"steps": None}, "exactly one of steps and epochs"),
        ({"per_promt": True}, "field 'per_promt': unknown option; did you mean 'per_prompt'"),
    ],
)
def test_bad_settings_are_named(settings: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config("reward_model", "mine", BASE | settings)
