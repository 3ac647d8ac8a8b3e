"""Changes of weights as products of two thin matrices: the trainable parameters of a run of low rank."""

from __future__ import annotations

import hashlib
import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from .frozen_layers import frozen_linear


class Factors(torch.nn.Module):
    """A change of a weight [n, m]: ``up`` [n, rank] times ``down`` [rank, m], float32.

    It computes in the dtype of its input x [..., m].
    """

    def __init__(self, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Parameter(up), torch.nn.Parameter(down)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the change adds to the layer's output, [..., n]."""
        return F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))


class FactoredLinear(torch.nn.Module):
    """A linear layer whose weight is a frozen one (None for zero), in the compute dtype, plus ``factors``."""

    frozen: Tensor | None

    def __init__(self, frozen: Tensor | None, factors: Factors, bias: torch.nn.Parameter | None) -> None:
        super().__init__()
        self.register_buffer("frozen", frozen)
        self.factors, self.bias = factors, bias

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for x [..., m]."""
        out, frozen = self.factors(x), self.frozen
        if frozen is not None:
            # Autograd would hold the weight, and the planner would count it as an activation.
            out = out + frozen_linear(x, lambda _: nullcontext((frozen, None)))
        return out if self.bias is None else out + self.bias.to(x.dtype)


def start_scale(rank: int, columns: int) -> float:
    """Return the standard deviation of a fresh ``down`` [rank, columns].

    AdamW moves every number by the same amount. With this scale a first step, which moves ``up`` alone, changes the
    output for an input that the gradient came from as much as a step of the whole matrix would.
    """
    return math.sqrt(columns) / rank


def fresh_factors(key: str, shape: tuple[int, int], rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return ``up``, zero, and ``down``, drawn from the seed and the weight's key alone, for a weight of a shape.

    The rank is at most the shorter side.
    """
    rows, columns = shape
    rank = min(rank, rows, columns)
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    down = torch.randn(rank, columns, generator=generator) * start_scale(rank, columns)
    return torch.zeros(rows, rank), down


def rescaled(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return factors of the same product with ``down`` at the scale of a fresh one; None for those of nothing.

    A compressed motion shares the scale out between its factors, so that they would learn at another pace.
    """
    size = down.square().mean().sqrt()
    factor = start_scale(*down.shape) / size
    return (up / factor, down * factor) if size > 0 else None
