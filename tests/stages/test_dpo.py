"""dpo: the losses reach the weights, every setting counts, and a stopped stage goes on exactly.

Suffixes: B rows, P pairs.
"""

from __future__ import annotations

import json
import math
import pickle
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.algorithms import Dpo, DpoNorm, Ipo, Kto, Preference, SimPO
from posttrain.backends.base import LearnerSettings, TokenLoss
from posttrain.backends.checkpoint import LanguageModel, chat_of, load
from posttrain.backends.local import LocalLearner
from posttrain.backends.tiny import character_tokenizer
from posttrain.engine.errors import ConfigError
from posttrain.engine.work import read_warnings
from posttrain.rl.batch import Batch
from posttrain.schedules import linear
from posttrain.stages.config import build_config
from posttrain.stages.data import Pool
from posttrain.stages.dpo import counted_tokens, mismatched, pair_batch, preference_loss

RunStage = Callable[..., Any]
LEARNER = LearnerSettings(betas=(0.9, 0.98), weight_decay=0.0, max_grad_norm=1.0)
BASE: dict[str, Any] = {"steps": 5, "batch_size": 8, "lr": 0.003, "warmup_steps": 1}
LOSSES = ("dpo", "dpo_norm", "simpo", "ipo", "kto")


def all_pairs() -> list[dict[str, Any]]:
    """40 pairs of two domains; the chosen response is in capitals, the rejected one longer."""
    words = ["ab", "cde", "f", "gh", "edcb"]
    return [
        {"id": str(i), "domain": name, "prompt": f"{name} {words[i % 5]}{i}"}
        | {"chosen": words[i % 5].upper(), "rejected": f"{words[(i + 1) % 5]}xy"}
        | {"rewards": [1.0, 0.0]}
        for i in range(20)
        for name in ("words", "short")
    ]


@pytest.fixture
def data(tmp_path: Path) -> str:
    folder = tmp_path / "pairs"
    folder.mkdir()
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in all_pairs()))
    record = {"format": 1, "name": "pairs", "kind": "pairs", "fingerprint": "2" * 64}
    (folder / "record.json").write_text(json.dumps(record))
    return str(folder)


@pytest.fixture
def dpo(run_stage: RunStage, models: Mapping[str, str], data: str) -> Callable[..., Any]:
    def run(reference: str | None = None, work: Path | None = None, **changes: Any) -> Any:
        inputs = {"start": models["start"], "data": data}
        if reference is not None:
            inputs["reference"] = models[reference]
        return run_stage("dpo", BASE | changes, inputs, work)

    return run


