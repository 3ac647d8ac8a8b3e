"""A UNet prepared for one-shot tuning: which weights learn, and forwards that do no work for the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import attend
from ..inflate import Forward, transformer_blocks
from .frozen_layers import WeightAndBias, frozen_conv2d, frozen_linear, gated_gelu

TrainScope = Literal["all", "middle and up"]
TRAIN_SCOPES: tuple[TrainScope, ...] = get_args(TrainScope)

# Weight and bias of a module of the UNet, for use with the given input: its dtype, its device.
FetchModule = Callable[[torch.nn.Module, Tensor], WeightAndBias]


def in_scope(path: str, scope: TrainScope) -> bool:
    """Whether a block learns. "all" is the paper; "middle and up" is what the released code really does.

    Its reentrant activation checkpointing passes no gradient to the down blocks.
    """
    return scope == "all" or not path.startswith("input_blocks.")


class CastingOperations:
    """``torch.nn`` layers that keep float32 weights and compute in the dtype of their input."""

    class Linear(torch.nn.Linear):
        """Linear layer; see the enclosing class."""

        def forward(self, input: Tensor) -> Tensor:
            bias = None if self.bias is None else self.bias.to(input.dtype)
            return F.linear(input, self.weight.to(input.dtype), bias)

    class LayerNorm(torch.nn.LayerNorm):
        """Layer norm; see the enclosing class."""

        def forward(self, input: Tensor) -> Tensor:
            weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
            return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class TrainingBackend:
    """Inflation's needs (``inflate.Backend``) met for training: differentiable, with normal tensors."""

    def __init__(self, fetch: FetchModule) -> None:
        self._fetch = fetch
        self._affine: dict[torch.nn.Module, tuple[Tensor, Tensor]] = {}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, heads: int, **_: Any) -> Tensor:
        """PyTorch's fused attention; the host's own may lack a backward pass."""
        return attend(q, k, v, heads)

    def affine(self, norm: torch.nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """Copies that autograd may save (the host's are inference tensors); small, so made once and kept."""
        if norm not in self._affine:
            weight, bias = self._fetch(norm, x)
            assert bias is not None
            self._affine[norm] = (weight.detach().clone(), bias.detach().clone())
        return self._affine[norm]


def _query(weight: Tensor) -> Forward:
    return lambda x: F.linear(x, weight.to(x.dtype))


def _group_norm(norm: torch.nn.GroupNorm, backend: TrainingBackend) -> Forward:
    return lambda x: F.group_norm(x, norm.num_groups, *backend.affine(norm, x), norm.eps)


def _layer_norm(norm: torch.nn.LayerNorm, backend: TrainingBackend) -> Forward:
    return lambda x: F.layer_norm(x, norm.normalized_shape, *backend.affine(norm, x), norm.eps)


def _geglu(gate: Any) -> Forward:
    return lambda x: gated_gelu(gate.proj(x))


def _cross_attention(attn: Any, context: Tensor, fetch: FetchModule) -> Forward:
    # The text and its projections are frozen: keys and values are the same in every step.
    with torch.no_grad():
        k = F.linear(context, *fetch(attn.to_k, context))
        v = F.linear(context, *fetch(attn.to_v, context))

    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        rows = x.shape[0]
        keys, values = (t if t.shape[0] == rows else t[:1].expand(rows, -1, -1) for t in (k, v))
        return attn.to_out(attend(attn.to_q(x), keys, values, attn.heads))

    return forward


def training_forwards(
    unet: torch.nn.Module,
    queries: Mapping[str, Tensor],
    context: Tensor,
    fetch: FetchModule,
    backend: TrainingBackend,
) -> list[tuple[torch.nn.Module, Forward]]:
    """Forwards for tuning, to be swapped in before those of ``inflate.inflated_forwards``.

    ``queries``: query projection weights [inner, c] by path, float32, the ones that learn and the ones that
    merely differ from the UNet's. ``context``: text embedding, [1, tokens, c] for all frames or
    [frames, tokens, c]. Every other layer becomes frozen: no weight gradient, no saved input.
    """
    swaps: list[tuple[torch.nn.Module, Forward]] = []
    for path, module in unet.named_modules():
        if f"{path}.weight" in queries:
            swaps.append((module, _query(queries[f"{path}.weight"])))
        elif isinstance(module, torch.nn.Linear):
            swaps.append((module, partial(frozen_linear, fetch=partial(fetch, module))))
        elif isinstance(module, torch.nn.Conv2d):
            swaps.append((module, partial(frozen_conv2d, module=module, fetch=partial(fetch, module))))
        elif isinstance(module, torch.nn.GroupNorm):
            swaps.append((module, _group_norm(module, backend)))
        elif isinstance(module, torch.nn.LayerNorm):
            swaps.append((module, _layer_norm(module, backend)))
    for block in transformer_blocks(unet).values():
        gate = block.ff.net[0]
        if hasattr(gate, "proj"):
            swaps.append((gate, _geglu(gate)))
        swaps.append((block.attn2, _cross_attention(block.attn2, context, fetch)))
    return swaps
