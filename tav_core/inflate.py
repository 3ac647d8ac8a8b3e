"""Inflation: make a 2-D LDM UNet see video, for the length of one call.

Nothing is added to the UNet and nothing stays changed. ``swapped`` replaces the ``forward`` of some of its
modules on entry and puts them back on exit. So state-dict keys stay what LoRA files expect, and the host's
model is its own again between calls, whatever happened in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .attention import SpatialMode, by_frame, gather_frames
from .norm import pooled_group_norm
from .temporal import TemporalLayer
from .unet import pooled_norms, transformer_blocks


@dataclass(frozen=True)
class Inflation:
    """The parts that are inflated, and how. The defaults are the paper's; the rest are ablations.

    ``temporal_strength`` scales the residual of the temporal layers (0 = off, 1 = as tuned).
    """

    attention: SpatialMode = "sparse-causal"
    pool_group_norm: bool = True
    temporal_strength: float = 1.0


@dataclass(frozen=True)
class Layout:
    """The order of rows on the batch axis: rows = chunks * frames, frames innermost.

    A chunk is the host's word for one conditioning that shares the batch with others; each is a whole video.
    ``shuffle``: seed of the order of "shuffled groups", another one for each step.
    """

    frames: int
    chunks: int
    shuffle: int = 0


class AttentionControl(Protocol):
    """A guest in the spatial attentions that decides what they attend with."""

    def self_attention(
        self, path: str, q: Tensor, k: Tensor, attend: Callable[[Tensor, Tensor, str], Tensor]
    ) -> Tensor:
        """Return the output for queries and keys [rows, n, c].

        ``attend(q, k, name)`` gathers the frames' keys and attends; other keys than the layer's own need a name of
        their own.
        """


class Backend(Protocol):
    """The operations that inflation needs from the owner of the UNet."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, heads: int, **options: Any) -> Tensor:
        """Multi-head attention, q [rows, n, c], k and v [rows, m, c] -> [rows, n, c]."""

    def affine(self, norm: torch.nn.Module, x: Tensor) -> AbstractContextManager[tuple[Tensor, Tensor | None]]:
        """Lend weight and bias of a normalisation layer, ready to be used with x."""


Forward = Callable[..., Tensor]
Swap = tuple[torch.nn.Module, Forward]

# (path of a spatial attention, "k" or "v", tokens [chunks, frames, tiles, n, c] of the frames at hand) -> the tokens
# [chunks, 1, tiles, n, c] of the video's first frame, where it is not the first of them.
FirstFrame = Callable[[str, str, Tensor], Tensor | None]


def _spatial_attention(
    path: str,
    attn: Any,
    mode: SpatialMode,
    layout: Layout,
    backend: Backend,
    first_frame: FirstFrame | None,
    control: AttentionControl | None = None,
) -> Forward:
    def gather(name: str, tokens: Tensor) -> Tensor:
        first = None
        if first_frame is not None:
            first = first_frame(path, name, by_frame(tokens, layout.frames, layout.chunks))
        return gather_frames(tokens, layout.frames, layout.chunks, mode, first, layout.shuffle)

    def forward(
        x: Tensor, context: Tensor | None = None, value: Tensor | None = None, mask: Any = None, **options: Any
    ) -> Tensor:
        context = x if context is None else context
        value = context if value is None else value
        # Project first, gather after: each frame's keys are computed once, not once per frame that looks.
        # Queries come last: the order decides how gradients are summed up, to the last bit.
        k, v = attn.to_k(context), attn.to_v(value)
        q = attn.to_q(x)

        def attend(q: Tensor, k: Tensor, name: str) -> Tensor:
            gathered = gather(name, k), gather("v", v)
            return backend.attend(q, *gathered, attn.heads, attn_precision=attn.attn_precision, **options)

        return attn.to_out(attend(q, k, "k") if control is None else control.self_attention(path, q, k, attend))

    return forward


def _with_temporal(original: Forward, layer: TemporalLayer, strength: float, layout: Layout) -> Forward:
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        x = original(*args, **kwargs)
        return torch.add(x, layer(x, layout.frames), alpha=strength)

    return forward


def _pooled(norm: torch.nn.GroupNorm, silu: bool, layout: Layout, backend: Backend) -> Forward:
    def forward(x: Tensor) -> Tensor:
        with backend.affine(norm, x) as (weight, bias):
            assert bias is not None
            return pooled_group_norm(x, layout.frames, norm.num_groups, weight, bias, norm.eps, silu)

    return forward


def _identity(x: Tensor) -> Tensor:
    return x


def inflated_forwards(
    unet: torch.nn.Module,
    inflation: Inflation,
    layers: Mapping[str, TemporalLayer],
    layout: Layout,
    backend: Backend,
    first_frame: FirstFrame | None = None,
    control: AttentionControl | None = None,
) -> list[Swap]:
    """Return which modules of ``unet`` get which forward.

    ``layers``: temporal layers by block path. ``first_frame``: for frames that are a window of a longer video.
    ``control``: edit control of the spatial attentions.
    """
    swaps: list[Swap] = []
    for path, block in transformer_blocks(unet).items():
        # Some upscalers have cross-attention in attn1's place; there are no frames to look at in a text.
        if (inflation.attention != "per frame" or control is not None) and not block.disable_self_attn:
            forward = _spatial_attention(path, block.attn1, inflation.attention, layout, backend, first_frame, control)
            swaps.append((block.attn1, forward))
        if path in layers and inflation.temporal_strength != 0:
            forward = _with_temporal(block.forward, layers[path], inflation.temporal_strength, layout)
            swaps.append((block, forward))
    if inflation.pool_group_norm:
        for norm, activation in pooled_norms(unet).items():
            swaps.append((norm, _pooled(norm, activation is not None, layout, backend)))
            if activation is not None:
                swaps.append((activation, _identity))
    return swaps


@contextmanager
def swapped(swaps: list[Swap]) -> Iterator[None]:
    """Give modules other forwards; on exit each has again exactly what it had, another pack's swap included.

    A later entry for the same module wins.
    """
    missing = object()
    before = [(module, module.__dict__.get("forward", missing)) for module, _ in swaps]
    try:
        for module, forward in swaps:
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, forward in reversed(before):
            if forward is missing:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward
