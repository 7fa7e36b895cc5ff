"""The plain path, family by family: what transformers computes for a row alone is what comes out.

Legend: B rows, T positions, N sampled tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import posttrain.backends.lockstep as lockstep_module
from posttrain.backends.architecture import CachedRows, backbone, path_of
from posttrain.backends.base import LearnerSettings, Metrics, TokenLoss
from posttrain.backends.checkpoint import LanguageModel
from posttrain.backends.forward import forward_passes
from posttrain.backends.local import LocalLearner, LocalSampler, LocalScorer
from posttrain.backends.token_sampling import LocalSampling
from posttrain.rl.batch import Batch

MakeModel = Callable[..., LanguageModel]
# Longer and shorter than the windows (6), the chunks of scans (8) and the convolutions (4).
PROMPTS = [
    [11, 12, 13],
    [20, 21, 22, 23, 25, 26, 27, 29, 30, 31],
    [30],
    [41, 42, 43],
    [50, 51, 53],
    [61, 62, 63, 65, 66, 67, 69],
]
FAMILIES = (
    "mistral", "qwen2", "gemma3_text", "gpt_oss", "gpt_neo", "llama4_text", "mamba", "mamba2",
    "falcon_mamba", "jamba", "bamba", "falcon_h1", "granitemoehybrid", "nemotron_h",
    "qwen3_next", "qwen3_5_text", "olmo_hybrid", "lfm2", "bloom", "mpt", "falcon", "gptj", "opt",
)  # fmt: skip
# Gated delta nets compute a whole row in chunks and in float32 whatever the type of the weights;
# token by token the sums have another order.
LOOSE = {"qwen3_next": 5e-4, "qwen3_5_text": 5e-4, "olmo_hybrid": 5e-4}
# One of each kind of layer, for what does not depend on the family.
KINDS = ("mistral", "mamba2", "falcon_h1", "qwen3_next", "lfm2")


def lockstep(
    language_model: LanguageModel, prompts: Any = PROMPTS, *, max_rows: int = 256, **settings: Any
) -> LocalSampling:
    defaults = {"group_size": 1, "max_new_tokens": 12, "temperature": 1.0, "seed": 3}
    sampler = LocalSampler(language_model, max_rows=max_rows, fast_paths=False)
    return sampler.stream(prompts, **(defaults | settings))


def run(language_model: LanguageModel, prompts: Any = PROMPTS, **settings: Any) -> Batch:
    sampling = lockstep(language_model, prompts, **settings)
    assert len(list(sampling)) > 0
    return sampling.batch()


@pytest.mark.parametrize("kind", FAMILIES)
def test_greedy_is_generate(make_family: MakeModel, kind: str) -> None:
    language_model = make_family(kind)
    assert path_of(language_model.model) == "plain"
    responses = run(language_model, temperature=0.0, group_size=2).responses()
    for number, prompt in enumerate(PROMPTS):
        expected = language_model.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=12,
        )[0, len(prompt) :].tolist()
        assert responses[2 * number : 2 * number + 2] == [expected, expected]


@pytest.mark.parametrize("kind", FAMILIES)
def test_logprobs_are_those_of_a_fresh_forward_pass(make_family: MakeModel, kind: str) -> None:
    language_model = make_family(kind)
    rollouts = run(language_model, group_size=3, temperature=0.8, max_rows=9)
    assert len(set(rollouts.sampled_len_B.tolist())) > 1, "rows must leave at different times"
    for number in range(len(rollouts)):
        start, length = int(rollouts.prompt_len_B[number]), int(rollouts.length_B[number])
        row = rollouts.tokens_BT[number, :length]
        assert row[:start].tolist() == PROMPTS[number // 3]
        with torch.no_grad():
            logits_TV = language_model.model(input_ids=row[None], use_cache=False).logits[0]
        logp_TV = torch.log_softmax(logits_TV[start - 1 : -1].float() / 0.8, dim=-1)
        expected = logp_TV.gather(1, row[start:, None])[:, 0]
        reported = rollouts["sampler_logp_N"][rollouts.row_N == number]
        torch.testing.assert_close(reported, expected, atol=LOOSE.get(kind, 2e-5), rtol=0)


def together(model: Any, rollouts: Batch) -> Tensor:
    """`hidden_ND` by the learner's one forward pass."""
    (forward,) = forward_passes(model, rollouts, max_tokens=10_000)
    return forward.hidden_states(model)


