"""Hold a node's LATENT, CONDITIONING and MOTION against the MODEL, before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import comfy.ldm.modules.attention
import torch
from torch import Tensor

from ..control.blend import BEYOND
from ..errors import Refusal
from .model import Conditioning, ModelPatcher, context_width, family

# Side of the square that a family was trained at, in latent pixels.
_NATIVE_SIDE = {"SD1": 64, "SD2": 64, "SDXL": 128}
PIXELS_PER_LATENT = 8
_FP32_TEXT = "Encode the prompt again; if the text encoder ran in fp16, start ComfyUI with --fp32-text-enc."
_ONE_STEP = 0.02  # of the way: one step of fifty


def check_latent(model: ModelPatcher, latent: Mapping[str, Any]) -> Tensor:
    """Return the samples of a LATENT, [frames, c, h, w] float32. Raises ValueError if they don't suit the model.

    Hosts with --fp16-intermediates encode in half precision, in which a walk over noise levels overflows.
    """
    samples = latent.get("samples") if isinstance(latent, Mapping) else None
    if not isinstance(samples, Tensor):  # nothing, or video and sound in one
        raise Refusal("latent", "it holds no frames", "Encode the frames with the VAE Encode node of an image model.")
    channels = model.get_model_object("latent_format").latent_channels
    if samples.ndim != 4:
        raise Refusal(
            "latent",
            f"its shape is {list(samples.shape)}, but frames must lie on the batch axis: "
            "[frames, channels, height, width]",
            "Encode the frames with the VAE Encode node of an image model.",
        )
    if samples.shape[1] != channels:
        raise Refusal(
            "latent",
            f"it has {samples.shape[1]} channels, the model takes {channels}",
            "Encode the clip with the VAE of the model's own checkpoint.",
        )
    if 0 in samples.shape:
        raise Refusal("latent", f"it is empty, its shape is {list(samples.shape)}", "Load at least one frame.")
    if not torch.isfinite(samples).all():
        raise Refusal(
            "latent",
            "it holds values that are not finite (NaN or infinity)",
            "Encode the clip again; if the VAE ran in fp16, start ComfyUI with --fp32-vae.",
        )
    mask = latent.get("noise_mask")
    if mask is not None and (mask.ndim < 2 or 0 in mask.shape[-2:]):
        raise Refusal("latent", f"its noise mask is empty, its shape is {list(mask.shape)}", "Draw it again.")
    if mask is not None and not torch.isfinite(mask).all():
        raise Refusal("latent", "its noise mask holds values that are not finite (NaN or infinity)", "Draw it again.")
    if mask is not None and not (-BEYOND <= float(mask.min()) and float(mask.max()) <= 1 + BEYOND):
        raise Refusal(
            "latent",
            f"its noise mask holds values from {float(mask.min()):g} to {float(mask.max()):g}",
            "A mask is 0 where the clip stays and 1 where it changes: scale its values to 0..1.",
        )
    # The host would repeat masks for another number of frames in turn.
    masks = len(samples) if mask is None else mask.reshape(-1, *mask.shape[-2:]).shape[0]
    if masks not in (1, len(samples)):
        raise Refusal(
            "latent",
            f"its noise mask has {masks} frames, the clip has {len(samples)}",
            "Give Set Latent Noise Mask one mask for all frames, or one for each.",
        )
    return samples.float()


def check_conditioning(model: ModelPatcher, name: str, conditioning: Conditioning, frames: int) -> None:
    """Refuse a CONDITIONING that the model or the clip cannot take. ``name``: the input's, for the message."""
    if conditioning is None or isinstance(conditioning, Sequence) and not conditioning:
        raise Refusal(name, "it is empty", "Connect a CLIP Text Encode node.")
    if not isinstance(conditioning, Sequence) or not all(map(_is_prompt, conditioning)):
        raise Refusal(
            name,
            "it is not made as a CONDITIONING is: text embeddings, each with its options",
            "Connect a CLIP Text Encode node, or take out the node between that makes it otherwise.",
        )
    width = context_width(model)
    for embedding, options in conditioning:
        pooled = options.get("pooled_output")
        if pooled is not None and not torch.isfinite(pooled).all():
            raise Refusal(name, "its pooled text embedding holds NaN or infinity", _FP32_TEXT)
        if embedding.ndim != 3 or 0 in embedding.shape:
            raise Refusal(
                name,
                f"a text embedding of shape {list(embedding.shape)} is not [prompts, tokens, width]",
                "Connect a CLIP Text Encode node.",
            )
        if not torch.isfinite(embedding).all():
            raise Refusal(name, "its text embedding holds NaN or infinity", _FP32_TEXT)
        if embedding.shape[-1] != width:
            raise Refusal(
                name,
                f"its text embedding is {embedding.shape[-1]} wide, {family(model)} takes {width}",
                "CLIP and model come from different families: use the CLIP of the model's own checkpoint.",
            )
        if embedding.shape[0] not in (1, frames):
            raise Refusal(
                name,
                f"it holds {embedding.shape[0]} text embeddings for {frames} frames",
                "Give one prompt for all frames, or one per frame.",
            )
    if (gap := _range_without_prompt(conditioning)) is not None:
        raise Refusal(
            name,
            f"no prompt acts between {gap[0]:g} and {gap[1]:g} of the steps",
            "Let the ranges of Conditioning (Set Timestep Range) meet, or combine it with a prompt for the rest.",
        )
    for _, options in conditioning:
        pooled = options.get("pooled_output")
        if not _takes_pooled(model, options):
            found = "none" if pooled is None else f"one of shape {list(pooled.shape)}"
            raise Refusal(
                name,
                f"{family(model)} needs a pooled text embedding beside the text's own, and here is {found}",
                "Connect a CLIP Text Encode node with the CLIP of the model's own checkpoint.",
            )


