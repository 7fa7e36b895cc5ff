"""Teachers that take turns: no number changes, one at a time is in memory, and they are probed.

Legend: N sampled tokens, D hidden, E the teacher's hidden, V vocabulary.
"""

from __future__ import annotations

import json
import pickle
import shutil
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain.algorithms import Jsd, SampledToken, TopK, Truncated
from posttrain.backends.base import Head
from posttrain.backends.local import LocalBackend, LocalLearner, LocalScorer
from posttrain.backends.resting import RestingHead, RestingWeights
from posttrain.engine.errors import StageError
from posttrain.engine.fingerprint import file_digest
from posttrain.losses.distill import full_vocabulary
from posttrain.losses.divergence import TeacherStates
from posttrain.rl.batch import Batch
from posttrain.stages import probes
from posttrain.stages import teachers as stage
from posttrain.stages.context import Context
from posttrain.stages.distill import teacher_logprobs
from posttrain.stages.probes import Probe, due
from posttrain.stages.settings.distill import Distill

RunStage = Callable[..., Any]
BASE: dict[str, Any] = {
    "steps": 3,
    "prompts_per_step": 12,
    "max_new_tokens": 6,
    "lr": 0.01,
    "warmup_steps": 1,
    "routes": {"short": "first", "words": "second"},
}


class Killed(Exception):
    """In place of a signal."""


