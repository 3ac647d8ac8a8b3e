"""Make an inflated evaluation faster on the CPU: its convolutions, the text's keys and values, its attention.

Graphics cards gain nothing from these, and comparing texts would wait for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import ref

import comfy.ldm.modules.attention
import torch
from comfy.cli_args import args
from torch import Tensor

from ..convolution import conv2d
from ..inflate import Evaluation, Forward, Swap, own_forward
from .lend import lent
from .stored import is_coarse

# The host's name for a function that stands in for its attention; hosts before it ignore it.
_OVERRIDE = "optimized_attention_override"


def cpu_forwards(unet: torch.nn.Module, blocks: Mapping[str, Any], evaluation: Evaluation) -> list[Swap]:
    """Return forwards for layers that have their class's own; other packs' and quantised layers stay as they are.

    ``blocks``: the UNet's transformer blocks by path.
    """
    texts = _Texts(evaluation)
    layers = [(m, _convolution(m)) for m in unet.modules() if isinstance(m, torch.nn.Conv2d)]
    crossed = [projection for block in blocks.values() for projection in (block.attn2.to_k, block.attn2.to_v)]
    layers += [(projection, _of_text(projection, texts)) for projection in crossed]
    return [(layer, forward) for layer, forward in layers if own_forward(layer) is None and not is_coarse(layer)]


def with_fused_attention(transformer_options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return options under which the host's attention keeps no scores; the same ones where somebody chose another.

    Without a choice the host takes its sub-quadratic attention on the CPU, which writes scores out. PyTorch's kernel
    gives the same but for rounding.
    """
    attention = comfy.ldm.modules.attention
    chosen = _OVERRIDE in transformer_options or getattr(args, "use_quad_cross_attention", False)
    if chosen or attention.optimized_attention is not getattr(attention, "attention_sub_quad", None):
        return transformer_options
    return {**transformer_options, _OVERRIDE: _fused}


def _fused(replaced: Forward, *args: Any, **options: Any) -> Tensor:
    out: Tensor = comfy.ldm.modules.attention.attention_pytorch(*args, **options)
    return out


def _convolution(layer: torch.nn.Conv2d) -> Forward:
    def forward(x: Tensor) -> Tensor:
        with lent(layer, x) as (weight, bias):
            return conv2d(x, layer, weight, bias, may_reorder=True)

    return forward


def _of_text(projection: Any, texts: _Texts) -> Forward:
    def forward(text: Tensor) -> Tensor:
        frames = texts.repeats(text)
        projected: Tensor = type(projection).forward(projection, text[::frames])
        return projected if frames == 1 else projected.repeat_interleave(frames, 0)

    return forward


class _Texts:
    """Tells whether all frames of a video have one text; all cross-attentions of an evaluation get the same tensor."""

    def __init__(self, evaluation: Evaluation) -> None:
        self._evaluation = evaluation
        self._seen: tuple[ref[Tensor], int] | None = None

    def repeats(self, text: Tensor) -> int:
        """Return how many rows of a text embedding [chunks * frames, tokens, c] follow each other unchanged."""
        if self._seen is None or self._seen[0]() is not text:
            self._seen = ref(text), self._count(text)
        return self._seen[1]

    def _count(self, text: Tensor) -> int:
        layout = self._evaluation.layout
        if len(text) != layout.chunks * layout.frames:
            return 1
        by_video = text.unflatten(0, (layout.chunks, layout.frames))
        return layout.frames if torch.equal(by_video, by_video[:, :1].expand_as(by_video)) else 1
