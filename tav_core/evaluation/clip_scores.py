"""The paper's two metrics (section 5), computed from CLIP embeddings: frame consistency and textual faithfulness.

Image embeddings are [frames, width], a text's embedding has ``width`` elements.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def frame_consistency(images: Tensor) -> float:
    """Return the mean cosine similarity over all pairs of frames, -1..1; 1 for a single frame."""
    frames = len(images)
    if frames < 2:
        return 1.0
    unit = F.normalize(images.double(), dim=-1)
    # Both halves of the matrix without its diagonal.
    return float(((unit @ unit.T).sum() - frames) / (frames * (frames - 1)))


def similarity_to_previous(images: Tensor) -> Tensor:
    """Return each frame's cosine similarity to the frame before it, [frames - 1]."""
    return F.cosine_similarity(images[1:].double(), images[:-1].double(), dim=-1)


def clip_scores(images: Tensor, text: Tensor) -> Tensor:
    """Return each frame's CLIP score, [frames]: its cosine similarity with the text, times 100."""
    return 100 * F.cosine_similarity(images.double(), text.double().reshape(1, -1), dim=-1)


def textual_faithfulness(images: Tensor, text: Tensor) -> float:
    """Return the mean CLIP score over frames, -100..100."""
    return float(clip_scores(images, text).mean())
