"""Weights in every storage that checkpoints come in, small UNets of them, and the same UNets dequantised."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import comfy.ops
import torch
from packed_layers import Packed, PackedOps, pack_all, unpack
from torch import Tensor
from unets import UNETS, build_model

CONFIG = UNETS["tiny"]
FP8 = torch.float8_e4m3fn
Weights = dict[str, Tensor]


def random_weights() -> Weights:
    return {k: v.clone() for k, v in build_model(CONFIG).model.diffusion_model.state_dict().items()}


def plain_fp8() -> Any:
    return build_model(CONFIG, random_weights(), dtype=FP8, compute_dtype=torch.float32)


def as_scaled_fp8(weights: Weights) -> tuple[Weights, Weights]:
    """Return the weights of linear layers in fp8 with a ``scale_weight`` each, and what all weights stand for."""
    stored, meant = {}, {}
    for key, value in weights.items():
        stored[key] = meant[key] = value.float()
        if key.endswith(".weight") and value.ndim == 2:
            scale = value.float().abs().amax() / torch.finfo(FP8).max
            stored[key], stored[key.removesuffix("weight") + "scale_weight"] = (value.float() / scale).to(FP8), scale
            meant[key] = stored[key].float() * scale
    return stored, meant


def scaled_fp8() -> Any:
    """As ComfyUI 0.3.64 loads scaled fp8: the layers multiply by ``scale_weight`` in their own forward."""
    weights, _ = as_scaled_fp8(random_weights())
    return build_model(CONFIG, weights, operations=comfy.ops.scaled_fp8_ops(override_dtype=FP8))


LAYOUTS = {
    "float8_e4m3fn": "TensorCoreFP8E4M3Layout",
    "float8_e5m2": "TensorCoreFP8E5M2Layout",
    "int8_tensorwise": "TensorWiseINT8Layout",
    "nvfp4": "TensorCoreNVFP4Layout",
    "mxfp8": "TensorCoreMXFP8Layout",
}


def as_mixed(weights: Weights, quant_format: str, spared: str = "none") -> tuple[Weights, Weights]:
    """Return the weights of linear layers under ``comfy_quant``, and what all weights stand for.

    ``spared``: layers with this in their name stay as they are.
    """
    from comfy.quant_ops import QuantizedTensor

    stored, meant = {}, {}
    for key, value in weights.items():
        stored[key] = meant[key] = value.float()
        if key.endswith(".weight") and value.ndim == 2 and min(value.shape) >= 32 and spared not in key:
            quantised = QuantizedTensor.from_float(value.float(), LAYOUTS[quant_format], **_scale_of(quant_format))
            del stored[key]
            stored |= quantised.state_dict(key)
            told = json.dumps({"format": quant_format}).encode()
            stored[key.removesuffix("weight") + "comfy_quant"] = torch.tensor(list(told), dtype=torch.uint8)
            meant[key] = quantised.dequantize().float()
    return stored, meant


def _scale_of(quant_format: str) -> dict[str, Any]:
    return {"scale": "recalculate"} if quant_format.startswith("float8") else {}


def mixed(quant_format: str) -> Callable[[], Any]:
    """As ComfyUI 0.26 and newer load ``comfy_quant``: a Linear of their own, with a quantised tensor as weight."""

    def build() -> Any:
        weights, _ = as_mixed(random_weights(), quant_format)
        operations = comfy.ops.mixed_precision_ops({}, torch.float32, disabled=set(LAYOUTS))
        return build_model(CONFIG, weights, operations=operations)

    return build


def mixed_formats() -> list[str]:
    """Return the formats of ``comfy_quant`` that this host knows."""
    if not hasattr(comfy.ops, "mixed_precision_ops"):
        return []
    from comfy.quant_ops import QUANT_ALGOS

    return [name for name in LAYOUTS if name in QUANT_ALGOS]


def gguf() -> Any:
    return build_model(CONFIG, pack_all(random_weights()), operations=PackedOps)


# --- the same, dequantised --------------------------------------------------------------------------------------------


def dequantised(model: Any) -> Any:
    """Build a float32 model with the weights that a quantised one stands for, read layer by layer, not by the pack."""
    weights: Weights = {}
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
KINDS |= {f"mixed {name}": mixed(name) for name in mixed_formats()}
