"""Which ids a model may say, and when two models mean the same by them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.backends.base import Head, HeadLoss, LearnerSettings, Metrics, TokenLoss
from posttrain.backends.chat import Chat
from posttrain.backends.checkpoint import LanguageModel, output_head
from posttrain.backends.local import LocalLearner, LocalSampler, LocalScorer
from posttrain.backends.tiny import character_tokenizer
from posttrain.backends.vocabulary import (
    TokenIds,
    check_same_tokens,
    difference,
    draw_alike,
    drawable,
)
from posttrain.engine.errors import ConfigError
from posttrain.losses.distill import full_vocabulary
from posttrain.losses.divergence import TeacherStates
from posttrain.rl.batch import Batch

MakeModel = Callable[..., LanguageModel]
COUNT = 100
"""Tokens of the tokenizer of `make_model`."""
PROMPTS = [[7, 8, 9], [10, 11], [12, 13, 14, 15, 16]]
SETTINGS = LearnerSettings(betas=(0.9, 0.95), weight_decay=0.0, max_grad_norm=1e9)


def loud(language_model: LanguageModel, ids: Sequence[int]) -> LanguageModel:
    """The model with large output rows at `ids`, which would be drawn most of the time."""
    with torch.no_grad():
        weight_VD = language_model.model.get_output_embeddings().weight
        generator = torch.Generator().manual_seed(3)
        weight_VD[list(ids)] = 3 * torch.randn(len(ids), weight_VD.shape[1], generator=generator)
    return language_model


@pytest.fixture
def padded(make_model: MakeModel) -> Callable[..., LanguageModel]:
    """A model with 28 rows more than its tokenizer has tokens."""

    def make(kind: str = "llama", seed: int = 0) -> LanguageModel:
        return loud(make_model(kind, vocabulary=128, seed=seed), range(COUNT, 128))

    return make


def with_holes(language_model: LanguageModel, holes: Sequence[int]) -> LanguageModel:
    """The model as if its tokenizer had no tokens at `holes`."""
    sampler = loud(language_model, holes)
    vocabulary = {t: i for t, i in sampler.tokenizer.get_vocab().items() if i not in holes}
    sampler.tokenizer.get_vocab = lambda: vocabulary
    return sampler


def test_ids_that_may_be_drawn_have_a_token_and_a_row() -> None:
    assert drawable({0, 1, 2}, 3) == drawable({0, 1, 2}, 8) == TokenIds(3)
    assert drawable({0, 1, 2, 3, 9}, 3) == TokenIds(3)
    gaps = drawable({0, 3, 4}, 8)
    assert gaps == TokenIds(5, frozenset({1, 2}))
    assert [i for i in range(-1, 9) if i in gaps] == list(gaps) == [0, 3, 4] and len(gaps) == 3
    assert gaps.without([4]) == TokenIds(4, frozenset({1, 2}))
    with pytest.raises(ConfigError, match="none of the tokenizer's 1 token ids is among the 3 row"):
        drawable({9}, 3)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("fast_paths", [True, False])
@pytest.mark.parametrize("how", [{"temperature": 0.0}, {"temperature": 1.3}, {"top_p": 0.95}])
def test_no_sampler_draws_an_id_without_a_token(
    padded: Callable[..., LanguageModel], kind: str, fast_paths: bool, how: dict[str, Any]
) -> None:
    """Slots (llama, qwen3) and lockstep; holes below the last id too. The log-probabilities are
    those of the learner, to rounding."""
    language_model = with_holes(padded(kind), range(30, 40))
    sampler = LocalSampler(language_model, fast_paths=fast_paths)
    how = {"temperature": 1.0} | how
    batch = sampler.sample(PROMPTS, group_size=8, max_new_tokens=8, seed=0, **how)
    drawn = set(batch.targets_N.tolist())
    assert drawn <= set(range(COUNT)) - set(range(30, 40))
    learner = LocalLearner(language_model, SETTINGS)
    logp_N = learner.logprobs(batch, temperature=how["temperature"] or 1.0)
    torch.testing.assert_close(logp_N, batch["sampler_logp_N"], atol=2e-4, rtol=1e-4)


def test_without_the_cut_such_ids_would_be_drawn(padded: Callable[..., LanguageModel]) -> None:
    """The rows of the models above are loud enough for the tests to be able to fail."""
    sampler = LocalSampler(padded())
    sampler.chat.ids = TokenIds(128)
    batch = sampler.sample(PROMPTS, group_size=8, max_new_tokens=8, seed=0, temperature=1.0)
    assert float((batch.targets_N >= COUNT).float().mean()) > 0.3


def nll(settings: Any, logp_N: Tensor, entropy_N: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
    return -logp_N.sum(), {"entropy": entropy_N.sum()}


def to_head(settings: Head, hidden_ND: Tensor, head: Head, batch: Batch) -> tuple[Tensor, Metrics]:
    teacher = TeacherStates(
        hidden_NE=hidden_ND.detach(), head_VE=settings.weight_VD, bias_V=settings.bias_V
    )
    loss, metrics, _ = full_vocabulary(
        hidden_ND,
        head.weight_VD,
        [teacher],
        torch.ones(len(hidden_ND)),
        bias_V=head.bias_V,
    )
    return loss, metrics


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("aside", [False, True])
def test_a_padded_model_learns_as_the_one_without_padding(
    make_model: MakeModel, kind: str, dtype: torch.dtype, aside: bool
) -> None:
    """Own and tied heads, a computing copy, several forward passes and steps, workers, a moving
    average: the very numbers of the model whose rows are the tokens, and padding gets no gradient.
    """
    wide, narrow = make_model(kind, vocabulary=128), make_model(kind)
    states = wide.model.state_dict()
    narrow.model.load_state_dict(
        {
            name: states[name][: len(value)] if value.dim() else states[name]
            for name, value in narrow.model.state_dict().items()
        }
    )
    loud(wide, range(COUNT, 128))
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(5, COUNT, (12, 9), generator=generator).tolist()
    batch = Batch.from_tokens(PROMPTS * 4, rows, pad_id=0)
    teacher = Head(weight_VD=torch.randn(COUNT, 32, generator=generator))
    settings = LearnerSettings(
        betas=(0.9, 0.95), weight_decay=0.0, max_grad_norm=1.0, dtype=dtype, ema=0.5
    )
    before = wide.model.get_output_embeddings().weight[COUNT:].detach().clone()
    with ThreadPoolExecutor(2) as pool:
        found = []
        for language_model in (wide, narrow):
            learner = LocalLearner(
                language_model, settings, max_tokens=40, workers=pool if aside else None
            )
            said = [
                learner.update(batch, loss, count=100.0, lr=1e-3)
                for loss in (TokenLoss(nll), HeadLoss(to_head, teacher)) * 2
            ]
            learner.finish()
            found.append((said, learner.logprobs(batch)))
    (ours, our_logp_N), (theirs, their_logp_N) = found
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=1e-5)
    torch.testing.assert_close(our_logp_N, their_logp_N, atol=1e-5, rtol=1e-5)
    assert torch.equal(wide.model.get_output_embeddings().weight[COUNT:], before)


def test_holes_have_no_probability_and_no_gradient(
    padded: Callable[..., LanguageModel],
) -> None:
    """Finite everywhere: losses, entropies and divergences of exact zeros."""
    language_model = with_holes(padded(), [40, 41])
    learner = LocalLearner(language_model, SETTINGS)
    weight_VD = language_model.model.get_output_embeddings().weight
    before_VD = weight_VD.detach().clone()
    head = LocalScorer(language_model).head
    assert head.weight_VD.shape == (COUNT, 32) and not head.weight_VD.requires_grad
    batch = Batch.from_tokens(PROMPTS, [[50, 51], [52], [53, 54]], pad_id=0)
    teacher = Head(weight_VD=head.weight_VD.roll(1, 0).clone(), bias_V=head.bias_V)
    for loss in (TokenLoss(nll), HeadLoss(to_head, teacher)):
        said = learner.update(batch, loss, count=5.0, lr=1e-2)
        assert all(value == value and abs(value) < 1e6 for value in said.values()), said
    out = [40, 41, *range(COUNT, 128)]
    assert torch.equal(weight_VD[out], before_VD[out])
    assert not torch.equal(weight_VD[50], before_VD[50])
    ids_NK, logp_NK = LocalScorer(language_model).top_k(batch, 128)
    assert ids_NK.shape[1] == COUNT - 2 and bool(torch.isfinite(logp_NK).all())
    assert not set(out) & set(ids_NK.flatten().tolist())


def test_a_head_without_padding_is_the_models_own_tensor(make_model: MakeModel) -> None:
    language_model = make_model()
    head = output_head(language_model.model, language_model.ids)
    assert head.weight_VD is language_model.model.get_output_embeddings().weight
    assert head.bias_V is None


# -- two vocabularies ------------------------------------------------------------------------------

OURS = {"a": 0, "b": 1, "<end>": 2}


@pytest.mark.parametrize(
    ("theirs", "added", "token"),
    [
        (OURS, (), None),
        ({"a": 0, "b": 1, "<end>": 2, "<img>": 3}, ("<img>",), None),
        ({"a": 0, "b": 1}, (), None),
        ({"b": 0, "a": 1, "<end>": 2}, (), "a"),
        ({"a": 0, "b": 1, "<end>": 3}, ("<end>",), "<end>"),
        ({"a": 0, "b": 1, "<stop>": 2}, ("<stop>",), "<end>"),
        # A token that is none of the added ones makes other tokens of the same text.
        ({"a": 0, "b": 1, "<end>": 2, "ab": 3}, ("<end>",), "ab"),
    ],
)
def test_what_differs_is_a_token_with_another_id(
    theirs: dict[str, int], added: Sequence[str], token: str | None
) -> None:
    found = difference(OURS, theirs, our_added={"<end>"}, their_added=added)
    back = difference(theirs, OURS, our_added=added, their_added={"<end>"})
    for one in (found, back):
        assert (None if one is None else one.token) == token
    if found is not None:
        assert (found.ours, found.theirs) == (OURS.get(found.token), theirs.get(found.token))


def chat(tokenizer: Any, **facts: Any) -> Chat:
    return Chat(tokenizer, **({"stop_ids": (4,), "pad_id": 0} | facts))


def test_models_are_alike_whatever_their_rows_ends_and_templates_are() -> None:
    ours = chat(character_tokenizer([]))
    other = character_tokenizer([])
    other.chat_template = "{{ messages[0]['content'] }}"
    check_same_tokens(ours, chat(other, stop_ids=(4, 0), max_positions=5), "math")
    other.add_tokens(["<img>"], special_tokens=True)
    check_same_tokens(ours, chat(other), "math")
    with pytest.raises(ConfigError, match=r"critic 'start': .* token '[^']+' has .* a critic must"):
        check_same_tokens(ours, chat(character_tokenizer(["é"])), "start", role="critic")


def test_models_with_other_added_tokens_draw_the_common_ones(make_model: MakeModel) -> None:
    """The student has one token more than the one teacher and one less than the other."""
    student, few, many = (make_model(vocabulary=128) for _ in range(3))
    # No special tokens: the text of these in data would stay text.
    student.tokenizer.add_tokens(["<one>"])
    many.tokenizer.add_tokens(["<one>", "<two>"])
    learner = LocalLearner(loud(student, range(COUNT, 128)), SETTINGS)
    sampler = LocalSampler(learner)
    teachers = [LocalScorer(few), LocalScorer(many)]
    assert learner.chat.prompt("a <one> b")
    draw_alike(learner, teachers)
    assert {len(head.weight_VD) for head in (*(t.head for t in teachers),)} == {COUNT}
    batch = sampler.sample(PROMPTS, group_size=8, max_new_tokens=8, seed=0, temperature=1.0)
    assert int(batch.targets_N.max()) < COUNT
    torch.testing.assert_close(
        learner.logprobs(batch), batch["sampler_logp_N"], atol=2e-4, rtol=1e-4
    )
    with pytest.raises(ConfigError, match=r"token '<one>' \(id 100\)"):
        sampler.chat.prompt("a <one> b")


def test_a_restricted_model_learns_an_end_that_it_may_say() -> None:
    tokenizer = character_tokenizer([])
    two = chat(tokenizer, stop_ids=(4, 2))
    two.restrict([4])
    assert two.stop_ids == (2,)
    with pytest.raises(ConfigError, match=r"ends a response \('<|user|>'\) .* another model"):
        two.restrict([2])


def test_a_model_that_reads_prompts_of_its_own_keeps_its_tokens_there(
    make_model: MakeModel,
) -> None:
    """As Qwen3, which writes thinking tags into its prompts, teaches Qwen2.5, or is taught by it:
    none of them is drawn, and none is refused in the prompts of the one that has them."""
    few, many = make_model(vocabulary=128), make_model(vocabulary=128)
    many.tokenizer.add_tokens(["<think>"])
    for student, teacher in ((few, many), (many, few)):
        learner, scorer = LocalLearner(student, SETTINGS), LocalScorer(teacher)
        draw_alike(learner, [scorer], own_text=[scorer])
        assert learner.chat.ids == scorer.chat.ids
        assert len(scorer.head.weight_VD) == COUNT
        thinks = learner if student is many else scorer
        assert COUNT in thinks.chat.prompt("a <think> b")
