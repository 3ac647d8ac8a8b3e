"""Pictures of results, for where people would rather look than read."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

_WIDTH, _HEIGHT, _MARGIN = 768, 384, 48
_INK, _FAINT, _STRONG = (40, 40, 40), (170, 190, 220), (30, 90, 180)


def loss_curve(losses: list[float]) -> Tensor:
    """Loss over steps as an IMAGE [1, h, w, 3], 0..1: each step thin, the mean of its neighbourhood thick."""
    image = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    values = np.asarray(losses, dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    span = (high - low) or 1.0

    def points(ys: np.ndarray) -> list[tuple[float, float]]:
        xs = np.linspace(_MARGIN, _WIDTH - _MARGIN, len(ys)) if len(ys) > 1 else np.array([_WIDTH / 2])
        heights = _HEIGHT - _MARGIN - (ys - low) / span * (_HEIGHT - 2 * _MARGIN)
        return list(zip(xs.tolist(), heights.tolist(), strict=True))

    window = max(1, len(values) // 20)
    padded = np.pad(values, (window // 2, window - 1 - window // 2), mode="edge")
    smooth = np.convolve(padded, np.ones(window) / window, mode="valid")
    draw.line(points(values), fill=_FAINT, width=1)
    draw.line(points(smooth), fill=_STRONG, width=3)
    for x, y in points(values) if len(values) == 1 else ():
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=_STRONG)
    frame = (_MARGIN, _MARGIN, _WIDTH - _MARGIN, _HEIGHT - _MARGIN)
    draw.rectangle(frame, outline=_INK)
    draw.text((_MARGIN, _MARGIN - 16), f"loss {high:.4g}", fill=_INK)
    draw.text((_MARGIN, _HEIGHT - _MARGIN + 4), f"{low:.4g}", fill=_INK)
    draw.text((_WIDTH - _MARGIN - 80, _HEIGHT - _MARGIN + 4), f"{len(losses)} steps", fill=_INK)
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255.0)[None]
