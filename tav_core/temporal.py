"""Temporal layers: self-attention over frames behind every transformer block (paper, section 4.1)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .attention import temporal_attend
from .unet import transformer_blocks


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
        """Return the residual to add to x [chunks * frames, n, c]."""
        n = self.norm_temp(x)
        attn = self.attn_temp
        out = temporal_attend(attn.to_q(n), attn.to_k(n), attn.to_v(n), self.heads, frames)
        return attn.to_out(out)


def initial_temporal(unet: torch.nn.Module, scope: Callable[[str], bool], seed: int) -> dict[str, Tensor]:
    """Draw fresh temporal weights, float32, for the blocks whose path ``scope`` accepts; see ``draw_temporal``."""
    return draw_temporal(
        {
            path: (block.attn1.heads * block.attn1.dim_head, block.attn1.to_q.in_features)
            for path, block in transformer_blocks(unet).items()
            if scope(path)
        },
        seed,
    )


def draw_temporal(blocks: Mapping[str, tuple[int, int]], seed: int) -> dict[str, Tensor]:
    """Draw fresh temporal weights, float32, for blocks of (inner width, channels).

    A block's weights depend on the seed and its path alone. Projections are drawn as torch.nn.Linear draws them.
    ``to_out`` starts at zero, weight and bias, so that a freshly inflated model equals the inflated plain model.
    (The released code leaves a random bias there.)
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
    """Build a module that holds temporal layers under the same paths as the UNet's transformer blocks.

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
        # After loading, because casting layers of some hosts keep the dtype of the loaded tensors.
        _add_at(root, path, layer.to(dtype).requires_grad_(False))
    return root


def add_queries(
    root: torch.nn.Module, deltas: Mapping[str, Tensor], operations: Any, dtype: torch.dtype
) -> torch.nn.Module:
    """Add layers to ``root``, as ``build_temporal`` made it, whose outputs are added to the UNet's queries.

    ``deltas``: differences of query projection weights [inner, channels] by the weight's path.
    """
    for path, delta in deltas.items():
        layer = operations.Linear(delta.shape[1], delta.shape[0], bias=False, device="cpu")
        layer.load_state_dict({"weight": delta})
        _add_at(root, path.removesuffix(".weight"), layer.to(dtype).requires_grad_(False))
    return root


def query_layers(root: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the layers that ``add_queries`` put into ``root``, by the query projection's path."""
    return {path: module for path, module in root.named_modules() if path.endswith((".attn1.to_q", ".attn2.to_q"))}


def _add_at(root: torch.nn.Module, path: str, module: torch.nn.Module) -> None:
    *parents, name = path.split(".")
    for part in parents:
        if part not in root._modules:
            root.add_module(part, torch.nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    root.add_module(name, module)


def temporal_layers(root: torch.nn.Module) -> dict[str, TemporalLayer]:
    """Return the layers that ``build_temporal`` put into ``root``, by block path."""
    return {path: module for path, module in root.named_modules() if isinstance(module, TemporalLayer)}