def response_logp(directory: str, prompt: str, response: str, *, prompt_of: str = "") -> float:
    """Sum over the response's tokens, by transformers alone, of one row without padding."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    message = [{"role": "user", "content": prompt}]
    start = tokenizer.apply_chat_template(message, add_generation_prompt=True).input_ids
    message.append({"role": "assistant", "content": response})
    ids = torch.tensor([tokenizer.apply_chat_template(message).input_ids])
    with torch.no_grad():
        logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    taken = logp.gather(1, ids[0, 1:, None])[len(start) - 1 :, 0]
    return float(taken.sum())


def drawn(count: int) -> list[dict[str, Any]]:
    by_domain = {
        name: [pair for pair in all_pairs() if pair["domain"] == name]
        for name in ("short", "words")
    }
    return Pool(by_domain, seed=0).draw(0, count)


def test_lines_and_summary(dpo: Callable[..., Any]) -> None:
    """The first step is measured where policy and reference are one: log 2, and no margin."""
    ran = dpo()
    assert [line["step"] for line in ran.lines] == [1, 2, 3, 4, 5]
    names = {"loss", "accuracy", "margin", "reward_chosen", "reward_rejected", "nll"}
    names |= {"logp_chosen", "logp_rejected", "grad_norm", "lr"}
    for line in ran.lines:
        assert set(line) == {"step", "total", "tokens", "seconds", *names}
        assert all(math.isfinite(value) for value in line.values())
    first, last = ran.lines[0], ran.lines[-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert [first[n] for n in ("margin", "reward_chosen")] == pytest.approx([0, 0], abs=1e-5)
    assert ran.metrics == {n: last[n] for n in ("loss", "accuracy", "margin", "tokens")}
    # Responses with their end tokens.
    tokens = sum(len(p["chosen"]) + len(p["rejected"]) + 2 for p in drawn(8))
    assert first["tokens"] == tokens


def test_the_first_step_against_transformers(
    dpo: Callable[..., Any], models: Mapping[str, str]
) -> None:
    """Loss, rewards and NLL of a step computed row by row, with another model as reference."""
    loss = {"kind": "dpo", "nll_weight": 0.2}
    line = dpo(reference="two", batch_size=6, loss=loss).lines[0]
    sums = {"loss": 0.0, "nll": 0.0, "reward_chosen": 0.0, "reward_rejected": 0.0}
    for pair in drawn(6):
        score, logp = {}, {}
        for side in ("chosen", "rejected"):
            logp[side], ref = (
                response_logp(models[name], pair["prompt"], pair[side]) for name in ("start", "two")
            )
            score[side] = logp[side] - ref
            sums[f"reward_{side}"] += 0.1 * score[side] / 6
        nll = -logp["chosen"] / (len(pair["chosen"]) + 1)
        margin = 0.1 * (score["chosen"] - score["rejected"])
        sums["nll"] += nll / 6
        sums["loss"] += (math.log1p(math.exp(-margin)) + 0.2 * nll) / 6
    assert {name: line[name] for name in sums} == pytest.approx(sums, rel=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_learns_to_prefer_the_chosen(dpo: Callable[..., Any], loss: str) -> None:
    beta = 2.0 if loss in ("dpo_norm", "simpo") else 0.1
    ran = dpo(loss={"kind": loss, "beta": beta}, steps=30)
    first, last = ran.lines[0], ran.lines[-1]
    assert last["loss"] < first["loss"]
    assert last["accuracy"] > 0.9
    assert last["margin"] > first["margin"]
    likelier = [line["logp_chosen"] - line["logp_rejected"] for line in (first, last)]
    assert likelier[1] > likelier[0] + 1


SETTINGS: list[dict[str, Any]] = [
    {"seed": 1},
    {"steps": 6},
    {"steps": None, "epochs": 1.5},
    {"batch_size": 6},
    {"lr": 0.006},
    {"lr_decay": "constant"},
    {"lr_decay": "linear"},
    {"lr_decay": {"kind": "cosine", "end": 0.5}},
    {"warmup_steps": 2},
    {"optimizer": {"beta1": 0.5}},
    {"optimizer": {"beta2": 0.5}},
    {"optimizer": {"weight_decay": 0.5}},
    {"optimizer": {"max_grad_norm": 0.01}},
    {"mask_formatting": True},
    *({"loss": loss} for loss in LOSSES[1:]),
    {"loss": Dpo(beta=0.5)},
    {"loss": Dpo(label_smoothing=0.2)},
    {"loss": Dpo(nll_weight=0.2)},
    {"loss": DpoNorm(beta=0.5)},
    {"loss": DpoNorm(label_smoothing=0.2)},
    {"loss": DpoNorm(nll_weight=0.2)},
    {"loss": "dpo_norm", "mask_formatting": True},
    {"loss": SimPO(beta=0.5)},
    {"loss": SimPO(gamma=1.5)},
    {"loss": SimPO(label_smoothing=0.2)},
    {"loss": SimPO(nll_weight=0.2)},
    {"loss": Ipo(beta=0.5)},
    {"loss": Ipo(nll_weight=0.2)},
    {"loss": Kto(beta=0.5)},
    {"loss": Kto(desirable_weight=2.0)},
    {"loss": Kto(undesirable_weight=2.0)},
    {"loss": "kto", "mask_formatting": True},
    {"reference": "two"},
    {"reference": "two", "loss": "kto"},
]


def test_every_setting_changes_the_weights(dpo: Callable[..., Any], same: Any) -> None:
    results = {"base": dpo()} | {str(changes): dpo(**changes) for changes in SETTINGS}
    names = list(results)
    alike = [
        (one, other)
        for i, one in enumerate(names)
        for other in names[i + 1 :]
        if same(results[one], results[other])
    ]
    assert alike == []


def test_the_reference_is_the_start_unless_given(dpo: Callable[..., Any], same: Any) -> None:
    for loss in ("dpo", "kto"):
        assert same(dpo(loss=loss), dpo(loss=loss, reference="start"))


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_a_stopped_stage_ends_with_the_same_bits(
    dpo: Callable[..., Any], goes_on: Callable[..., Any], loss: str
) -> None:
    """Stopped after step 3 with a checkpoint of step 2: the reference is read anew, from the start
    and not from the checkpoint."""
    calm, resumed = goes_on(lambda work: dpo(loss=loss, work=work), saved=2, killed=3)
    assert calm.metrics == resumed.metrics


@pytest.mark.parametrize("loss", [Dpo(nll_weight=0.2), DpoNorm(), SimPO(), Ipo(), Kto()], ids=str)
def test_micro_batches_of_whole_pairs_change_only_rounding(
    models: Mapping[str, str], loss: Preference
) -> None:
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> list[int]:
        return torch.randint(5, 90, (length,), generator=generator).tolist()

    prompts = [tokens(n) for n in (3, 3, 9, 9, 2, 2, 5, 5)]
    batch = Batch.from_tokens(prompts, [tokens(n) for n in (2, 8, 4, 3, 1, 1, 7, 6)], pad_id=0)
    batch["counted_N"] = torch.rand(batch.num_tokens, generator=generator) < 0.8
    batch["ref_logp_B"] = -4 * torch.rand(8, generator=generator)
    batch["baseline_B"] = torch.full((8,), 0.3)
    results = []
    for max_tokens in (8192, 20):
        learner = LocalLearner(load(models["start"]), LEARNER, max_tokens=max_tokens)
        results.append(
            learner.update(batch, TokenLoss(preference_loss, loss), count=4, lr=0.0, group_rows=2)
        )
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_a_loss_can_be_sent_to_another_process() -> None:
    loss = TokenLoss(preference_loss, Kto(beta=linear(0.1, 0.5)))
    again = pickle.loads(pickle.dumps(loss))
    assert again == loss and again.settings.schedules == loss.settings.schedules


def pair(problem: str, chosen: str, rejected: str, domain: str = "d") -> dict[str, Any]:
    return {"id": problem, "domain": domain, "prompt": problem} | {
        "chosen": chosen,
        "rejected": rejected,
    }


class Letters:
    """A tokenizer in which a text is its characters."""

    pad_id = 0

    def prompt(self, text: str, mode: str | None = None) -> list[int]:
        return [ord(letter) for letter in text]

    def response(self, prompt: str, text: str, mode: str | None = None) -> list[int]:
        return [ord(letter) for letter in text]


def test_mismatched_rows_answer_another_problem() -> None:
    """Pairs of problems p, p, q, p': the last p' is of another domain and not p. The first p takes
    the responses of q, not those of the second p; the last takes those of the first, round the end.
    """
    pairs = [pair("p", "ab", "c"), pair("p", "d", "e"), pair("q", "f", "gh")]
    pairs.append(pair("p", "ij", "k", domain="e"))
    batch = pair_batch(pairs, Letters(), mismatched(pairs))  # type: ignore[arg-type]
    said = ["".join(map(chr, ids)) for ids in batch.responses()]
    assert said == ["f", "gh", "f", "gh", "ij", "k", "ab", "c"]
    asked = [chr(ids[0]) for ids in batch.tokens_BT.tolist()]
    assert asked == ["p", "p", "p", "p", "q", "q", "p", "p"]
    with pytest.raises(ConfigError, match="loss = 'kto' needs pairs of two problems"):
        mismatched(pairs[:2])


def test_kto_logs_the_baseline_of_mismatched_rows(
    dpo: Callable[..., Any], models: Mapping[str, str]
) -> None:
    """max(0, mean log ratio) of the step's prompts with the responses of the next pair."""
    ordered = sorted(all_pairs(), key=lambda pair: pair["domain"])
    found = []
    for reference in ("one", "two"):
        ratios = []
        for pair in drawn(4):
            other = ordered[(ordered.index(pair) + 1) % len(ordered)]
            for side in ("chosen", "rejected"):
                ours, theirs = (
                    response_logp(models[name], pair["prompt"], other[side])
                    for name in ("start", reference)
                )
                ratios.append(ours - theirs)
        found.append(max(0.0, sum(ratios) / len(ratios)))
        line = dpo(reference=reference, loss="kto", batch_size=4).lines[0]
        assert line["kl_baseline"] == pytest.approx(found[-1], rel=1e-4)
    assert max(found) > 1, "one of the two is not cut at 0"


