"""Small UNets in every storage that checkpoints come in, and the same UNets dequantised."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import comfy.ops
import torch
import torch.nn.functional as F
from torch import Tensor
from unets import UNETS, build_model

CONFIG = UNETS["tiny"]
FP8 = torch.float8_e4m3fn


def random_weights() -> dict[str, Tensor]:
    return {k: v.clone() for k, v in build_model(CONFIG).model.diffusion_model.state_dict().items()}


def plain_fp8() -> Any:
    return build_model(CONFIG, random_weights(), dtype=FP8, compute_dtype=torch.float32)


def scaled_fp8() -> Any:
    """As ComfyUI 0.3.64 loads scaled fp8: the layers multiply by ``scale_weight`` in their own forward."""
    weights: dict[str, Tensor] = {}
    for key, value in random_weights().items():
        if key.endswith(".weight") and value.ndim == 2:
            scale = value.abs().amax() / torch.finfo(FP8).max
            weights[key], weights[key.removesuffix("weight") + "scale_weight"] = (value / scale).to(FP8), scale
        else:
            weights[key] = value
    return build_model(CONFIG, weights, operations=comfy.ops.scaled_fp8_ops(override_dtype=FP8))


LAYOUTS = {
    "float8_e4m3fn": "TensorCoreFP8E4M3Layout",
    "float8_e5m2": "TensorCoreFP8E5M2Layout",
    "int8_tensorwise": "TensorWiseINT8Layout",
    "nvfp4": "TensorCoreNVFP4Layout",
    "mxfp8": "TensorCoreMXFP8Layout",
}


def mixed(quant_format: str) -> Callable[[], Any]:
    """As ComfyUI 0.26 and newer load ``comfy_quant``: a Linear of their own, with a quantised tensor as weight."""

    def build() -> Any:
        from comfy.quant_ops import QuantizedTensor

        weights: dict[str, Tensor] = {}
        for key, value in random_weights().items():
            if key.endswith(".weight") and value.ndim == 2 and min(value.shape) >= 32:
                quantised = QuantizedTensor.from_float(value, LAYOUTS[quant_format], **_scale_of(quant_format))
                weights |= quantised.state_dict(key)
                told = json.dumps({"format": quant_format}).encode()
                weights[key.removesuffix("weight") + "comfy_quant"] = torch.tensor(list(told), dtype=torch.uint8)
            else:
                weights[key] = value
        operations = comfy.ops.mixed_precision_ops({}, torch.float32, disabled=set(LAYOUTS))
        return build_model(CONFIG, weights, operations=operations)

    return build


def _scale_of(quant_format: str) -> dict[str, Any]:
    return {"scale": "recalculate"} if quant_format.startswith("float8") else {}


# --- ComfyUI-GGUF's way: raw bytes, a shape that is not theirs, and a cast_bias_weight of the layer's own -----------

BLOCK = 32


class Packed(torch.Tensor):
    """Blocks of an fp16 scale and 32 int8 values, 34 bytes each, as GGUF's Q8_0."""

    stands_for: torch.Size

    def to(self, *args: Any, **kwargs: Any) -> Any:
        return _packed(super().to(*args, **kwargs), self.stands_for)

    def detach(self) -> Packed:
        return self

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.stands_for


def _packed(data: Tensor, shape: torch.Size) -> Packed:
    new = data.as_subclass(Packed)
    new.stands_for = shape
    return new


def pack(weight: Tensor) -> Packed:
    blocks = weight.reshape(-1, BLOCK)
    scale = (blocks.abs().amax(1, keepdim=True) / 127).half()
    values = (blocks / scale.float()).round().clamp(-127, 127).to(torch.int8)
    return _packed(torch.cat([scale.view(torch.uint8), values.view(torch.uint8)], 1), weight.shape)


def unpack(packed: Packed, dtype: torch.dtype) -> Tensor:
    data = packed.as_subclass(Tensor)
    scale = data[:, :2].contiguous().view(torch.float16).to(dtype)
    return (data[:, 2:].view(torch.int8).to(dtype) * scale).reshape(packed.stands_for)


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


def gguf() -> Any:
    weights = {k: pack(v) if v.ndim > 1 and v.numel() % BLOCK == 0 else v for k, v in random_weights().items()}
    return build_model(CONFIG, weights, operations=PackedOps)


# --- the same, dequantised --------------------------------------------------------------------------------------------


def dequantised(model: Any) -> Any:
    """Build a float32 model with the weights that a quantised one stands for, read layer by layer, not by the pack."""
    weights: dict[str, Tensor] = {}
    for path, layer in model.model.diffusion_model.named_modules():
        weight: Any = getattr(layer, "weight", None)
        if weight is None:
            continue
        if isinstance(weight, Packed):
            value = unpack(weight, torch.float32)
        elif hasattr(weight, "_qdata"):
            value = weight.dequantize().float()
        else:
            value = weight.float() * getattr(layer, "scale_weight", torch.ones(()))
        weights[f"{path}.weight"] = value
        if getattr(layer, "bias", None) is not None:
            weights[f"{path}.bias"] = layer.bias.float()
    return build_model(CONFIG, weights)


KINDS: dict[str, Callable[[], Any]] = {"fp8": plain_fp8, "gguf": gguf}
if hasattr(comfy.ops, "scaled_fp8_ops"):
    KINDS["scaled fp8"] = scaled_fp8
if hasattr(comfy.ops, "mixed_precision_ops"):
    from comfy.quant_ops import QUANT_ALGOS

    KINDS |= {f"mixed {name}": mixed(name) for name in LAYOUTS if name in QUANT_ALGOS}
