"""Frozen layers give autograd's gradients, for inference tensors too, and save nothing they need not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from tune_a_video.tav_core import convolution
from tune_a_video.tav_core.tuning.frozen_layers import Lend, frozen_conv2d, frozen_linear, gated_gelu


def saved_bytes(run: Callable[[], Tensor]) -> int:
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return total


def check(make: Callable[[], Any], frozen: Callable[[Tensor, Any, Lend], Tensor], x: Tensor) -> None:
    """Compare with the same layer under autograd; the frozen one has inference tensors and must save nothing."""
    with torch.inference_mode():
        layer = make()
    plain = make()
    plain.load_state_dict({k: v.clone() for k, v in layer.state_dict().items()})
    x.requires_grad_()

    def run() -> Tensor:
        return frozen(x, layer, lambda _: nullcontext((layer.weight, layer.bias)))

    ours, theirs = run(), plain(x)
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn_like(ours)
    torch.testing.assert_close(torch.autograd.grad(ours, x, grad), torch.autograd.grad(theirs, x, grad))
    assert saved_bytes(run) == 0


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias: bool) -> None:
    check(lambda: torch.nn.Linear(5, 7, bias=bias), lambda x, _, lend: frozen_linear(x, lend), torch.randn(2, 3, 5))


@pytest.mark.parametrize(("stride", "padding", "kernel"), [(1, 1, 3), (2, 1, 3), (1, 0, 1)])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (8, 6), (5, 7)])
@pytest.mark.parametrize("as_product", [True, False])
def test_conv2d(
    stride: int, padding: int, kernel: int, size: tuple[int, int], as_product: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolution, "_CHANNELS_A_POSITION", 0 if as_product else 10**6)
    check(lambda: torch.nn.Conv2d(4, 6, kernel, stride, padding), frozen_conv2d, torch.randn(3, 4, *size))


def test_gated_gelu() -> None:
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gated_gelu, x)
    value, gate = x.chunk(2, dim=-1)
    torch.testing.assert_close(gated_gelu(x), value * F.gelu(gate))
    assert saved_bytes(lambda: gated_gelu(x)) == x.nbytes
