"""Inflation: make a 2-D LDM UNet see video, for the length of one call.

Nothing is added to the UNet and nothing stays changed. ``swapped`` replaces the ``forward`` of some of its
modules on entry and puts them back on exit. So state-dict keys stay what LoRA files expect, and the host's
model is its own again between calls, whatever happened in them.

The forwards themselves are made once. What differs from call to call they read in an ``Evaluation``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .attention import SpatialMode, by_frame, gather_frames, sparse_causal_attend
from .norm import pooled_group_norm
from .temporal import TemporalLayer
from .unet import Parts


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


@dataclass
class Evaluation:
    """The running evaluation of the UNet, as far as the forwards need to know it; they read it as they run.

    ``first_frame``: for frames that are a window of a longer video. ``control``: edit control of spatial attentions.
    """

    layout: Layout
    first_frame: FirstFrame | None = None
    control: AttentionControl | None = None

    @contextmanager
    def of(self, other: Evaluation) -> Iterator[None]:
        """Be another evaluation while the context lasts."""
        before = replace(self)
        self._become(other)
        try:
            yield
        finally:
            self._become(before)

    def _become(self, other: Evaluation) -> None:
        self.layout, self.first_frame, self.control = other.layout, other.first_frame, other.control


def _spatial_attention(path: str, attn: Any, mode: SpatialMode, evaluation: Evaluation, backend: Backend) -> Forward:
    def gather(name: str, tokens: Tensor) -> Tensor:
        layout, first = evaluation.layout, None
        if evaluation.first_frame is not None:
            first = evaluation.first_frame(path, name, by_frame(tokens, layout.frames, layout.chunks))
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

        def attend_to(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return backend.attend(q, k, v, attn.heads, attn_precision=attn.attn_precision, **options)

        def attend(q: Tensor, k: Tensor, name: str) -> Tensor:
            if mode == "sparse-causal" and evaluation.first_frame is None:
                return sparse_causal_attend(q, k, v, evaluation.layout.frames, evaluation.layout.chunks, attend_to)
            return attend_to(q, gather(name, k), gather("v", v))

        control = evaluation.control
        return attn.to_out(attend(q, k, "k") if control is None else control.self_attention(path, q, k, attend))

    return forward


def _with_temporal(block: Any, layer: TemporalLayer, strength: float, evaluation: Evaluation) -> Forward:
    own = own_forward(block)

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        x = type(block).forward(block, *args, **kwargs) if own is None else own(*args, **kwargs)
        return torch.add(x, layer(x, evaluation.layout.frames), alpha=strength)

    return forward


def own_forward(module: torch.nn.Module) -> Forward | None:
    """Return the forward that a pack has given to this one module; None where it has its class's."""
    return module.__dict__.get("forward")


def _pooled(norm: torch.nn.GroupNorm, silu: bool, evaluation: Evaluation, backend: Backend) -> Forward:
    def forward(x: Tensor) -> Tensor:
        with backend.affine(norm, x) as (weight, bias):
            assert bias is not None
            return pooled_group_norm(x, evaluation.layout.frames, norm.num_groups, weight, bias, norm.eps, silu)

    return forward


def _identity(x: Tensor) -> Tensor:
    return x


def inflated_forwards(
    parts: Parts,
    inflation: Inflation,
    layers: Mapping[str, TemporalLayer],
    evaluation: Evaluation,
    backend: Backend,
    controlled: bool = False,
) -> list[Swap]:
    """Return which modules of a UNet get which forward.

    ``layers``: temporal layers by block path. ``evaluation``: what the forwards will read as they run. ``controlled``:
    its ``control`` may be set. The forwards hold those that blocks have now (``own_forward``).
    """
    swaps: list[Swap] = []
    for path, block in parts.blocks.items():
        # Some upscalers have cross-attention in attn1's place; there are no frames to look at in a text.
        if (inflation.attention != "per frame" or controlled) and not block.disable_self_attn:
            forward = _spatial_attention(path, block.attn1, inflation.attention, evaluation, backend)
            swaps.append((block.attn1, forward))
        if path in layers and inflation.temporal_strength != 0:
            swaps.append((block, _with_temporal(block, layers[path], inflation.temporal_strength, evaluation)))
    if inflation.pool_group_norm:
        for norm, activation in parts.norms.items():
            swaps.append((norm, _pooled(norm, activation is not None, evaluation, backend)))
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
