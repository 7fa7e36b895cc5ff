"""Parity with TRL 1.16: the losses of its DPO, CPO and KTO trainers on the same tensors.

As in `test_trl_parity.py` a trainer is made with `__new__` and given only what its method reads.
Suffixes: B rows (chosen, then rejected, as TRL has them), P pairs, T response positions.
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.losses.ops import row_sums
from posttrain.losses.preference import (
    chosen_nll,
    dpo,
    ipo,
    kto,
    kto_baseline,
    response_scores,
)

PAIRS, LENGTH, BETA = 4, 6, 0.3
CLOSE = {"rtol": 2e-6, "atol": 1e-6}


@pytest.fixture(scope="module")
def trl() -> Any:
    return pytest.importorskip("trl", minversion="1.16")


class OneProcess:
    """The parts of accelerate's Accelerator that the methods use, for a single process."""

    device = torch.device("cpu")

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    gather_for_metrics = gather


class Responses:
    """Four pairs of responses of 1 to 6 tokens: log-probabilities, and the reference's sums."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        length_B = torch.tensor([6, 2, 4, 3, 5, 1, 4, 6])
        self.mask_BT = torch.arange(LENGTH)[None] < length_B[:, None]
        logp_BT = -torch.rand(2 * PAIRS, LENGTH, generator=generator) * 3
        sum_B = (logp_BT * self.mask_BT).sum(1)
        self.ref_logp_B = sum_B + torch.randn(2 * PAIRS, generator=generator)
        self.logp_BT = logp_BT.requires_grad_()

    def scores(self, *, mean: bool = False, reference: bool = True) -> tuple[Tensor, Tensor]:
        """Ours: scores of the chosen and of the rejected responses."""
        row_BT = torch.arange(2 * PAIRS)[:, None].expand_as(self.mask_BT)
        score_B = response_scores(
            self.logp_BT.flatten(),
            self.mask_BT.flatten(),
            row_BT.flatten(),
            num_rows=2 * PAIRS,
            ref_logp_B=self.ref_logp_B if reference else None,
            mean=mean,
        )
        return score_B[:PAIRS], score_B[PAIRS:]

    def inputs(self) -> dict[str, Tensor]:
        """Theirs: one prompt token before each response."""
        mask_BT = torch.nn.functional.pad(self.mask_BT, (1, 0)).long()
        ids_BT = torch.zeros_like(mask_BT)
        return {"input_ids": ids_BT, "completion_mask": mask_BT, "attention_mask": mask_BT}

    def outputs(self, logp_BT: Tensor) -> SimpleNamespace:
        """What TRL's models with a fused head return: 0 where a token is masked."""
        zero_BT = torch.zeros_like(logp_BT)
        logp_BT = torch.where(self.mask_BT, logp_BT, zero_BT)
        return SimpleNamespace(
            log_probs=logp_BT, entropy=zero_BT, mean_logits=zero_BT, is_top1=zero_BT.bool()
        )


@pytest.fixture
def responses() -> Responses:
    return Responses()


def make_trainer(cls: type, **attributes: Any) -> Any:
    trainer = cls.__new__(cls)
    trainer.__dict__.update(
        accelerator=OneProcess(),
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        beta=BETA,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **attributes,
    )
    return trainer


def trl_dpo(
    trl: Any, responses: Responses, loss_type: str, **attributes: Any
) -> tuple[Tensor, Any]:
    """DPOTrainer._compute_loss, and what it logged."""
    trainer = make_trainer(
        trl.DPOTrainer,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        use_weighting=False,
        **({"label_smoothing": 0.0} | attributes),
    )
    ref_chosen_logps, ref_rejected_logps = responses.ref_logp_B.chunk(2)
    inputs = responses.inputs() | {
        "ref_chosen_logps": ref_chosen_logps,
        "ref_rejected_logps": ref_rejected_logps,
    }
    loss = trainer._compute_loss(lambda **_: responses.outputs(responses.logp_BT), inputs, False)
    return loss, {name: value[0] for name, value in trainer._metrics["train"].items() if value}


def assert_same(ours: Tensor, theirs: Tensor, logp_BT: Tensor) -> None:
    """Loss and gradient of every token."""
    torch.testing.assert_close(ours, theirs, **CLOSE)
    grads = [torch.autograd.grad(loss, logp_BT, retain_graph=True)[0] for loss in (ours, theirs)]
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(*grads, **CLOSE)


def test_dpo_loss(trl: Any, responses: Responses):
    """Loss, gradient, and the logged rewards, margins, accuracies and log-probabilities."""
    theirs, logged = trl_dpo(trl, responses, "sigmoid")
    loss, metrics = dpo(*responses.scores(), beta=BETA)
    assert_same(loss / PAIRS, theirs, responses.logp_BT)
    names = {
        "accuracy": "rewards/accuracies",
        "margin": "rewards/margins",
        "reward_chosen": "rewards/chosen",
        "reward_rejected": "rewards/rejected",
    }
    assert 0 < metrics["accuracy"] < PAIRS
    for ours, name in names.items():
        assert metrics[ours].item() / PAIRS == pytest.approx(logged[name], rel=1e-5)
    row_B = torch.arange(2 * PAIRS).repeat_interleave(responses.mask_BT.sum(1))
    counted_N = torch.ones(len(row_B), dtype=torch.bool)
    logp_B = row_sums(responses.logp_BT[responses.mask_BT], row_B, 2 * PAIRS, counted_N)
    means = [half.mean().item() for half in logp_B.chunk(2)]
    assert means == pytest.approx([logged["logps/chosen"], logged["logps/rejected"]])


