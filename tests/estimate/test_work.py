"""What each kind of stage samples, learns and scores, against counts by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from posttrain.estimate import work as counting
from posttrain.estimate.parts import Rows, Work
from posttrain.estimate.shapes import Model
from posttrain.stages.config import build_config
from posttrain.stages.kinds import KINDS


class Told:
    """A view whose prompts have 10 tokens, demonstrations 20 and responses 8."""

    def __init__(
        self, kind: str, inputs: Mapping[str, str] | None = None, rows: int = 1000, **settings: Any
    ) -> None:
        self.settings = build_config(kind, "it", settings)
        self.config = self.settings.to_json()
        self.inputs = inputs or {"start": "base", "domains.a": "a", "domains.b": "b"}
        self.rows, self.shares = float(rows), 1.0

    def model(self, edge: str) -> Model | None:
        return None

    def number(self, name: str) -> float:
        values = self.settings.possible(name)
        return sum(values) / len(values)

    def prompts(self) -> Rows:
        return Rows(count=self.rows, prompt=10, response=20, longest=40)

    def said(self, edge: str, most: float) -> float:
        return min(8.0, most)

    def data(self, *roles: str) -> Rows:
        return self.prompts()

    def problems(self, split: str) -> Mapping[str, int]:
        return {"a": 100, "b": 300}

    def measured(self, metric: str, otherwise: float) -> float:
        return self.shares if metric == "train_fraction" else otherwise


def tokens(work: Work) -> tuple[float, float, float]:
    """Sampled, learned, scored."""
    return work.tokens("sample"), work.tokens("learn"), work.tokens("score")


def test_every_kind_that_computes_says_how_its_work_is_counted() -> None:
    for kind in KINDS.values():
        assert kind.work.startswith("posttrain.estimate.work:")
        assert callable(getattr(counting, kind.work.partition(":")[2]))


def test_pretrain_learns_documents() -> None:
    whole = counting.pretrain(Told("pretrain", steps=5, batch_size=4))
    # Every token but the first: 10 + 20 - 1.
    assert tokens(whole) == (0, 5 * 4 * 29, 0)
    responses = counting.pretrain(Told("pretrain", steps=5, batch_size=4, loss_on="response"))
    assert tokens(responses) == (0, 5 * 4 * 20, 0)
    assert responses.saves and responses.counted == 400


def test_sft_counts_steps_or_passes() -> None:
    assert tokens(counting.sft(Told("sft", steps=3, batch_size=8))) == (0, 3 * 8 * 20, 0)
    # 1,000 rows in batches of 8: 125 steps a pass.
    assert counting.sft(Told("sft", epochs=2, batch_size=8)).steps == 250
    hinted = Told("sft", epochs=1, batch_size=8, hint="{prompt} {answer}")
    assert counting.sft(hinted).steps == 250


def test_pairs_are_learned_from_on_both_sides_and_read_by_the_reference() -> None:
    work = counting.dpo(Told("dpo", steps=10, batch_size=4))
    assert tokens(work) == (0, 10 * 2 * 4 * 20, 2 * 1000 * 20)
    free = counting.dpo(Told("dpo", steps=10, batch_size=4, loss={"kind": "simpo"}))
    assert tokens(free) == (0, 10 * 2 * 4 * 20, 0)
    reward = counting.reward_model(Told("reward_model", epochs=1, batch_size=10, holdout=0.1))
    # 900 pairs are learned from, 100 held out and read at the end.
    assert tokens(reward) == (0, 90 * 2 * 10 * 20, pytest.approx(2 * 100 * 20))


RL = {"steps": 10, "prompts_per_step": 4, "group_size": 8, "max_new_tokens": 16}


def test_rl_samples_groups_and_learns_from_them() -> None:
    rows = 10 * 4 * 8
    assert tokens(counting.rl(Told("rl", **RL))) == (rows * 8, rows * 8, 0)
    held = counting.rl(Told("rl", **RL, kl={"coef": 0.1}))
    assert tokens(held) == (rows * 8, rows * 8, rows * 8)
    few = Told("rl", **RL)
    few.shares = 0.25
    assert tokens(counting.rl(few)) == (rows * 8, rows * 2, 0)
    # What the stage counts is what it has sampled.
    assert counting.rl(few).counted == rows * 8
    short = counting.rl(Told("rl", **RL | {"max_new_tokens": 5}))
    assert short.tokens("sample") == rows * 5


def test_a_critic_learns_beside_the_policy_and_reads_what_it_said() -> None:
    work = counting.rl(Told("rl", **RL, advantage="gae"))
    rows = 10 * 4 * 8
    assert tokens(work) == (rows * 8, 2 * rows * 8, rows * 8)


def test_a_reward_model_reads_every_response() -> None:
    inputs = {"start": "s", "judges.rm": "rm", "domains.a": "a"}
    reward = {"judge": "scalar", "model": "judges.rm"}
    work = counting.rl(Told("rl", inputs, **RL, reward=reward))
    assert [part.edge for part in work.parts if part.do == "score"] == ["judges.rm"]
    assert work.tokens("score") == 10 * 4 * 8 * 8


def test_teachers_read_the_rows_of_their_domains() -> None:
    inputs = {"start": "s", "teachers.x": "x", "teachers.y": "y", "domains.a": "a"}
    routes = {"a": "x", "b": "x", "c": "x", "d": "y"}
    view = Told("distill", inputs, steps=5, prompts_per_step=16, routes=routes)
    work = counting.distill(view)
    assert tokens(work) == (5 * 16 * 8, 5 * 16 * 8, 5 * 16 * 8)
    shares = {p.edge: p.calls * p.rows / 5 for p in work.parts if p.do == "score"}
    assert shares == {"teachers.x": 12, "teachers.y": 4}
    learned = next(part for part in work.parts if part.do == "learn")
    assert learned.pair, "the exact divergence goes over two vocabularies"
    sampled = Told("distill", inputs, steps=5, routes=routes, estimator="sampled_token")
    assert not any(part.pair for part in counting.distill(sampled).parts)


def test_an_evaluation_asks_each_model_once() -> None:
    inputs = {"student": "s", "init": "i", "teachers.x": "i", "domains.a": "a", "domains.b": "b"}
    view = Told("evaluate", inputs, num_problems=200, samples=3, max_new_tokens=16)
    # Two models; 100 and 200 problems; three responses and a greedy one each.
    assert tokens(counting.evaluate(view)) == (2 * 300 * 4 * 8, 0, 0)


def test_operators_that_sample() -> None:
    inputs = {"models.m": "m", "models.n": "n", "domains.a": "a", "domains.b": "b"}
    routes = {"a": ("m",), "b": ("m", "n")}
    view = Told("sample", inputs, num_prompts=200, k=2, routes=routes)
    # 100 prompts of a for m; 200 of b for each of m and n.
    assert tokens(counting.sample(view)) == (500 * 2 * 8, 0, 0)
    view = Told("profile", {"model": "m", "domains.a": "a", "domains.b": "b"}, num_prompts=50, n=4)
    assert tokens(counting.profile(view)) == (100 * 4 * 8, 0, 0)
    view = Told("best", {"candidates.x": "x", "candidates.y": "y", "domains.a": "a"}, samples=2)
    assert tokens(counting.best(view)) == (2 * 300 * 2 * 8, 0, 0)


def test_auxiliary_losses_learn_rows_of_their_own() -> None:
    work = counting.rl(Told("rl", **RL, num_minibatches=2, aux={"ptx": {"weight": 0.5}}))
    aux = work.parts[-1]
    assert aux.tokens == 10 * 2 * 32 * 20 and not aux.policy
    assert work.counted == 10 * 4 * 8 * 8


def test_stages_without_a_model_count_rows() -> None:
    work = counting.nothing(Told("select"))
    assert work.parts == () and work.rows == 1000
    work = counting.domain(Told("select"))
    assert work.rows == 3 * 400 and not work.saves
