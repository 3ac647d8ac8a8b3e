"""3x3 convolutions by minimal filtering, F(2x2, 3x3) (Winograd 1980; Lavin and Gray 2015, arXiv 1509.09308, 4.1).

A tile of 4x4 positions gives 2x2 results by 16 products a pair of channels; the convolution itself takes 36. Tiles,
weights and results go through small matrices of 0, 1 and 1/2: tiles and results by sums over whole tensors with
channels last, weights by one product. In float32 the error is of five or six roundings of the largest value; that of
the library's convolution is of two to six, by the algorithm that it takes on a processor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

# Tiles transformed at a time, and numbers of transformed weights: both then stay in the processor's cache.
_TILES = 1024
_WEIGHTS = 2**21


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the convolution of x [f, c, h, w] with weight [o, c, 3, 3], stride 1 and a border of zeros; float32."""
    filters = _filters(x)

    def transformed(some: slice) -> Tensor:
        part = rearrange(weight[some], "o c h w -> (h w) (o c)")
        return torch.mm(filters, part).view(16, -1, weight.shape[1]).mT

    out = _convolved(x, len(weight), transformed)
    return out if bias is None else out.add_(bias.view(-1, 1, 1))


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of ``conv3x3``'s x [f, c, h, w] from that of its result, grad [f, o, h, w]."""
    # It is the convolution with each filter turned round and the channels exchanged.
    filters = _filters(grad).flip(1)

    def transformed(some: slice) -> Tensor:
        # Whole filters are copied first: one copy in the new order would take five times as long.
        part = rearrange(weight[:, some].contiguous(), "o c h w -> (h w) (o c)")
        return torch.mm(filters, part).view(16, len(weight), -1)

    return _convolved(grad, weight.shape[1], transformed)


def _filters(like: Tensor) -> Tensor:
    """Return the matrix [16, 9] that transforms filters: the outer square of Lavin and Gray's G."""
    g = like.new_tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
    return torch.kron(g, g)


def _convolved(x: Tensor, channels: int, transformed: Callable[[slice], Tensor]) -> Tensor:
    """Convolve x [f, c, h, w]; ``transformed`` gives the weights of some of the result's channels, [16, c, some]."""
    frames, c, height, width = x.shape
    rows, columns = -(-height // 2), -(-width // 2)
    out = x.new_empty(frames, rows, 2, columns, 2, channels)
    step, block = max(1, _TILES // (rows * columns)), max(32, _WEIGHTS // (16 * c))
    for part, result in zip(x.split(step), out.split(step), strict=True):
        tiles = _tiles(part, rows, columns)
        for start in range(0, channels, block):
            some = slice(start, start + block)
            _untile(torch.bmm(tiles, transformed(some)), result[..., some])
    whole = rearrange(out, "f rows i columns j c -> f c (rows i) (columns j)")
    return whole[..., :height, :width].contiguous()


def _tiles(x: Tensor, rows: int, columns: int) -> Tensor:
    """Cut x [f, c, h, w] into rows x columns overlapping tiles of 4x4 and transform them: [16, tiles, c]."""
    frames, c, height, width = x.shape
    padded = F.pad(rearrange(x, "f c h w -> f h w c"), (0, 0, 1, 2 * columns + 1 - width, 1, 2 * rows + 1 - height))
    out = x.new_empty(4, 4, frames, rows, columns, c)
    a, b, c_, d = (padded[:, i : i + 2 * rows - 1 : 2] for i in range(4))
    for row, to in zip((a - c_, b + c_, c_ - b, b - d), out, strict=True):
        e, f, g, h = (row[:, :, j : j + 2 * columns - 1 : 2] for j in range(4))
        torch.sub(e, g, out=to[0])
        torch.add(f, g, out=to[1])
        torch.sub(g, f, out=to[2])
        torch.sub(f, h, out=to[3])
    return out.view(16, -1, c)


def _untile(products: Tensor, out: Tensor) -> None:
    """Write the results of products [16, tiles, o] to out [f, rows, 2, columns, 2, o]."""
    a, b, c, d = products.view(4, 4, len(out), out.shape[1], out.shape[3], -1)
    for row, to in zip(((a + b).add_(c), (b - c).sub_(d)), out.unbind(2), strict=True):
        torch.add(row[0], row[1], out=to[:, :, :, 0]).add_(row[2])
        torch.sub(row[1], row[2], out=to[:, :, :, 1]).sub_(row[3])
