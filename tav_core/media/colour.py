"""Colours of HDR and wide-gamut clips, as a BT.709 screen shows them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import einsum
from torch import Tensor

Colours = tuple[int, int]  # transfer and primaries, numbers of ITU-T H.273

LINEAR, PQ, HLG = 8, 16, 18
_GAMMA = 2.4  # BT.1886, of the screen
_WHITE = 100.0  # nits of the screen's white
_HLG_PEAK = 1000.0  # nits
_KNEE = 0.5  # of the screen's white: what is darker is kept as it is

# RGB of other primaries -> BT.709, linear light. D65 all (theatrical DCI-P3's white is taken for it).
_TO_BT709 = {
    9: ((1.660491, -0.587641, -0.072850), (-0.124550, 1.132900, -0.008349), (-0.018151, -0.100579, 1.118730)),
    11: ((1.224940, -0.224940, 0.0), (-0.042057, 1.042057, 0.0), (-0.019638, -0.078636, 1.098274)),
    12: ((1.224940, -0.224940, 0.0), (-0.042057, 1.042057, 0.0), (-0.019638, -0.078636, 1.098274)),
}


def to_bt709_(images: Tensor, numbers: Sequence[int], transfer: int, primaries: int) -> None:
    """Convert the frames ``numbers`` of images [f, h, w, 3] in place, from a coded signal to BT.709, both in 0..1.

    Light above half of the screen's white is compressed towards the brightest of these frames, and only if that
    exceeds the white: a clip that fits the screen is not changed.
    """
    peak = max(float(_light(images[number], transfer, primaries).amax()) for number in numbers)
    for number in numbers:
        light = _light(images[number], transfer, primaries)
        brightest = light.amax(-1, keepdim=True).clamp(min=1e-6)
        images[number] = (light * compressed(brightest, peak) / brightest).clamp(0, 1) ** (1 / _GAMMA)


def _light(signal: Tensor, transfer: int, primaries: int) -> Tensor:
    """Return linear light with BT.709's primaries; 1 is the screen's white. What lies outside of them is clipped."""
    if transfer == PQ:
        light = pq_nits(signal) / _WHITE
    elif transfer == HLG:
        light = hlg_nits(signal) / _WHITE
    else:
        light = signal if transfer == LINEAR else signal**_GAMMA
    if primaries in _TO_BT709:
        matrix = light.new_tensor(_TO_BT709[primaries])
        light = einsum(light, matrix, "h w c, out c -> h w out")
    return light.clamp(min=0)


def pq_nits(signal: Tensor) -> Tensor:
    """Return a PQ signal's light in nits (SMPTE ST 2084)."""
    m1, m2, c1, c2, c3 = 1305 / 8192, 2523 / 32, 107 / 128, 2413 / 128, 2392 / 128
    root = signal ** (1 / m2)
    return 10_000 * ((root - c1).clamp(min=0) / (c2 - c3 * root)) ** (1 / m1)


def hlg_nits(signal: Tensor) -> Tensor:
    """Return an HLG signal's light in nits on a screen of 1000 (BT.2100), its gamma applied to each channel."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = torch.where(signal <= 0.5, signal**2 / 3, (((signal - c) / a).exp() + b) / 12)
    return _HLG_PEAK * scene**1.2


def compressed(light: Tensor, peak: float) -> Tensor:
    """Return light of 0..``peak`` in 0..1, unchanged up to the knee and smooth above it (the Moebius curve)."""
    if peak <= 1:
        return light
    j = _KNEE
    a = -(j**2) * (peak - 1) / (j**2 - 2 * j + peak)
    b = (j**2 - 2 * j * peak + peak) / (peak - 1)
    return torch.where(light <= j, light, (b**2 + 2 * b * j + j**2) / (b - a) * (light + a) / (light + b))
