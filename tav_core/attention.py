"""Attention over video: which frames a frame looks at, as pure functions on tensors.

Layout everywhere: ``rows = chunks * frames`` on the batch axis, frames innermost; a chunk is one whole video.
A pack that tiles attention (HyperTile) adds a third, innermost factor; see ``gather_frames``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend

SpatialMode = Literal[
    "sparse-causal", "first frame only", "full", "per frame", "self, first and previous", "shuffled groups"
]
SPATIAL_MODES: tuple[SpatialMode, ...] = get_args(SpatialMode)

# Frames of a shuffled group.
GROUP = 4

# CUDA's fused attention kernels put the batch on one grid axis of 65535 blocks, and the heads on another.
_MAX_FUSED_ROWS = 65535
# Taking frames 0 and 1 apart costs more than it saves in frames of fewer tokens.
_TOKENS_APART = 1024
# Scores that attention without a fused kernel holds at a time; it has up to three tensors of this size.
SLICE_BYTES = 64 * 2**20


def gather_frames(
    tokens: Tensor, frames: int, chunks: int, mode: SpatialMode, first: Tensor | None = None, shuffle: int = 0
) -> Tensor:
    """Lay the keys (or values) of the frames that each frame attends to side by side.

    "sparse-causal" is the paper's ST-Attn (section 4.1): the first and the previous frame, where the previous
    frame of frame 0 is frame 0 itself; so frame i >= 1 never sees its own keys. "self, first and previous" adds them.
    "shuffled groups" (RAVE, arXiv 2312.04524) lets the frames of a group see each other. The other modes are ablations.

    ``tokens``: [chunks * frames * tiles, n, c]; returns [chunks * frames * tiles, n * k, c] with k = 2 for
    sparse-causal, 3 with the frame itself, 1 for first and per frame, ``frames`` for full attention, at most ``GROUP``
    for groups. ``first``: the tokens [chunks, 1, tiles, n, c] of the video's first frame, for frames that are a window
    without it. ``shuffle``: see ``shuffled_groups``.
    """
    if mode == "per frame":
        return tokens
    x = by_frame(tokens, frames, chunks)
    if mode == "shuffled groups":
        x = x[:, shuffled_groups(frames, shuffle)]
        return rearrange(x, "chunks frames k tiles n c -> (chunks frames tiles) (k n) c")
    if mode == "self, first and previous":
        others = gather_frames(tokens, frames, chunks, "sparse-causal", first)
        return torch.cat([tokens, others], dim=1)
    first = x[:, :1] if first is None else first
    if mode == "sparse-causal":
        x = _FirstAndPrevious.apply(x, first)
    elif mode == "first frame only":
        x = first.expand(-1, frames, -1, -1, -1)
    else:
        x = rearrange(x, "chunks frames tiles n c -> chunks 1 tiles (frames n) c").expand(-1, frames, -1, -1, -1)
    return rearrange(x, "chunks frames tiles n c -> (chunks frames tiles) n c")


def sparse_causal_attend(
    q: Tensor, k: Tensor, v: Tensor, frames: int, chunks: int, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """Return ``attend(q, gathered k, gathered v)`` for "sparse-causal", and see no frame twice where that is faster.

    The first and the previous frame of frames 0 and 1 are both frame 0. Attending to a frame twice gives what attending
    to it once gives, but for rounding; so it is done without gradients alone, where no run has to be repeated bit by
    bit. q, k, v [chunks * frames * tiles, n, c].
    """
    if torch.is_grad_enabled() or frames <= 2 or k.shape[1] < _TOKENS_APART:
        k, v = (gather_frames(t, frames, chunks, "sparse-causal") for t in (k, v))
        return attend(q, k, v)
    q, k, v = (by_frame(t, frames, chunks) for t in (q, k, v))
    both = (t[:, :1].expand(-1, 2, -1, -1, -1) for t in (k, v))
    others = (torch.cat([t[:, :1].expand(-1, frames - 2, -1, -1, -1), t[:, 1:-1]], dim=3) for t in (k, v))
    parts = (q[:, :2], *both), (q[:, 2:], *others)
    out = [attend(*(t.flatten(0, 2) for t in part)).unflatten(0, (chunks, -1)) for part in parts]
    return torch.cat(out, dim=1).flatten(0, 1)


class _FirstAndPrevious(torch.autograd.Function):
    """Lay the first and the previous frame of tokens [chunks, frames, tiles, n, c] side by side, written once.

    Two concatenations would write them twice, and so would their backward passes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: Tensor) -> Tensor:
        n = x.shape[3]
        out = x.new_empty(*x.shape[:3], 2 * n, x.shape[4])
        out[:, :, :, :n] = first
        out[:, :1, :, n:] = x[:, :1]
        out[:, 1:, :, n:] = x[:, :-1]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        to_first, to_previous = grad.chunk(2, dim=3)
        dx = torch.zeros(to_previous.shape, dtype=grad.dtype, device=grad.device)
        dx[:, :-1] = to_previous[:, 1:]
        dx[:, 0] += to_previous[:, 0]
        return dx, to_first.sum(1, keepdim=True)


