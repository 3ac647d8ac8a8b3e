"""Masks that limit an edit: given by the user, or found in the cross-attention of the changed words."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import Refusal

# Tokens of the layers whose cross-attention says best where a word is: 16 x 16 (prompt-to-prompt).
_TOKENS = 256
# No attention map with more tokens than this is written.
_MOST_TOKENS = 1024


def grid(tokens: int, height: int, width: int) -> tuple[int, int, int] | None:
    """Return height, width and halvings of a layer of so many tokens in a UNet for latents [height, width]."""
    for halvings in range(8):
        if height * width == tokens:
            return height, width, halvings
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    return None


def resized_mask(mask: Tensor, frames: int, height: int, width: int) -> Tensor:
    """Return a MASK [1 or frames, h, w] or [1 or frames, 1, h, w] as [frames, 1, height, width] for the latent.

    A cell that the mask touches belongs to it. Raises Refusal for another number of frames, or NaN.
    """
    mask = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    if not torch.isfinite(mask).all():
        raise Refusal("mask", "it holds values that are not finite (NaN or infinity)", "Draw it again.")
    if len(mask) not in (1, frames):
        raise Refusal("mask", f"it has {len(mask)} frames, the clip has {frames}", "Give one for all or one each.")
    larger = mask.shape[-2] >= height and mask.shape[-1] >= width
    mask = F.adaptive_max_pool2d(mask, (height, width)) if larger else F.interpolate(mask, (height, width))
    return mask.clamp(0, 1).expand(frames, -1, -1, -1)


def frame_masks(mask: Tensor | None, latent: Tensor) -> Tensor:
    """Return a MASK [frames, h, w] on the CPU for a latent [frames, c, h, w]; all 1 where there is none."""
    frames, _, height, width = latent.shape
    mask = latent.new_ones(1, height, width) if mask is None else mask
    return resized_mask(mask, frames, height, width)[:, 0].cpu().contiguous()


def word_attention(q: Tensor, k: Tensor, heads: int, words: Tensor) -> Tensor:
    """Return how much each query attends to some tokens, mean over heads, [rows, n].

    q [rows, n, c], k [rows, m, c]. ``words``: [m], 1 for the tokens that count. Prompt-to-prompt's maps, summed.
    """
    q, k = (x.unflatten(-1, (heads, -1)).transpose(1, 2).float() for x in (q, k))
    return (torch.softmax(q * q.shape[-1] ** -0.5 @ k.mT, -1) @ words.to(q)).mean(1)


class WordMaps:
    """Cross-attention to the words that change, summed over steps and layers for each frame of a clip."""

    def __init__(self, frames: int, height: int, width: int) -> None:
        self._frames, self._size = frames, (height, width)
        self._sums: dict[bool, Tensor] = {}
        self._layer_tokens: int | None = None

    def looks_at(self, tokens: int, height: int, width: int) -> bool:
        """Say whether a layer's map is read: those that come nearest to 16 x 16 of an uncropped latent."""
        return (height, width) == self._size and tokens == self._layer_tokens

    def choose(self, tokens: Sequence[int]) -> None:
        """Choose the layers to read from the token counts that the UNet's cross-attentions have."""
        self._layer_tokens = min(tokens, key=lambda n: abs(math.log(n / _TOKENS)))

    @property
    def chosen(self) -> bool:
        """Say whether ``choose`` was called."""
        return self._layer_tokens is not None

    def pooled(self, q: Tensor) -> Tensor:
        """Return queries [rows, n, c] of at most 32 x 32 tokens: of more, the mean of each square of four."""
        while q.shape[1] > _MOST_TOKENS:
            height, width, _ = grid(q.shape[1], *self._size) or (1, q.shape[1], 0)
            q = F.avg_pool2d(q.mT.unflatten(-1, (height, width)), 2, ceil_mode=True).flatten(2).mT
        return q

    def add(self, source: bool, frames: Sequence[int], attention: Tensor) -> None:
        """Add attention [frames, n] of the clip (``source``) or of the edit."""
        found = grid(attention.shape[1], *self._size)
        if found is None:
            return
        maps = attention.unflatten(1, found[:2])
        sums = self._sums.setdefault(source, torch.zeros(self._frames, *maps.shape[1:], device=maps.device))
        sums.index_add_(0, torch.as_tensor(frames, device=sums.device), maps.to(sums))

    def mask(self, threshold: float) -> Tensor | None:
        """Return the mask so far, [frames, 1, height, width], 0 or 1; None before any map was read.

        3 x 3 maximum, resized, smoothed over three frames, divided by the frame's maximum, above ``threshold``; the
        union of the clip's words and the edit's.
        """
        masks = [self._mask(sums, threshold) for sums in self._sums.values() if sums.amax() > 0]
        return torch.stack(masks).amax(0) if masks else None

    def _mask(self, sums: Tensor, threshold: float) -> Tensor:
        maps = F.max_pool2d(sums[:, None], 3, stride=1, padding=1)
        maps = F.interpolate(maps, self._size, mode="bilinear")
        maps = maps / maps.amax((1, 2, 3), keepdim=True).clamp_min(1e-12)
        before, after = torch.cat([maps[:1], maps[:-1]]), torch.cat([maps[1:], maps[-1:]])
        maps = (before + 4 * maps + after) / 6
        return (maps > threshold * maps.amax((1, 2, 3), keepdim=True)).float()
