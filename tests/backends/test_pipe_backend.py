"""The seam: real stages run through a backend in other processes and end with the local weights.

Legend: B rows, N sampled tokens.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import posttrain.stages.worker
from posttrain.algorithms import (
    KL,
    Critique,
    Custom,
    Gae,
    IcePop,
    Jsd,
    SampledToken,
    TopK,
    Truncated,
)
from posttrain.backends.base import AuxLoss, Backend, LearnerSettings, Metrics, TokenLoss
from posttrain.backends.local import LocalBackend
from posttrain.backends.scalar import load_scalar, save_scalar
from posttrain.engine.errors import ConfigError
from posttrain.rewards.judge_kinds import Itself, Scalar
from posttrain.rl.batch import Batch
from posttrain.stages import teachers
from posttrain.stages.context import Context
from posttrain.stages.worker import BACKEND

# The processes import it by name.
sys.path.append(str(Path(__file__).parent))
from pipe_backend import PipeBackend, PipeScorer, Processes

RunStage = Callable[..., Any]
SETTINGS = LearnerSettings(betas=(0.9, 0.98), weight_decay=0.1, max_grad_norm=1.0)
NEAR = 5e-6
OPTIM: dict[str, Any] = {"steps": 3, "lr": 2e-4, "warmup_steps": 0, "lr_decay": "constant"}
ROLLOUT = OPTIM | {"prompts_per_step": 6, "max_new_tokens": 6}
RL = ROLLOUT | {"group_size": 4}
DISTILL = ROLLOUT | {"samples_per_prompt": 2, "routes": {"short": "one", "words": "two"}}

SURROGATE = """
def plain(logp_N, old_logp_N, advantage_N, weight_N, row_N, *, num_rows, correction_N, scale):
    ratio_N = (logp_N - old_logp_N).exp()
    total = (weight_N * correction_N * advantage_N * ratio_N).sum()
    return -scale * total, {"ratio": ratio_N.sum()}
