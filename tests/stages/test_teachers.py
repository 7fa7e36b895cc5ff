"""Teachers that read beside the sampler: what they say is the same, and they do not wait for it."""

from __future__ import annotations

import pickle
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.backends.chat import Chat
from posttrain.backends.checkpoint import LanguageModel, load
from posttrain.backends.local import LocalBackend, LocalSampler, LocalScorer
from posttrain.engine.work import read_warnings
from posttrain.rl.batch import Batch
from posttrain.stages import teachers as stage
from posttrain.stages.config import build_config
from posttrain.stages.context import Context
from posttrain.stages.distill import LossSettings, distill_loss
from posttrain.stages.rollout import gathered
from posttrain.stages.settings.distill import Distill
from posttrain.stages.teachers import Teachers, TeacherScoring


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a few rows, though the batches of these tests are small."""
    monkeypatch.setattr(stage, "READ_TOKENS", 30)


PROMPTS = [[10 + n, 20, 30 + n % 3] for n in range(12)]
PROBLEMS = [{"domain": "ab"[n % 2], "id": str(n), "prompt": "p", "answer": "a"} for n in range(12)]
SAMPLE: dict[str, Any] = {
    "group_size": 2,
    "max_new_tokens": 8,
    "temperature": 1.0,
    "seed": 0,
}


def settings(**changes: Any) -> Distill:
    values = {"steps": 1, "routes": {"a": "one", "b": "two"}, "samples_per_prompt": 2} | changes
    built = build_config("distill", "student", values)
    assert isinstance(built, Distill)
    return built


@pytest.fixture
def scoring(tmp_path: Path, models: Mapping[str, str]) -> Callable[..., Any]:
    """`scoring(settings, workers)`: a sampler of the student, and the scoring of what it says by
    the teachers `one` and `two`."""

    def scoring(
        chosen: Distill, workers: ThreadPoolExecutor | None = None, **paths: str
    ) -> tuple[LocalSampler, TeacherScoring, Teachers]:
        backend = LocalBackend()
        inputs = {"start": models["start"]}
        inputs |= {f"teachers.{name}": models[name] for name in ("one", "two")}
        inputs |= {f"teachers.{name}": path for name, path in paths.items()}
        ctx = Context(
            name="student",
            work=tmp_path,
            inputs=inputs,
            threads=1,
            backend=backend,
            workers=workers,
        )
        sampler = backend.sampler(Path(models["start"]))
        sampler.max_rows = 8
        policy: Any = LocalScorer(load(models["start"]))
        teachers = Teachers(chosen, ctx, policy)
        return sampler, teachers.scoring(chosen, PROBLEMS), teachers

    return scoring


def read(scoring: Callable[..., Any], chosen: Distill, workers: ThreadPoolExecutor | None) -> Batch:
    """A batch with what the teachers say; without workers all is read at the end, in one piece."""
    sampler, said, _ = scoring(chosen, workers)
    sampling = sampler.stream(PROMPTS, **SAMPLE)
    for row_B in gathered(sampling, 2):
        if workers is not None:
            said.on_finished(row_B, sampling)
    batch: Batch = sampling.batch()
    said.add_columns(batch)
    return batch


@pytest.mark.parametrize(
    ("estimator", "columns"),
    [
        ({"kind": "reverse_kl"}, ["teacher_hidden_NE"]),
        ({"kind": "reverse_kl", "cache": "bfloat16"}, ["teacher_hidden_NE"]),
        ({"kind": "top_k", "k": 5}, ["teacher_ids_NK", "teacher_logp_NK"]),
        ({"kind": "sampled_token"}, ["teacher_logp_N"]),
    ],
    ids=str,
)
def test_beside_the_sampler_they_say_what_they_say_after_it(
    scoring: Callable[..., Any], estimator: dict[str, Any], columns: list[str]
) -> None:
    chosen = settings(estimator=estimator)
    with ThreadPoolExecutor(1) as aside:
        beside = read(scoring, chosen, aside)
    after = read(scoring, chosen, None)
    assert beside.responses() == after.responses()
    assert beside["teacher_B"].tolist() == [n % 2 for n in range(12) for _ in range(2)]
    assert {name for name in beside.columns if name.startswith("teacher")} == {
        "teacher_B",
        *columns,
    }
    for name in columns:
        assert beside[name].dtype == after[name].dtype
        torch.testing.assert_close(
            beside[name].double(),
            after[name].double(),
            atol=2e-2 if "cache" in estimator else 1e-5,
            rtol=1e-4,
        )


def test_each_teacher_says_what_it_says_of_its_rows_alone(scoring: Callable[..., Any]) -> None:
    """By hand: each model's own log-probabilities of the rows of its domain."""
    chosen = settings(estimator="sampled_token")
    batch = read(scoring, chosen, None)
    _, _, teachers = scoring(chosen)
    for number, scorer in enumerate(teachers.scorers):
        rows = batch.select(batch["teacher_B"] == number)
        expected_N = scorer.logprobs(rows)
        torch.testing.assert_close(rows["teacher_logp_N"], expected_N, atol=1e-5, rtol=1e-4)
        other_N = teachers.scorers[1 - number].logprobs(rows)
        assert float((rows["teacher_logp_N"] - other_N).abs().mean()) > 0.1


