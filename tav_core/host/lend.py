"""Lend the weights of a loaded model's layers: cast, moved and patched as the host would for its own forward."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.ops
import torch
from torch import Tensor

WeightAndBias = tuple[Tensor, Tensor | None]

# Hosts with dynamic VRAM pin a weight's page at each cast, and unpin it in uncast_bias_weight alone.
_TAKES_BACK = "offloadable" in inspect.signature(comfy.ops.cast_bias_weight).parameters


@contextmanager
def lent(layer: torch.nn.Module, x: Tensor) -> Iterator[WeightAndBias]:
    """Lend weight and bias of a UNet layer for use with x, in its dtype and on its device.

    Both may be the host's own buffers: after the context ends they can hold something else. Clone to keep.
    """
    if not hasattr(layer, "comfy_cast_weights"):
        plain: Any = layer
        yield plain.weight.to(x), None if plain.bias is None else plain.bias.to(x)
    elif _TAKES_BACK:
        weight, bias, stream = comfy.ops.cast_bias_weight(layer, x, offloadable=True)
        try:
            yield weight, bias
        finally:
            comfy.ops.uncast_bias_weight(layer, weight, bias, stream)
    else:
        yield comfy.ops.cast_bias_weight(layer, x)


def resident_dtype(layer: torch.nn.Module, device: torch.device) -> torch.dtype | None:
    """Return the dtype in which a layer's weight lies on the device; None where the host keeps it elsewhere."""
    weight: Any = layer.weight
    if hasattr(layer, "_v"):  # dynamic VRAM: the weight itself stays in RAM, its page has the model's dtype
        return getattr(weight, "_model_dtype", weight.dtype)
    return weight.dtype if isinstance(weight, Tensor) and weight.device == device else None
