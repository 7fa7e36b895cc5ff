"""What a stage takes of memory, by a config; how passes fit a budget; and gradient checkpointing.

Legend: N sampled tokens, D hidden.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.backends.base import LearnerSettings, TokenLoss
from posttrain.backends.budget import (
    KEPT_ELEMENTS,
    MIN_TOKENS,
    PROCESS,
    Part,
    PassPlan,
    cache_bytes,
    laid_out_bytes,
    layer_bytes,
    learner_parts,
    loss_bytes,
    peak,
    plan_passes,
    read_shape,
    reader_parts,
    row_bytes,
    sampler_parts,
    saved_bytes,
    shape_of,
    step_checkpoint_bytes,
    token_bytes,
)
from posttrain.backends.checkpoint import LanguageModel, save
from posttrain.backends.forward import forward_passes
from posttrain.backends.local import LocalBackend
from posttrain.backends.local_learner import LocalLearner
from posttrain.backends.memory import MEMORY, Budget, model_shape
from posttrain.engine.errors import ConfigError
from posttrain.losses import ops
from posttrain.rl.batch import Batch
from posttrain.stages.aux_losses import token_cross_entropy

MakeModel = Callable[..., LanguageModel]
LOSS = TokenLoss(token_cross_entropy, 1.0)
SETTINGS = LearnerSettings(betas=(0.9, 0.98), weight_decay=0.0, max_grad_norm=1.0)
SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def rows() -> Batch:
    generator = torch.Generator().manual_seed(0)
    draw = torch.randint(5, 90, (8, 20), generator=generator).tolist()
    responses = [row[4 : 8 + i] for i, row in enumerate(draw)]
    return Batch.from_tokens([row[:4] for row in draw], responses, pad_id=0)


def test_the_shape_of_a_config() -> None:
    shape = shape_of(SMOLLM2)
    assert shape.parameters == 134_515_008
    assert (shape.queries, shape.keys, len(shape.layers)) == (576, 192, 30)
    assert shape_of(SMOLLM2, 7).parameters == 7
    untied = shape_of(SMOLLM2 | {"tie_word_embeddings": False}).parameters
    assert untied - shape.parameters == 49152 * 576


def test_a_mixture_reads_few_of_its_experts() -> None:
    more = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 100}
    shape = shape_of(SMOLLM2 | more)
    assert shape.intermediate == 200
    dense = shape_of(SMOLLM2 | {"intermediate_size": 800})
    assert shape.parameters == dense.parameters


def test_nested_and_other_names() -> None:
    other = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 10}
    assert shape_of({"text_config": SMOLLM2}).hidden == 576
    assert (shape_of(other).hidden, shape_of(other).intermediate) == (32, 128)
    with pytest.raises(ConfigError, match="no hidden_size or no num_hidden_layers"):
        shape_of({"vocab_size": 10})


def test_a_checkpoint(make_model: MakeModel, tmp_path: Path) -> None:
    """The parameters are those of its files: qwen3 ties its head, llama does not."""
    for kind in ("qwen3", "llama"):
        model = make_model(kind)
        save(model, tmp_path / kind)
        shape = read_shape(tmp_path / kind)
        assert shape == model_shape(model.model)
        assert shape.parameters == sum(p.numel() for p in model.model.parameters())
    (tmp_path / "llama" / "config.json").write_text(json.dumps([1]))
    with pytest.raises(ConfigError, match="is no JSON object"):
        read_shape(tmp_path / "llama")
    (tmp_path / "llama" / "config.json").unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        read_shape(tmp_path / "llama")


def test_layers_that_look_back_a_little() -> None:
    kinds = ["full_attention", "sliding_attention", "linear_attention"] * 10
    shape = shape_of(SMOLLM2 | {"layer_types": kinds, "sliding_window": 100})
    assert cache_bytes(shape, 1000) == 2 * (10 * 1000 + 10 * 100) * 192 * 4
    assert cache_bytes(shape, 50, "bfloat16") == 2 * 2 * 10 * 50 * 192 * 2
    assert row_bytes(shape, 0) == 24 * 49152


def test_phases_follow_one_another() -> None:
    parts = [
        Part(what="weights", bytes=10),
        Part(what="a", bytes=5, phase="sampling"),
        Part(what="b", bytes=4, phase="learning"),
        Part(what="c", bytes=3, phase="learning"),
    ]
    assert peak(parts, process=100) == 100 + 10 + 4 + 3
    assert peak([]) == PROCESS


def test_what_a_learner_takes() -> None:
    shape = shape_of(SMOLLM2)
    numbers = shape.parameters

    def always(**how: Any) -> float:
        parts = learner_parts(shape, precision="bfloat16", **how)
        return sum(p.bytes for p in parts if p.phase == "always") / numbers

    assert always() == 4 + 2 + 8
    assert always(ema=True) == 4 + 2 + 8 + 4
    assert always(master="stochastic") == 2 + 8
    assert always(states="int8") == pytest.approx(4 + 2 + 2, rel=0.01)
    assert always(trained=0) == 4 + 2
    assert always(trained=numbers // 100, adapter=True) == pytest.approx(2 + 0.14, rel=1e-3)
    assert step_checkpoint_bytes(learner_parts(shape, precision="bfloat16")) == 12 * numbers
    assert saved_bytes(shape) == 2 * numbers
    # A reader has one layer at a time, a sampler its rows; either may use the learner's weights.
    own = peak(reader_parts(shape)) - peak(reader_parts(shape, own_weights=False))
    assert own == 4 * numbers
    sampler = sampler_parts(shape, rows=7, length=100, own_weights=False)
    found = sum(p.bytes for p in sampler) - laid_out_bytes(shape)
    assert found == pytest.approx(7 * row_bytes(shape, 100), rel=1e-6)
    # In float32 the layers in two forms; in bfloat16 in one, and the output layer.
    assert laid_out_bytes(shape) == 2 * 4 * (numbers - 49152 * 576)
    assert laid_out_bytes(shape, "bfloat16") == 2 * numbers


def test_passes_fit_what_is_left() -> None:
    shape = shape_of(SMOLLM2)
    parts = learner_parts(shape, precision="bfloat16")
    plenty = plan_passes(shape, 2**40, parts, precision="bfloat16")
    assert plenty.max_tokens == 2048 and not plenty.checkpoints(10_000)
    fixed = peak(p for p in parts if not p.what.startswith("activations"))
    each = token_bytes(shape, "bfloat16")
    some = plan_passes(shape, fixed + 1000 * each, parts, precision="bfloat16")
    assert some == PassPlan(max_tokens=1000, kept_tokens=1000)
    # A row that is longer than a pass has one of its own, and there is no memory for it.
    assert some.checkpoints(1001)
    few = plan_passes(shape, fixed + 400 * each, parts, precision="bfloat16")
    assert few.checkpoints(401) and 400 < few.max_tokens <= 2048
    again = token_bytes(shape, "bfloat16", checkpointing=True)
    assert few.max_tokens == min(2048, 400 * each // again)
    none = plan_passes(shape, 1000, parts, precision="bfloat16")
    assert none.max_tokens == MIN_TOKENS and none.checkpoints(1)
    # A long pass with checkpointing takes less than a quarter of what it would.
    assert 4 * again < each
    assert layer_bytes(shape, "bfloat16") < layer_bytes(shape)


@pytest.mark.parametrize("fast_paths", [True, False])
@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_changes_no_bit(
    make_model: MakeModel, kind: str, fast_paths: bool, dtype: torch.dtype
) -> None:
    """The same passes, whose layers are computed twice: gradients, metrics and weights."""
    found, how = [], replace(SETTINGS, dtype=dtype)
    for kept in (None, 0):
        learner = LocalLearner(
            make_model(kind), how, max_tokens=50, kept_tokens=kept, fast_paths=fast_paths
        )
        batch = rows()
        learner.accumulate(batch, LOSS, count=batch.num_tokens)
        gradients = [p.grad.clone() for p in learner.parameters if p.grad is not None]
        sums = learner.update(batch, LOSS, count=batch.num_tokens, lr=1e-3)
        found.append((gradients, sums, [p.detach().clone() for p in learner.weights]))
    (plain, sums, weights), (again, same_sums, same_weights) = found
    assert sums == same_sums
    for ours, theirs in ((plain, again), (weights, same_weights)):
        assert len(ours) == len(theirs) > 10
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("kind", "fast_paths"), [("qwen3", True), ("llama", False)])
def test_checkpointing_keeps_less(make_model: MakeModel, kind: str, fast_paths: bool) -> None:
    model = make_model(kind).model
    (forward, *_) = forward_passes(model, rows(), max_tokens=10_000, fast_paths=fast_paths)
    sizes = []
    for checkpointing in (False, True):
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            if not isinstance(tensor, torch.nn.Parameter):
                storage = tensor.untyped_storage()
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            hidden_ND = forward.hidden_states(model, checkpointing=checkpointing)
        sizes.append(sum(kept.values()))
        assert hidden_ND.requires_grad
    assert sizes[1] < 0.4 * sizes[0]
    # The model is as it was.
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_small_budget_learns_the_same(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes of few tokens with checkpointing, against one pass: equal up to rounding."""
    monkeypatch.setattr("posttrain.backends.budget.MIN_TOKENS", 32)
    save(make_model(), tmp_path / "model")
    found = []
    for size in ("8G", "1M"):
        monkeypatch.setenv(MEMORY, size)
        learner = LocalBackend().learner(tmp_path / "model", SETTINGS)
        batch = rows()
        sums = learner.update(batch, LOSS, count=batch.num_tokens, lr=0.0)
        found.append((learner, sums))
    (plenty, sums), (little, same_sums) = found
    assert plenty.passes.max_tokens == 2048 and not plenty.passes.checkpoints(2048)
    assert little.passes.max_tokens == 32 and little.passes.checkpoints(1)
    assert same_sums == pytest.approx(sums, rel=1e-5)
    told = {part.what for part in little.budget.parts}
    assert "activations of 32 tokens with gradient checkpointing" in told


