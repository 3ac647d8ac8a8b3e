"""Read a MODEL: its UNet, family, prediction type, noise levels and dtype."""

from __future__ import annotations

from typing import Any, Protocol

import comfy.model_sampling
import torch
from torch import Tensor

from .. import unet as unet_parts
from ..errors import Refusal

_FAMILIES = {768: "SD1", 1024: "SD2", 2048: "SDXL"}

# ComfyUI's list of [text embedding, options].
Conditioning = Any


class ModelPatcher(Protocol):
    """The part of ComfyUI's ModelPatcher (a MODEL) that this pack uses."""

    model: Any
    model_options: dict[str, Any]
    patches: dict[str, list[tuple[Any, ...]]]
    load_device: torch.device
    offload_device: torch.device

    def clone(self) -> Any:
        """Return another patcher of the same model, with patches of its own."""

    def get_model_object(self, name: str) -> Any:
        """Return an object of the model as the patcher's object patches change it."""

    def add_patches(self, patches: dict[str, Any], strength_patch: float = 1.0) -> Any:
        """Add weight patches by state-dict key."""

    def memory_required(self, input_shape: Any) -> float:
        """Return the host's estimate of an evaluation's memory in bytes."""

    def loaded_size(self) -> int:
        """Return the bytes of the weights that are on the device."""

    def partially_unload(self, device_to: torch.device, memory_to_free: int = 0) -> int:
        """Move weights off the device; return the bytes that were freed."""


def unet_of(model: ModelPatcher) -> torch.nn.Module:
    """Return the UNet of a MODEL. Raises ValueError for models without one (DiT, video models, audio models)."""
    unet = getattr(model.model, "diffusion_model", None) or torch.nn.Module()
    if not unet_parts.transformer_blocks(unet) or not unet_parts.pooled_norms(unet):
        raise Refusal(
            "model",
            f"{type(model.model).__name__} has no UNet with spatial transformer blocks",
            "Tune-A-Video inflates Stable Diffusion 1.x, 2.x and SDXL; load one of those.",
        )
    if any(hasattr(module, "time_stack") for module in unet.modules()):
        raise Refusal("model", "this UNet is a video model already", "Load an image model: SD 1.x, 2.x or SDXL.")
    return unet


def check_model(model: ModelPatcher) -> None:
    """Refuse a MODEL that is no Stable Diffusion UNet with a discrete schedule (ValueError)."""
    unet_of(model)
    prediction_type(model)


def query_shapes(model: ModelPatcher) -> dict[str, torch.Size]:
    """Return the shape of every query projection's weight of the model's UNet, by path."""
    return unet_parts.query_shapes(unet_of(model))


def context_width(model: ModelPatcher) -> int:
    """Return the width of the text embedding that the model's cross-attention takes."""
    block = next(iter(unet_parts.transformer_blocks(unet_of(model)).values()))
    return int(block.attn2.to_k.in_features)


def family(model: ModelPatcher) -> str:
    """Return "SD1", "SD2" or "SDXL"; another width of text embedding is a family of its own."""
    width = context_width(model)
    return _FAMILIES.get(width, f"a model of text width {width}")


def prediction_type(model: ModelPatcher) -> str:
    """Return "epsilon" or "v". Raises ValueError for other parametrisations (flow, EDM)."""
    sampling = model.get_model_object("model_sampling")
    known = comfy.model_sampling
    if hasattr(sampling, "sigmas") and isinstance(sampling, known.ModelSamplingDiscrete):
        if isinstance(sampling, known.V_PREDICTION) and not isinstance(sampling, known.EDM):
            return "v"
        others = (known.V_PREDICTION, getattr(known, "X0", known.EDM))
        if isinstance(sampling, known.EPS) and not isinstance(sampling, others):
            return "epsilon"
    raise Refusal(
        "model",
        f"its sampling ({type(sampling).__mro__[1].__name__}) is neither epsilon- nor v-prediction "
        "on discrete timesteps",
        "Remove the node that changes it (ModelSampling...), or load another model.",
    )


def sigma_table(model: ModelPatcher) -> Tensor:
    """Return the noise level per training timestep, [train_steps], ascending."""
    prediction_type(model)
    return model.get_model_object("model_sampling").sigmas.detach().to("cpu", torch.float32, copy=True)


def model_scale(model: ModelPatcher) -> float:
    """Return the factor from LATENT scale to the model's own."""
    return float(model.get_model_object("latent_format").scale_factor)


def inference_dtype(model: ModelPatcher) -> torch.dtype:
    """Return the dtype in which the host computes the model, by ModelComputeDtype where that node is on it."""
    return model.get_model_object("manual_cast_dtype") or model.model.get_dtype()
