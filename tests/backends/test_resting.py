"""Models that rest: the memory is given back, and what they say after it is the same to the bit.

Legend: B rows, N sampled tokens, D hidden, V vocabulary, K top-k.
"""

from __future__ import annotations

import gc
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain.backends import resting
from posttrain.backends.base import Head, LearnerSettings, TokenLoss
from posttrain.backends.checkpoint import LanguageModel, save
from posttrain.backends.local import LocalBackend, LocalScorer
from posttrain.backends.resting import RestingHead
from posttrain.backends.scalar import load_scalar, save_scalar
from posttrain.engine.errors import StageError
from posttrain.rl.batch import Batch

MakeModel = Callable[..., LanguageModel]
SETTINGS = LearnerSettings(betas=(0.9, 0.98), weight_decay=0.1, max_grad_norm=1.0)
ROWS = Batch.from_tokens(
    [[11, 12, 13], [20, 21], [30]], [[40, 41, 42, 43], [50, 51, 52], [60, 61]], pad_id=0
)


@pytest.fixture
def scorer(make_model: MakeModel, tmp_path: Path) -> LocalScorer:
    save(make_model("llama"), tmp_path / "model")
    return LocalBackend().scorer(tmp_path / "model")


def live_bytes() -> int:
    """Bytes of all tensors that anything holds."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if type(found) in (Tensor, torch.nn.Parameter):
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def said(scorer: LocalScorer) -> list[Tensor]:
    """All that a scorer of a language model can be asked for."""
    ids_NK, logp_NK = scorer.top_k(ROWS, 5)
    head = scorer.head
    return [
        scorer.hidden(ROWS),
        scorer.logprobs(ROWS, temperature=0.7),
        ids_NK,
        logp_NK,
        head.weight_VD.clone(),
        *scorer.state().values(),
    ]


def all_equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def test_a_model_at_rest_has_no_weights_in_memory(scorer: LocalScorer) -> None:
    size = sum(p.nbytes for p in scorer.model.parameters())
    assert size > 50_000
    # What the rows remember of themselves is there from now on.
    scorer.logprobs(ROWS)
    awake = live_bytes()
    scorer.rest()
    assert scorer.weights is not None and not scorer.weights.awake
    assert sum(p.nbytes for p in scorer.model.parameters()) == 0
    assert awake - live_bytes() == size
    scorer.logprobs(ROWS)
    assert scorer.weights.awake and live_bytes() == awake


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
@pytest.mark.parametrize("portion", [1, 2**26])
def test_it_says_the_same_after_it(
    make_model: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    dtype: torch.dtype,
    portion: int,
) -> None:
    """With the files in one type and in two, and with tied and other output layers."""
    monkeypatch.setattr(resting, "PORTION_BYTES", portion)
    save(make_model(kind), tmp_path, types="bfloat16")
    scorer = LocalBackend().scorer(tmp_path, dtype=dtype)
    before = said(scorer)
    for _ in range(2):
        scorer.rest()
        scorer.rest()
        assert all_equal(said(scorer), before)
    assert scorer.frozen


@pytest.mark.parametrize("kind", ["olmoe", "mistral", "mamba", "gpt_oss"])
def test_what_no_file_has_rests_in_a_scratch_file(
    make_family: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Of mixtures of experts transformers joins the weights of all experts while loading."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    save(make_family(kind), tmp_path / "model")
    scorer: LocalScorer | None = LocalBackend().scorer(tmp_path / "model")
    assert scorer is not None
    before = said(scorer)
    scorer.rest()
    assert sum(p.nbytes for p in scorer.model.parameters()) == 0
    scratch = list(tmp_path.glob("posttrain-rest-*/*"))
    joined = [n for n, _ in scorer.model.named_parameters() if "experts." in n]
    assert len(scratch) == (len(joined) if kind == "olmoe" else 0)
    assert all_equal(said(scorer), before)
    del scorer
    gc.collect()
    assert not list(tmp_path.glob("posttrain-rest-*"))


def test_a_model_that_was_not_loaded_from_a_file_rests_too(make_model: MakeModel) -> None:
    scorer = LocalScorer(make_model())
    before = said(scorer)
    scorer.rest()
    assert sum(p.nbytes for p in scorer.model.parameters()) == 0
    assert all_equal(said(scorer), before)


@pytest.mark.parametrize("holes", [(), (3, 17)])
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_the_output_layer_is_read_where_it_lies(
    make_model: MakeModel, tmp_path: Path, kind: str, holes: tuple[int, ...]
) -> None:
    """Without the model, also in another process, and with the ids that may be drawn now."""
    save(make_model(kind, vocabulary=112), tmp_path)
    scorer = LocalBackend().scorer(tmp_path)
    scorer.restrict(holes)
    whole = scorer.head
    scorer.rest()
    head = scorer.head_at_rest
    assert isinstance(head, RestingHead)
    sent = pickle.dumps(head)
    assert len(sent) < 2000
    opened = pickle.loads(sent).open()
    assert scorer.weights is not None and not scorer.weights.awake
    assert opened.weight_VD.shape == head.shape == whole.shape == (100, 32)
    assert torch.equal(opened.weight_VD, whole.weight_VD)
    assert (opened.bias_V is None) == (whole.bias_V is None) == (not holes)
    if holes:
        assert torch.equal(opened.bias_V, whole.bias_V)
    assert whole.open() is whole


def test_a_file_that_was_written_meanwhile_is_refused(scorer: LocalScorer, tmp_path: Path) -> None:
    scorer.rest()
    path = tmp_path / "model" / "model.safetensors"
    save_file({n: t + 1 for n, t in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(StageError, match=r"model.safetensors was written or removed while a model"):
        scorer.logprobs(ROWS)
    os.remove(path)
    with pytest.raises(StageError, match="Put the file back"):
        scorer.hidden(ROWS)


def test_a_scorer_that_takes_weights_over_rests_with_the_new_ones(
    make_model: MakeModel, tmp_path: Path
) -> None:
    save(make_model(), tmp_path)
    backend = LocalBackend()
    learner, scorer = backend.learner(tmp_path, SETTINGS), backend.scorer(tmp_path)
    start = {name: value.clone() for name, value in scorer.state().items()}
    first_N = scorer.logprobs(ROWS)
    learner.update(ROWS, TokenLoss(_mean), count=9.0, lr=0.1)
    scorer.rest()
    scorer.sync(learner)
    scorer.rest()
    assert torch.equal(scorer.logprobs(ROWS), learner.logprobs(ROWS))
    assert not torch.equal(scorer.logprobs(ROWS), first_N)
    scorer.rest()
    scorer.restore(start)
    scorer.rest()
    assert torch.equal(scorer.logprobs(ROWS), first_N)


def _mean(_: None, logp_N: Tensor, entropy_N: Tensor, batch: Batch) -> tuple[Tensor, Any]:
    return -logp_N.sum(), {}


def test_a_learner_s_scorer_does_not_rest(make_model: MakeModel, tmp_path: Path) -> None:
    save(make_model(), tmp_path)
    backend = LocalBackend()
    learner = backend.learner(tmp_path, SETTINGS)
    scorer = backend.scorer(learner)
    scorer.rest()
    assert all(p.nbytes for p in learner.model.parameters())
    assert not scorer.frozen and isinstance(scorer.head_at_rest, Head)


def test_a_model_with_a_score_rests(make_model: MakeModel, tmp_path: Path) -> None:
    save(make_model(), tmp_path / "base")
    scored = load_scalar(tmp_path / "base")
    torch.nn.init.normal_(scored.model.score.weight)
    save_scalar(scored, tmp_path / "scored")
    scorer = LocalBackend().scorer(tmp_path / "scored", scalar=True)
    before_N = scorer.scores(ROWS)
    scorer.rest()
    assert torch.equal(scorer.scores(ROWS), before_N)
    scorer.rest()
    assert torch.equal(scorer.head_at_rest.open().weight_VD, scorer.head.weight_VD)


def test_on_a_device_it_rests_in_host_memory(
    scorer: LocalScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as that can be seen without one: all but the output layer moves, and comes back."""
    assert scorer.weights is not None
    before = said(scorer)
    # Not "cpu", and not "cuda", whose page-locked memory needs one.
    monkeypatch.setattr(scorer.weights, "_device", _Elsewhere())
    scorer.rest()
    left = [n for n, p in scorer.model.named_parameters() if p.nbytes]
    assert left == ["lm_head.weight"]
    assert isinstance(scorer.head_at_rest, Head)
    monkeypatch.setattr(scorer.weights._device, "index", None)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", _on_the_cpu(torch.empty))
        assert all_equal(said(scorer), before)