def test_formatting_tokens_are_the_special_ones(
    make_model: Callable[..., LanguageModel],
) -> None:
    chat = chat_of(make_model(stop=[4, 40]))
    tokenizer = chat.tokenizer
    counted_V = counted_tokens(chat, mask_formatting=True)
    masked = set((~counted_V).nonzero()[:, 0].tolist())
    assert masked == {*tokenizer.all_special_ids, 4, 40}
    assert tokenizer.convert_tokens_to_ids("<|user|>") in masked
    assert bool(counted_tokens(chat, mask_formatting=False).all())


def test_masked_end_tokens_leave_the_reward_alone(
    dpo: Callable[..., Any], models: Mapping[str, str]
) -> None:
    """The same pairs with and without the mask differ by the end token's log ratio alone."""
    whole, masked = (dpo(reference="two", mask_formatting=m).lines[0] for m in (False, True))
    assert whole["logp_chosen"] == masked["logp_chosen"], "logged over all tokens"
    assert whole["nll"] == masked["nll"]
    assert abs(whole["reward_chosen"] - masked["reward_chosen"]) > 0.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": 1.0}, "field 'gamma': unknown option"),
        ({"loss": {"gamma": 1.0}}, "field 'loss'.*kind"),
        ({"loss": {"kind": "dpo", "gamma": 1.0}}, "field 'loss.*gamma': unknown option"),
        ({"loss": {"kind": "kto", "nll_weight": 0.2}}, "field 'loss.*nll_weight': unknown option"),
        ({"loss": "sigmoid"}, "field 'loss': there is no 'sigmoid'.*choices: dpo, dpo_norm"),
        ({"loss": {"kind": "dpo", "beta": 0.0}}, "field 'loss.*beta': 0.0 is not allowed"),
        ({"loss": {"kind": "dpo", "label_smoothing": 0.5}}, "label_smoothing': 0.5 is not allowed"),
        ({"epochs": 1.0}, "exactly one of steps and epochs"),
        ({"steps": None}, "exactly one of steps and epochs"),
        ({"los": "kto"}, "field 'los': unknown option; did you mean 'loss'"),
    ],
)
def test_bad_settings_are_named(settings: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config("dpo", "mine", BASE | settings)


def test_a_reference_with_another_template_is_told(
    run_stage: RunStage, models: Mapping[str, str], data: str, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(models["start"], other)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text() + "{# of another kind #}")
    for reference, told in ((models["start"], 0), (str(other), 1)):
        inputs = {"start": models["start"], "data": data, "reference": reference}
        ran = run_stage("dpo", BASE, inputs)
        said = read_warnings(ran.out.parent)
        assert sum("reference has another chat template" in text for text in said) == told


def test_a_reference_of_another_vocabulary_is_refused(
    run_stage: RunStage,
    models: Mapping[str, str],
    data: str,
    make_model: Callable[..., LanguageModel],
    save_model: Callable[[LanguageModel], str],
) -> None:
    other = replace(make_model(), tokenizer=character_tokenizer(["é"]))
    inputs = {"start": models["start"], "data": data, "reference": save_model(other)}
    with pytest.raises(
        ConfigError, match=r"reference 'reference': its vocabulary differs .* a ref"
    ):
        run_stage("dpo", BASE, inputs)
