"""Guidance that changes only what the sentence clearly asks for."""

from __future__ import annotations

from torch import Tensor


def proximal(conditional: Tensor, unconditional: Tensor, quantile: float) -> Tensor:
    """Return ``conditional`` with its smaller differences from ``unconditional`` dropped.

    Proximal guidance (ProxEdit, arXiv 2306.05414), hard threshold: differences below their ``quantile`` (0 to 1) of
    the whole clip are dropped. Both [frames, c, h, w].
    """
    difference = conditional - unconditional
    sizes = difference.abs()
    bound = sizes.flatten().kthvalue(max(1, round(quantile * sizes.numel()))).values
    return unconditional + difference * (sizes > bound)
