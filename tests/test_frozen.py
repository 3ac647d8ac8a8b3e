"""Frozen layers give autograd's gradients, for inference tensors too, and save nothing they need not."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from tune_a_video.tav_core.tuning.frozen_layers import frozen_conv2d, frozen_linear, gated_gelu


def saved_bytes(run: object) -> int:
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()  # type: ignore[operator]
    return total


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias: bool) -> None:
    with torch.inference_mode():
        layer = torch.nn.Linear(5, 7, bias=bias)
    plain = torch.nn.Linear(5, 7, bias=bias)
    plain.load_state_dict({k: v.clone() for k, v in layer.state_dict().items()})
    x = torch.randn(2, 3, 5, requires_grad=True)
    ours = frozen_linear(x, lambda _: nullcontext((layer.weight, layer.bias)))
    theirs = plain(x)
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn_like(ours)
    torch.testing.assert_close(torch.autograd.grad(ours, x, grad), torch.autograd.grad(theirs, x, grad))
    assert saved_bytes(lambda: frozen_linear(x, lambda _: nullcontext((layer.weight, layer.bias)))) == 0


@pytest.mark.parametrize(("stride", "padding", "kernel"), [(1, 1, 3), (2, 1, 3), (1, 0, 1)])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (8, 6), (5, 7)])
def test_conv2d(stride: int, padding: int, kernel: int, size: tuple[int, int]) -> None:
    with torch.inference_mode():
        layer = torch.nn.Conv2d(4, 6, kernel, stride, padding)
    plain = torch.nn.Conv2d(4, 6, kernel, stride, padding)
    plain.load_state_dict({k: v.clone() for k, v in layer.state_dict().items()})
    x = torch.randn(3, 4, *size, requires_grad=True)
    ours = frozen_conv2d(x, layer, lambda _: nullcontext((layer.weight, layer.bias)))
    theirs = plain(x)
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn_like(ours)
    torch.testing.assert_close(torch.autograd.grad(ours, x, grad), torch.autograd.grad(theirs, x, grad))
    assert saved_bytes(lambda: frozen_conv2d(x, layer, lambda _: nullcontext((layer.weight, layer.bias)))) == 0


def test_gated_gelu() -> None:
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gated_gelu, x)
    value, gate = x.chunk(2, dim=-1)
    torch.testing.assert_close(gated_gelu(x), value * F.gelu(gate))
    assert saved_bytes(lambda: gated_gelu(x)) == x.nbytes
