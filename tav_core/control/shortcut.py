"""End the clip's evaluation after the last layer that is kept of it: nothing that follows would be used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..inflate import Swap, own_forward

# (path of a transformer block, halvings of the latent's size in it) -> whether its self-attention is kept.
IsKept = Callable[[str, int], bool]


def shortcut(unet: Any, is_kept: IsKept, cross: bool, feature: torch.nn.Module | None) -> tuple[str | None, list[Swap]]:
    """Return cheap forwards for the UNet's layers after the last kept one; they keep shapes, their values are unused.

    ``cross``: cross-attentions at half of the latent's size and below are kept. ``feature``: a layer whose output is
    kept, or None. Also returns the path of the block whose self-attention is the last kept layer, or None: of that
    layer only queries and keys are needed. Layers with another pack's forward keep it. Nothing is replaced where no
    output block is kept.
    """
    stages = list(_stages(unet, is_kept, cross, feature))
    last = max((number for number, (kept, _, _) in enumerate(stages) if kept), default=None)
    if last is None:
        return None, []
    after = [(layer, forward) for _, _, (layer, forward) in stages[last + 1 :] if own_forward(layer) is None]
    return stages[last][1], after


def _stages(
    unet: Any, is_kept: IsKept, cross: bool, feature: torch.nn.Module | None
) -> Iterator[tuple[bool, str | None, Swap]]:
    """Yield layers of the output blocks as they run: is it kept, its block if a self-attention, its cheap forward."""
    upsamples = [sum(map(_is_upsample, layers)) for layers in unet.output_blocks]
    for number, layers in enumerate(unet.output_blocks):
        halvings = sum(upsamples[number:])
        for index, layer in enumerate(layers):
            if hasattr(layer, "transformer_blocks"):
                yield False, None, (layer, _same)
                for depth, block in enumerate(layer.transformer_blocks):
                    path = f"output_blocks.{number}.{index}.transformer_blocks.{depth}"
                    yield False, None, (block, _same)
                    kept = is_kept(path, halvings) and not block.disable_self_attn
                    yield kept, path, (block.attn1, _same)
                    yield cross and halvings >= 1, None, (block.attn2, _same)
                    yield False, None, (block.ff, _same)
            elif _is_upsample(layer):
                yield False, None, (layer.conv, _of_channels(layer.conv.out_channels))
            elif hasattr(layer, "in_layers"):  # a residual block; other packs insert layers of their own
                kept = any(module is feature for module in layer.modules())
                yield kept, None, (layer, _of_channels(layer.out_channels))
    yield False, None, (unet.out, _of_channels(unet.out_channels))


def _is_upsample(layer: Any) -> bool:
    return isinstance(getattr(layer, "conv", None), torch.nn.Conv2d)


def _same(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _of_channels(channels: int) -> Callable[..., Tensor]:
    def zeros(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x.new_zeros(x.shape[0], channels, *x.shape[2:])

    return zeros
