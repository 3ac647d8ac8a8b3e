"""Forwards for a UNet in training: gradients flow to query projections and temporal layers alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import host
from ..attention import attend
from ..inflate import Forward, Swap
from ..unet import transformer_blocks
from .factors import Factors
from .frozen_layers import Lend, WeightAndBias, frozen_conv2d, frozen_linear, gated_gelu

# Lends weight and bias of a layer of the UNet in the dtype and on the device of the given tensor.
LendLayer = Callable[[torch.nn.Module, Tensor], AbstractContextManager[WeightAndBias]]


class TrainingBackend:
    """Inflation's needs (``inflate.Backend``) met for training: differentiable, with normal tensors."""

    def __init__(self, lend: LendLayer) -> None:
        self._lend = lend
        self._affine: dict[torch.nn.Module, WeightAndBias] = {}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, heads: int, **_: Any) -> Tensor:
        """Attend by PyTorch's fused kernels; the host's own may lack a backward pass."""
        return attend(q, k, v, heads)

    @contextmanager
    def affine(self, norm: torch.nn.Module, x: Tensor) -> Iterator[WeightAndBias]:
        """Lend copies that autograd may save (the host's are inference tensors); small, so made once and kept."""
        yield self.kept_affine(norm, x)

    def kept_affine(self, norm: torch.nn.Module, x: Tensor) -> WeightAndBias:
        """Return weight and bias of a norm, normal tensors, copied at the first call."""
        if norm not in self._affine:
            with self._lend(norm, x) as (weight, bias):
                self._affine[norm] = weight.detach().clone(), None if bias is None else bias.detach().clone()
        return self._affine[norm]


def _query(weight: Tensor) -> Forward:
    return lambda x: F.linear(x, weight.to(x.dtype))


def _changed_query(change: Factors, lend: Lend) -> Forward:
    return lambda x: frozen_linear(x, lend) + change(x)


def _group_norm(norm: torch.nn.GroupNorm, backend: TrainingBackend) -> Forward:
    return lambda x: F.group_norm(x, norm.num_groups, *backend.kept_affine(norm, x), norm.eps)


def _layer_norm(norm: torch.nn.LayerNorm, backend: TrainingBackend) -> Forward:
    return lambda x: F.layer_norm(x, norm.normalized_shape, *backend.kept_affine(norm, x), norm.eps)


def _geglu(gate: Any) -> Forward:
    return lambda x: gated_gelu(gate.proj(x))


def _cross_attention(attn: Any, context: Tensor, lend: LendLayer) -> Forward:
    # The text and its projections are frozen: keys and values are the same in every step.
    with torch.no_grad():
        with lend(attn.to_k, context) as (weight, bias):
            k = F.linear(context, weight, bias)
        with lend(attn.to_v, context) as (weight, bias):
            v = F.linear(context, weight, bias)

    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        rows = x.shape[0]
        keys, values = (t if t.shape[0] == rows else t[:1].expand(rows, -1, -1) for t in (k, v))
        return attn.to_out(attend(attn.to_q(x), keys, values, attn.heads))

    return forward


def training_forwards(
    unet: torch.nn.Module,
    queries: Mapping[str, Tensor | Factors],
    context: Tensor,
    lend: LendLayer,
    backend: TrainingBackend,
) -> list[Swap]:
    """Return forwards for tuning, to be swapped in together with those of ``inflate.inflated_forwards`` after them.

    ``queries``: query projection weights [inner, c] by path, float32, those that learn and those that merely
    differ from the UNet's; or their changes as factors. ``context``: text embedding, [1, tokens, c] for all frames or
    [frames, tokens, c]. Every other layer becomes frozen: no weight gradient, no saved input.
    """
    swaps: list[Swap] = []
    for path, module in unet.named_modules():
        query = queries.get(f"{path}.weight")
        if isinstance(query, Factors):
            swaps.append((module, _changed_query(query, partial(lend, module))))
        elif query is not None:
            swaps.append((module, _query(query)))
        elif len(shape := host.weight_shape(module) or ()) == 2:
            swaps.append((module, partial(frozen_linear, lend=partial(lend, module))))
        elif len(shape) == 4:
            swaps.append((module, partial(frozen_conv2d, module=module, lend=partial(lend, module))))
        elif isinstance(module, torch.nn.GroupNorm):
            swaps.append((module, _group_norm(module, backend)))
        elif isinstance(module, torch.nn.LayerNorm):
            swaps.append((module, _layer_norm(module, backend)))
    for block in transformer_blocks(unet).values():
        gate = block.ff.net[0]
        if hasattr(gate, "proj"):
            swaps.append((gate, _geglu(gate)))
        swaps.append((block.attn2, _cross_attention(block.attn2, context, lend)))
    return swaps
