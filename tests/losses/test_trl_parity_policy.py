"""Parity with TRL 1.16: CISPO, GMPO, RLOO, dual clip, unbiased KL, off-policy mask, reward model.

As in `test_trl_parity.py` a trainer is made with `__new__` and given only what its method reads.
Suffixes: B rows, T response positions, P pairs.
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.losses.ops import aggregation_weights, kl_penalty, unbiased_kl_penalty
from posttrain.losses.policy import cispo, geometric_mean, policy_gradient
from posttrain.losses.reward import bradley_terry
from posttrain.rl.advantage import advantages, whitened
from posttrain.rl.corrections import off_policy_mask

ROWS, LENGTH, BETA = 6, 7, 0.05
CLOSE = {"rtol": 2e-6, "atol": 1e-6}


@pytest.fixture(scope="module")
def trl() -> Any:
    return pytest.importorskip("trl", minversion="1.16")


class OneProcess:
    """The parts of accelerate's Accelerator that the methods use, for a single process."""

    num_processes, process_index, device = 1, 0, torch.device("cpu")

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    gather_for_metrics = gather


class Responses:
    """Six responses of 2 to 7 tokens; ratios on both sides of every clip used here."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        length_B = torch.tensor([7, 2, 5, 3, 6, 4])
        logp_BT = -torch.rand(ROWS, LENGTH, generator=generator) * 3
        self.mask_BT = torch.arange(LENGTH)[None] < length_B[:, None]
        self.row_N = torch.arange(ROWS)[:, None].expand_as(self.mask_BT)[self.mask_BT]
        self.logp_BT = logp_BT.requires_grad_()
        self.old_BT = logp_BT.detach() + 0.5 * torch.randn(ROWS, LENGTH, generator=generator)
        self.ref_BT = logp_BT.detach() + 0.5 * torch.randn(ROWS, LENGTH, generator=generator)
        self.advantage_B = torch.tensor([1.2, -0.8, 0.3, -1.5, 0.0, 0.7])

    def theirs(self, cls: type, **attributes: Any) -> tuple[Tensor, Any]:
        """The trainer's `_compute_loss`, and what it logged."""
        trainer: Any = cls.__new__(cls)
        args = {"delta": None, "use_bias_correction_kl": False, "steps_per_generation": 1}
        trainer.__dict__.update(
            accelerator=OneProcess(),
            model=SimpleNamespace(training=True),
            aux_loss_enabled=False,
            _metrics={"train": defaultdict(list)},
            _get_per_token_logps_and_entropies=lambda *args, **kwargs: (
                self.logp_BT,
                torch.zeros_like(self.logp_BT),
                None,
            ),
            current_gradient_accumulation_steps=1,
            top_entropy_quantile=1.0,
            use_vllm=False,
            _entropy_bonus_enabled=False,
        )
        defaults = {
            "loss_type": "grpo",
            "importance_sampling_level": "token",
            "beta": 0.0,
            "epsilon_low": 0.2,
            "epsilon_high": 0.28,
            "off_policy_mask_threshold": None,
        }
        trainer.__dict__.update(defaults | attributes)
        trainer.args = SimpleNamespace(**args | attributes.get("args", {}))
        inputs = {
            "prompt_ids": torch.zeros(ROWS, 1, dtype=torch.int64),
            "prompt_mask": torch.ones(ROWS, 1, dtype=torch.int64),
            "completion_ids": torch.zeros(ROWS, LENGTH, dtype=torch.int64),
            "completion_mask": self.mask_BT.long(),
            "advantages": self.advantage_B,
            "old_per_token_logps": self.old_BT,
            "old_logps": (self.old_BT * self.mask_BT).sum(1),
            "ref_per_token_logps": self.ref_BT,
            "num_items_in_batch": self.mask_BT.sum(),
        }
        return trainer._compute_loss(trainer.model, inputs), trainer._metrics["train"]

    def ours(self, aggregation: str) -> tuple[dict[str, Any], float]:
        """What every surrogate of ours takes, and the count."""
        weight_N, count = aggregation_weights(self.row_N, ROWS, aggregation=aggregation)
        tensors = {
            "logp_N": self.logp_BT[self.mask_BT],
            "old_logp_N": self.old_BT[self.mask_BT],
            "advantage_N": self.advantage_B[self.row_N],
            "weight_N": weight_N,
            "row_N": self.row_N,
            "num_rows": ROWS,
        }
        return tensors, count