@pytest.fixture
def resting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Teachers of any size rest, and batches come in several parts."""
    monkeypatch.setattr(stage, "REST_BYTES", 1)
    monkeypatch.setattr(stage, "READ_TOKENS", 30)


@pytest.fixture
def distill(
    run_stage: RunStage, models: Mapping[str, str], domains: Mapping[str, str]
) -> Callable[..., Any]:
    """Distil `start` from two teachers with BASE and the given changes."""

    def run(work: Path | None = None, threads: int = 1, **changes: Any) -> Any:
        teachers = {"teachers.first": models["one"], "teachers.second": models["two"]}
        edges = {f"teachers.{name}": changes.pop(name) for name in ("second",) if name in changes}
        inputs = {"start": models["start"], **teachers, **edges, **domains}
        return run_stage("distill", BASE | changes, inputs, work, threads=threads)

    return run


@pytest.mark.parametrize(
    "changes",
    [
        {"estimator": "reverse_kl", "num_minibatches": 2},
        {"estimator": Jsd(0.3), "precision": "bfloat16"},
        {"estimator": {"kind": "reverse_kl", "cache": "bfloat16"}, "samples_per_prompt": 2},
        {"estimator": TopK(8)},
        {"estimator": SampledToken(), "correction": Truncated(), "reward_weight": 0.5}
        | {"samples_per_prompt": 2},
        {"hints": {"words": "{prompt} {answer}"}, "routes": {"short": "first", "words": "first"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("threads", [1, 2])
def test_no_number_depends_on_it(
    distill: Callable[..., Any],
    same: Callable[[Any, Any], bool],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    threads: int,
) -> None:
    monkeypatch.setattr(stage, "READ_TOKENS", 30)
    awake = distill(threads=threads, **changes)
    woken: list[object] = []
    wake = RestingWeights.wake

    def counted(self: RestingWeights) -> None:
        woken.extend([] if self.awake else [self])
        wake(self)

    monkeypatch.setattr(RestingWeights, "wake", counted)
    monkeypatch.setattr(stage, "REST_BYTES", 1)
    rested = distill(threads=threads, **changes)
    assert same(awake, rested)
    for ours, theirs in zip(awake.lines, rested.lines, strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    # Each for its probe, and once in every step.
    teachers = len({id(weights) for weights in woken})
    assert teachers == len(set(changes.get("routes", BASE["routes"]).values()))
    assert len(woken) == teachers * (1 + BASE["steps"])


def test_one_at_a_time_is_in_memory_and_none_while_the_student_learns(
    distill: Callable[..., Any], resting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[LocalScorer] = []
    scorer_of, update, hidden = LocalBackend.scorer, LocalLearner.update, LocalScorer.hidden
    seen: dict[str, set[int]] = {"update": set(), "hidden": set()}

    def remembered(self: LocalBackend, *args: Any, **settings: Any) -> LocalScorer:
        made.append(scorer_of(self, *args, **settings))
        return made[-1]

    def count() -> int:
        return sum(s.weights is not None and s.weights.awake for s in made)

    def updated(self: LocalLearner, *args: Any, **settings: Any) -> Any:
        seen["update"].add(count())
        return update(self, *args, **settings)

    def read(self: LocalScorer, *args: Any) -> Tensor:
        hidden_ND = hidden(self, *args)
        seen["hidden"].add(count())
        return hidden_ND

    monkeypatch.setattr(LocalBackend, "scorer", remembered)
    monkeypatch.setattr(LocalLearner, "update", updated)
    monkeypatch.setattr(LocalScorer, "hidden", read)
    distill()
    assert len(made) == 2
    assert seen == {"update": {0}, "hidden": {1}}


def test_what_is_small_stays_awake(models: Mapping[str, str], tmp_path: Path) -> None:
    assert not stage.rests(Path(models["one"]))
    for number in range(2):
        save_file({"a": torch.zeros(2_000_000)}, tmp_path / f"model-{number}.safetensors")
    assert stage.rests(tmp_path)


def test_heads_are_opened_one_after_another(
    models: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each once in a call of the loss, when its tokens are reached, and the one before is gone
    then; the numbers are those of open heads."""
    backend = LocalBackend()
    scorers = [backend.scorer(Path(models[name])) for name in ("one", "two", "start")]
    live: list[weakref.ref[Tensor]] = []
    opened: list[str] = []
    open_head = RestingHead.open

    def noted(self: RestingHead) -> Head:
        assert all(ref() is None for ref in live), "the head before is still there"
        head = open_head(self)
        live.append(weakref.ref(head.weight_VD))
        opened.append(self.weight.file.parent.name)
        return head

    monkeypatch.setattr(RestingHead, "open", noted)
    heads = [scorer.head_at_rest for scorer in scorers]
    assert len(pickle.dumps(heads)) < 5000
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(90, 32, generator=generator, requires_grad=True)
    states_NE = [torch.randn(n, 32, generator=generator) for n in (10, 30, 50)]
    head_VD = scorers[0].head.weight_VD.clone().requires_grad_()
    found = []
    for which in (heads, [scorer.head for scorer in scorers]):
        teachers = [
            TeacherStates(hidden_NE=states, head_VE=head)
            for states, head in zip(states_NE, which, strict=True)
        ]
        # Chunks of 7 tokens: some are of two teachers.
        loss, _, values = full_vocabulary(
            hidden_ND, head_VD, teachers, torch.ones(90), max_elements=7 * len(head_VD)
        )
        found.append([loss, values["kl"], *torch.autograd.grad(loss, (hidden_ND, head_VD))])
    assert opened == ["one", "two", "start"]
    assert all(map(torch.equal, *found))
    # What samples tell opens them in the same way, and computes in the wider type as the loss does.
    rows = Batch.from_tokens([[11]] * 3, [[12] * n for n in (10, 30, 50)], pad_id=0)
    rows["teacher_B"] = torch.arange(3)
    rows["teacher_hidden_NE"] = torch.cat(states_NE).bfloat16()
    said = [
        teacher_logprobs(Distill.model_construct(temperature=0.8), rows, which)
        for which in (heads, [scorer.head for scorer in scorers])
    ]
    wide_NE = rows["teacher_hidden_NE"][:10].float()
    exact_NV = torch.log_softmax(wide_NE @ scorers[0].head.weight_VD.T / 0.8, -1)
    assert opened == ["one", "two", "start"] * 2 and torch.equal(*said)
    torch.testing.assert_close(said[0][:10], exact_NV[:, 12], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 10**9])