"""
OWN = Custom(name="own.py:plain", source=SURROGATE, settings={"scale": 2.0})

STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", OPTIM | {"batch_size": 7, "aux": {"more": 0.5}}),
    "dpo": ("dpo", OPTIM | {"batch_size": 5, "loss": "kto"}),
    "reward_model": ("reward_model", OPTIM | {"batch_size": 5}),
    "rl": ("rl", RL | {"kl": KL(0.1), "num_minibatches": 2, "correction": IcePop()}),
    "rl, critic": ("rl", RL | {"advantage": Gae(), "num_minibatches": 2, "top_p": 0.9}),
    "rl, itself": (
        "rl",
        RL
        | {
            "reward": Itself(),
            "critique": Critique(0.5, pairs=5),
            "kl": KL(0.1, reference_every=2),
        },
    ),
    "rl, reward model": ("rl", RL | {"reward": Scalar(model="judges.scored"), "group_size": 3}),
    "rl, own surrogate": ("rl", RL | {"surrogate": OWN}),
    "distill": ("distill", DISTILL | {"estimator": Jsd(0.3)}),
    "distill, top k": ("distill", DISTILL | {"estimator": TopK(8), "aux": {"more": 0.5}}),
    "distill, reward": (
        "distill",
        DISTILL
        | {
            "estimator": SampledToken(),
            "reward_weight": 0.5,
            "num_minibatches": 2,
            "correction": Truncated(),
        },
    ),
}


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    """Started once for all tests: each takes seconds to import what it needs."""
    processes = Processes()
    yield processes
    processes.close()


@pytest.fixture
def inputs(
    models: Mapping[str, str], domains: Mapping[str, str], data: str, tmp_path: Path
) -> Callable[[str], dict[str, str]]:
    """`inputs(name)`: the edges of a stage of `STAGES`."""

    def inputs(name: str) -> dict[str, str]:
        kind, settings = STAGES[name]
        found = {"start": models["start"]}
        found |= {"data": data} if kind in ("dpo", "reward_model") else domains
        if kind == "distill":
            found |= {"teachers.one": models["one"], "teachers.two": models["two"]}
        if "aux" in settings:
            found["aux.more"] = data
        if isinstance(settings.get("reward"), Scalar):
            found[settings["reward"].edge] = reward_model(models["one"], tmp_path / "scored")
        return found

    return inputs


def reward_model(start: str, path: Path) -> str:
    """A model with a score of random weights in place of the logits of `start`."""
    scored = load_scalar(start)
    torch.nn.init.normal_(scored.model.score.weight, generator=torch.Generator().manual_seed(0))
    save_scalar(scored, path)
    (path / "record.json").write_text((Path(start) / "record.json").read_text())
    return str(path)


@pytest.fixture
def through_pipes(
    run_stage: RunStage, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> RunStage:
    """`run_stage` with models in other processes."""

    def run(*args: Any, **settings: Any) -> Any:
        def new_backend(*_: object, **__: object) -> Backend:
            return PipeBackend(processes=processes)

        with monkeypatch.context() as patch:
            patch.setattr(posttrain.stages.worker, "new_backend", new_backend)
            return run_stage(*args, **settings)

    return run


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest difference of two numbers of the same name and place."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_ends_with_the_local_weights(
    run_stage: RunStage,
    through_pipes: RunStage,
    inputs: Callable[[str], dict[str, str]],
    name: str,
) -> None:
    """What was sampled is the same, weights to 5e-6, what is logged to rounding."""
    kind, settings = STAGES[name]
    edges = inputs(name)
    local, piped = run_stage(kind, settings, edges), through_pipes(kind, settings, edges)
    assert distance(local.weights(), piped.weights()) <= NEAR
    barely = run_stage(kind, settings | {"steps": 1, "lr": 1e-12}, edges)
    assert distance(local.weights(), barely.weights()) > 100 * NEAR, "it learns"
    for ours, theirs in zip(local.lines, piped.lines, strict=True):
        ours["seconds"] = theirs["seconds"]
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    if (local.out / "rollouts.jsonl").exists():
        sampled, theirs = (
            [json.loads(line)["response"] for line in (ran.out / "rollouts.jsonl").open()]
            for ran in (local, piped)
        )
        assert sampled == theirs


@pytest.mark.parametrize("name", ["distill", "distill, top k"])
def test_teachers_that_rest_there_say_the_same(
    through_pipes: RunStage,
    inputs: Callable[[str], dict[str, str]],
    same: Callable[[Any, Any], bool],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """The learners open their output layers by the names of files."""
    kind, settings = STAGES[name]
    edges = inputs(name)
    awake = through_pipes(kind, settings, edges)
    monkeypatch.setattr(teachers, "REST_BYTES", 1)
    opened: list[str] = []
    at_rest = PipeScorer.head_at_rest.fget
    assert at_rest is not None

    def noted(scorer: PipeScorer) -> Any:
        head = at_rest(scorer)
        opened.append(type(head).__name__)
        return head

    monkeypatch.setattr(PipeScorer, "head_at_rest", property(noted))
    assert same(awake, through_pipes(kind, settings, edges))
    assert set(opened) == ({"RestingHead"} if name == "distill" else set())


def test_a_stage_that_only_samples_has_the_local_responses(
    run_stage: RunStage,
    through_pipes: RunStage,
    models: Mapping[str, str],
    domains: Mapping[str, str],
) -> None:
    settings = {"k": 3, "num_prompts": 10, "max_new_tokens": 6, "routes": {"short": ["one"]}}
    edges = {"domains.short": domains["domains.short"], "models.one": models["one"]}
    local, piped = (run("sample", settings, edges) for run in (run_stage, through_pipes))
    rows = (local.out / "rollouts.jsonl").read_text()
    assert rows == (piped.out / "rollouts.jsonl").read_text()
    assert rows.count("\n") == 30


class Killed(Exception):
    """In place of a signal."""


RESUMED = {
    "rl": RL | {"kl": KL(0.1, reference_every=1), "advantage": Gae(), "steps": 4},
    "distill": DISTILL | {"steps": 4, "optimizer": {"ema": 0.5}},
}


@pytest.mark.parametrize("kind", RESUMED)
def test_a_stage_goes_on_from_its_checkpoint(
    through_pipes: RunStage,
    inputs: Callable[[str], dict[str, str]],
    same: Callable[[Any, Any], bool],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """State goes to the disk and comes back through the pipes, to the same bits."""

    def checkpoint(ctx: Context, step: int, learner: Any) -> None:
        if step == 2:
            ctx.save(step, learner)
        if step == 3:
            raise Killed

    calm = through_pipes(kind, RESUMED[kind], inputs(kind))
    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(Context, "checkpoint", checkpoint)
        with pytest.raises(Killed):
            through_pipes(kind, RESUMED[kind], inputs(kind), stopped)
    again = through_pipes(kind, RESUMED[kind], inputs(kind), stopped)
    assert same(calm, again)
    assert [line["tokens"] for line in calm.lines] == [line["tokens"] for line in again.lines]


def test_a_job_names_its_backend(
    run_stage: RunStage,
    inputs: Callable[[str], dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By an entry of its environment; the processes end with the stage."""
    made: list[Processes] = []
    begin = Processes.__init__

    def remember(processes: Processes) -> None:
        begin(processes)
        made.append(processes)

    monkeypatch.setattr(Processes, "__init__", remember)
    kind, settings = STAGES["sft"]
    environment = {BACKEND: "pipe_backend:PipeBackend"}
    piped = run_stage(kind, settings, inputs("sft"), environment=environment)
    assert distance(piped.weights(), run_stage(kind, settings, inputs("sft")).weights()) <= NEAR
    (started,) = (processes.started for processes in made)
    # Two that learn, and one that samples for whoever watches.
    assert [one.process.exitcode for one in started] == [0, 0, 0]


