"""The sampler against transformers: same greedy tokens, same log-probs, draws from the softmax.

Legend: B rows, R response positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from posttrain.backends.checkpoint import LanguageModel
from posttrain.backends.local import LocalSampler
from posttrain.backends.token_sampling import draw
from posttrain.engine.errors import ConfigError
from posttrain.rl.batch import Batch

MakeModel = Callable[..., LanguageModel]
KINDS = ("qwen3", "llama", "gpt2")
PROMPTS = [[11, 12, 13], [20, 21, 22, 23, 24, 25, 26], [30], [40, 41, 42, 43, 44, 45], [50, 51]]
# A quarter of the vocabulary ends a row, so that rows end at many different lengths.
STOPS = list(range(4, 100, 4))


def sample(sampler: LocalSampler, prompts: list[list[int]] = PROMPTS, **settings: Any) -> Batch:
    defaults = {"group_size": 1, "max_new_tokens": 12, "temperature": 1.0, "seed": 3}
    return sampler.sample(prompts, **(defaults | settings))


def fresh_logprobs(language_model: LanguageModel, row: list[int], start: int, t: float) -> Any:
    """Log-probs of `row[start:]` by one plain forward pass over the row alone."""
    with torch.no_grad():
        logits_TV = language_model.model(input_ids=torch.tensor([row])).logits[0]
    logp_TV = torch.log_softmax(logits_TV[start - 1 : -1] / t, dim=-1)
    return logp_TV.gather(1, torch.tensor(row[start:])[:, None])[:, 0]


@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_generate(make_model: MakeModel, kind: str, group_size: int) -> None:
    language_model = make_model(kind, stop=STOPS)
    rollouts = sample(LocalSampler(language_model), temperature=0.0, group_size=group_size)
    responses = rollouts.responses()
    lengths = set()
    for number, prompt in enumerate(PROMPTS):
        expected = language_model.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=12,
        )[0, len(prompt) :].tolist()
        lengths.add(len(expected))
        for member in range(group_size):
            assert responses[number * group_size + member] == expected
    assert len(lengths) > 1, "the case is too easy: all responses have one length"


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_are_those_of_a_fresh_forward_pass(
    make_model: MakeModel, kind: str, temperature: float
) -> None:
    language_model = make_model(kind, stop=STOPS)
    sampler = LocalSampler(language_model, max_rows=4)
    rollouts = sample(sampler, group_size=2, temperature=temperature)
    for number in range(len(rollouts)):
        start, length = int(rollouts.prompt_len_B[number]), int(rollouts.length_B[number])
        row = rollouts.tokens_BT[number, :length].tolist()
        expected = fresh_logprobs(language_model, row, start, temperature)
        reported = rollouts["sampler_logp_N"][rollouts.row_N == number]
        torch.testing.assert_close(reported, expected, atol=1e-5, rtol=0)


def test_greedy_reports_the_logprobs_of_the_model(make_model: MakeModel) -> None:
    language_model = make_model()
    rollouts = sample(LocalSampler(language_model), [[7, 8, 9]], temperature=0.0)
    expected = fresh_logprobs(language_model, rollouts.tokens_BT[0].tolist(), 3, 1.0)
    torch.testing.assert_close(rollouts["sampler_logp_N"], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("max_rows", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_replaced_rows_change_no_token(make_model: MakeModel, kind: str, max_rows: int) -> None:
    language_model = make_model(kind, stop=STOPS)
    prompts = PROMPTS * 4
    together = sample(LocalSampler(language_model, max_rows=1000), prompts, group_size=2)
    replaced = sample(LocalSampler(language_model, max_rows=max_rows), prompts, group_size=2)
    assert together.responses() == replaced.responses()
    assert torch.equal(together["finished_B"], replaced["finished_B"])
    torch.testing.assert_close(
        together["sampler_logp_N"], replaced["sampler_logp_N"], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("max_rows", [3, 1000])
def test_a_row_does_not_depend_on_its_neighbours(make_model: MakeModel, max_rows: int) -> None:
    """A row's random numbers follow from (seed, its index, position), so a row that keeps its index
    keeps its tokens, whatever the other prompts are, however long, and however many follow."""
    sampler = LocalSampler(make_model(stop=STOPS), max_rows=max_rows)
    alone = sample(sampler, PROMPTS[:2], group_size=3).responses()
    followed = sample(sampler, [*PROMPTS[:2], [60] * 20, [70], [80] * 3], group_size=3)
    assert followed.responses()[:6] == alone
    replaced = sample(sampler, [[60] * 20, PROMPTS[1], [9]], group_size=3)
    assert replaced.responses()[3:6] == alone[3:6]
    assert replaced.responses()[:3] != alone[:3]


def test_seeds_rows_and_positions_draw_differently(make_model: MakeModel) -> None:
    sampler = LocalSampler(make_model(vocabulary=50))
    same = sample(sampler, [[7, 8]] * 2, group_size=4, seed=5)
    assert sample(sampler, [[7, 8]] * 2, group_size=4, seed=5).responses() == same.responses()
    assert sample(sampler, [[7, 8]] * 2, group_size=4, seed=6).responses() != same.responses()
    assert len({tuple(response) for response in same.responses()}) == 8


def chi_square(counts_V: torch.Tensor, probabilities_V: torch.Tensor) -> float:
    expected_V = probabilities_V * counts_V.sum()
    return float(((counts_V - expected_V).square() / expected_V).sum())


def pair_probabilities(language_model: LanguageModel, prompt: list[int], t: float) -> torch.Tensor:
    """Exact probability of every pair of two tokens after `prompt`, flattened, in float64."""
    size = language_model.model.config.vocab_size
    rows = torch.tensor([[*prompt, token] for token in range(size)])
    with torch.no_grad():
        logits_BTV = language_model.model(input_ids=rows).logits.double() / t
    first_V = torch.softmax(logits_BTV[0, -2], dim=-1)
    second_VV = torch.softmax(logits_BTV[:, -1], dim=-1)
    return (first_V[:, None] * second_VV).flatten()


@pytest.mark.parametrize(("temperature", "seed"), [(1.0, 0), (0.7, 1), (1.6, 2)])
def test_draws_follow_the_softmax(make_model: MakeModel, temperature: float, seed: int) -> None:
    """Counts of all 36 pairs of two tokens in 20000 rows. With 35 degrees of freedom chi-square
    passes 66.6 in one run of a thousand; a dependence between positions would show as well."""
    language_model = make_model(vocabulary=6)
    language_model.model.get_output_embeddings().weight.data.mul_(0.5)
    sampler = LocalSampler(language_model)
    # No row ends before its second token.
    sampler.chat.stop_ids = ()
    rollouts = sample(
        sampler,
        [[2, 3]],
        group_size=20000,
        max_new_tokens=2,
        temperature=temperature,
        seed=seed,
    )
    pairs_B = rollouts.tokens_BT[:, 2] * 6 + rollouts.tokens_BT[:, 3]
    counts = torch.bincount(pairs_B, minlength=36).double()
    exact = pair_probabilities(language_model, [2, 3], temperature)
    assert chi_square(counts, exact) < 66.6
    # The test can tell: another temperature does not pass.
    assert chi_square(counts, pair_probabilities(language_model, [2, 3], temperature * 1.2)) > 66.6


def test_first_tokens_over_many_seeds_follow_the_softmax(make_model: MakeModel) -> None:
    """One row per seed, as steps of a stage draw: 5 degrees of freedom, 20.5 is the 0.999 point."""
    language_model = make_model(vocabulary=6)
    language_model.model.get_output_embeddings().weight.data.mul_(0.5)
    sampler = LocalSampler(language_model)
    first = [
        sample(sampler, [[2, 3]], max_new_tokens=1, seed=(7 << 31) + step).responses()[0][0]
        for step in range(500)
    ]
    counts = torch.bincount(torch.tensor(first), minlength=6).double()
    exact = pair_probabilities(language_model, [2, 3], 1.0).reshape(6, 6).sum(dim=1)
    assert chi_square(counts, exact) < 20.5


def test_draw_at_the_edges_of_the_uniform_number() -> None:
    """Probabilities 0, 1/2, 1/2, 0: tokens 1 and 2 share [0, 1), and no other is ever drawn."""
    logits_BV = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).repeat(4, 1)
    uniform_B = torch.tensor([0.0, 0.49, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    token_B, logp_B, _ = draw(logits_BV, uniform_B, 1.0)
    assert token_B.tolist() == [1, 1, 2, 2]
    torch.testing.assert_close(logp_B, torch.full((4,), 0.5).log())


@pytest.mark.parametrize("vocabulary", [1, 3, 256, 700, 2048])
def test_bfloat16_draws_follow_the_softmax(vocabulary: int) -> None:
    """Drawn block by block: the token whose part of the cumulative sum has the number."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits_V = 3 * torch.randn(vocabulary, generator=generator)
    logits_V[torch.rand(vocabulary, generator=generator) < 0.2] = -torch.inf
    logits_V[0] = 0.0
    logits_V = logits_V.bfloat16()
    uniform_B = torch.cat([torch.linspace(0, 1, 997, dtype=torch.float64), torch.zeros(1)])
    drawn = draw(logits_V.expand(len(uniform_B), -1), uniform_B, 0.7)
    exact_V = torch.softmax(logits_V.double() / 0.7, 0)
    end_B = exact_V.cumsum(0)[drawn.token_B]
    start_B = end_B - exact_V[drawn.token_B]
    assert bool((start_B - 1e-6 <= uniform_B).all()) and bool((uniform_B <= end_B + 1e-6).all())
    assert bool((exact_V[drawn.token_B] > 0).all()), "at 0, at 1 and between"
    expected_B = exact_V[drawn.token_B].log().float()
    torch.testing.assert_close(drawn.logp_B, expected_B, atol=1e-5, rtol=0)
    # Number by number the same token as by one sum over the vocabulary, but at the borders.
    whole = draw(logits_V.float().expand(len(uniform_B), -1), uniform_B, 0.7)
    assert int((whole.token_B != drawn.token_B).sum()) <= 3


