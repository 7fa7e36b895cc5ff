"""A large step checkpoint is written from where it lies, and nothing changes it meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from posttrain.backends.base import LearnerSettings, TokenLoss
from posttrain.backends.checkpoint import LanguageModel
from posttrain.backends.local_learner import LocalLearner
from posttrain.rl.batch import Batch
from posttrain.stages import context, step_state
from posttrain.stages.aux_losses import token_cross_entropy
from posttrain.stages.step_state import CheckpointGroup, Part, SavedTensors, to_write

LOSS = TokenLoss(token_cross_entropy, 1.0)
SETTINGS = LearnerSettings(betas=(0.9, 0.98), weight_decay=0.0, max_grad_norm=1.0, ema=0.5)
ROWS = Batch.from_tokens([[11, 12], [13, 14, 15]], [[16, 17], [18]], pad_id=0)


class Plain:
    """A part that cannot wait."""

    def __init__(self) -> None:
        self.number = torch.ones(3)

    def state(self) -> dict[str, Tensor]:
        return {"number": self.number}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.number = tensors["number"]


def learner(make_model: Callable[..., LanguageModel]) -> LocalLearner:
    return LocalLearner(make_model(), SETTINGS)


def update(mine: LocalLearner) -> None:
    mine.update(ROWS, LOSS, count=3.0, lr=0.1)


def test_the_learner_waits_for_the_writer(
    make_model: Callable[..., LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_state, "COPIED", 0)
    mine = learner(make_model)
    update(mine)
    read = Event()
    tensors = to_write(CheckpointGroup({"policy": mine}), read)
    # No copy: the same memory.
    places = {name: value.data_ptr() for name, value in mine.state().items()}
    assert {n.removeprefix("policy/"): t.data_ptr() for n, t in tensors.items()} == places
    before = {name: value.clone() for name, value in tensors.items()}
    thread = threading.Thread(target=update, args=(mine,))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    assert all(torch.equal(tensors[name], value) for name, value in before.items())
    read.set()
    thread.join(30)
    assert not thread.is_alive()
    assert not any(torch.equal(tensors[n], v) for n, v in before.items() if v.numel() > 100)
    # Once read, it waits no more.
    update(mine)


@pytest.mark.parametrize("small", [True, False])
def test_what_is_small_or_cannot_wait_is_copied(
    make_model: Callable[..., LanguageModel], monkeypatch: pytest.MonkeyPatch, small: bool
) -> None:
    if not small:
        monkeypatch.setattr(step_state, "COPIED", 0)
    parts: dict[str, Any] = {"policy": learner(make_model)}
    parts |= {} if small else {"other": Plain()}
    group = CheckpointGroup(parts)
    tensors = to_write(group, Event())
    places = {value.data_ptr() for value in group.state().values()}
    assert not places & {value.data_ptr() for value in tensors.values()}
    # Nobody holds it.
    update(parts["policy"])


def test_a_file_is_read_one_tensor_at_a_time(tmp_path: Path) -> None:
    saved = {"policy/weight.a": torch.ones(2), "policy/b": torch.zeros(1), "other/c": torch.ones(1)}
    save_file(saved, tmp_path / "state.safetensors")
    tensors = SavedTensors(tmp_path / "state.safetensors")
    assert sorted(tensors) == sorted(saved) and len(tensors) == 3
    part = Part(tensors, "policy/")
    assert set(part) == {"weight.a", "b"} and len(part) == 2
    assert "b" in part and "c" not in part and "other/c" in tensors
    assert torch.equal(part["weight.a"], torch.ones(2))
    with pytest.raises(KeyError):
        part["c"]


@pytest.mark.parametrize("how", [{}, {"master": "stochastic"}], ids=str)
def test_a_stage_that_goes_on_has_the_same_bits(
    run_stage: Callable[..., Any],
    models: Mapping[str, str],
    domains: Mapping[str, str],
    tmp_path: Path,
    same: Callable[[Any, Any], bool],
    monkeypatch: pytest.MonkeyPatch,
    how: dict[str, str],
) -> None:
    """With a checkpoint of the very weights after every step, and a stop after the third."""
    inputs = {"start": models["start"], **domains}
    settings = {"steps": 5, "batch_size": 8, "lr": 0.01, "precision": "bfloat16"}
    settings |= {"optimizer": how} if how else {}
    whole = run_stage("sft", settings, inputs)
    monkeypatch.setattr(context, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    monkeypatch.setattr(step_state, "COPIED", 0)

    class Stopped(Exception):
        pass

    def stopping(ctx: context.Context, step: int, total: int, **metrics: Any) -> None:
        if step == 4:
            ctx.finish()
            raise Stopped
        log(ctx, step, total, **metrics)

    log = context.Context.log
    work = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(context.Context, "log", stopping)
        with pytest.raises(Stopped):
            run_stage("sft", settings, inputs, work)
    again = run_stage("sft", settings, inputs, work)
    assert same(whole, again)
    assert [line["loss"] for line in again.lines] == [line["loss"] for line in whole.lines]