@pytest.fixture
def responses() -> Responses:
    return Responses()


def assert_same(ours: Tensor, theirs: Tensor, logp_BT: Tensor) -> None:
    """Loss and gradient of every token."""
    torch.testing.assert_close(ours, theirs, **CLOSE)
    grads = [torch.autograd.grad(loss, logp_BT, retain_graph=True)[0] for loss in (ours, theirs)]
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(*grads, **CLOSE)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_cispo_loss(trl: Any, responses: Responses, ratio: str):
    """TRL's epsilon_high is the bound on the ratio itself, ours its distance from 1."""
    theirs, logged = responses.theirs(
        trl.GRPOTrainer, loss_type="cispo", importance_sampling_level=ratio, epsilon_high=1.1
    )
    tensors, count = responses.ours("token")
    loss, metrics = cispo(**tensors, ratio=ratio, clip_low=1.0, clip_high=0.1)
    assert_same(loss / count, theirs, responses.logp_BT)
    # TRL counts the tokens whose advantage is positive, ours all whose weight is cut.
    assert logged["cispo_clip_ratio"][0] > 0
    if ratio == "token":
        share = metrics["clip_high"].item() / len(responses.row_N)
        assert 1 > share > logged["cispo_clip_ratio"][0]


def test_gmpo_loss(trl: Any, responses: Responses):
    from trl.experimental.gmpo import GMPOTrainer

    theirs, logged = responses.theirs(GMPOTrainer, epsilon_low=0.4, epsilon_high=0.3)
    tensors, count = responses.ours("sequence")
    loss, metrics = geometric_mean(**tensors, clip_low=0.4, clip_high=0.3)
    assert_same(loss / count, theirs, responses.logp_BT)
    shares = [metrics[name].item() / len(responses.row_N) for name in ("clip_low", "clip_high")]
    assert min(shares) > 0
    names = ("clip_ratio/low_mean", "clip_ratio/high_mean")
    assert shares == pytest.approx([logged[name][0] for name in names])


def test_rloo_loss(trl: Any, responses: Responses):
    """RLOOTrainer._compute_loss: the response is one action, its ratio the product."""
    theirs, logged = responses.theirs(trl.RLOOTrainer)
    tensors, count = responses.ours("sequence")
    loss, metrics = policy_gradient(**tensors, ratio="product", clip_low=0.2, clip_high=0.28)
    assert_same(loss / count, theirs, responses.logp_BT)
    assert logged["clip_ratio/region_mean"][0] > 0
    assert metrics["clip_low"].item() + metrics["clip_high"].item() > 0


