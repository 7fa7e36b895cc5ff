"""The pure parts of the benchmark: what a task needs, how sides take turns, the models' lengths."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import bench
from suite import limits, measure, models, ours, workload
from suite.measure import Timed, Work, agreement, interleave, sampled


def test_tree_counts_prompts_once_per_group() -> None:
    """Two prompts of 32 tokens, three responses of 1, 2 and 3 tokens: 0 + 1 + 2 inputs.

    Pairs: 32 * 33 / 2 per prompt; an input at offset i of a response sees 32 + i + 1 positions, so
    33 for the second response and 33 + 34 for the third.
    """
    assert limits.tree([1, 2, 3], 2) == (2 * 32 + 3, 2 * 528 + 33 + 33 + 34)


def test_forward_flops_of_a_matrix_product_alone() -> None:
    """With no context, 2 operations per weight and token."""
    size = models.S
    assert limits.forward_flops(size, tokens=3, context=0, logits=0) == 6 * size.block_parameters
    only_head = limits.forward_flops(size, tokens=0, context=0, logits=5)
    assert only_head == 10 * size.vocabulary * size.hidden


def test_sides_take_turns_after_one_warm_up() -> None:
    calls: list[tuple[str, int]] = []

    def side(name: str, tokens: int) -> measure.Side:
        def work(repetition: int) -> Work:
            calls.append((name, repetition))
            return Work(tokens=tokens)

        return work

    timed = interleave({"a": side("a", 1), "b": side("b", 2)}, 2)
    assert calls == [("a", -1), ("b", -1), ("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert [one.work.tokens for one in timed["a"] + timed["b"]] == [1, 1, 2, 2]
    assert all(one.seconds >= 0 for one in timed["a"])


def test_agreement_tells_equal_from_unequal_lengths() -> None:
    def series(*lengths: int) -> list[Timed]:
        return [Timed(seconds=1.0, work=sampled(list(lengths)))]

    assert "agree" in agreement(series(10, 30, 20), series(20, 30, 13))
    assert "DIFFER" in agreement(series(10, 11, 12), series(20, 21, 22))


def test_mixed_rows_are_heavy_tailed_and_end_with_the_end_token() -> None:
    rows = workload.mixed_rows(models.S, 2000, seed=0)
    lengths = [len(row) for row in rows]
    assert sum(lengths) / len(lengths) == pytest.approx(31.4, abs=2.0)
    assert min(lengths) == 2
    assert max(lengths) == models.MAX_NEW_TOKENS
    assert all(row.index(models.END_ID) == len(row) - 1 for row in rows)


def test_the_models_end_responses_at_the_wanted_rate() -> None:
    """Mean probability of the end token on words that the calibration has not seen."""
    model = models.new_model(models.S, seed=1)
    tokens_BT = models.random_words(models.S, rows=8, tokens=100, seed=5)
    with torch.no_grad():
        probability = model(tokens_BT).logits.softmax(-1)
    assert float(probability[..., models.END_ID].mean()) == pytest.approx(1 / 32, rel=0.1)
    assert float(probability[..., models.PAD_ID].max()) < 1e-4


def test_text_and_ids_of_the_workload_are_the_same_thing() -> None:
    tokenizer = models.tokenizer(models.S)
    ids = workload.prompts(models.S, 3)
    assert tokenizer(workload.texts(models.S, 3))["input_ids"] == ids


def test_every_part_is_there() -> None:
    """A part whose module is missing would be found half an hour into a run."""
    folder = bench.HERE / "suite"
    for part in bench.PARTS:
        assert "\ndef run(options: Options) -> list[Row]:" in (folder / f"{part}.py").read_text()


@pytest.mark.slow
def test_ours_does_a_step_of_every_kind(tmp_path: Path) -> None:
    """On the small model with few prompts: what the suite calls is there and counts its tokens."""
    torch.set_num_threads(1)
    start, teacher = (models.save(models.S, tmp_path, seed=seed) for seed in (1, 2))
    texts, prompts = workload.texts(models.S, 2), workload.prompts(models.S, 2)
    rows, others = (workload.mixed_rows(models.S, 2, seed=seed) for seed in (0, 1))
    distillation = ours.Distillation(start, {"a": teacher, "b": teacher}, group=2)
    for done in (
        distillation.step(distillation.problems(texts), 0),
        ours.Grpo(start, workload.reward, group=2).step(texts, 0),
        ours.Sampling(start)(prompts, 2, 0),
    ):
        assert len(done.lengths) == 4 and done.tokens == sum(done.lengths)
    read = 2 * sum(map(len, prompts)) + sum(map(len, [*rows, *others]))
    assert ours.Preference(start, prompts, rows, others).step().tokens == read
    supervised = ours.Supervised(start).step(prompts, rows)
    assert supervised.tokens == sum(map(len, prompts)) + sum(map(len, rows))