def sum_of_pairs(
    weight: float, logp_N: Tensor, entropy_N: Tensor, batch: Batch
) -> tuple[Tensor, Metrics]:
    """A loss that needs both rows of a pair."""
    sum_B = torch.zeros(len(batch)).index_add(0, batch.row_N, logp_N * batch["weight_N"])
    total = weight * (sum_B[::2] * sum_B[1::2]).sum()
    return total, {"total": total.detach(), "entropy": entropy_N.sum()}


def pairs_of_rows(num_rows: int) -> Batch:
    """Rows of unlike lengths with a weight for each sampled token."""
    batch = Batch.from_tokens(
        [[11, 12, 13 + number // 2] for number in range(num_rows)],
        [[20 + number, *range(30, 31 + 3 * number)] for number in range(num_rows)],
        pad_id=0,
    )
    batch["weight_N"] = torch.linspace(-1, 1, batch.num_tokens)
    return batch


def test_gradients_and_metrics_of_all_processes_are_those_of_one(
    models: Mapping[str, str], processes: Processes
) -> None:
    """Blocks of rows that belong together stay whole, and no process has all of them. The first
    moment of Adam is a tenth of the gradient."""
    loss = TokenLoss(sum_of_pairs, 0.01)
    aux = AuxLoss(
        name="aux", batch=pairs_of_rows(2), loss=loss, count=2.0, weight=0.3, group_rows=2
    )
    found = []
    for backend in (LocalBackend(), PipeBackend(processes=processes)):
        learner = backend.learner(Path(models["start"]), SETTINGS, scalar=False)
        before_N = learner.logprobs(pairs_of_rows(6))
        learner.set_hyperparameters(weight_decay=0.5, max_grad_norm=0.1)
        sums = learner.update(pairs_of_rows(6), loss, count=6.0, lr=1e-4, group_rows=2, aux=[aux])
        found.append((before_N, sums, learner.state(), learner.num_parameters()))
    (local_N, local, state, size), (piped_N, piped, piped_state, piped_size) = found
    torch.testing.assert_close(piped_N, local_N, atol=1e-5, rtol=1e-5)
    assert piped == pytest.approx(local, rel=1e-5)
    assert set(piped) == {"total", "entropy", "aux/total", "aux/entropy", "grad_norm"}
    assert size == piped_size > 1000
    first = {name: value for name, value in state.items() if name.endswith("exp_avg")}
    theirs = {name: piped_state[name] for name in first}
    largest = max(float(value.abs().max()) for value in first.values())
    assert distance(first, theirs) < 1e-5 * largest


def test_what_is_refused_there_is_raised_here(
    models: Mapping[str, str], processes: Processes
) -> None:
    backend, start = PipeBackend(processes=processes), Path(models["start"])
    sampler = backend.sampler(start, dtype=torch.float32)
    with pytest.raises(ConfigError, match="max_new_tokens = 99"):
        sampler.sample([[5, 6]], group_size=1, max_new_tokens=99, temperature=1.0, seed=0)
    with pytest.raises(ConfigError, match="cannot load"):
        backend.scorer(start / "nowhere", dtype=torch.float32, scalar=False)
