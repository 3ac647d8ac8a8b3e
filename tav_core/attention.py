"""Attention over video: which frames a frame looks at, as pure functions on tensors.

Layout everywhere: ``rows = videos * frames`` on the batch axis, videos outermost, frames innermost.
A pack that tiles attention (HyperTile) adds a third, innermost factor; see ``gather_frames``.
"""

from __future__ import annotations

import sys
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

SpatialMode = Literal["sparse-causal", "first frame only", "full", "per frame"]
SPATIAL_MODES: tuple[SpatialMode, ...] = get_args(SpatialMode)

# CUDA's fused attention kernels put batch * heads on a grid axis of 65535 blocks.
_MAX_FUSED_ROWS = 65535


def gather_frames(tokens: Tensor, frames: int, videos: int, mode: SpatialMode, first: Tensor | None = None) -> Tensor:
    """Lay the keys (or values) of the frames that each frame attends to side by side.

    "sparse-causal" is the paper's ST-Attn (section 4.1): the first and the previous frame, where the previous
    frame of frame 0 is frame 0 itself; so frame i >= 1 never sees its own keys. The other modes are ablations.

    ``tokens``: [videos * frames * tiles, n, c]; returns [videos * frames * tiles, n * k, c] with
    k = 2 for sparse-causal, 1 for first and per frame, ``frames`` for full attention. ``first``: those of the
    video's first frame [videos, 1, tiles, n, c], where the frames given are a window that does not hold it.
    """
    if mode == "per frame":
        return tokens
    x = by_frame(tokens, frames, videos)
    first = x[:, :1] if first is None else first
    if mode == "sparse-causal":
        previous = torch.cat([x[:, :1], x[:, :-1]], dim=1)
        x = torch.cat([first.expand_as(previous), previous], dim=3)
    elif mode == "first frame only":
        x = first.expand(-1, frames, -1, -1, -1)
    else:
        every = x.permute(0, 2, 1, 3, 4).flatten(2, 3)[:, None]
        x = every.expand(-1, frames, -1, -1, -1)
    return x.reshape(len(tokens), -1, tokens.shape[-1])


def by_frame(tokens: Tensor, frames: int, videos: int) -> Tensor:
    """[videos * frames * tiles, n, c] -> [videos, frames, tiles, n, c] (a view). Raises ValueError if it can't be."""
    rows, n, c = tokens.shape
    if rows % (videos * frames):
        raise ValueError(f"{rows} attention rows are not a multiple of {videos} videos x {frames} frames")
    return tokens.view(videos, frames, rows // (videos * frames), n, c)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[rows, n, heads * d] -> [rows, heads, n, d] (a view)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Multi-head attention by PyTorch's fused kernels. q [rows, n, c], k and v [rows, m, c] -> [rows, n, c]."""
    out = _fused(split_heads(q, heads), split_heads(k, heads), split_heads(v, heads))
    return out.transpose(1, 2).flatten(2)


def _fused_rows(device: torch.device) -> int:
    """The most batch * heads that one call of fused attention takes."""
    return _MAX_FUSED_ROWS if device.type == "cuda" else sys.maxsize


def _fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad:
        # The backward pass takes up to eight times as long in bfloat16 as in float32 on the CPU.
        return F.scaled_dot_product_attention(_float(q), _float(k), _float(v)).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v)


def _float(x: Tensor) -> Tensor:
    """In float32; a text that all frames share, a view of one, is not written out for each of them."""
    return x[:1].float().expand_as(x) if x.stride(0) == 0 else x.float()


def temporal_attend(q: Tensor, k: Tensor, v: Tensor, heads: int, frames: int) -> Tensor:
    """Full, unmasked attention over the frames of each pixel, without positional encoding.

    q, k, v: [videos * frames, n, c] -> [videos * frames, n, c]. Released code: ``attn_temp``.
    """
    rows, n, c = q.shape
    videos = rows // frames

    def per_pixel(x: Tensor) -> Tensor:
        x = x.view(videos, frames, n, heads, c // heads).permute(0, 2, 3, 1, 4)
        return x.reshape(videos * n, heads, frames, c // heads)

    q, k, v = per_pixel(q), per_pixel(k), per_pixel(v)
    step = _fused_rows(q.device) // heads
    if len(q) > step:
        parts = zip(q.split(step), k.split(step), v.split(step), strict=True)
        out = torch.cat([_fused(*part) for part in parts])
    else:
        out = _fused(q, k, v)
    return out.view(videos, n, heads, frames, c // heads).permute(0, 3, 1, 2, 4).reshape(rows, n, c)
