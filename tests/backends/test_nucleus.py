"""Top-p sampling: what is drawn from, what is reported, and the mask that rollouts carry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from posttrain.backends.base import LearnerSettings
from posttrain.backends.local import LocalLearner, LocalSampler, LocalScorer
from posttrain.backends.token_sampling import draw, nucleus, uniform
from posttrain.rl.batch import Batch, concatenate

PROMPTS = [[11, 12, 13], [20, 21, 22, 23, 24, 25, 26], [30], [50, 51]]
STOPS = list(range(4, 100, 4))


def rollouts_of(language_model: Any, top_p: float) -> Batch:
    return LocalSampler(language_model, max_rows=4).sample(
        PROMPTS, group_size=2, max_new_tokens=8, temperature=0.7, seed=3, top_p=top_p
    )


def nuclei(rows: Batch) -> list[list[int]]:
    """The ids of every sampled token."""
    parts = rows["nucleus_ids_F"].split(rows["nucleus_count_N"].tolist())
    return [part.tolist() for part in parts]


def test_the_nucleus_by_hand() -> None:
    """p = (.1, .4, .2, .3): .7 is reached by ids {1, 3}, .71 needs id 2 too, and .3 is id 1's."""
    logits_BV = torch.tensor([[0.1, 0.4, 0.2, 0.3]], dtype=torch.float64).log()
    for top_p, expected in ((0.69, [1, 3]), (0.71, [1, 2, 3]), (0.3, [1]), (0.95, [0, 1, 2, 3])):
        assert nucleus(logits_BV, top_p)[0].nonzero()[:, 0].tolist() == expected
    # Of equals the lower ids.
    assert nucleus(torch.zeros(1, 4), 0.5)[0].tolist() == [True, True, False, False]


def test_draws_have_the_renormalised_probabilities() -> None:
    """Of {.4, .3} at 0.69: 4/7 and 3/7, and the log-probs say so."""
    logits_BV = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log().expand(4000, 4)
    uniform_B = uniform(torch.arange(4000), torch.zeros(4000, dtype=torch.int64))
    token_B, logp_B, _ = draw(logits_BV, uniform_B, 1.0, 0.69)
    assert set(token_B.tolist()) == {1, 3}
    assert float((token_B == 1).float().mean()) == pytest.approx(4 / 7, abs=0.03)
    torch.testing.assert_close(logp_B.exp(), torch.where(token_B == 1, 4 / 7, 3 / 7))


@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "qwen3_next"])
def test_rollouts_carry_the_nucleus_of_a_fresh_forward_pass(
    make_model: Callable[..., Any], kind: str
) -> None:
    language_model = make_model(kind, stop=STOPS)
    rollouts = rollouts_of(language_model, 0.6)
    found, reported = iter(nuclei(rollouts)), iter(rollouts["sampler_logp_N"])
    for row in range(len(rollouts)):
        first, length = int(rollouts.prompt_len_B[row]), int(rollouts.sampled_len_B[row])
        ids = rollouts.tokens_BT[row, : first + length]
        with torch.no_grad():
            logits_TV = language_model.model(input_ids=ids[None]).logits[0, first - 1 : -1] / 0.7
        for position, logits_V in enumerate(logits_TV):
            allowed, token = next(found), int(ids[first + position])
            assert allowed == nucleus(logits_V[None], 0.6)[0].nonzero()[:, 0].tolist()
            assert token in allowed
            expected = torch.log_softmax(logits_V[allowed], -1)[allowed.index(token)]
            torch.testing.assert_close(next(reported), expected, atol=1e-5, rtol=0)
    assert next(found, None) is None
    assert "nucleus_ids_F" not in rollouts_of(language_model, 1.0)


def test_rows_and_joined_rows_have_their_own_nuclei(make_model: Callable[..., Any]) -> None:
    rollouts = rollouts_of(make_model(stop=STOPS), 0.6)
    whole = iter(nuclei(rollouts))
    by_row = [[next(whole) for _ in range(n)] for n in rollouts.sampled_len_B.tolist()]
    for index in (torch.tensor([5, 0, 3]), torch.arange(len(rollouts)) % 3 == 1):
        rows = torch.arange(len(rollouts))[index].tolist()
        assert nuclei(rollouts.select(index)) == [ids for row in rows for ids in by_row[row]]
    both = concatenate([rollouts.select(torch.tensor([1])), rollouts])
    assert nuclei(both) == by_row[1] + [ids for row in by_row for ids in row]


def test_with_the_mask_the_learner_finds_the_sampler_s_logprobs(
    make_model: Callable[..., Any],
) -> None:
    """So the ratio at the first update is 1; over the vocabulary each is less by the mass left
    out, which is at most log 0.6 here."""
    language_model = make_model(stop=STOPS)
    rollouts = rollouts_of(language_model, 0.6)
    scorer = LocalScorer(language_model)
    logp_N = scorer.logprobs(rollouts, temperature=0.7)
    torch.testing.assert_close(logp_N, rollouts["sampler_logp_N"], atol=1e-5, rtol=0)
    learner = LocalLearner(
        language_model, LearnerSettings(betas=(0.9, 0.98), weight_decay=0, max_grad_norm=1)
    )
    torch.testing.assert_close(learner.logprobs(rollouts, temperature=0.7), logp_N)
    unmasked = rollouts.without("nucleus_ids_F", "nucleus_count_N")
    gap_N = logp_N - scorer.logprobs(unmasked, temperature=0.7)
    assert float(gap_N.min()) > 0 and float(gap_N.max()) <= -torch.tensor(0.6).log() + 1e-5