def alone(model: Any, rollouts: Batch) -> Tensor:
    """`hidden_ND` by one forward pass per row, without padding and without any code of ours."""
    parts = []
    for number, row in enumerate(rollouts.tokens_BT):
        length = int(rollouts.length_B[number])
        output = backbone(model)(input_ids=row[None, :length], use_cache=False)
        parts.append(output.last_hidden_state[0, :-1][rollouts.sampled_BT[number, 1:length]])
    return torch.cat(parts)


def batch() -> Batch:
    """Rows of different lengths, one to both sides of each window and chunk."""
    generator = torch.Generator().manual_seed(1)
    responses = [torch.randint(5, 95, (n,), generator=generator) for n in (2, 9, 1, 12, 4, 7)]
    return Batch.from_tokens(PROMPTS, [response.tolist() for response in responses], pad_id=0)


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_learner_reads_and_learns_what_rows_alone_give(
    make_family: MakeModel, kind: str
) -> None:
    """Hidden states to 1e-5 of the largest, and gradients in float64, so that what is left is a
    difference of the computation and not of rounding."""
    model, rollouts = make_family(kind).model, batch()
    with torch.no_grad():
        expected = alone(model, rollouts)
        error = (together(model, rollouts) - expected).abs().max()
    assert error <= 1e-5 * max(1.0, float(expected.abs().max()))
    # Grouped products of experts know no float64.
    model.set_experts_implementation("eager")
    model.double()
    direction = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
    gradients = []
    for read in (alone, together):
        model.zero_grad()
        (read(model, rollouts).double() * direction).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    largest = max(float(gradient.abs().max()) for gradient in gradients[0].values())
    assert largest > 0
    for name, gradient in gradients[0].items():
        # Several families compute parts in float32 whatever the type of the weights.
        assert (gradients[1][name] - gradient).abs().max() <= 1e-5 * largest, name


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_it_draws_what_the_slot_sampler_draws(
    make_model: MakeModel, kind: str, temperature: float
) -> None:
    language_model = make_model(kind, stop=list(range(4, 100, 4)))
    settings = {"group_size": 3, "max_new_tokens": 12, "temperature": temperature, "seed": 9}
    assert path_of(language_model.model) == "packed"
    slots = LocalSampler(language_model, max_rows=7).sample(PROMPTS, **settings)  # type: ignore[arg-type]
    ours = run(language_model, **settings)
    assert ours.responses() == slots.responses()
    assert torch.equal(ours["finished_B"], slots["finished_B"])
    torch.testing.assert_close(ours["sampler_logp_N"], slots["sampler_logp_N"], atol=1e-5, rtol=0)
    assert torch.equal(ours.tokens_BT, slots.tokens_BT)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_its_neighbours(make_family: MakeModel, kind: str) -> None:
    language_model = make_family(kind)
    together = run(language_model, group_size=2, max_rows=1000)
    split = run(language_model, group_size=2, max_rows=1)
    assert together.responses() == split.responses()
    torch.testing.assert_close(
        together["sampler_logp_N"], split["sampler_logp_N"], atol=2e-5, rtol=0
    )
    replaced = run(language_model, [[7] * 9, PROMPTS[1], [8, 9]], group_size=2)
    assert replaced.responses()[2:4] == together.responses()[2:4]
    assert replaced.responses()[:2] != together.responses()[:2]
    assert run(language_model, group_size=2, seed=4).responses() != together.responses()


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_read_once_and_rows_leave(
    make_family: MakeModel, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read: a prompt once for its group of 8, and then its rows until they end, but for a
    third of them at most that have ended and not left. Every row is announced once."""
    shapes: list[tuple[int, int]] = []
    read = CachedRows.read

    def counted(rows: CachedRows, tokens_BT: Tensor) -> Tensor:
        shapes.append((tokens_BT.shape[0], tokens_BT.shape[1]))
        return read(rows, tokens_BT)

    monkeypatch.setattr(CachedRows, "read", counted)
    sampling = lockstep(make_family(kind), group_size=8)
    announced = list(sampling)
    rollouts = sampling.batch()
    assert sorted(torch.cat(announced).tolist()) == list(range(8 * len(PROMPTS)))
    assert not any(rows.is_inference() for rows in announced)
    # Lengths 1, 3, 3, 3 and 7 differ by no more than half of 12; 10 is a batch of its own.
    second = shapes.index((1, 10))
    assert shapes[0] == (5, 1) and second > 6
    for start, lengths in ((0, (1, 3, 7)), (second, (10,))):
        member_B = torch.isin(rollouts.prompt_len_B, torch.tensor(lengths))
        prompt_B = rollouts.prompt_len_B[member_B]
        # The last token of a row is drawn and not read.
        end_B = prompt_B + rollouts.sampled_len_B[member_B] - 1
        for step in range(1, int(end_B.max()) - min(lengths) + 1):
            position = min(lengths) + step - 1
            reading = int((prompt_B > position).sum()) // 8
            needed = reading + int(((prompt_B <= position) & (end_B > position)).sum())
            rows, columns = shapes[start + step]
            assert columns == 1
            assert needed <= rows <= needed / 0.75
    assert len(shapes) == second + 1 + step


def test_the_model_keeps_its_mode_and_gradients_stay_on(make_family: MakeModel) -> None:
    language_model = make_family("mamba")
    language_model.model.train()
    for _ in lockstep(language_model):
        assert not torch.is_inference_mode_enabled()
        assert not language_model.model.training
    assert language_model.model.training
    # Left half-way, the mode is given back as well.
    iterator = iter(lockstep(language_model))
    next(iterator)
    iterator.close()
    assert language_model.model.training


def test_no_prompts_give_no_rows(make_family: MakeModel) -> None:
    sampling = lockstep(make_family("mamba"), [])
    assert list(sampling) == []
    assert len(sampling.batch()) == 0


def negative_logp(
    _: Any, logp_N: Tensor, entropy_N: Tensor, batch: Batch
) -> tuple[Tensor, Metrics]:
    return -logp_N.sum(), {"loss": -logp_N.sum().detach()}


CROSS_ENTROPY = TokenLoss(negative_logp)


@pytest.mark.parametrize("kind", KINDS)
def test_local_sampler_and_learner_take_the_plain_path(make_family: MakeModel, kind: str) -> None:
    """The log-probs of sampler and learner agree, and learning raises them."""
    language_model = make_family(kind)
    rollouts = LocalSampler(language_model).sample(
        PROMPTS, group_size=2, max_new_tokens=12, temperature=0.9, seed=1
    )
    settings = LearnerSettings(betas=(0.9, 0.98), weight_decay=0.0, max_grad_norm=1.0)
    learner = LocalLearner(language_model, settings, max_tokens=40)
    logp_N = learner.logprobs(rollouts, temperature=0.9)
    sampled_N = rollouts["sampler_logp_N"]
    torch.testing.assert_close(logp_N, sampled_N, atol=LOOSE.get(kind, 2e-5), rtol=0)
    losses = [
        learner.update(rollouts, CROSS_ENTROPY, count=rollouts.num_tokens, lr=1e-3)["loss"]
        for _ in range(6)
    ]
    assert losses[-1] < 0.8 * losses[0]
    hidden_ND = LocalScorer(language_model).hidden(rollouts)
    assert hidden_ND.shape[0] == rollouts.num_tokens


@pytest.mark.parametrize("kind", KINDS)
def test_long_prompts_are_read_few_at_a_time(
    make_family: MakeModel, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """What a batch of prompts may take decides how many are in it, and no response."""
    language_model = make_family(kind)
    prompts = [*PROMPTS, [70 + number for number in range(10)]]
    whole = run(language_model, prompts).responses()
    config = language_model.model.config
    width = getattr(config, "intermediate_size", None) or config.hidden_size
    # Two rows of three tokens at once, and longer ones alone.
    monkeypatch.setattr(lockstep_module, "READ_BYTES", 2 * 3 * width * 4)
    read: list[tuple[int, int]] = []
    original = CachedRows.read

    def noted(rows: CachedRows, tokens_BT: Tensor) -> Tensor:
        if rows.length == 0:
            read.append(tuple(tokens_BT.shape))
        return original(rows, tokens_BT)

    monkeypatch.setattr(CachedRows, "read", noted)
    assert run(language_model, prompts).responses() == whole
    assert len(read) > 2
    assert all(count == 1 or count * columns <= 6 for count, columns in read)