def test_other_models_of_the_stage_count(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher that is there when the first step is taken leaves less for the passes."""
    save(make_model(), tmp_path / "model")
    shape = read_shape(tmp_path / "model")
    parts = learner_parts(shape)
    fixed = peak(p for p in parts if not p.what.startswith("activations"))
    monkeypatch.setenv(MEMORY, str(fixed + 1000 * token_bytes(shape)))
    alone, backend = LocalBackend(), LocalBackend()
    assert alone.learner(tmp_path / "model", SETTINGS).passes.max_tokens == 1000
    learner = backend.learner(tmp_path / "model", SETTINGS)
    teacher = backend.scorer(tmp_path / "model")
    gone = 4 * shape.parameters // token_bytes(shape)
    assert learner.passes.max_tokens == pytest.approx(1000 - gone, abs=1)
    assert len(backend.parts) == len(parts) + 2
    del teacher
    assert len(backend.parts) == len(parts)


def test_reading_has_a_share() -> None:
    budget = Budget(torch.device("cpu"))
    shape = shape_of(SMOLLM2)
    budget.given = 8 * 2 * layer_bytes(shape) * 700
    assert budget.for_reading(shape, "float32", 2048) == 700
    budget.given = 1
    assert budget.for_reading(shape, "float32", 2048) == MIN_TOKENS


def test_what_a_loss_keeps_is_what_the_losses_say() -> None:
    assert KEPT_ELEMENTS == ops._KEEP_ELEMENTS
    shape = shape_of(SMOLLM2)
    most = KEPT_ELEMENTS // shape.vocabulary
    for precision, tokens in (("float32", most), ("bfloat16", 2 * most)):
        # As many bytes of a narrower type, and none where it is computed again.
        kept = loss_bytes(shape, precision, tokens=tokens) - loss_bytes(shape, precision, tokens=0)
        assert kept == 4 * most * shape.vocabulary
        again = loss_bytes(shape, precision, tokens=tokens + 2)
        assert again == loss_bytes(shape, precision, tokens=0)