class _Elsewhere:
    """In place of a device."""

    type, index = "elsewhere", 0


def _on_the_cpu(empty: Any) -> Any:
    return lambda *size, device, **settings: empty(*size, **settings)


def test_several_threads_wake_it_once(scorer: LocalScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import ThreadPoolExecutor

    expected_N = scorer.logprobs(ROWS)
    reads: list[str] = []
    read_tensors = resting.read_tensors

    def counted(places: Any) -> Iterator[tuple[str, Tensor]]:
        reads.extend(places)
        yield from read_tensors(places)

    scorer.rest()
    monkeypatch.setattr(resting, "read_tensors", counted)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: scorer.logprobs(ROWS), range(8)))
    assert all(torch.equal(logp_N, expected_N) for logp_N in found)
    assert sorted(reads) == sorted(name for name, _ in scorer.model.named_parameters())


def test_the_budget_counts_what_is_in_memory_and_shared_weights_once(
    make_model: MakeModel, tmp_path: Path
) -> None:
    save(make_model("llama"), tmp_path / "model")
    save(make_model("llama", seed=1), tmp_path / "other")
    backend = LocalBackend()

    def weights() -> int:
        return sum(part.what.startswith("weights") for part in backend.parts)

    twice = [backend.scorer(tmp_path / "model") for _ in range(2)]
    assert weights() == 1 and len(backend.parts) == 3, "and a pass of each"
    other = backend.scorer(tmp_path / "other")
    assert weights() == 2
    other.rest()
    twice[0].rest()
    assert weights() == 1, "the second one reads them still"
    twice[1].rest()
    assert backend.parts == ()
    twice[0].logprobs(ROWS)
    assert weights() == 1 and len(backend.parts) == 2
    del twice
    gc.collect()
    assert backend.parts == ()
