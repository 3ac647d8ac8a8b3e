"""Lend the weights of a loaded model's layers: cast, moved, dequantised and patched as for the host's own forward."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.ops
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import Refusal
from .stored import is_coarse, weight_shape

WeightAndBias = tuple[Tensor, Tensor | None]

# Hosts with dynamic VRAM pin a weight's page at each cast, and unpin it in uncast_bias_weight alone.
_TAKES_BACK = "offloadable" in inspect.signature(comfy.ops.cast_bias_weight).parameters

# Hardware that multiplies in 8 or 4 bits quantises the layer's input, too: up to a tenth of its result.
_MOST_OFF = 0.3


@contextmanager
def lent(layer: torch.nn.Module, x: Tensor) -> Iterator[WeightAndBias]:
    """Lend weight and bias of a UNet layer for use with x, in its dtype and on its device.

    Both may be the host's own buffers: after the context ends they can hold something else. Clone to keep.
    """
    if not hasattr(layer, "comfy_cast_weights"):
        plain: Any = layer
        yield plain.weight.to(x), None if plain.bias is None else plain.bias.to(x)
    elif hasattr(layer, "cast_bias_weight"):  # ComfyUI-GGUF dequantises there
        own: Any = layer
        # It turns its tensors into plain ones with torch.Tensor(), which fails within modes that look at operations.
        with torch.no_grad(), _disable_current_modes():
            dequantised = own.cast_bias_weight(x)
        yield dequantised
    elif _TAKES_BACK:
        # Hosts keep the buffers that they cast into. A buffer made in inference mode cannot be written outside it.
        with torch.inference_mode():
            weight, bias, stream = comfy.ops.cast_bias_weight(layer, x, offloadable=True)
        try:
            yield _dequantised(layer, weight), bias
        finally:
            with torch.inference_mode():
                comfy.ops.uncast_bias_weight(layer, weight, bias, stream)
    else:
        weight, bias = comfy.ops.cast_bias_weight(layer, x)
        yield _dequantised(layer, weight), bias


@torch.no_grad()
def _dequantised(layer: torch.nn.Module, weight: Tensor) -> Tensor:
    """Return a cast weight as the layer uses it: scaled fp8 and mixed precision keep a scale beside it."""
    convert: Any = getattr(layer, "convert_weight", None)
    return weight if convert is None else convert(weight)


def resident_dtype(layer: torch.nn.Module, device: torch.device) -> torch.dtype | None:
    """Return the dtype in which a layer's weight lies on the device; None where the host keeps it elsewhere.

    A weight that is no plain tensor counts as uint8.
    """
    weight: Any = layer.weight
    on_page = hasattr(layer, "_v")  # dynamic VRAM: the weight itself stays in RAM, its page has the model's dtype
    if not isinstance(weight, Tensor) or not (on_page or weight.device == device):
        return None
    dtype: torch.dtype = getattr(weight, "_model_dtype", weight.dtype) if on_page else weight.dtype
    return torch.uint8 if is_coarse(layer) and dtype.itemsize > 1 else dtype


def check_lending(unet: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a UNet whose quantised weights cannot be read (ValueError); looks at one layer of each kind.

    What is lent must have the layer's shape, and give about what the layer's own forward gives.
    """
    seen: set[Any] = set()
    for layer in unet.modules():
        shape, weight = weight_shape(layer), getattr(layer, "weight", None)
        kind = (type(layer), type(weight), getattr(weight, "dtype", None), getattr(layer, "quant_format", None))
        if shape is None or kind in seen or not is_coarse(layer):
            continue
        seen.add(kind)
        if not _lends_what_it_uses(layer, shape, device, dtype):
            name = getattr(layer, "quant_format", None) or str(getattr(weight, "dtype", "unknown")).removeprefix(
                "torch."
            )
            raise Refusal(
                "model",
                f"its weights are quantised as {name} in {type(layer).__module__}.{type(layer).__qualname__}, "
                "which gives no access to what they stand for",
                "Load an fp16 or bf16 checkpoint.",
            )


@torch.no_grad()
def _lends_what_it_uses(layer: Any, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    # Several rows: with one, hosts may choose another way to multiply.
    x = (
        torch.randn(4, 16, shape[1], generator=generator)
        if len(shape) == 2
        else torch.randn(1, layer.in_channels, *(size + 2 for size in shape[2:]), generator=generator)
    )
    x = x.to(device, dtype)
    try:
        with lent(layer, x) as (weight, bias):
            if tuple(weight.shape) != shape or not weight.is_floating_point():
                return False
            ours = (
                torch.nn.functional.linear(x, weight, bias) if len(shape) == 2 else layer._conv_forward(x, weight, bias)
            )
    except (RuntimeError, TypeError, AttributeError):
        return False
    theirs = type(layer).forward(layer, x)
    return bool((ours - theirs).float().norm() <= _MOST_OFF * theirs.float().norm())
