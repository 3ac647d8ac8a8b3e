"""Load a MODEL for training, and read from it what every training step needs besides noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from ..errors import Refusal
from .model import Conditioning, ModelPatcher

# Multiple of the host's estimate for evaluating the model on the same clip.
_ROOM_FOR_TRAINING = 4


def load_for_training(model: ModelPatcher, shape: torch.Size) -> None:
    """Load a MODEL onto its device, with room for tuning on latents of ``shape`` [frames, c, h, w].

    Other models make room as far as they can, but activations are rather recomputed than weights offloaded.
    """
    inference = model.memory_required(shape)
    comfy.model_management.load_models_gpu(
        [model], memory_required=_ROOM_FOR_TRAINING * inference, minimum_memory_required=inference
    )


def without_injections(model: ModelPatcher) -> Any:
    """Return the MODEL, or a clone without the layers that other packs (AnimateDiff-Evolved) insert as it is loaded.

    Such layers are not made to be differentiated, and ask for options that only a sampling has.
    """
    keys = list(getattr(model, "injections", {}))
    if not keys:
        return model
    clone = model.clone()
    for key in keys:
        clone.remove_injections(key)
    return clone


@dataclass(frozen=True)
class UNetConditions:
    """A CONDITIONING as the UNet takes it, normal tensors in the compute dtype on the device.

    ``context``: text embedding [1 or frames, tokens, width]. ``extra``: other keyword arguments by name (SDXL's
    ``y``), ``concat``: channels to add to the latent (inpainting models), None for none; rows are frames.
    """

    context: Tensor
    extra: Mapping[str, Tensor]
    concat: Tensor | None


def latents_in(model: ModelPatcher, latents: Tensor) -> Tensor:
    """Return a float32 copy of a LATENT's samples [frames, c, h, w] on the device, in the UNet's own scale."""
    return model.model.process_latent_in(latents.detach().clone().float().to(model.load_device))


def unet_conditions(model: ModelPatcher, conditioning: Conditioning, x0: Tensor, dtype: torch.dtype) -> UNetConditions:
    """Convert a CONDITIONING of one prompt for clean latents ``x0`` of ``latents_in``.

    Raises Refusal for a UNet that takes more channels than the host gives it.
    """
    device, frames = model.load_device, x0.shape[0]
    conds = comfy.sampler_helpers.convert_cond(conditioning)
    conds = comfy.samplers.encode_model_conds(
        model.model.extra_conds, conds, x0, device, "positive", latent_image=x0, denoise_mask=None, seed=0
    )[0]["model_conds"]

    def ready(value: Tensor) -> Tensor:
        value = value.detach().clone().to(device)
        return value.to(dtype) if value.is_floating_point() else value  # class labels are indices

    per_frame = {
        key: ready(cond.process_cond(batch_size=frames, device=device, area=None).cond)
        for key, cond in conds.items()
        if key != "c_crossattn"
    }
    concat = per_frame.pop("c_concat", None)
    given = x0.shape[1] + (0 if concat is None else concat.shape[1])
    taken = getattr(model.model.diffusion_model, "in_channels", given)
    if given != taken:
        raise Refusal(
            "model",
            f"its UNet takes {taken} channels, and latent and conditioning give {given}",
            "Load a model that takes the clip alone: SD 1.x, 2.x or SDXL, or one of their inpainting models.",
        )
    return UNetConditions(ready(conds["c_crossattn"].cond), per_frame, concat)
