"""Which device is chosen, what is refused there, and a draw whose sums need no order."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from posttrain.backends.device import check_precision, choose_device, has_bfloat16
from posttrain.backends.token_sampling import fixed_point
from posttrain.engine.errors import ConfigError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`card(capability)`: what torch says of its CUDA devices; None for no device."""

    def card(capability: tuple[int, int] | None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card 9")

    return card


@pytest.mark.parametrize(
    ("wanted", "capability", "found"),
    [("auto", None, CPU), ("auto", (9, 0), CUDA), ("cpu", (9, 0), CPU), ("cuda", (7, 5), CUDA)],
)
def test_the_device_that_is_chosen(card: Any, wanted: Any, capability: Any, found: Any) -> None:
    card(capability)
    assert choose_device(wanted) == found


def test_cuda_without_a_device_is_refused(card: Any) -> None:
    card(None)
    with pytest.raises(ConfigError, match="sees no CUDA device; use --device cpu"):
        choose_device("cuda")


@pytest.mark.parametrize(("wanted", "capability"), [("auto", None), ("cpu", (9, 0))])
def test_compiling_on_the_cpu_is_refused(card: Any, wanted: Any, capability: Any) -> None:
    card(capability)
    with pytest.raises(ConfigError, match=r"--compile: .* measured slower"):
        choose_device(wanted, compile=True)


def test_compiling_on_cuda_is_taken(card: Any) -> None:
    card((9, 0))
    assert choose_device("auto", compile=True) == CUDA


def test_bfloat16_needs_hardware(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    card((7, 5))
    with pytest.raises(ConfigError, match=r"Card 9\) has compute capability 7.5 and 8.0 is needed"):
        check_precision(torch.bfloat16, CUDA)
    check_precision(torch.float32, CUDA)
    card((8, 0))
    check_precision(torch.bfloat16, CUDA)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    with pytest.raises(ConfigError, match="neither AVX512_BF16 nor AMX"):
        check_precision(torch.bfloat16, CPU)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert has_bfloat16(CPU)


@pytest.mark.parametrize("vocabulary", [100, 50_000])
def test_sums_of_integers_draw_what_sums_of_floats_do(vocabulary: int) -> None:
    """The draw of CUDA, where deterministic mode refuses a cumulative sum of floats."""
    generator = torch.Generator().manual_seed(0)
    logits_BV = 4 * torch.randn(500, vocabulary, generator=generator, dtype=torch.float64)
    uniform_B1 = torch.rand(500, 1, generator=generator, dtype=torch.float64)
    probability_BV = logits_BV.softmax(-1)
    floats_BV = probability_BV.cumsum(-1)
    expected_B1 = torch.searchsorted(floats_BV, uniform_B1 * floats_BV[:, -1:], right=True)
    integers_BV = fixed_point(probability_BV).cumsum(-1)
    target_B1 = (uniform_B1 * integers_BV[:, -1:]).long()
    assert torch.equal(torch.searchsorted(integers_BV, target_B1, right=True), expected_B1)


def test_what_the_fork_server_imports_does_not_touch_cuda() -> None:
    """A process that forks after the driver was started cannot use CUDA."""
    code = (
        "import torch\n"
        "def touched(*_, **__): raise SystemExit('the driver was asked')\n"
        "for name in ('is_available', 'device_count', 'init', '_lazy_init', 'current_device'):\n"
        "    setattr(torch.cuda, name, touched)\n"
        "import importlib, posttrain.stages.worker, posttrain.backends.device\n"
        "for module in posttrain.stages.worker.PRELOAD: importlib.import_module(module)\n"
        "print('quiet')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "quiet\n", done.stderr
