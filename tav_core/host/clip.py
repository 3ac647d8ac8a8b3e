"""Embed pictures and sentences with the host's CLIP models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import Refusal

# The image encoder takes this many pictures at a time.
_IMAGES_AT_ONCE = 16


def image_embeddings(clip_vision: Any, images: Tensor) -> Tensor:
    """Return embeddings [n, width], float32, of IMAGEs [n, h, w, 3 or 4] by a CLIP_VISION."""
    parts = [clip_vision.encode_image(part)["image_embeds"] for part in images.split(_IMAGES_AT_ONCE)]
    return torch.cat([part.float().cpu() for part in parts])


def text_embedding(clip: Any, text: str) -> Tensor:
    """Return a sentence's embedding [width], float32, in the space of the images' embeddings of the same CLIP.

    Raises ValueError for a CLIP without a text projection: checkpoints of SD 1.x don't have one.
    """
    _, pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
    models = [module for module in clip.cond_stage_model.children() if hasattr(module, "return_projected_pooled")]
    if pooled is None or not models:
        raise Refusal("clip", "it is not a CLIP text model", "Connect Load CLIP with the text half of the clip_vision.")
    pooled = pooled[0].float().cpu()
    if len(models) == 1 and not models[0].return_projected_pooled:
        projection = models[0].transformer.text_projection.weight.detach().float().cpu()
        # A projection that no file filled is zeros, or whatever lay in memory.
        if not torch.isfinite(projection).all() or projection.abs().max() in (0, 1) or projection.norm() > 1e3:
            raise Refusal(
                "clip",
                "it has no text projection, so its sentences cannot be compared with images",
                "Connect Load CLIP with a file that has it (clip_l.safetensors), not the CLIP of a checkpoint.",
            )
        pooled = projection @ pooled
    return pooled
