"""Layers as ComfyUI-GGUF's: raw bytes, a shape that is not theirs, and a cast_bias_weight of the layer's own."""

from __future__ import annotations

from typing import Any

import comfy.ops
import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 32


class Packed(torch.Tensor):
    """Blocks of an fp16 scale and 32 int8 values, 34 bytes each, as GGUF's Q8_0."""

    stands_for: torch.Size

    def __new__(cls, data: Tensor, *, stands_for: torch.Size) -> Packed:
        return data.as_subclass(cls)

    def __init__(self, data: Tensor, *, stands_for: torch.Size) -> None:
        self.stands_for = stands_for

    def to(self, *args: Any, **kwargs: Any) -> Any:
        return Packed(super().to(*args, **kwargs), stands_for=self.shape)

    def detach(self) -> Packed:
        return self

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        shape: torch.Size = vars(self).get("stands_for", self.size())
        return shape


def pack(weight: Tensor) -> Packed:
    blocks = weight.float().reshape(-1, BLOCK)
    scale = (blocks.abs().amax(1, keepdim=True) / 127).half()
    values = (blocks / scale.float()).round().clamp(-127, 127).to(torch.int8)
    return Packed(torch.cat([scale.view(torch.uint8), values.view(torch.uint8)], 1), stands_for=weight.shape)


def unpack(packed: Packed, dtype: torch.dtype) -> Tensor:
    rows: Any = packed.data
    scale = rows[:, :2].contiguous().view(torch.float16).to(dtype)
    values = (rows[:, 2:].view(torch.int8).to(dtype) * scale).reshape(packed.stands_for)
    # Results of operations are Packed, too: this ends it, though not within a dispatch mode.
    return torch.Tensor(values)


def pack_all(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pack the weights of linear layers and convolutions, as far as they come in whole blocks."""
    return {k: pack(v) if v.ndim > 1 and v.numel() % BLOCK == 0 else v for k, v in weights.items()}


class _PackedLayer(torch.nn.Module):
    comfy_cast_weights = True

    def cast_bias_weight(
        self, input: Any = None, dtype: Any = None, device: Any = None, bias_dtype: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        layer: Any = self
        dtype = dtype or input.dtype
        weight = layer.weight
        weight = unpack(weight, dtype) if isinstance(weight, Packed) else weight.to(dtype)
        return weight, None if layer.bias is None else layer.bias.to(dtype)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for name in ("weight", "bias"):
            if (value := state.get(prefix + name)) is not None:
                setattr(self, name, torch.nn.Parameter(value, requires_grad=False))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, value in self.named_parameters(recurse=False):
            destination[prefix + name] = torch.zeros(value.shape, device="meta")


class PackedOps(comfy.ops.manual_cast):
    """Layers of ``Packed`` weights."""

    class Linear(_PackedLayer, comfy.ops.manual_cast.Linear):
        def forward_comfy_cast_weights(self, input: Tensor) -> Tensor:
            return F.linear(input, *self.cast_bias_weight(input))

    class Conv2d(_PackedLayer, comfy.ops.manual_cast.Conv2d):
        def forward_comfy_cast_weights(self, input: Tensor) -> Tensor:
            return self._conv_forward(input, *self.cast_bias_weight(input))


class SecretOps(comfy.ops.manual_cast):
    """Layers of int8 weights that they dequantise in their forward, and nowhere else."""

    class Linear(comfy.ops.manual_cast.Linear):
        def forward_comfy_cast_weights(self, input: Tensor) -> Tensor:
            return F.linear(input, self.weight.to(input.dtype) / 64, self.bias)


def keep_secret(unet: torch.nn.Module) -> None:
    """Store the weights of the linear layers that ``SecretOps`` built as int8."""
    for layer in unet.modules():
        if isinstance(layer, SecretOps.Linear):
            stored = (64 * layer.weight).clamp(-127, 127).to(torch.int8)
            layer.weight = torch.nn.Parameter(stored, requires_grad=False)