def shuffled_groups(frames: int, seed: int) -> Tensor:
    """Return which frames each frame sees in groups of a random order, [frames, GROUP], or all of fewer frames.

    Where the groups do not come out even, the last one is filled up with frames of the first.
    """
    order = torch.randperm(frames, generator=torch.Generator().manual_seed(seed))
    size = min(GROUP, frames)
    members = order[(torch.arange(frames) // size * size)[:, None] + torch.arange(size) - frames]
    return members[order.argsort()]


def by_frame(tokens: Tensor, frames: int, chunks: int) -> Tensor:
    """View [chunks * frames * tiles, n, c] as [chunks, frames, tiles, n, c]. Raises ValueError if it can't be."""
    if len(tokens) % (chunks * frames):
        raise ValueError(f"{len(tokens)} attention rows are not a multiple of {chunks} videos x {frames} frames")
    return rearrange(tokens, "(chunks frames tiles) n c -> chunks frames tiles n c", chunks=chunks, frames=frames)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Multi-head attention by PyTorch's fused kernels. q [rows, n, c], k and v [rows, m, c] -> [rows, n, c]."""
    q, k, v = (rearrange(x, "rows n (heads d) -> rows heads n d", heads=heads) for x in (q, k, v))
    return rearrange(_fused(q, k, v), "rows heads n d -> rows n (heads d)")


def _fused_rows(device: torch.device) -> int:
    """Return the largest batch that one call of fused attention takes."""
    return _MAX_FUSED_ROWS if device.type == "cuda" else sys.maxsize


def is_fused(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Say whether PyTorch has a kernel for q, k, v [rows, heads, n, d] that keeps no scores."""
    try:
        return bool(torch._fused_sdp_choice(q, k, v) != SDPBackend.MATH.value)
    except (NotImplementedError, RuntimeError):  # PyTorch has no choice function for some devices (DirectML)
        return False


class _SlicedAttention(torch.autograd.Function):
    """Attention on [rows, heads, n, d] a slice at a time; keeps q, k and v alone for the backward pass."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device)
        for rows, queries in _slices(q, k):
            out[rows, :, queries] = _weights(q[rows, :, queries], k[rows]) @ v[rows]
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        q, k, v = ctx.saved_tensors
        (grad,) = gradients
        needs_k, needs_v = ctx.needs_input_grad[1:]
        grad_q = torch.zeros_like(q, memory_format=torch.contiguous_format)
        grad_k = torch.zeros(k.shape, dtype=k.dtype, device=k.device) if needs_k else None
        grad_v = torch.zeros(v.shape, dtype=v.dtype, device=v.device) if needs_v else None
        scale = q.shape[-1] ** -0.5
        for rows, queries in _slices(q, k):
            weights, upper = _weights(q[rows, :, queries], k[rows]), grad[rows, :, queries]
            if grad_v is not None:
                grad_v[rows] += weights.mT @ upper
            scores = torch._softmax_backward_data(upper @ v[rows].mT, weights, -1, weights.dtype)
            grad_q[rows, :, queries] = scores @ k[rows] * scale
            if grad_k is not None:
                grad_k[rows] += scores.mT @ q[rows, :, queries] * scale
        return grad_q, grad_k, grad_v


def _weights(q: Tensor, k: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(d)); q is scaled first, since scores can exceed what half precision holds."""
    return torch.softmax(q * q.shape[-1] ** -0.5 @ k.mT, -1)


def _slices(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield slices of rows and of queries whose scores take at most SLICE_BYTES, or one query's."""
    rows, heads, n, _ = q.shape
    queries = min(n, max(1, SLICE_BYTES // (heads * k.shape[2] * q.element_size())))
    step = max(1, SLICE_BYTES // (heads * n * k.shape[2] * q.element_size()))
    for row in range(0, rows, step):
        for query in range(0, n, queries):
            yield slice(row, row + step), slice(query, query + queries)


def _fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # torch.compile cannot trace is_fused. Compiled code leaves the choice of kernel to PyTorch.
    if not torch.compiler.is_compiling() and not is_fused(q, k, v):
        return _SlicedAttention.apply(q, k, v)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad:
        # The backward pass takes up to eight times as long in bfloat16 as in float32 on the CPU.
        return F.scaled_dot_product_attention(_float(q), _float(k), _float(v)).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v)


def _float(x: Tensor) -> Tensor:
    """Convert to float32; a text that all frames share (an expanded view) is converted once."""
    return x[:1].float().expand_as(x) if x.stride(0) == 0 else x.float()


def temporal_attend(q: Tensor, k: Tensor, v: Tensor, heads: int, frames: int) -> Tensor:
    """Full, unmasked attention over the frames of each pixel, without positional encoding.

    q, k, v: [chunks * frames, n, c] -> [chunks * frames, n, c]. Released code: ``attn_temp``. The kernels read each
    video where it lies; rows of all videos together would first have to be copied into their order.
    """
    # torch.compile cannot break a graph inside a zip, so this is a list.
    videos = list(zip(q.split(frames), k.split(frames), v.split(frames), strict=True))
    out = [_attend_over_frames(*video, heads) for video in videos]
    return out[0] if len(out) == 1 else torch.cat(out)


def _attend_over_frames(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attend over the frames of one video; q, k, v [frames, n, c]."""
    q, k, v = (rearrange(x, "frames n (heads d) -> n heads frames d", heads=heads) for x in (q, k, v))
    step = _fused_rows(q.device)
    if len(q) > step:
        parts = list(zip(q.split(step), k.split(step), v.split(step), strict=True))
        out = torch.cat([_fused(*part) for part in parts])
    else:
        out = _fused(q, k, v)
    return rearrange(out, "n heads frames d -> frames n (heads d)")
