"""Parity with TRL 1.16: its own methods on the same tensors, to float32 rounding.

TRL's arithmetic sits in trainer methods. Each test makes the trainer with `__new__`, gives it only
the attributes that the method reads, and calls the method itself; nothing is generated or trained.
TRL is imported by a fixture, as the import takes seconds.
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.losses.distill import full_vocabulary
from posttrain.losses.divergence import TeacherStates
from posttrain.losses.ops import (
    aggregation_weights,
    cross_entropy,
    kl_penalty,
    token_logprobs,
)
from posttrain.losses.policy import policy_gradient
from posttrain.rl.advantage import advantages

ROWS, LENGTH, LIMIT, BETA = 6, 7, 10, 0.05
CLOSE = {"rtol": 2e-6, "atol": 1e-6}


@pytest.fixture(scope="module")
def trl() -> Any:
    return pytest.importorskip("trl", minversion="1.16")


class OneProcess:
    """The parts of accelerate's Accelerator that the methods use, for a single process."""

    num_processes, process_index, device, parallelism_config = 1, 0, torch.device("cpu"), None

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    gather_for_metrics = gather


def make_trainer(cls: type, **attributes: Any) -> Any:
    trainer = cls.__new__(cls)
    trainer.__dict__.update(
        accelerator=OneProcess(),
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        **attributes,
    )
    return trainer


def flat_rows(mask_BT: Tensor) -> Tensor:
    """The row of each counted token, in the order of `tensor_BT[mask_BT]`."""
    return torch.arange(mask_BT.shape[0])[:, None].expand_as(mask_BT)[mask_BT]


@pytest.fixture
def rollouts() -> SimpleNamespace:
    """Log-probabilities of six responses of 2 to 7 tokens; ratios on both sides of the clip."""
    generator = torch.Generator().manual_seed(0)
    length_B = torch.tensor([7, 2, 5, 3, 6, 4])
    logp_BT = -torch.rand(ROWS, LENGTH, generator=generator) * 3
    return SimpleNamespace(
        mask_BT=torch.arange(LENGTH)[None] < length_B[:, None],
        logp_BT=logp_BT.requires_grad_(),
        old_BT=logp_BT.detach() + 0.3 * torch.randn(ROWS, LENGTH, generator=generator),
        ref_BT=logp_BT.detach() + 0.5 * torch.randn(ROWS, LENGTH, generator=generator),
        advantage_B=torch.tensor([1.2, -0.8, 0.3, -1.5, 0.0, 0.7]),
    )


GRPO_LOSSES = [
    ("grpo", "sequence", "token"),
    ("bnpo", "token", "token"),
    ("dapo", "token", "token"),
    ("dr_grpo", "constant", "token"),
    ("grpo", "sequence", "sequence"),
]


@pytest.mark.parametrize(("loss_type", "aggregation", "ratio"), GRPO_LOSSES)
def test_grpo_loss(
    trl: Any, rollouts: SimpleNamespace, loss_type: str, aggregation: str, ratio: str
):
    """GRPOTrainer._compute_loss: loss, gradient and logged clip shares and KL (k3, beta 0.05)."""
    mask_BT, logp_BT = rollouts.mask_BT, rollouts.logp_BT
    trainer = make_trainer(
        trl.GRPOTrainer,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (
            logp_BT,
            torch.zeros_like(logp_BT),
            None,
        ),
        loss_type=loss_type,
        importance_sampling_level=ratio,
        beta=BETA,
        epsilon_low=0.2,
        epsilon_high=0.28,
        max_completion_length=LIMIT,
        current_gradient_accumulation_steps=1,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        _entropy_bonus_enabled=False,
    )
    inputs = {
        "prompt_ids": torch.zeros(ROWS, 1, dtype=torch.int64),
        "prompt_mask": torch.ones(ROWS, 1, dtype=torch.int64),
        "completion_ids": torch.zeros(ROWS, LENGTH, dtype=torch.int64),
        "completion_mask": mask_BT.long(),
        "advantages": rollouts.advantage_B,
        "old_per_token_logps": rollouts.old_BT,
        "ref_per_token_logps": rollouts.ref_BT,
        "num_items_in_batch": mask_BT.sum(),
    }
    theirs = trainer._compute_loss(trainer.model, inputs)
    (their_grad_BT,) = torch.autograd.grad(theirs, logp_BT)

    row_N = flat_rows(mask_BT)
    weight_N, count = aggregation_weights(row_N, ROWS, aggregation=aggregation, constant=LIMIT)
    loss, metrics = policy_gradient(
        logp_BT[mask_BT],
        rollouts.old_BT[mask_BT],
        rollouts.advantage_B[row_N],
        weight_N,
        row_N,
        num_rows=ROWS,
        ratio=ratio,
        clip_low=0.2,
        clip_high=0.28,
    )
    penalty, kl_metrics = kl_penalty(
        logp_BT[mask_BT], rollouts.ref_BT[mask_BT], weight_N, estimator="k3"
    )
    ours = (loss + BETA * penalty) / count
    (grad_BT,) = torch.autograd.grad(ours, logp_BT)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    torch.testing.assert_close(grad_BT, their_grad_BT, **CLOSE)

    logged = trainer._metrics["train"]
    assert kl_metrics["kl"].item() / len(row_N) == pytest.approx(logged["kl"][0], rel=1e-5)
    if ratio == "token":
        clipped = metrics["clip_low"].item(), metrics["clip_high"].item()
        assert min(clipped) > 0
        shares = [value / len(row_N) for value in clipped]
        names = ("clip_ratio/low_mean", "clip_ratio/high_mean")
        assert shares == pytest.approx([logged[name][0] for name in names])


