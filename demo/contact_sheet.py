"""Clips below each other, their frames side by side, with captions."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_GAP, _CAPTION, _FRAME = 6, 26, 128


def contact_sheet(rows: Sequence[tuple[str, Tensor]]) -> Image.Image:
    """A picture of (caption, frames [F, H, W, 3] in 0..1) rows; every frame is shown 128 pixels wide and high."""
    columns = max(len(frames) for _, frames in rows)
    size = (columns * (_FRAME + _GAP) + _GAP, len(rows) * (_FRAME + _CAPTION + _GAP) + _GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=15)
    for row, (caption, frames) in enumerate(rows):
        top = _GAP + row * (_FRAME + _CAPTION + _GAP)
        draw.text((_GAP, top + 2), caption, fill="black", font=font)
        for column, frame in enumerate(frames):
            picture = Image.fromarray((frame * 255).round().byte().numpy())
            picture = picture.resize((_FRAME, _FRAME), Image.Resampling.NEAREST)
            sheet.paste(picture, (_GAP + column * (_FRAME + _GAP), top + _CAPTION))
    return sheet