def _is_prompt(entry: Any) -> bool:
    """Say whether an entry of a CONDITIONING is a pair of a text embedding and options."""
    pair = isinstance(entry, Sequence) and len(entry) == 2
    return pair and isinstance(entry[0], Tensor) and isinstance(entry[1], Mapping)


def _range_without_prompt(conditioning: Conditioning) -> tuple[float, float] | None:
    """Return a part of the way, 0 to 1, in which no entry of a CONDITIONING acts; None if there is none."""
    reached = 0.0
    for start, end in sorted((o.get("start_percent", 0.0), o.get("end_percent", 1.0)) for _, o in conditioning):
        if start > reached + _ONE_STEP:
            return reached, start
        reached = max(reached, end)
    return (reached, 1.0) if reached < 1 - _ONE_STEP else None


def _takes_pooled(model: ModelPatcher, options: Mapping[str, Any]) -> bool:
    """Say whether the model can make its vector conditioning (SDXL's) of a CONDITIONING's options, if it has one."""
    channels = getattr(model.model, "adm_channels", 0)
    if not channels or "unclip_conditioning" in options:  # which needs no text, and the model's own device
        return True
    noise = torch.zeros(1, model.get_model_object("latent_format").latent_channels, 8, 8)
    values = {"width": 64, "height": 64, "seed": 0, **options, "noise": noise, "device": "cpu"}
    try:
        made = model.model.encode_adm(**values)
    except (KeyError, AttributeError, RuntimeError, IndexError, TypeError):
        return False
    return made is None or made.shape[-1] == channels


def small_clip(model: ModelPatcher, samples: Tensor) -> str | None:
    """Return a warning if a clip has less than a quarter of the area that the model's family was trained at.

    ``samples``: the clip's latent [frames, c, h, w]. None for larger clips and unknown families.
    """
    side, (height, width) = _NATIVE_SIDE.get(family(model), 0), samples.shape[-2:]
    if height * width >= side**2 / 4:
        return None
    shown, native = (f"{PIXELS_PER_LATENT * w} x {PIXELS_PER_LATENT * h}" for w, h in ((width, height), (side, side)))
    return (
        f"the clip is {shown}, and {family(model)} was trained at {native}: it knows little of pictures so small. "
        "Load the clip larger."
    )


def check_single_prompt(conditioning: Conditioning) -> None:
    """Refuse a CONDITIONING of several prompts, for a clip is tuned on exactly one (ValueError)."""
    if len(conditioning) != 1:
        raise Refusal(
            "conditioning",
            f"it holds {len(conditioning)} prompts, and a clip is tuned on exactly one",
            "Connect one CLIP Text Encode node directly, without Conditioning (Combine).",
        )


def left_out_of_tuning(model: ModelPatcher, conditioning: Conditioning) -> list[str]:
    """Name what is on a MODEL or a CONDITIONING and acts when sampling, but not when tuning.

    Tuning is on the clip and its prompt alone. A ControlNet's hints or an attention patch would have to be
    differentiable, and would teach the weights to rely on them.
    """
    options = [options for _, options in conditioning]
    transformer_options = model.model_options.get("transformer_options", {})
    found = {
        "ControlNet": any(each.get("control") is not None for each in options),
        "hooks": any(each.get("hooks") is not None for each in options),
        "GLIGEN": any(each.get("gligen") is not None for each in options),
        "area or mask": any(each.get("area") is not None or each.get("mask") is not None for each in options),
        "patches of attention and blocks": any(
            transformer_options.get(key) for key in ("patches", "patches_replace", "wrappers")
        ),
        "UNet wrapper": model.model_options.get("model_function_wrapper") is not None,
        "other packs' layers in the UNet": bool(getattr(model, "injections", None)),
    }
    return [name for name, present in found.items() if present]


def check_prediction(model: ModelPatcher, samples: Tensor) -> Tensor:
    """Return what a sampler gave. Raises RuntimeError if it is not finite: the model overflowed on the way."""
    if not torch.isfinite(samples).all():
        reason = "model: what it predicted is not finite (NaN or infinity). "
        if _has_sage_attention(model):
            raise RuntimeError(
                reason + "ComfyUI runs with Sage attention, which gives that with some models: start it without "
                "--use-sage-attention, or remove the node that patches Sage attention in."
            )
        raise RuntimeError(
            reason + "Half precision has overflowed, or the motion's strengths are too high: start ComfyUI with "
            "--fp32-unet or --bf16-unet, or lower query_strength and temporal_strength of Inflate UNet."
        )
    return samples


def _has_sage_attention(model: ModelPatcher) -> bool:
    """Say whether the host, a pack that replaces its attention, or an override on the model uses Sage attention."""
    override = model.model_options.get("transformer_options", {}).get("optimized_attention_override")
    used = (comfy.ldm.modules.attention.optimized_attention, override)
    return any(
        "sage" in f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}".lower()
        for function in used
        if function is not None
    )