def test_teachers_of_unlike_sizes_share_a_column(
    scoring: Callable[..., Any],
    make_model: Callable[..., LanguageModel],
    save_model: Callable[[LanguageModel], str],
    models: Mapping[str, str],
) -> None:
    """`wide` has 48 numbers per state and `one` 32, whose rows leave the last 16 places free. The
    loss of all rows together is that of the rows of each teacher alone."""
    sampler = LocalBackend().sampler(Path(models["start"]))
    like = make_model(stop=list(sampler.chat.stop_ids))
    torch.manual_seed(5)
    config = type(like.model.config)(**like.model.config.to_dict() | {"hidden_size": 48})
    model = type(like.model)(config).eval()
    model.generation_config = like.model.generation_config
    wide = save_model(replace(like, model=model))
    chosen = settings(estimator="reverse_kl")
    sampler, said, teachers = scoring(chosen, two=wide)
    batch = sampler.sample(PROMPTS, **SAMPLE)
    said.add_columns(batch)
    assert batch["teacher_hidden_NE"].shape == (batch.num_tokens, 48)
    assert [head.weight_VD.shape[1] for head in teachers.heads] == [32, 48]
    batch["domain_B"] = batch["teacher_B"]
    batch["loss_weight_B"] = torch.ones(len(batch))
    student = teachers.scorers[0]
    wanted = LossSettings(step=chosen, domains=("a", "b"), heads=teachers.heads)
    whole, sums = distill_loss(wanted, student.hidden(batch), student.head, batch)
    alone = 0.0
    for number, name in enumerate("ab"):
        rows = batch.select(batch["teacher_B"] == number)
        part, of_it = distill_loss(wanted, student.hidden(rows), student.head, rows)
        alone += float(part.detach())
        assert float(of_it[f"kl/{name}"]) == pytest.approx(float(sums[f"kl/{name}"]), abs=1e-4)
    assert float(whole.detach()) == pytest.approx(alone, rel=1e-5)
    # The student is `one` itself: of its own rows nothing is left.
    assert abs(float(sums["kl/a"])) < 1e-4 < float(sums["kl/b"])


def test_a_teacher_reads_the_response_after_the_prompt_in_its_own_template(
    scoring: Callable[..., Any], models: Mapping[str, str], tmp_path: Path
) -> None:
    """By hand: the prompt as `two` lays it out, then the student's tokens as they were sampled."""
    shutil.copytree(models["two"], tmp_path / "two")
    template = "{% for m in messages %}ask: {{ m['content'] }} {% endfor %}say: "
    (tmp_path / "two" / "chat_template.jinja").write_text(template)
    chosen = settings(estimator="sampled_token")
    sampler, said, teachers = scoring(chosen, two=str(tmp_path / "two"))
    batch = sampler.sample(PROMPTS, **SAMPLE)
    said.add_columns(batch)
    for number, scorer in enumerate(teachers.scorers):
        rows = batch.select(batch["teacher_B"] == number)
        if number == 1:
            prompt = scorer.chat.begin("ask: p say: ")
            assert scorer.chat.prompt("p") == prompt
            rows = Batch.from_tokens([prompt] * len(rows), rows.responses(), pad_id=0)
        expected_N = scorer.logprobs(rows)
        found_N = batch.select(batch["teacher_B"] == number)["teacher_logp_N"]
        torch.testing.assert_close(found_N, expected_N, atol=1e-5, rtol=1e-4)
    [same, own] = teachers.readers(chosen)
    assert same.chat is teachers.chat and own.chat is teachers.scorers[1].chat


def test_a_teacher_that_ends_its_turns_otherwise_is_told(
    scoring: Callable[..., Any],
    make_model: Callable[..., LanguageModel],
    save_model: Callable[[LanguageModel], str],
    tmp_path: Path,
) -> None:
    other = make_model(stop=95, seed=1)
    other.tokenizer.eos_token = "z"
    other.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert other.stop_ids[0] == 95
    scoring(settings(), two=save_model(other))
    (told,) = read_warnings(tmp_path)
    assert told.startswith("teacher 'two' ends its turns with 'z', the student with '<|end|>' or")