@pytest.mark.parametrize(
    ("scale_rewards", "mode"),
    [("group", "group_zscore"), ("none", "group_mean"), ("batch", "batch")],
)
def test_grpo_advantages(trl: Any, scale_rewards: str, mode: str):
    """GRPOTrainer._generate_and_score_completions with rewards given; three groups of four."""
    rewards_B = torch.tensor([1, 0, 0, 1, 0.5, 0.25, 1, 0, 1, 1, 1, 0], dtype=torch.float32)
    rows = len(rewards_B)
    prompts = [[1, 2]] * rows
    trainer = make_trainer(
        trl.GRPOTrainer,
        args=SimpleNamespace(
            per_device_train_batch_size=rows,
            gradient_checkpointing_kwargs=None,
            gradient_accumulation_steps=1,
            steps_per_generation=1,
        ),
        _tokenizer=SimpleNamespace(pad_token_id=0),
        _generate=lambda prompts: (
            prompts,
            [[3, 4]] * rows,
            None,
            [""] * rows,
            None,
            {},
            None,
            None,
        ),
        _calculate_rewards=lambda *args: rewards_B[:, None],
        reward_weights=torch.ones(1),
        reward_func_names=["reward"],
        scale_rewards=scale_rewards,
        multi_objective_aggregation="sum_then_normalize",
        num_generations=4,
        num_iterations=1,
        beta=0.0,
        use_vllm=False,
        tools=None,
        environment_factories=None,
        environments=None,
        pad_to_multiple_of=None,
        mask_truncated_completions=False,
        _logs={
            **{name: [] for name in ("prompt", "completion", "advantages")},
            **{name: defaultdict(list) for name in ("rewards", "extra")},
        },
        _pending_extra_logs=defaultdict(list),
        _pending_metrics=defaultdict(list),
    )
    trainer.model.is_gradient_checkpointing = False
    output = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in prompts])
    ours_B = advantages(rewards_B, torch.arange(rows) // 4, mode=mode)
    assert ours_B.abs().max() > 0.5
    torch.testing.assert_close(ours_B, output["advantages"], **CLOSE)


@pytest.fixture(scope="module")
def tiny_model(trl: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return LlamaForCausalLM(config)


def test_sft_loss(trl: Any, tiny_model: Any):
    """SFTTrainer.compute_loss (fused head) and transformers' ForCausalLMLoss, on one tiny model."""
    from transformers.loss.loss_utils import ForCausalLMLoss
    from trl.trainer.utils import add_fused_lm_head

    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(40, (3, 9), generator=generator)
    labels_BT = ids_BT.clone()
    labels_BT[0, :4], labels_BT[1, :2], labels_BT[2, 6:] = -100, -100, -100
    num_items = 30

    states_BTD = tiny_model.model(input_ids=ids_BT).last_hidden_state[:, :-1]
    counted_BT = labels_BT[:, 1:] != -100
    logp_N, entropy_N = token_logprobs(
        states_BTD[counted_BT], tiny_model.lm_head.weight, ids_BT[:, 1:][counted_BT]
    )
    loss, metrics = cross_entropy(logp_N, torch.ones_like(logp_N))
    ours = loss / num_items
    parameters = list(tiny_model.parameters())
    grads = torch.autograd.grad(ours, parameters)
    assert metrics["nll"].item() == pytest.approx(loss.item())

    logits_BTV = tiny_model(input_ids=ids_BT).logits
    plain = ForCausalLMLoss(logits_BTV, labels_BT, 40, num_items_in_batch=num_items)
    torch.testing.assert_close(ours, plain, **CLOSE)
    torch.testing.assert_close(grads, torch.autograd.grad(plain, parameters), **CLOSE)

    add_fused_lm_head(tiny_model, outputs=("log_probs", "entropy", "is_top1"))
    trainer = make_trainer(
        trl.SFTTrainer,
        compute_loss_func=None,
        label_smoother=None,
        args=SimpleNamespace(loss_type="nll", average_tokens_across_devices=False, max_length=None),
        _total_train_tokens=0,
        _tp_size=1,
    )
    trainer.model = tiny_model.train()
    inputs = {
        "input_ids": ids_BT,
        "attention_mask": torch.ones_like(ids_BT),
        "labels": labels_BT,
    }
    theirs = trainer.compute_loss(tiny_model, inputs, num_items_in_batch=num_items)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    torch.testing.assert_close(grads, torch.autograd.grad(theirs, parameters), **CLOSE)
    logged = trainer._metrics["train"]["entropy"][0]
    assert entropy_N.mean().item() == pytest.approx(logged, rel=1e-5)


DIVERGENCES = [
    (1.0, {"divergence": "reverse_kl"}),
    (0.0, {"divergence": "forward_kl"}),
    (0.5, {"divergence": "jsd", "jsd_beta": 0.5}),
    (0.2, {"divergence": "jsd", "jsd_beta": 0.2}),
]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("beta", "options"), DIVERGENCES)
def test_divergences(trl: Any, beta: float, options: dict[str, Any], temperature: float):
    """DistillationTrainer's divergence: loss, student entropy and gradients; GKDTrainer's: loss."""
    from trl.experimental.gkd import GKDTrainer
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    generator = torch.Generator().manual_seed(0)
    hidden_BTD = torch.randn(ROWS, LENGTH, 16, generator=generator)
    teacher_hidden_BTE = torch.randn(ROWS, LENGTH, 24, generator=generator)
    head_VD = torch.randn(50, 16, generator=generator) * 0.3
    teacher_head_VE = torch.randn(50, 24, generator=generator) * 0.3
    bias_V = torch.randn(50, generator=generator)
    teacher_bias_V = torch.randn(50, generator=generator)
    mask_BT = torch.arange(LENGTH)[None] < torch.tensor([7, 2, 5, 3, 6, 4])[:, None]
    leaves = [tensor.requires_grad_() for tensor in (hidden_BTD, head_VD, bias_V)]
    theirs, their_entropy, their_count = _chunked_divergence_loss(
        hidden_BTD,
        teacher_hidden_BTE,
        head_VD,
        teacher_head_VE,
        mask_BT,
        beta,
        num_items_in_batch=31,
        student_lm_head_bias=bias_V,
        teacher_lm_head_bias=teacher_bias_V,
        temperature=temperature,
    )
    teacher = TeacherStates(
        hidden_NE=teacher_hidden_BTE[mask_BT], head_VE=teacher_head_VE, bias_V=teacher_bias_V
    )
    loss, metrics, _ = full_vocabulary(
        hidden_BTD[mask_BT],
        head_VD,
        [teacher],
        torch.ones(int(their_count)),
        bias_V=bias_V,
        temperature=temperature,
        **options,
    )
    torch.testing.assert_close(loss / 31, theirs, **CLOSE)
    gkd = GKDTrainer.generalized_jsd_loss(
        hidden_BTD @ head_VD.T + bias_V,
        teacher_hidden_BTE @ teacher_head_VE.T + teacher_bias_V,
        labels=torch.where(mask_BT, 0, -100),
        beta=beta,
        temperature=temperature,
        num_items_in_batch=31,
    )
    torch.testing.assert_close(loss / 31, gkd, **CLOSE)
    torch.testing.assert_close(metrics["entropy"], their_entropy, **CLOSE)
    torch.testing.assert_close(
        torch.autograd.grad(loss / 31, leaves), torch.autograd.grad(theirs, leaves), **CLOSE
    )