def test_a_teacher_that_loses_its_weights_stops_the_stage(
    distill: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """As in Relax, issue 287: it says the same of every token, and nothing else would notice."""
    monkeypatch.setattr(stage, "REST_BYTES", size)
    monkeypatch.setattr(probes, "PROBE_EVERY", 2)
    logprobs = Probe.again

    def lost(self: Probe) -> None:
        if self.name == "second":
            scorer: Any = self._scorer
            scorer.logprobs(self._rows)
            for parameter in scorer.model.parameters():
                parameter.data.zero_()
        logprobs(self)

    monkeypatch.setattr(Probe, "again", lost)
    with pytest.raises(
        StageError, match="teacher 'second' has changed while the stage ran"
    ) as told:
        distill()
    assert "a model without weights says -4.605" in str(told.value)
    assert "mean now -4.605" in str(told.value)


def test_a_teacher_is_probed_every_so_often_and_after_the_last_step() -> None:
    assert [step for step in range(25) if due(step, 25)] == [9, 19, 24]
    assert [step for step in range(3) if due(step, 3)] == [2]


def test_probes_are_told(distill: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "PROBE_EVERY", 2)
    ran = distill(steps=5)
    facts = json.loads((ran.out.parent / "facts.json").read_text())
    assert facts["teachers_probed"] == 3
    assert "Its teachers were probed 3 times" in (ran.out / "README.md").read_text()


def test_a_backend_without_bits_is_given_a_tolerance(models: Mapping[str, str]) -> None:
    path = Path(models["one"])
    scorer = LocalBackend().scorer(path)
    exact, near = (Probe("t", scorer, path, exact=exact) for exact in (True, False))
    scorer.restore({"model.norm.weight": scorer.state()["model.norm.weight"] * 1.001})
    near.again()
    with pytest.raises(StageError, match="teacher 't' has changed"):
        exact.again()
    scorer.restore({"model.norm.weight": scorer.state()["model.norm.weight"] * 1.5})
    with pytest.raises(StageError, match="teacher 't' has changed"):
        near.again()


def test_a_teacher_that_learns_is_refused(models: Mapping[str, str]) -> None:
    path = Path(models["one"])
    scorer = LocalBackend().scorer(path)
    next(scorer.model.parameters()).requires_grad_()
    with pytest.raises(StageError, match="teacher 't' is not frozen"):
        Probe("t", scorer, path, exact=True)


def with_files(path: Path) -> None:
    """Let a record name the files, as those of the engine do."""
    record = json.loads((path / "record.json").read_text())
    names = [p.name for p in path.iterdir() if p.name != "record.json"]
    record["files"] = {name: {"sha256": file_digest(path / name)} for name in names}
    (path / "record.json").write_text(json.dumps(record))


@pytest.mark.parametrize("rest_bytes", [1, 10**9])
@pytest.mark.parametrize(
    ("recorded", "told"), [(True, "other bytes in model.safetensors"), (False, "nats off")]
)
def test_a_stage_that_goes_on_wants_its_teachers_back(
    distill: Callable[..., Any],
    models: Mapping[str, str],
    same: Callable[[Any, Any], bool],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recorded: bool,
    told: str,
    rest_bytes: int,
) -> None:
    """A teacher made anew may have the same identity and other bytes. The record tells, and where
    it says the same, as over another base of an adapter, the probe does."""
    monkeypatch.setattr(stage, "REST_BYTES", rest_bytes)
    monkeypatch.setattr(probes, "PROBE_EVERY", 1)
    mine, weights = tmp_path / "mine", tmp_path / "mine" / "model.safetensors"
    shutil.copytree(models["two"], mine)
    if recorded:
        with_files(mine)
    former = weights.read_bytes()

    def checkpoint(ctx: Context, step: int, learner: Any) -> None:
        if step == 1:
            ctx.save(step, learner)
            raise Killed

    calm = distill(second=str(mine))
    with monkeypatch.context() as patch:
        patch.setattr(Context, "checkpoint", checkpoint)
        with pytest.raises(Killed):
            distill(tmp_path / "stopped", second=str(mine))
    changed = {n: t * 1.2 if "norm" in n else t for n, t in load_file(weights).items()}
    save_file(changed, weights, metadata={"format": "pt"})
    if recorded:
        with_files(mine)
    with pytest.raises(StageError, match=f"teacher 'second' is not the one .*{told}") as error:
        distill(tmp_path / "stopped", second=str(mine))
    assert f"remove {tmp_path / 'stopped'}" in str(error.value)
    weights.write_bytes(former)
    if recorded:
        with_files(mine)
    again = distill(tmp_path / "stopped", second=str(mine))
    assert same(calm, again)
    facts = json.loads((tmp_path / "stopped" / "facts.json").read_text())
    assert facts["teachers_probed"] == BASE["steps"]
