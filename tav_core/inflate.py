"""Inflation: a 2-D LDM UNet made to see video, for the length of one call.

Nothing is added to the UNet and nothing stays changed: ``inflated`` swaps the ``forward`` of some of its
modules on entry and puts them back on exit. So state-dict keys stay what LoRA files expect, and the host's
model is its own again between calls, whatever happened in them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .attention import SpatialMode, by_frame, gather_frames, temporal_attend
from .norm import pooled_group_norm


@dataclass(frozen=True)
class Inflation:
    """What is inflated and how. The defaults are the paper's; the rest are ablations.

    ``temporal_strength`` scales what the temporal layers add to the image layers (0 = off, 1 = as tuned).
    """

    attention: SpatialMode = "sparse-causal"
    pool_group_norm: bool = True
    temporal_strength: float = 1.0


@dataclass(frozen=True)
class Layout:
    """How rows of the batch axis belong together: rows = videos * frames, frames innermost."""

    frames: int
    videos: int


class Backend(Protocol):
    """What inflation needs of whoever owns the UNet."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, heads: int, **options: Any) -> Tensor:
        """Multi-head attention, q [rows, n, c], k and v [rows, m, c] -> [rows, n, c]."""

    def affine(self, norm: torch.nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias of a normalisation layer, ready to be used with x."""


class _TemporalAttention(torch.nn.Module):
    def __init__(self, channels: int, inner: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.to_q = operations.Linear(channels, inner, bias=False, **factory)
        self.to_k = operations.Linear(channels, inner, bias=False, **factory)
        self.to_v = operations.Linear(channels, inner, bias=False, **factory)
        self.to_out = torch.nn.Sequential(operations.Linear(inner, channels, **factory))


class TemporalLayer(torch.nn.Module):
    """LayerNorm and self-attention over frames, added after the feed-forward of a transformer block.

    ``operations`` supplies Linear and LayerNorm (``torch.nn``, or the host's casting layers).
    """

    def __init__(self, channels: int, inner: int, heads: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.heads = heads
        self.norm_temp = operations.LayerNorm(channels, **factory)
        self.attn_temp = _TemporalAttention(channels, inner, operations, **factory)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """The residual for x [videos * frames, n, c]; to be added to it."""
        n = self.norm_temp(x)
        attn = self.attn_temp
        out = temporal_attend(attn.to_q(n), attn.to_k(n), attn.to_v(n), self.heads, frames)
        return attn.to_out(out)


def transformer_blocks(unet: torch.nn.Module) -> dict[str, Any]:
    """The UNet's transformer blocks by LDM path; empty for anything that is not such a UNet."""
    return {
        path: module
        for path, module in unet.named_modules()
        if ".transformer_blocks." in path and hasattr(module, "attn1") and hasattr(module, "attn2")
    }


def pooled_norms(unet: torch.nn.Module) -> dict[torch.nn.GroupNorm, torch.nn.Module | None]:
    """The GroupNorms of residual blocks and of the output head; not those of the spatial transformers.

    With each the activation right behind it, None where something comes between the two (a block that
    modulates the norm's output by the timestep).
    """
    found: dict[torch.nn.GroupNorm, torch.nn.Module | None] = {}
    for path, module in unet.named_modules():
        for name in ("in_layers", "out_layers", "out"):
            layers = getattr(module, name, None)
            if (name == "out") != (path == "") or not isinstance(layers, torch.nn.Sequential):
                continue
            norm, activation = layers[0], layers[1]
            if not isinstance(norm, torch.nn.GroupNorm):
                continue
            modulated = name == "out_layers" and module.use_scale_shift_norm
            found[norm] = activation if isinstance(activation, torch.nn.SiLU) and not modulated else None
    return found


def query_shapes(unet: torch.nn.Module) -> dict[str, torch.Size]:
    """Shape of every query projection's weight by its path: the places a motion's deltas go to."""
    return {
        f"{path}.{name}.to_q.weight": torch.Size((attn.heads * attn.dim_head, _query_dim(attn)))
        for path, block in transformer_blocks(unet).items()
        for name, attn in (("attn1", block.attn1), ("attn2", block.attn2))
    }


def _query_dim(attn: Any) -> int:
    return int(attn.to_q.in_features)


def initial_temporal(unet: torch.nn.Module, scope: Callable[[str], bool], seed: int) -> dict[str, Tensor]:
    """Fresh temporal weights, float32, for the blocks whose path ``scope`` accepts; see ``draw_temporal``."""
    return draw_temporal(
        {
            path: (block.attn1.heads * block.attn1.dim_head, _query_dim(block.attn1))
            for path, block in transformer_blocks(unet).items()
            if scope(path)
        },
        seed,
    )


def draw_temporal(blocks: Mapping[str, tuple[int, int]], seed: int) -> dict[str, Tensor]:
    """Fresh temporal weights, float32, for blocks of (inner width, channels); a block's depend on its path alone.

    Projections are drawn as torch.nn.Linear draws them; ``to_out`` starts at zero, weight and bias, so that
    a freshly inflated model is the inflated plain model. (The released code leaves a random bias there.)
    """
    tensors: dict[str, Tensor] = {}
    for path, (inner, channels) in blocks.items():
        digest = hashlib.sha256(f"{seed} {path}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        for name in ("to_q", "to_k", "to_v"):
            bound = 1 / math.sqrt(channels)
            drawn = torch.rand((inner, channels), generator=generator) * (2 * bound) - bound
            tensors[f"{path}.attn_temp.{name}.weight"] = drawn
        tensors[f"{path}.attn_temp.to_out.0.weight"] = torch.zeros(channels, inner)
        tensors[f"{path}.attn_temp.to_out.0.bias"] = torch.zeros(channels)
        tensors[f"{path}.norm_temp.weight"] = torch.ones(channels)
        tensors[f"{path}.norm_temp.bias"] = torch.zeros(channels)
    return tensors


def build_temporal(
    unet: torch.nn.Module, tensors: Mapping[str, Tensor], operations: Any, dtype: torch.dtype
) -> torch.nn.Module:
    """A module that holds temporal layers under the same paths as the UNet's transformer blocks.

    ``tensors``: as ``Motion.temporal()``; blocks without weights there get no temporal layer.
    """
    root = torch.nn.Module()
    for path, block in transformer_blocks(unet).items():
        prefix = f"{path}."
        weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if not weights:
            continue
        inner, channels = weights["attn_temp.to_q.weight"].shape
        layer = TemporalLayer(channels, inner, block.attn1.heads, operations, device="cpu")
        layer.load_state_dict(weights)
        # Not when it is made: casting layers of some hosts keep the dtype of what was loaded.
        _add_at(root, path, layer.to(dtype).requires_grad_(False))
    return root


def _add_at(root: torch.nn.Module, path: str, module: torch.nn.Module) -> None:
    *parents, name = path.split(".")
    for part in parents:
        if part not in root._modules:
            root.add_module(part, torch.nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    root.add_module(name, module)


def temporal_layers(root: torch.nn.Module) -> dict[str, TemporalLayer]:
    """The layers that ``build_temporal`` put into ``root``, by block path."""
    return {path: module for path, module in root.named_modules() if isinstance(module, TemporalLayer)}


Forward = Callable[..., Tensor]

# Of a spatial attention's path, "k" or "v", and those tokens [videos, frames, tiles, n, c] of the frames at hand: those
# of the video's first frame [videos, 1, tiles, n, c], where it is not the first of them.
FirstFrame = Callable[[str, str, Tensor], Tensor | None]


def _spatial_attention(
    path: str, attn: Any, mode: SpatialMode, layout: Layout, backend: Backend, first_frame: FirstFrame | None
) -> Forward:
    def gather(name: str, tokens: Tensor) -> Tensor:
        first = None
        if first_frame is not None:
            first = first_frame(path, name, by_frame(tokens, layout.frames, layout.videos))
        return gather_frames(tokens, layout.frames, layout.videos, mode, first)

    def forward(
        x: Tensor, context: Tensor | None = None, value: Tensor | None = None, mask: Any = None, **options: Any
    ) -> Tensor:
        context = x if context is None else context
        value = context if value is None else value
        # Project first, gather after: each frame's keys are computed once, not once per frame that looks.
        k, v = gather("k", attn.to_k(context)), gather("v", attn.to_v(value))
        out = backend.attend(attn.to_q(x), k, v, attn.heads, attn_precision=attn.attn_precision, **options)
        return attn.to_out(out)

    return forward


def _with_temporal(original: Forward, layer: TemporalLayer, strength: float, layout: Layout) -> Forward:
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        x = original(*args, **kwargs)
        return torch.add(x, layer(x, layout.frames), alpha=strength)

    return forward


def _pooled(norm: torch.nn.GroupNorm, silu: bool, layout: Layout, backend: Backend) -> Forward:
    def forward(x: Tensor) -> Tensor:
        weight, bias = backend.affine(norm, x)
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
) -> list[tuple[torch.nn.Module, Forward]]:
    """Which modules of ``unet`` get which forward. ``layers``: temporal layers by block path.

    ``first_frame``: where the frames are a window of a longer video.
    """
    swaps: list[tuple[torch.nn.Module, Forward]] = []
    for path, block in transformer_blocks(unet).items():
        # Some upscalers have cross-attention in attn1's place; there are no frames to look at in a text.
        if inflation.attention != "per frame" and not block.disable_self_attn:
            forward = _spatial_attention(path, block.attn1, inflation.attention, layout, backend, first_frame)
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
def swapped(swaps: list[tuple[torch.nn.Module, Forward]]) -> Iterator[None]:
    """Give modules other forwards; on exit each has again exactly what it had, another pack's swap included."""
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