def test_the_loss_can_be_sent_to_another_process(scoring: Callable[..., Any]) -> None:
    chosen = settings(estimator="reverse_kl")
    _, _, teachers = scoring(chosen)
    sent = LossSettings(step=chosen, domains=("a", "b"), heads=teachers.heads)
    function, came = pickle.loads(pickle.dumps((distill_loss, sent)))
    assert function is distill_loss
    assert came.step == chosen
    assert torch.equal(came.heads[1].weight_VD, teachers.heads[1].weight_VD)


def test_they_begin_while_rows_are_still_being_sampled(
    scoring: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last rows are given out only after a teacher has read some: this would wait for ever if
    teachers waited for the sampler."""
    began = threading.Event()
    threads: set[str] = set()
    hidden = LocalScorer.hidden

    def noted(self: LocalScorer, batch: Batch) -> Tensor:
        began.set()
        threads.add(threading.current_thread().name)
        return hidden(self, batch)

    monkeypatch.setattr(LocalScorer, "hidden", noted)

    with ThreadPoolExecutor(1, thread_name_prefix="aside") as aside:
        sampler, said, _ = scoring(settings(), aside)
        sampling = sampler.stream(PROMPTS, **SAMPLE)
        assert list(sampling)
        for row in range(24):
            if row == 23:
                assert began.wait(timeout=60), "no teacher has begun"
            said.on_finished(torch.tensor([row]), sampling)
        batch = sampling.batch()
        said.add_columns(batch)
    assert threads == {"aside_0"}
    assert bool((batch["teacher_hidden_NE"] != 0).any(1).all())


def test_an_error_of_a_teacher_reaches_the_stage(
    scoring: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: LocalScorer, batch: Batch) -> Tensor:
        raise MemoryError("no room")

    monkeypatch.setattr(LocalScorer, "hidden", broken)
    with ThreadPoolExecutor(1) as aside, pytest.raises(MemoryError, match="no room"):
        read(scoring, settings(), aside)


def test_rows_are_gathered_in_order_and_none_is_lost() -> None:
    rows = [torch.tensor(part) for part in ([5], [2, 9], [0], [7, 1, 3], [4])]
    assert [part.tolist() for part in gathered(rows, 3)] == [[2, 5, 9], [0, 1, 3, 7], [4]]
    assert list(gathered([], 3)) == []


@pytest.mark.parametrize("kind", ["sft", "rl", "distill"])
def test_a_second_core_changes_no_bit(
    kind: str,
    run_stage: Callable[..., Any],
    same: Callable[..., bool],
    models: Mapping[str, str],
    domains: Mapping[str, str],
) -> None:
    """A tiny model computes on one thread; what a stage of two cores does beside each other is cut
    and added up as on one. The batches are large enough for two passes an update."""
    settings: dict[str, Any] = {"steps": 3, "lr": 0.01, "warmup_steps": 1}
    inputs = {"start": models["start"], **domains}
    if kind == "sft":
        settings |= {"batch_size": 120}
    else:
        settings |= {"prompts_per_step": 120, "max_new_tokens": 8}
    if kind == "rl":
        settings |= {"group_size": 2, "kl": {"coef": 0.1}}
    if kind == "distill":
        settings |= {"routes": {"short": "first", "words": "second"}, "num_minibatches": 2}
        inputs |= {"teachers.first": models["one"], "teachers.second": models["two"]}
    one, two = (run_stage(kind, settings, inputs, threads=threads) for threads in (1, 2))
    assert same(one, two)
    assert [line["tokens"] for line in one.lines] == [line["tokens"] for line in two.lines]


def test_a_teacher_has_room_for_the_block_that_the_students_prompt_opens(
    scoring: Callable[..., Any], models: Mapping[str, str], tmp_path: Path
) -> None:
    """Its own template opens none, so it reads seven characters beyond its prompt."""
    chosen = settings(estimator="sampled_token")
    _, _, teachers = scoring(chosen)
    assert [reader.more for reader in teachers.readers(chosen)] == [0, 0]
    tokenizer = deepcopy(teachers.chat.tokenizer)
    tokenizer.chat_template += "{% if add_generation_prompt %}<think>{% endif %}"
    teachers.chat = Chat(tokenizer, stop_ids=teachers.chat.stop_ids, pad_id=0)
    readers = teachers.readers(chosen)
    assert [reader.more for reader in readers] == [len("<think>")] * 2
    prompt = teachers._own_prompt(chosen, teachers.scorers[0], PROBLEMS[0])
    assert len(prompt) == len(readers[0].chat.prompt("p")) + readers[0].more