@pytest.mark.parametrize("normalize", [False, True])
def test_rloo_advantages(trl: Any, normalize: bool):
    """RLOOTrainer._generate_and_score_completions with rewards given; three groups of four."""
    rewards_B = torch.tensor([1, 0, 0, 1, 0.5, 0.25, 1, 0, 1, 1, 1, 0], dtype=torch.float32)
    rows = len(rewards_B)
    trainer: Any = trl.RLOOTrainer.__new__(trl.RLOOTrainer)
    trainer.__dict__.update(
        accelerator=OneProcess(),
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        args=SimpleNamespace(per_device_train_batch_size=rows, gradient_checkpointing_kwargs=None),
        _metrics={"train": defaultdict(list)},
        _tokenizer=SimpleNamespace(pad_token_id=0),
        _generate=lambda prompts: (prompts, [[3, 4]] * rows, [""] * rows),
        _calculate_rewards=lambda *args: rewards_B[:, None],
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (
            torch.zeros(rows, 2),
            None,
            None,
        ),
        reward_weights=torch.ones(1),
        reward_func_names=["reward"],
        reward_clip_range=None,
        normalize_advantages=normalize,
        num_generations=4,
        beta=0.0,
        pad_to_multiple_of=None,
        mask_truncated_completions=False,
        _logs={
            **{name: [] for name in ("prompt", "completion", "advantages")},
            **{name: defaultdict(list) for name in ("rewards", "extra")},
        },
        _pending_extra_logs=defaultdict(list),
        _pending_metrics=defaultdict(list),
    )
    output = trainer._generate_and_score_completions([{"prompt": [1, 2]}] * rows)
    ours_B = advantages(rewards_B, torch.arange(rows) // 4, mode="leave_one_out")
    if normalize:
        ours_B = whitened(ours_B)
    assert ours_B.abs().max() > 0.5
    torch.testing.assert_close(ours_B, output["advantages"], **CLOSE)


def test_dual_clip(trl: Any, responses: Responses):
    """TRL's two-sided clipping (`delta`) is ours where delta is above the upper clip."""
    theirs, _ = responses.theirs(trl.GRPOTrainer, args={"delta": 1.4})
    tensors, count = responses.ours("sequence")
    loss, metrics = policy_gradient(
        **tensors, ratio="token", clip_low=0.2, clip_high=0.28, dual_clip=1.4
    )
    assert_same(loss / count, theirs, responses.logp_BT)
    assert metrics["clip_dual"].item() > 0


@pytest.mark.parametrize("unbiased", [True, False])
def test_unbiased_kl(trl: Any, responses: Responses, unbiased: bool):
    theirs, logged = responses.theirs(
        trl.GRPOTrainer, beta=BETA, args={"use_bias_correction_kl": unbiased}
    )
    tensors, count = responses.ours("sequence")
    loss, _ = policy_gradient(**tensors, ratio="token", clip_low=0.2, clip_high=0.28)
    ref_N, weight_N = responses.ref_BT[responses.mask_BT], tensors["weight_N"]
    if unbiased:
        penalty, metrics = unbiased_kl_penalty(
            tensors["logp_N"], tensors["old_logp_N"], ref_N, weight_N
        )
    else:
        penalty, metrics = kl_penalty(tensors["logp_N"], ref_N, weight_N, estimator="k3")
    assert_same((loss + BETA * penalty) / count, theirs, responses.logp_BT)
    kl = metrics["kl"].item() / len(responses.row_N)
    assert kl == pytest.approx(logged["kl"][0], rel=1e-5)


def test_off_policy_mask(trl: Any, responses: Responses):
    """GRPOTrainer with off_policy_mask_threshold: one of the bad responses is dropped."""
    responses.old_BT[3] += 0.3
    theirs, _ = responses.theirs(trl.GRPOTrainer, off_policy_mask_threshold=0.2)
    tensors, count = responses.ours("sequence")
    mask_N, _ = off_policy_mask(
        *(tensors[name] for name in ("logp_N", "old_logp_N", "advantage_N", "row_N")),
        num_rows=ROWS,
        delta=0.2,
    )
    dropped = set(responses.row_N[mask_N == 0].tolist())
    assert dropped and dropped < {1, 3}
    loss, _ = policy_gradient(
        **tensors, ratio="token", clip_low=0.2, clip_high=0.28, correction_N=mask_N
    )
    assert_same(loss / count, theirs, responses.logp_BT)


@pytest.mark.parametrize("centring", [None, 0.01])
@pytest.mark.parametrize("with_margin", [False, True])
def test_reward_model_loss(trl: Any, with_margin: bool, centring: float | None):
    """RewardTrainer.compute_loss: loss, gradient, logged accuracy, margin and mean reward."""
    generator = torch.Generator().manual_seed(0)
    pairs = 5
    rewards_B = torch.randn(2 * pairs, generator=generator).requires_grad_()
    margin_P = torch.rand(pairs, generator=generator) * 2 if with_margin else None
    trainer: Any = trl.RewardTrainer.__new__(trl.RewardTrainer)
    trainer.__dict__.update(
        accelerator=OneProcess(),
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(center_rewards_coefficient=centring),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"attention_mask": torch.ones(2 * pairs, 3)}
    inputs |= {"margin": margin_P} if margin_P is not None else {}
    theirs = trainer.compute_loss(lambda **_: SimpleNamespace(logits=rewards_B[:, None]), inputs)

    chosen_P, rejected_P = rewards_B.chunk(2)
    loss, metrics = bradley_terry(
        chosen_P, rejected_P, torch.ones(pairs), margin_P=margin_P, centring=centring or 0.0
    )
    assert_same(loss / pairs, theirs, rewards_B)
    logged = trainer._metrics["train"]
    assert 0 < metrics["accuracy"] < pairs
    for name in ("accuracy", "margin"):
        assert metrics[name].item() / pairs == pytest.approx(logged[name][0], rel=1e-5)
    mean = (metrics["reward_chosen"] + metrics["reward_rejected"]).item() / (2 * pairs)
    assert mean == pytest.approx(logged["mean_reward"][0], rel=1e-5)
