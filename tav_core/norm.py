"""GroupNorm whose statistics are pooled over all frames of a video, and the SiLU behind it.

The released code norms the 5-D tensor [chunks, c, frames, h, w] in its residual blocks and output head.
Here frames stay on the batch axis; only the statistics cross them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor


def _statistics(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Return mean and reciprocal standard deviation, float32 [chunks, groups], of x [chunks, frames, c, h, w]."""
    grouped = rearrange(x, "chunks frames (groups c) h w -> chunks frames groups (c h w)", groups=groups)
    var, mean = torch.var_mean(grouped.float(), dim=(1, 3), correction=0)
    return mean, (var + eps).rsqrt()


def _per_channel(stat: Tensor, channels: int) -> Tensor:
    """Spread [chunks, groups] over channels: [chunks, 1, c, 1, 1]."""
    return repeat(stat, "chunks groups -> chunks 1 (groups c) 1 1", c=channels // stat.shape[1])


class _PooledGroupNorm(torch.autograd.Function):
    """Pooled norm for frozen affine parameters: only x gets a gradient. Saves x and two numbers per group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
        c = x.shape[2]
        mean, rstd = _statistics(x, groups, eps)
        scale = _per_channel(rstd, c) * weight.float().view(-1, 1, 1)
        shift = bias.float().view(-1, 1, 1) - _per_channel(mean, c) * scale
        ctx.save_for_backward(x, mean, rstd)
        ctx.scale, ctx.shift, ctx.silu = scale, shift, silu
        y = torch.addcmul(shift.to(x.dtype), x, scale.to(x.dtype))
        return F.silu(y, inplace=True) if silu else y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        x, mean, rstd = ctx.saved_tensors
        c, groups, scale = x.shape[2], rstd.shape[1], ctx.scale
        if ctx.silu:
            # Computing the norm again is cheaper than having kept what the SiLU saw.
            y = torch.addcmul(ctx.shift.to(x.dtype), x, scale.to(x.dtype))
            grad = torch.ops.aten.silu_backward(grad, y)
        count = x.shape[1] * (c // groups) * x.shape[3] * x.shape[4]
        # dx = rstd (g - mean(g) - x^ mean(g x^)) with g = grad * weight and x^ = (x - mean) rstd, the
        # means over a group: written as grad * scale - a - b x, so that only two reductions read x.
        weight = scale / _per_channel(rstd, c)
        per_channel = grad.sum(dim=(1, 3, 4), keepdim=True, dtype=torch.float32) * weight
        # In float32, because a product of scaled gradients soon exceeds what half precision holds.
        per_channel_x = (grad.float() * x.float()).sum(dim=(1, 3, 4), keepdim=True) * weight

        def group_sum(t: Tensor) -> Tensor:
            return rearrange(t, "chunks 1 (groups c) 1 1 -> chunks groups c", groups=groups).sum(2)

        sum_g = group_sum(per_channel)
        sum_gx = (group_sum(per_channel_x) - mean * sum_g) * rstd
        b = rstd * rstd * sum_gx / count
        a = rstd * sum_g / count - b * mean
        a, b = _per_channel(a, c), _per_channel(b, c)
        dx = torch.addcmul(-a.to(x.dtype), x, -b.to(x.dtype)).addcmul_(grad, scale.to(x.dtype))
        return dx, None, None, None, None, None


def pooled_group_norm(
    x: Tensor, frames: int, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool = False
) -> Tensor:
    """GroupNorm of x [chunks * frames, c, h, w] with statistics per chunk and group over all its frames.

    ``weight`` and ``bias``: [c], frozen (no gradient flows to them). ``silu``: apply it to the result. With
    ``frames`` = 1 this is GroupNorm.
    """
    video = rearrange(x, "(chunks frames) c h w -> chunks frames c h w", frames=frames)
    return rearrange(
        _PooledGroupNorm.apply(video, groups, weight, bias, eps, silu), "chunks frames c h w -> (chunks frames) c h w"
    )
