"""Convolutions on the CPU by the kernel that is fastest for their shape, and their gradients.

The library's convolution first copies its weights into an order of its own. Over few positions that takes longer than
the products themselves, and one matrix product over unfolded patches is several times as fast. Over more positions,
Winograd's filtering takes fewer products in float32; and in bfloat16, on processors with matrix units (AMX), the
library's is faster with channels last.
"""

from __future__ import annotations

import time
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from . import winograd

# One product is faster up to this many output channels a position, since unfolding takes time for each position and
# copying weights for each output channel (measured with 8 and 16 frames of 1x1 to 16x16, 320 to 2560 channels).
_CHANNELS_A_POSITION = 5
# Winograd's filtering saves more than its transformations take from this many positions and channels on, both in and
# out, and where its tiles of 2x2 results have little beyond the border (measured with 1 to 16 frames of 4x4 to 64x64,
# 32 to 1280 channels).
_WINOGRAD_POSITIONS = 128
_WINOGRAD_CHANNELS = 256
_WINOGRAD_SIDE = 4
# Channels last pays from this many positions an output channel on: the weights are copied into that order, too.
_POSITIONS_A_CHANNEL = 4
# How much faster channels last has to be in the probe: a tie must not fall one way today and another tomorrow.
_CLEARLY_FASTER = 1.15


def conv2d(
    x: Tensor, module: torch.nn.Conv2d, weight: Tensor, bias: Tensor | None, may_reorder: bool = False
) -> Tensor:
    """Return the convolution that ``module`` describes, of x [f, c, h, w] with the given weight and bias.

    ``may_reorder``: the result may come with channels last, where a probe of this machine prefers it.
    """
    if _is_winograd(x, module):
        return winograd.conv3x3(x, weight, bias)
    if _is_product(x, module):
        return _product(x, module, weight, bias)
    if may_reorder and _is_faster_with_channels_last(x, module):
        x = x.contiguous(memory_format=torch.channels_last)
    return module._conv_forward(x, weight, bias)


def input_gradient(grad: Tensor, x: Tensor, module: torch.nn.Conv2d, weight: Tensor) -> Tensor:
    """Return the gradient of ``conv2d``'s x [f, c, h, w] from that of its result; of x the shape alone is read."""
    m = module
    if m.padding_mode != "zeros" or "_conv_forward" in vars(m):
        return _by_autograd(grad, x, m, weight)
    if _is_winograd(x, m):
        return winograd.input_gradient(grad, weight)
    if _is_product(x, m):
        patches = rearrange(grad, "f c h w -> (f h w) c") @ weight.flatten(1)
        patches = rearrange(patches, "(f n) c -> f c n", f=len(x))
        return F.fold(patches, x.shape[2:], m.kernel_size, m.dilation, m.padding, m.stride)  # type: ignore[arg-type]
    dx, _, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, m.stride, m.padding, m.dilation, False, [0, 0], m.groups, [True, False, False]
    )
    return dx


def _by_autograd(grad: Tensor, x: Tensor, module: torch.nn.Conv2d, weight: Tensor) -> Tensor:
    with torch.enable_grad():
        zeros = grad.new_zeros(x.shape).requires_grad_()
        # A host's weight may be an inference tensor, which autograd does not save.
        out = module._conv_forward(zeros, weight.clone(), None)
        (dx,) = torch.autograd.grad(out, zeros, grad)
    return dx


def _is_winograd(x: Tensor, m: torch.nn.Conv2d) -> bool:
    """Say whether a convolution of x [f, c, h, w] is faster by Winograd's filtering."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or not _is_plain(m):
        return False
    if not (m.kernel_size == (3, 3) and m.stride == m.padding == m.dilation == (1, 1)):
        return False
    if min(m.in_channels, m.out_channels) < _WINOGRAD_CHANNELS or min(x.shape[2:]) < _WINOGRAD_SIDE:
        return False
    return _positions(x, m) >= _WINOGRAD_POSITIONS


def _is_product(x: Tensor, module: torch.nn.Conv2d) -> bool:
    """Say whether a convolution of x [f, c, h, w] is faster as one matrix product over unfolded patches."""
    if x.device.type != "cpu" or not _is_plain(module):
        return False
    return _positions(x, module) * _CHANNELS_A_POSITION <= module.out_channels


def _is_plain(module: torch.nn.Conv2d) -> bool:
    # Packs for seamless tiles change how a layer pads, or the function behind it.
    return module.groups == 1 and module.padding_mode == "zeros" and "_conv_forward" not in vars(module)


def _positions(x: Tensor, module: torch.nn.Conv2d) -> int:
    height, width = out_size(x, module)
    return x.shape[0] * height * width


def out_size(x: Tensor, m: torch.nn.Conv2d) -> tuple[int, int]:
    """Return height and width of a convolution's output."""
    height, width = (
        (x.shape[2 + i] + 2 * int(m.padding[i]) - m.dilation[i] * (m.kernel_size[i] - 1) - 1) // m.stride[i] + 1
        for i in range(2)
    )
    return height, width


def _product(x: Tensor, m: torch.nn.Conv2d, weight: Tensor, bias: Tensor | None) -> Tensor:
    patches = F.unfold(x, m.kernel_size, m.dilation, m.padding, m.stride)  # type: ignore[arg-type]
    # Frames and positions on one axis: as a batch of products each frame would read all weights again.
    out = F.linear(rearrange(patches, "f c n -> (f n) c"), weight.flatten(1), bias)
    height, width = out_size(x, m)
    return rearrange(out, "(f h w) c -> f c h w", h=height, w=width).contiguous()


def _is_faster_with_channels_last(x: Tensor, module: torch.nn.Conv2d) -> bool:
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or module.kernel_size != (3, 3):
        return False
    return _positions(x, module) >= _POSITIONS_A_CHANNEL * module.out_channels and prefers_channels_last()


@lru_cache(maxsize=1)
def prefers_channels_last() -> bool:
    """Say whether this machine's bfloat16 convolutions are clearly faster with channels last.

    Measured once in a process, in about a tenth of a second: a property of the processor and of PyTorch's build.
    """
    with torch.inference_mode():
        x, weight = torch.ones(4, 320, 32, 32, dtype=torch.bfloat16), torch.ones(320, 320, 3, 3, dtype=torch.bfloat16)
        last = x.contiguous(memory_format=torch.channels_last)
        # In turns, since the machine's speed drifts; processor time, since other programs run as well.
        times = [(_seconds(x, weight), _seconds(last, weight)) for _ in range(4)]
    contiguous, channels_last = (min(each) for each in zip(*times, strict=True))
    return contiguous > _CLEARLY_FASTER * channels_last


def _seconds(x: Tensor, weight: Tensor) -> float:
    start = time.process_time()
    F.conv2d(x, weight, padding=1)
    return time.process_time() - start
