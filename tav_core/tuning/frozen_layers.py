"""Layers whose weights do not learn: gradients flow through them, none flow to them.

Two reasons not to leave this to autograd. ComfyUI's loaded weights are inference tensors, which autograd
refuses to save for a backward pass. And the native convolution saves its input even when only the input's
gradient is wanted. These functions save neither. They keep a callable that lends the weight again, so weights
that the host keeps elsewhere (offloaded, in another dtype, with a LoRA applied on the fly) are borrowed twice
instead of being held.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..convolution import conv2d, input_gradient

WeightAndBias = tuple[Tensor, Tensor | None]
# Lends a layer's weight and bias in the dtype and on the device of the given tensor.
Lend = Callable[[Tensor], AbstractContextManager[WeightAndBias]]


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lend: Lend) -> Tensor:
        ctx.lend = lend
        with lend(x) as (weight, bias):
            return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        with ctx.lend(grad) as (weight, _):
            # As one product: a batched one that is not contiguous would copy the weight for each of its rows.
            return (grad.reshape(-1, grad.shape[-1]) @ weight).view(*grad.shape[:-1], -1), None


class _FrozenConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: torch.nn.Conv2d, lend: Lend) -> Tensor:
        ctx.module, ctx.lend, ctx.shape = module, lend, x.shape
        with lend(x) as (weight, bias):
            return conv2d(x, module, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        with ctx.lend(grad) as (weight, _):
            # Only the shape of the input enters its gradient.
            x = grad.new_empty(1).expand(ctx.shape)
            return input_gradient(grad, x, ctx.module, weight), None, None


class _GatedGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:
        ctx.save_for_backward(projected)
        x, gate = projected.chunk(2, dim=-1)
        return F.gelu(gate).mul_(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (projected,) = ctx.saved_tensors
        x, gate = projected.chunk(2, dim=-1)
        out = torch.empty_like(projected)
        to_x, to_gate = out.chunk(2, dim=-1)
        torch.mul(grad, F.gelu(gate), out=to_x)
        to_gate.copy_(torch.ops.aten.gelu_backward(grad * x, gate))
        return out


def gated_gelu(projected: Tensor) -> Tensor:
    """Return x * gelu(gate) for projected [..., 2 c] = (x, gate); saves that alone, and computes gelu twice."""
    return _GatedGelu.apply(projected)


def frozen_linear(x: Tensor, lend: Lend) -> Tensor:
    """Apply ``F.linear`` with the weight and bias that ``lend(x)`` lends."""
    return _FrozenLinear.apply(x, lend)


def frozen_conv2d(x: Tensor, module: torch.nn.Conv2d, lend: Lend) -> Tensor:
    """Apply the convolution of ``module`` with the weight and bias that ``lend(x)`` lends."""
    return _FrozenConv2d.apply(x, module, lend)
