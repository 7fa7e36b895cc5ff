"""Merging by hand: every rule on a few numbers, then on files.

The base is 0 unless said otherwise, so that a model is its own difference from it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from posttrain.backends.merging import (
    TensorFiles,
    average,
    dare,
    drop,
    merged,
    task_arithmetic,
    ties,
    trim,
    untie,
)
from posttrain.engine.errors import ConfigError

ZERO = torch.zeros(4)


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32)


def test_an_average_is_divided_by_the_weights() -> None:
    """(1 * 2 + 3 * 6) / 4 = 5."""
    found = average([vector(2.0, 0.0), vector(6.0, 4.0)], [1.0, 3.0])
    assert found.tolist() == [5.0, 3.0]


def test_task_arithmetic_adds_differences() -> None:
    """10 + .5 (1 * (12 - 10) - 2 * (11 - 10)) = 10, and 10 + .5 (1 * 4 - 2 * -1) = 13."""
    base, models = vector(10.0, 10.0), [vector(12.0, 14.0), vector(11.0, 9.0)]
    assert task_arithmetic(base, models, [1.0, -2.0], scale=0.5).tolist() == [10.0, 13.0]


def test_trimming_keeps_the_largest() -> None:
    """Half of four numbers; at least one of them however small the density."""
    assert trim(vector(0.1, -3.0, 2.0, 0.5), 0.5).tolist() == [0.0, -3.0, 2.0, 0.0]
    assert trim(vector(0.1, -3.0, 2.0, 0.5), 0.01).tolist() == [0.0, -3.0, 0.0, 0.0]
    assert trim(vector(0.1, -3.0), 1.0).tolist() == vector(0.1, -3.0).tolist()
    assert trim(torch.tensor([[1.0, -4.0], [3.0, 2.0]]), 0.5).tolist() == [[0.0, -4.0], [3.0, 0.0]]


def test_ties_by_hand() -> None:
    """Three models, nothing trimmed. Column by column of the differences:
    (3, 1, -2): sum 2, positive: mean(3, 1) = 2.
    (-4, 1, 1): sum -2, negative: -4 alone.
    (1, -1, 0): sum 0: nothing, since neither sign is elected.
    (0, 0, 6): positive; the zeros are nobody's: 6."""
    models = [vector(3, -4, 1, 0), vector(1, 1, -1, 0), vector(-2, 1, 0, 6)]
    assert ties(ZERO, models, [1, 1, 1], density=1.0).tolist() == [2, -4, 0, 6]
    base = vector(1, 1, 1, 1)
    moved = [model + base for model in models]
    assert ties(base, moved, [1, 1, 1], density=1.0, scale=0.5).tolist() == [2, -1, 1, 4]


def test_weights_count_in_the_election_and_in_the_mean_of_ties() -> None:
    """(3, -2) with weights 1 and 2: 3 - 4 < 0, so -2. (3, 6) with them: (3 + 12) / 3 = 5."""
    models = [vector(3, 3), vector(-2, 6)]
    assert ties(torch.zeros(2), models, [1, 2], density=1.0).tolist() == [-2, 5]


def test_ties_trims_before_it_elects() -> None:
    """-2 is trimmed, so that it has no vote against 1, which stays: at density .5 of two numbers
    each model keeps one."""
    models = [vector(1.0, 0.0), vector(-2.0, 5.0)]
    assert ties(torch.zeros(2), models, [1, 1], density=0.5).tolist() == [1, 5]
    assert ties(torch.zeros(2), models, [1, 1], density=1.0).tolist() == [-2, 5]


def test_what_dare_keeps_is_rescaled() -> None:
    """Every number is 0 or 1 / density, and about a density of them is not 0: 3000 of 10000, with
    a standard deviation of 46."""
    dropped = drop(torch.ones(100, 100), 0.3, seed=1)
    assert set(dropped.unique().tolist()) == {0.0, float(torch.tensor(1.0) / 0.3)}
    assert abs(int((dropped > 0).sum()) - 3000) < 200
    assert torch.equal(dropped, drop(torch.ones(100, 100), 0.3, seed=1))
    assert not torch.equal(dropped, drop(torch.ones(100, 100), 0.3, seed=2))
    assert torch.equal(drop(torch.ones(5), 1.0, seed=1), torch.ones(5))


