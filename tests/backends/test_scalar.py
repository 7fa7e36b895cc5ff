"""Models with a score: transformers reads them as they are, and rewards are where it reads them.

Legend: B rows, T positions, N sampled tokens, D hidden.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from posttrain.backends.base import Head, HeadLoss, LearnerSettings, Metrics
from posttrain.backends.checkpoint import LanguageModel, load, save
from posttrain.backends.local import LocalLearner, LocalScorer
from posttrain.backends.scalar import (
    load_scalar,
    rewards_B,
    save_scalar,
    scores_N,
)
from posttrain.engine.errors import ConfigError
from posttrain.rl.batch import Batch

MakeModel = Callable[..., LanguageModel]
KINDS = ("qwen3", "llama", "gpt2")
LENGTHS = [(3, 2), (3, 5), (7, 5), (1, 1), (4, 6), (5, 5), (2, 9), (6, 3)]


def batch(seed: int = 0) -> Batch:
    """Eight rows of different lengths; the first two share a prompt."""
    generator = torch.Generator().manual_seed(seed)
    prompts, responses = (
        [torch.randint(5, 90, (pair[i],), generator=generator).tolist() for pair in LENGTHS]
        for i in range(2)
    )
    prompts[1] = prompts[0]
    return Batch.from_tokens(prompts, responses, pad_id=0)


def scalar(make_model: MakeModel, path: Path, kind: str = "qwen3", **options: Any) -> LanguageModel:
    """A scalar model with a random score, from a causal LM in `path`."""
    save(make_model(kind, **options), path)
    language_model = load_scalar(path)
    torch.manual_seed(5)
    torch.nn.init.normal_(language_model.model.score.weight)
    return language_model


@pytest.mark.parametrize("kind", KINDS)
def test_the_body_is_that_of_the_language_model_and_the_score_is_zero(
    make_model: MakeModel, tmp_path: Path, kind: str
) -> None:
    save(make_model(kind), tmp_path)
    ours, theirs = load_scalar(tmp_path).model, load(tmp_path).model
    body = theirs.base_model.state_dict()
    assert ours.base_model.state_dict().keys() == body.keys()
    for name, tensor in ours.base_model.state_dict().items():
        assert torch.equal(tensor, body[name]), name
    assert ours.score.weight.tolist() == [[0.0] * 32]


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_the_saved_directory_and_gives_our_rewards(
    make_model: MakeModel, tmp_path: Path, kind: str
) -> None:
    """Rows padded on the right, as a batch: transformers pools at the last token of each."""
    save_scalar(scalar(make_model, tmp_path / "lm", kind), tmp_path / "rm")
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "rm", output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    rollouts = batch()
    with torch.no_grad():
        mask_BT = rollouts.tokens_BT != 0
        expected_B = model(input_ids=rollouts.tokens_BT, attention_mask=mask_BT).logits[:, 0]
    reloaded = load_scalar(tmp_path / "rm")
    found_B = rewards_B(LocalScorer(reloaded), rollouts)
    torch.testing.assert_close(found_B, expected_B, atol=2e-5, rtol=1e-5)
    assert expected_B.std() > 0.1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rm")
    assert tokenizer.chat_template == reloaded.tokenizer.chat_template is not None
    assert json.loads((tmp_path / "rm" / "config.json").read_text())["pad_token_id"] == 0


@pytest.mark.parametrize("max_tokens", [1, 13, 10_000])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_rewards_are_read_at_their_places(
    make_model: MakeModel, tmp_path: Path, kind: str, max_tokens: int
) -> None:
    """Row by row without padding. A value stands where its token is predicted, a reward one later
    than the last value: of 3 + 2 tokens at positions 2 and 3, and at position 4."""
    language_model, rollouts = scalar(make_model, tmp_path, kind), batch()
    scorer = LocalScorer(language_model, max_tokens=max_tokens)
    values, rewards = [], []
    for row_T, (start, length) in zip(rollouts.tokens_BT, LENGTHS, strict=True):
        with torch.no_grad():
            body = language_model.model.base_model
            hidden_TD = body(input_ids=row_T[None, : start + length]).last_hidden_state[0]
        score_T = hidden_TD @ language_model.model.score.weight[0]
        values.append(score_T[start - 1 : -1])
        rewards.append(score_T[-1:])
    found_N = scores_N(scorer.hidden(rollouts), scorer.head)
    torch.testing.assert_close(found_N, torch.cat(values), atol=3e-5, rtol=1e-5)
    found_B = rewards_B(scorer, rollouts)
    torch.testing.assert_close(found_B, torch.cat(rewards), atol=3e-5, rtol=1e-5)


def test_models_with_one_row_to_a_bin_are_read_at_the_same_places(
    make_family: MakeModel, tmp_path: Path
) -> None:
    """Mistral with a window goes the plain path."""
    language_model, rollouts = scalar(make_family, tmp_path, "mistral"), batch()
    found_B = rewards_B(LocalScorer(language_model), rollouts)
    for row, (row_T, lengths) in enumerate(zip(rollouts.tokens_BT, LENGTHS, strict=True)):
        with torch.no_grad():
            expected = language_model.model(input_ids=row_T[None, : sum(lengths)]).logits
        assert float(found_B[row]) == pytest.approx(float(expected), abs=1e-4)


def test_a_row_may_fill_all_positions(make_model: MakeModel, tmp_path: Path) -> None:
    """12 tokens of 12 positions, in a family whose positions are a table: the added token is not
    read."""
    language_model = scalar(make_model, tmp_path, "gpt2", positions=12)
    alone = batch().select(torch.tensor([2]))
    assert alone.tokens_BT.shape == (1, 12)
    with torch.no_grad():
        expected = language_model.model(input_ids=alone.tokens_BT).logits
    found_B = rewards_B(LocalScorer(language_model), alone)
    assert float(found_B[0]) == pytest.approx(float(expected), abs=1e-4)


def test_the_order_of_rows_and_padding_change_only_rounding(
    make_model: MakeModel, tmp_path: Path
) -> None:
    scorer, rollouts = LocalScorer(scalar(make_model, tmp_path)), batch()
    forward_B = rewards_B(scorer, rollouts)
    order_B = torch.tensor([5, 0, 7, 3, 1, 6, 2, 4])
    torch.testing.assert_close(rewards_B(scorer, rollouts.select(order_B)), forward_B[order_B])
    alone = [rewards_B(scorer, rollouts.select(torch.tensor([row]))) for row in range(8)]
    torch.testing.assert_close(torch.cat(alone), forward_B)


def test_an_empty_response_has_the_reward_of_its_prompt(
    make_model: MakeModel, tmp_path: Path
) -> None:
    scorer = LocalScorer(scalar(make_model, tmp_path))
    rows = Batch.from_tokens([[7, 8, 9], [7, 8]], [[], [9]], pad_id=0)
    empty, full = rewards_B(scorer, rows).tolist()
    assert empty == pytest.approx(full, abs=1e-5)


def squared_error(_: Any, hidden_ND: Tensor, head: Head, rows: Batch) -> tuple[Tensor, Metrics]:
    """To the number of the row."""
    reward_B = scores_N(hidden_ND[rows.last_B], head)
    loss = (reward_B - rows["target_B"]).square().sum()
    return loss, {"loss": loss.detach()}


REGRESSION = HeadLoss(squared_error)


@pytest.mark.parametrize("kind", KINDS)
def test_body_and_score_learn(make_model: MakeModel, tmp_path: Path, kind: str) -> None:
    """From zeros the first update reaches the score alone, the second the body as well."""
    save(make_model(kind), tmp_path)
    language_model, rows = load_scalar(tmp_path), batch().with_end_position()
    rows["target_B"] = torch.arange(8)
    settings = LearnerSettings(betas=(0.9, 0.98), weight_decay=0.0, max_grad_norm=9.0)
    learner = LocalLearner(language_model, settings)
    start = {n: p.detach().clone() for n, p in language_model.model.named_parameters()}
    first = learner.update(rows, REGRESSION, count=8, lr=0.01)["loss"]
    assert first == pytest.approx(sum(i * i for i in range(8)))
    changed = {
        n for n, p in language_model.model.named_parameters() if not torch.equal(p, start[n])
    }
    assert changed == {"score.weight"}
    for _ in range(60):
        last = learner.update(rows, REGRESSION, count=8, lr=0.01)["loss"]
    assert last < 0.1 * first
    assert not torch.equal(next(language_model.model.parameters()), next(iter(start.values())))


def test_what_computes_in_bfloat16_gives_float32_scores(
    make_model: MakeModel, tmp_path: Path
) -> None:
    exact_B = rewards_B(LocalScorer(scalar(make_model, tmp_path / "lm")), batch())
    save_scalar(scalar(make_model, tmp_path / "lm"), tmp_path / "rm")
    rough = LocalScorer(load_scalar(tmp_path / "rm", dtype=torch.bfloat16))
    found_B = rewards_B(rough, batch())
    assert found_B.dtype == torch.float32
    assert not torch.equal(found_B, exact_B)
    torch.testing.assert_close(found_B, exact_B, atol=0.3, rtol=0.05)


def test_what_ends_a_response_stays_known(make_model: MakeModel, tmp_path: Path) -> None:
    save_scalar(scalar(make_model, tmp_path / "lm", stop=[4, 40]), tmp_path / "rm")
    assert load_scalar(tmp_path / "rm").stop_ids == (4, 40)
    (tmp_path / "rm" / "generation_config.json").unlink()
    assert load_scalar(tmp_path / "rm").stop_ids == (4,)


def test_padding_is_never_the_stop_token(make_model: MakeModel, tmp_path: Path) -> None:
    """transformers would read the reward before a stop token that it takes for padding."""
    language_model = scalar(make_model, tmp_path / "lm")
    tokenizer = language_model.tokenizer
    tokenizer.pad_token = tokenizer.eos_token
    save_scalar(language_model, tmp_path / "rm")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    saved = AutoTokenizer.from_pretrained(tmp_path / "rm")
    assert model.config.pad_token_id == saved.pad_token_id == saved.unk_token_id == 1
    assert tokenizer.pad_token == tokenizer.eos_token, "the model's own tokenizer is left alone"
    rows = Batch.from_tokens([[7, 8], [9]], [[10, 4], [11, 12, 13, 4]], pad_id=1)
    with torch.no_grad():
        mask_BT = rows.tokens_BT != 1
        expected_B = model(input_ids=rows.tokens_BT, attention_mask=mask_BT).logits[:, 0]
    torch.testing.assert_close(rewards_B(LocalScorer(language_model), rows), expected_B)
    tokenizer.unk_token = None
    save_scalar(language_model, tmp_path / "none")
    assert load_scalar(tmp_path / "none").model.config.pad_token_id is None


def test_bad_checkpoints_are_named(make_model: MakeModel, tmp_path: Path) -> None:
    save_scalar(scalar(make_model, tmp_path / "lm"), tmp_path / "rm")
    with pytest.raises(ConfigError, match=r"rm: this is a reward model \(Qwen3ForSequenceCl"):
        load(tmp_path / "rm")

    config = json.loads((tmp_path / "lm" / "config.json").read_text())
    several = AutoModelForSequenceClassification.from_pretrained(tmp_path / "lm", num_labels=3)
    several.save_pretrained(tmp_path / "three")
    load_scalar(tmp_path / "lm").tokenizer.save_pretrained(tmp_path / "three")
    with pytest.raises(ConfigError, match=r"three: a reward model has one label.*num_labels = 3"):
        load_scalar(tmp_path / "three")

    mixed = config | {"architectures": ["Qwen3ForSequenceClassification"], "num_labels": 1}
    (tmp_path / "lm" / "config.json").write_text(json.dumps(mixed))
    with pytest.raises(ConfigError, match=r"lack 1 of the tensors .* such as score.weight"):
        load_scalar(tmp_path / "lm")

    with pytest.raises(
        ConfigError,
        match=r"absent: transformers cannot load .* with a score",
    ):
        load_scalar(tmp_path / "absent")


def test_a_family_without_a_score_is_named(make_family: MakeModel, tmp_path: Path) -> None:
    save(make_family("olmoe"), tmp_path)
    with pytest.raises(ConfigError, match=r"no ForSequenceClassification class .* \(olmoe\)"):
        load_scalar(tmp_path)