def test_length_normalised_dpo_loss(trl: Any, responses: Responses):
    theirs, _ = trl_dpo(trl, responses, "sigmoid_norm")
    loss, _ = dpo(*responses.scores(mean=True), beta=BETA)
    assert_same(loss / PAIRS, theirs, responses.logp_BT)


def test_ipo_loss(trl: Any, responses: Responses):
    theirs, _ = trl_dpo(trl, responses, "ipo")
    loss, _ = ipo(*responses.scores(mean=True), beta=BETA)
    assert_same(loss / PAIRS, theirs, responses.logp_BT)


def test_label_smoothing_of_dpo(trl: Any, responses: Responses):
    """TRL smooths `aot`, which sorts the pairs first: alike where they are in order already.

    Its `sigmoid` reads no label_smoothing, and `robust` is another estimator (Robust DPO).
    """
    logp_BT = responses.logp_BT.detach() * responses.mask_BT
    chosen_B, rejected_B = logp_BT.sum(1).chunk(2)
    ref_chosen_B, ref_rejected_B = responses.ref_logp_B.chunk(2)
    order_P = torch.argsort(chosen_B - rejected_B)
    reference_P = torch.sort(ref_chosen_B - ref_rejected_B).values
    index_B = torch.cat([order_P, order_P + PAIRS])
    responses.logp_BT = logp_BT[index_B].requires_grad_()
    responses.mask_BT = responses.mask_BT[index_B]
    responses.ref_logp_B = torch.cat([reference_P, torch.zeros(PAIRS)])
    theirs, _ = trl_dpo(trl, responses, "aot", label_smoothing=0.2)
    loss, _ = dpo(*responses.scores(), beta=BETA, label_smoothing=0.2)
    assert_same(loss / PAIRS, theirs, responses.logp_BT)


def test_nll_of_the_chosen(trl: Any, responses: Responses):
    """TRL's `sft` is a mean over tokens, ours over pairs of token means: alike at equal lengths."""
    responses.mask_BT = torch.ones_like(responses.mask_BT)
    theirs, _ = trl_dpo(trl, responses, "sft")
    logp_P = responses.scores(reference=False)[0]
    loss, _ = chosen_nll(logp_P, torch.full((PAIRS,), LENGTH), weight=1.0)
    assert_same(loss / PAIRS, theirs, responses.logp_BT)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_simpo_loss(trl: Any, responses: Responses, label_smoothing: float):
    """CPOTrainer.cpo_loss with loss_type simpo: losses and rewards of every pair."""
    from trl.experimental.cpo import CPOTrainer

    trainer = make_trainer(
        CPOTrainer,
        alpha=0.0,
        loss_type="simpo",
        simpo_gamma=0.5,
        label_smoothing=label_smoothing,
    )
    scores = responses.scores(mean=True, reference=False)
    losses_P, their_chosen_P, their_rejected_P = trainer.cpo_loss(*scores)
    loss, metrics = dpo(*scores, beta=BETA, gamma=0.5, label_smoothing=label_smoothing)
    assert_same(loss, losses_P.sum(), responses.logp_BT)
    torch.testing.assert_close(metrics["reward_chosen"], their_chosen_P.sum(), **CLOSE)
    torch.testing.assert_close(metrics["reward_rejected"], their_rejected_P.sum(), **CLOSE)


@pytest.mark.parametrize("shift", [0.8, -0.8])
def test_kto_loss(trl: Any, responses: Responses, shift: float):
    """KTOTrainer._compute_loss: loss, gradient, baseline (cut at 0 for the negative shift)."""
    label_B = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1], dtype=torch.bool)
    mismatched_BT = (responses.logp_BT.detach() * 0.7 - 0.1) * responses.mask_BT
    ref_mismatched_B = mismatched_BT.sum(1) - shift + 0.1 * torch.arange(2 * PAIRS)
    trainer = make_trainer(
        trl.KTOTrainer,
        loss_type="kto",
        calculate_KL=True,
        desirable_weight=1.5,
        undesirable_weight=0.8,
    )

    def model(**inputs: Any) -> SimpleNamespace:
        # The forward pass for the baseline is the one without gradients.
        return responses.outputs(responses.logp_BT if torch.is_grad_enabled() else mismatched_BT)

    inputs = responses.inputs()
    inputs |= {f"KL_{name}": value for name, value in inputs.items()}
    inputs |= {
        "label": label_B,
        "ref_logps": responses.ref_logp_B,
        "ref_KL_logps": ref_mismatched_B,
    }
    theirs = trainer._compute_loss(model, inputs, False)

    baseline = kto_baseline(mismatched_BT.sum(1) - ref_mismatched_B)
    logged = trainer._metrics["train"]
    assert baseline.item() == pytest.approx(logged["kl"][0])
    assert (baseline > 0) == (shift > 0)
    score_B = torch.cat(responses.scores())
    loss, metrics = kto(
        score_B[label_B],
        score_B[~label_B],
        baseline,
        beta=BETA,
        desirable_weight=1.5,
        undesirable_weight=0.8,
    )
    assert_same(loss / (2 * PAIRS), theirs, responses.logp_BT)
    for name, count in (("chosen", 5), ("rejected", 3)):
        ours = metrics[f"reward_{name}"].item() / count
        assert ours == pytest.approx(logged[f"rewards/{name}"][0], rel=1e-5)