def test_dare_linear_is_task_arithmetic_of_what_is_left() -> None:
    base = torch.linspace(-1, 1, 50)
    models = [torch.randn(50, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    found = dare(base, models, [0.5, -1.0], density=0.4, seeds=[7, 8], scale=2.0)
    first, second = (drop(m - base, 0.4, s) for m, s in zip(models, (7, 8), strict=True))
    torch.testing.assert_close(found, base + 2.0 * (0.5 * first - second))


def test_dare_with_an_election_adds_those_that_agree() -> None:
    """Nothing dropped: (3, 1): 4, not their mean; (3, -1): 3 alone; (-2, 2): nothing."""
    models = [vector(3, 3, -2), vector(1, -1, 2)]
    found = dare(torch.zeros(3), models, [1, 1], density=1.0, seeds=[0, 1], elect=True)
    assert found.tolist() == [4, 3, 0]


def test_dare_keeps_the_expected_difference() -> None:
    """The mean over 400 draws of a difference of 1 in two models, each with weight .5, is 1 up to
    sqrt(.5 * (1 / .2 - 1) / 400) = .07 a number, so .007 over a hundred numbers."""
    for elect in (False, True):
        draws = [
            dare(
                torch.zeros(100),
                [torch.ones(100)] * 2,
                [0.5, 0.5],
                density=0.2,
                seeds=[2 * n, 2 * n + 1],
                elect=elect,
            )
            for n in range(400)
        ]
        assert float(torch.stack(draws).mean()) == pytest.approx(1.0, abs=0.03)


MODELS: list[dict[str, Tensor]] = [
    {"a": vector(2, 4), "b": torch.tensor([[1.0, 3.0]]), "n": torch.tensor([5])},
    {"a": vector(4, 0), "b": torch.tensor([[3.0, -3.0]]), "n": torch.tensor([5])},
]
BASE = {"a": vector(2, 2), "b": torch.tensor([[1.0, 1.0]]), "n": torch.tensor([5])}


def test_whole_models_are_merged_tensor_by_tensor() -> None:
    found = dict(merged(MODELS, [1.0, 1.0], how="average"))
    assert found["a"].tolist() == [3, 2] and found["b"].tolist() == [[2, 0]]
    assert found["n"].dtype == torch.int64 and found["n"].tolist() == [5]
    rest: dict[str, Any] = {"base": BASE, "density": 1.0}
    found = dict(merged(MODELS, [1.0, 1.0], how="task_arithmetic", base=BASE))
    assert found["a"].tolist() == [4, 2] and found["b"].tolist() == [[3, -1]]
    # Differences (0, 2) and (2, -2); (0, 2) and (2, -4).
    found = dict(merged(MODELS, [1.0, 1.0], how="ties", **rest))
    assert found["a"].tolist() == [4, 2] and found["b"].tolist() == [[3, -3]]
    found = dict(merged(MODELS, [1.0, 1.0], how="dare_ties", **rest))
    assert found["a"].tolist() == [4, 2] and found["b"].tolist() == [[3, -3]]
    found = dict(merged(MODELS, [1.0, 1.0], how="dare_linear", **rest))
    assert found["a"].tolist() == [4, 2] and found["b"].tolist() == [[3, -1]]


def test_what_is_dropped_follows_from_seed_model_and_tensor() -> None:
    ones = {name: torch.ones(200) for name in ("a", "b")}
    rest: dict[str, Any] = {
        "how": "dare_linear", "base": {n: torch.zeros(200) for n in ones}, "density": 0.5,
    }  # fmt: skip

    def of(seed: int, weights: list[float], *names: str) -> dict[str, Tensor]:
        models = [{name: ones[name] for name in names}] * 2
        return dict(merged(models, weights, seed=seed, **rest))

    both = of(0, [1.0, 0.0], "a", "b")
    assert not torch.equal(both["a"], both["b"])
    assert not torch.equal(both["a"], of(0, [0.0, 1.0], "a", "b")["a"])
    assert not torch.equal(both["a"], of(1, [1.0, 0.0], "a", "b")["a"])
    assert torch.equal(both["b"], of(0, [1.0, 0.0], "b")["b"])


def test_arithmetic_is_in_float32_and_integers_must_agree() -> None:
    """1 and 1 + 2**-8 are neighbours of bfloat16's grid at 1; their mean lies between them."""
    low, high = (torch.tensor([x]).bfloat16() for x in (1.0, 1.0 + 2**-7))
    found = dict(merged([{"a": low}, {"a": high}], [1.0, 1.0], how="average"))
    assert found["a"].dtype == torch.float32 and found["a"].item() == 1.0 + 2**-8
    with pytest.raises(ConfigError, match=r"tensor n holds torch\.int64 and differs"):
        list(merged([MODELS[0], MODELS[1] | {"n": torch.tensor([6])}], [1, 1], how="average"))


def test_files_are_read_tensor_by_tensor(tmp_path: Path) -> None:
    whole, split = tmp_path / "whole", tmp_path / "split"
    whole.mkdir()
    split.mkdir()
    save_file(BASE, whole / "model.safetensors")
    save_file({"a": BASE["a"]}, split / "one.safetensors")
    save_file({"b": BASE["b"]}, split / "two.safetensors")
    (split / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}'
    )
    files = TensorFiles(whole)
    assert set(files) == {"a", "b", "n"} and set(TensorFiles(split)) == {"a", "b"}
    assert len(files) == 3
    assert files.shape("b") == [1, 2]
    for name in files:
        assert torch.equal(files[name], BASE[name])
    assert torch.equal(TensorFiles(split)["b"], BASE["b"])
    with pytest.raises(ConfigError, match=r"there is no model\.safetensors"):
        TensorFiles(tmp_path)


def test_whether_a_tensor_is_tied_is_decided_by_its_numbers(tmp_path: Path) -> None:
    embed, other = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 3.0]])
    held = {
        "alone": {"embed": embed},
        "twice": {"embed": embed, "head": embed.clone()},
        "apart": {"embed": embed, "head": other},
    }
    files = {}
    for name, tensors in held.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        files[name] = TensorFiles(tmp_path / name, tied={"head": "embed"})
    assert [set(f) for f in files.values()] == [{"embed"}, {"embed"}, {"embed", "head"}]
    untie([files["alone"], files["twice"]])
    assert all(set(files[name]) == {"embed"} for name in ("alone", "twice"))
    untie(list(files.values()))
    heads = [f["head"] for f in files.values()]
    assert [torch.equal(head, embed) for head in heads] == [True, True, False]
    assert torch.equal(heads[2], other)
    assert all(len(f) == 2 and f.shape("head") == [1, 2] for f in files.values())
