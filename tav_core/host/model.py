"""Read a MODEL: its UNet, family, prediction type, noise levels and dtype."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
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
    backup: dict[str, Any]
    load_device: torch.device
    offload_device: torch.device

    def clone(self) -> Any:
        """Return another patcher of the same model, with patches of its own."""

    def get_model_object(self, name: str) -> Any:
        """Return an object of the model as the patcher's object patches change it."""

    def add_patches(self, patches: dict[str, Any], strength_patch: float = 1.0) -> Any:
        """Add weight patches by state-dict key."""

    def is_dynamic(self) -> bool:
        """Say whether weights are loaded as they are used (hosts with dynamic VRAM alone have this)."""

    def get_free_memory(self, device: Any) -> float:
        """Return free bytes, evictable weights included (hosts with dynamic VRAM alone have this)."""

    def memory_required(self, input_shape: Any) -> float:
        """Return the host's estimate of an evaluation's memory in bytes."""

    def loaded_size(self) -> int:
        """Return the bytes of the weights that are on the device."""

    def partially_unload(self, device_to: torch.device, memory_to_free: int = 0) -> int:
        """Move weights off the device; return the bytes that were freed."""


def current_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a CUDA device the current one within the context, as hosts' samplers do.

    A host that copies an offloaded weight lets the current device's stream wait for the copy.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def unet_of(model: ModelPatcher) -> torch.nn.Module:
    """Return the UNet of a MODEL. Raises ValueError for models without one (DiT, video models, audio models)."""
    if model is None:  # a loader found none in its file
        raise Refusal("model", "its file has no UNet", "Load a checkpoint that has a UNet: SD 1.x, 2.x or SDXL.")
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
    """Return "epsilon" or "v". Raises ValueError for other parametrisations (flow, EDM, x0) and distilled ones (LCM).

    Decided by what the sampling computes, so that other packs' classes count for what they are.
    """
    found = predicts(model)
    if found is None:
        sampling = model.get_model_object("model_sampling")
        names = ", ".join(kind.__name__ for kind in type(sampling).__bases__)
        raise Refusal(
            "model",
            f"its sampling ({names}) is neither epsilon- nor v-prediction on discrete timesteps",
            "Remove the node that changes it (ModelSamplingDiscrete or another ModelSampling node), or load another "
            "model. Distilled samplings such as LCM know a few of the timesteps alone.",
        )
    return found


def predicts(model: ModelPatcher) -> str | None:
    """Return what ``prediction_type`` does, None where it raises."""
    return _prediction_of(model.get_model_object("model_sampling"))


@torch.no_grad()
def _prediction_of(sampling: Any) -> str | None:
    """Return "epsilon" or "v" if that is what the sampling computes at each of its noise levels."""
    sigmas = getattr(sampling, "sigmas", None)
    if not isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete) or sigmas is None:
        return None
    # The UNet is asked for timestep i at sigmas[i], in training and in the schedules.
    if not torch.equal(sampling.timestep(sigmas).long(), torch.arange(len(sigmas), device=sigmas.device)):
        return None
    generator = torch.Generator().manual_seed(0)
    x, output = torch.randn(2, len(sigmas), 1, 1, 1, generator=generator).to(sigmas)
    sigma = sigmas.view(-1, 1, 1, 1)
    scale = (sigma**2 + 1) ** 0.5
    if not torch.allclose(sampling.calculate_input(sigmas, x), x / scale, rtol=1e-4):
        return None
    denoised = sampling.calculate_denoised(sigmas, output, x)
    formulas = {"epsilon": x - output * sigma, "v": x / scale**2 - output * sigma / scale}
    return next((name for name, x0 in formulas.items() if torch.allclose(denoised, x0, rtol=1e-4, atol=1e-5)), None)


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