def test_stop_tokens_end_rows_and_are_part_of_them(make_model: MakeModel) -> None:
    rollouts = sample(LocalSampler(make_model(stop=STOPS)), PROMPTS * 3, group_size=2)
    finished = rollouts["finished_B"].tolist()
    assert True in finished and False in finished
    for response, done in zip(rollouts.responses(), finished, strict=True):
        assert not set(response[:-1]) & set(STOPS)
        assert (response[-1] in STOPS) == done
        assert done or len(response) == 12


def test_a_stop_token_at_the_length_limit_counts_as_finished(make_model: MakeModel) -> None:
    everything = list(range(100))
    rollouts = sample(LocalSampler(make_model(stop=everything)), max_new_tokens=1)
    assert rollouts["finished_B"].all()
    assert rollouts.sampled_len_B.tolist() == [1] * len(PROMPTS)


def test_rollouts_are_right_padded(make_model: MakeModel) -> None:
    language_model = make_model(stop=STOPS)
    rollouts = sample(LocalSampler(language_model), group_size=2)
    used_B = rollouts.length_B
    assert torch.equal(used_B, rollouts.prompt_len_B + rollouts.sampled_len_B)
    assert rollouts.tokens_BT.shape == (10, int(used_B.max()))
    for number, row in enumerate(rollouts.tokens_BT.tolist()):
        prompt = PROMPTS[number // 2]
        assert row[: len(prompt)] == prompt
        assert set(row[int(used_B[number]) :]) <= {language_model.pad_id}


def test_the_model_keeps_its_mode_and_gets_no_gradient(make_model: MakeModel) -> None:
    language_model = make_model("gpt2")
    language_model.model.train()
    sampled = sample(LocalSampler(language_model))
    assert language_model.model.training
    language_model.model.eval()
    assert sample(LocalSampler(language_model)).responses() == sampled.responses()
    assert not sampled["sampler_logp_N"].is_inference()


def test_a_prompt_that_leaves_no_room_is_refused(make_model: MakeModel) -> None:
    sampler = LocalSampler(make_model(positions=20))
    assert len(sample(sampler, [[5] * 8])) == 1
    with pytest.raises(ConfigError, match=r"max_new_tokens = 12: .* 9 tokens .* 20 positions.* 11"):
        sample(sampler, [[5] * 9])
