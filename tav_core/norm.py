"""GroupNorm whose statistics are pooled over all frames of a video, and the SiLU behind it.

The released code norms the 5-D tensor [chunks, c, frames, h, w] in its residual blocks and output head.
Here frames stay on the batch axis; only the statistics cross them.

Half precision: statistics, and all that is computed with them, are float32; only results are rounded. A batch norm of
given statistics does that in one pass over the tensor, so a group's statistics are repeated for each of its channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Added to a variance whose reciprocal root a kernel returns, so that an even picture has a finite one.
_TINY = 1e-30
# A weight that counts as zero.
_SMALL = 1e-20


def _moments(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return mean and variance [rows, groups] of x [rows, c, h, w], in float32 at least, in one pass over x."""
    rows, c, h, w = x.shape
    dtype = _wide(x.dtype)
    if x.device.type == "cpu":
        # Ten times as fast as var_mean. The weights' dtype is that of the statistics.
        ones = torch.ones(c, dtype=dtype)
        _, mean, rstd = torch.native_group_norm(x, ones, ones, rows, c, h * w, groups, _TINY)
    elif x.is_cuda:
        # A block of CUDA's kernel for each frame and group.
        mean, rstd = torch.batch_norm_stats(x.reshape(1, rows * groups, -1), _TINY)
        mean, rstd = mean.view(rows, groups), rstd.view(rows, groups)
    else:
        var, mean = torch.var_mean(x.reshape(rows, groups, -1).to(dtype), dim=2, correction=0)
        return mean, var
    return mean, rstd.pow(-2)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _pooled_moments(x: Tensor, chunks: int, groups: int) -> tuple[Tensor, Tensor]:
    """Return mean and variance [chunks, c] of each channel's group over all frames of x [chunks * frames, c, h, w]."""
    mean, var = (t.unflatten(0, (chunks, -1)) for t in _moments(x, groups))
    # Every frame has as many values: a variance is the mean of the frames' plus that of their means.
    both = torch.stack([mean.mean(1), var.mean(1) + mean.var(1, correction=0)])
    mean, var = both.repeat_interleave(x.shape[1] // groups, 2)
    return mean, var


def _standardised(
    x: Tensor, mean: Tensor, var: Tensor, eps: float, weight: Tensor, bias: Tensor, out: Tensor | None = None
) -> Tensor:
    """Return (x - mean) / sqrt(var + eps) * weight + bias for x [rows, c, h, w] and the others [c], rounded once."""
    if x.device.type == "cpu" or x.is_cuda:
        out = torch.empty_like(x) if out is None else out
        unused = {"save_mean": mean.new_empty(0), "save_invstd": mean.new_empty(0)}
        torch.ops.aten.native_batch_norm.out(x, weight, bias, mean, var, False, 0.0, eps, out=out, **unused)
        return out
    mean, scale, bias = (t.view(-1, 1, 1) for t in (mean, weight * (var + eps).rsqrt(), bias))
    y = torch.addcmul(bias, x.to(mean.dtype) - mean, scale)
    return y.to(x.dtype) if out is None else out.copy_(y)


class _PooledGroupNorm(torch.autograd.Function):
    """Pooled norm for frozen affine parameters: only x gets a gradient. Saves x and two numbers per channel."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, chunks: int, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool
    ) -> Tensor:
        x = _dense(x)
        mean, var = _pooled_moments(x, chunks, groups)
        ctx.weight, ctx.bias, ctx.groups, ctx.eps, ctx.silu = weight.to(mean), bias.to(mean), groups, eps, silu
        ctx.save_for_backward(x, mean, var)
        y = _normed(ctx, x, mean, var)
        return F.silu(y, inplace=True) if silu else y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, mean, var = ctx.saved_tensors
        # PyTorch 2.9's backward kernel crashes where channels are last and x's own gradient is not wanted of it.
        x, grad = x.contiguous(), grad.contiguous()
        if ctx.silu:
            # Computing the norm again is cheaper than having kept what the SiLU saw.
            grad = torch.ops.aten.silu_backward(grad, _normed(ctx, x, mean, var))
        parts = zip(grad.chunk(len(mean)), x.chunk(len(mean)), mean, (var + ctx.eps).rsqrt(), strict=True)
        dx = [_gradient(*part, ctx.weight, ctx.groups) for part in parts]
        return dx[0] if len(dx) == 1 else torch.cat(dx), *[None] * 6


def _normed(ctx: Any, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Norm the videos [frames, c, h, w] that x [chunks * frames, c, h, w] consists of; mean and var [chunks, c]."""
    y = torch.empty_like(x)
    for part, m, v, out in zip(x.chunk(len(mean)), mean, var, y.chunk(len(mean)), strict=True):
        _standardised(part, m, v, ctx.eps, ctx.weight, ctx.bias, out)
    return y


def _dense(x: Tensor) -> Tensor:
    """Return x in one of the two layouts that the kernels read."""
    last = torch.channels_last
    return x if x.is_contiguous(memory_format=last) else x.contiguous()


def _gradient(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Return the gradient of one video x [frames, c, h, w] from that of its norm; mean, rstd and weight [c].

    dx = rstd (g - mean(g) - x^ mean(g x^)) with g = grad * weight and x^ = (x - mean) rstd, the means over a group.
    """
    count = x[:, : x.shape[1] // groups].numel()

    def group_mean(channels: Tensor) -> Tensor:
        sums = (channels * weight).view(groups, -1).sum(1) / count
        return sums.repeat_interleave(x.shape[1] // groups)

    if x.is_cuda:
        sums, sums_x, _, _ = torch.batch_norm_backward_reduce(grad, x, mean, rstd, None, True, False, False)
        to_mean, to_deviation = group_mean(sums), group_mean(sums_x * rstd)
        # The kernel multiplies all three terms by the weight; so two are divided by it, which must not be zero then.
        safe = torch.where(weight.abs() < _SMALL, _SMALL, weight)
        one = x.new_ones(1, dtype=torch.int32)
        return torch.batch_norm_backward_elemt(
            grad, x, mean, rstd, safe, to_mean / safe, to_deviation / (safe * rstd), one
        )
    sums, sums_x = _channel_sums(grad, x, mean, rstd, groups)
    to_mean, to_deviation = group_mean(sums), group_mean(sums_x)
    one, zero = torch.ones_like(mean), torch.zeros_like(mean)
    dx = _standardised(x, mean, one, 0.0, -rstd * rstd * to_deviation, -rstd * to_mean)
    return dx.add_(_standardised(grad, zero, one, 0.0, rstd * weight, zero))


def _channel_sums(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return the sums of grad and of grad * x^ over frames and positions, [c] each.

    In float32, because a product of scaled gradients soon exceeds what half precision holds.
    """
    rows, c, h, w = x.shape
    if x.device.type == "cpu":
        by_group = (t.view(groups, -1)[:, 0].expand(rows, -1).contiguous() for t in (mean, rstd))
        # In three dimensions: the kernel crashes where channels are last, as which a picture of one pixel counts.
        _, sums_x, sums = torch.ops.aten.native_group_norm_backward(
            grad.flatten(2), x.flatten(2), *by_group, torch.ones_like(mean), rows, c, h * w, groups, [False, True, True]
        )
        return sums, sums_x
    wide = grad.to(mean.dtype)
    normed = (x.to(mean.dtype) - mean.view(-1, 1, 1)) * rstd.view(-1, 1, 1)
    return wide.sum(dim=(0, 2, 3)), (wide * normed).sum(dim=(0, 2, 3))


def pooled_group_norm(
    x: Tensor, frames: int, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool = False
) -> Tensor:
    """GroupNorm of x [chunks * frames, c, h, w] with statistics per chunk and group over all its frames.

    ``weight`` and ``bias``: [c], frozen (no gradient flows to them). ``silu``: apply it to the result. With
    ``frames`` = 1 this is GroupNorm.
    """
    return _PooledGroupNorm.apply(x, len(x) // frames, groups, weight, bias, eps, silu)
