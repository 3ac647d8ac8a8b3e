"""Draw curves, tables and sheets of frames. Results are IMAGEs [n, h, w, 3] in 0..1, unless said otherwise."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from ..cancel import raise_if_cancelled
from ..control.blend import BEYOND
from ..errors import Refusal

_WIDTH, _HEIGHT, _MARGIN = 768, 384, 48
_INK, _FAINT, _STRONG = (40, 40, 40), (170, 190, 220), (30, 90, 180)
_GAP, _FONT_SIZE = 6, 15
_CAPTION = 26
_NO_CHARACTER = "\uffff"
# Fonts of Linux, Windows and macOS: first with accents, Greek and Cyrillic, then with Chinese, Japanese and Korean.
# Pillow's own has the letters a to z alone.
_FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "LiberationSans-Regular.ttf",
    "arial.ttf",
    "Arial.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "SourceHanSans.ttc",
    "DroidSansFallbackFull.ttf",
    "wqy-zenhei.ttc",
    "wqy-microhei.ttc",
    "NanumGothic.ttf",
    "malgun.ttf",
    "msyh.ttc",
    "YuGothM.ttc",
    "msgothic.ttc",
    "simsun.ttc",
    "AppleSDGothicNeo.ttc",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "Arial Unicode.ttf",
)


def _image(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255.0)[None]


@lru_cache(maxsize=256)
def font_for(text: str) -> Any:
    """Return a font that has every character of a text, the default one where it does.

    Fonts of the system are asked by file name. Where none has them all, the default font is used with a warning.
    """
    default = ImageFont.load_default(size=_FONT_SIZE)
    if _has_all(default, text):
        return default
    for font in _system_fonts():
        if _has_all(font, text):
            return font
    logging.warning("no font here has all characters of %r; install Noto Sans CJK to see them in pictures", text)
    return default


@cache
def _system_fonts() -> tuple[Any, ...]:
    found = []
    for name in _FONTS:
        try:
            found.append(ImageFont.truetype(name, _FONT_SIZE))
        except OSError:
            continue
    return tuple(found)


def _has_all(font: Any, text: str) -> bool:
    """Say whether no character of a text is drawn as the box that stands for a missing one."""
    missing = bytes(font.getmask(_NO_CHARACTER))
    return all(character.isspace() or bytes(font.getmask(character)) != missing for character in set(text))


def _finite_range(values: np.ndarray) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)


def _points(values: np.ndarray, low: float, high: float, top: int, bottom: int) -> list[tuple[float, float]]:
    """Place a curve's points between the margins, in pixels; infinite values and NaN are left out."""
    xs = np.linspace(_MARGIN, _WIDTH - _MARGIN, len(values)) if len(values) > 1 else np.array([_WIDTH / 2])
    ys = bottom - (values - low) / ((high - low) or 1.0) * (bottom - top)
    return [(float(x), float(y)) for x, y in zip(xs, ys, strict=True) if np.isfinite(y)]


def loss_curve(losses: Sequence[float], note: str = "") -> Tensor:
    """Draw loss over steps as [1, h, w, 3]: each step as a thin line, the moving mean as a thick one, a note above."""
    picture = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    draw = ImageDraw.Draw(picture)
    values = np.asarray(losses, dtype=np.float64)
    low, high = _finite_range(values)
    top, bottom = _MARGIN, _HEIGHT - _MARGIN
    window = max(1, len(values) // 20)
    padded = np.pad(values, (window // 2, window - 1 - window // 2), mode="edge")
    smooth = np.convolve(padded, np.ones(window) / window, mode="valid")
    draw.line(_points(values, low, high, top, bottom), fill=_FAINT, width=1)
    draw.line(_points(smooth, low, high, top, bottom), fill=_STRONG, width=3)
    for x, y in _points(values, low, high, top, bottom) if len(values) == 1 else ():
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=_STRONG)
    draw.rectangle((_MARGIN, top, _WIDTH - _MARGIN, bottom), outline=_INK)
    draw.text((_MARGIN, top - 16), f"loss {high:.4g}", fill=_INK)
    draw.text((_MARGIN + 160, top - 16), note, fill=_INK)
    draw.text((_MARGIN, bottom + 4), f"{low:.4g}", fill=_INK)
    draw.text((_WIDTH - _MARGIN - 80, bottom + 4), f"{len(losses)} steps", fill=_INK)
    return _image(picture)


def curve_with_frames(curve: Tensor, frames: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Draw a curve [1, h, w, 3] above a row of captioned pictures of equal size."""
    top = Image.fromarray((curve[0] * 255).round().byte().numpy())
    if not frames:
        return top
    side = min(_HEIGHT * 2 // 3, (_WIDTH - _GAP) // len(frames) - _GAP)
    fitted = [(caption, ImageOps.contain(frame, (side, side), Image.Resampling.BICUBIC)) for caption, frame in frames]
    whole = Image.new("RGB", (_WIDTH, _HEIGHT + _CAPTION + max(frame.height for _, frame in fitted) + _GAP), "white")
    whole.paste(top)
    draw = ImageDraw.Draw(whole)
    for column, (caption, frame) in enumerate(fitted):
        left = _GAP + column * (side + _GAP)
        draw.text((left, _HEIGHT + 2), caption, fill="black", font=font_for(caption))
        whole.paste(frame, (left, _HEIGHT + _CAPTION))
    return whole


def frame_curves(curves: Mapping[str, Sequence[float]]) -> Tensor:
    """Draw curves over frames as [1, h, w, 3], one panel below the other. No curves give a blank panel."""
    panel = _HEIGHT // 2
    picture = Image.new("RGB", (_WIDTH, panel * max(len(curves), 1)), "white")
    draw = ImageDraw.Draw(picture)
    for index, (name, numbers) in enumerate(curves.items()):
        values = np.asarray(numbers, dtype=np.float64)
        low, high = _finite_range(values)
        top, bottom = panel * index + _MARGIN // 2 + 8, panel * (index + 1) - _MARGIN // 2
        points = _points(values, low, high, top, bottom)
        draw.line(points, fill=_STRONG, width=2)
        for x, y in points:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=_STRONG)
        draw.rectangle((_MARGIN, top, _WIDTH - _MARGIN, bottom), outline=_INK)
        draw.text((_MARGIN, top - 20), f"{name}: {low:.4g} to {high:.4g}", fill=_INK, font=font_for(name))
    return _image(picture)


def table_over_plot(figures: Sequence[tuple[str, str, str]], plot: Tensor) -> Tensor:
    """Draw rows of name, value and what is good above a plot [1, h, w, 3], as [1, h', w, 3]."""
    row, columns = _CAPTION, (_GAP, 220, 310)
    picture = Image.new("RGB", (plot.shape[2], row * len(figures) + _GAP), "white")
    draw = ImageDraw.Draw(picture)
    for index, cells in enumerate(figures):
        for left, cell, ink in zip(columns, cells, (_INK, _STRONG, _INK), strict=True):
            draw.text((left, index * row + 4), cell, fill=ink, font=font_for(cell))
        draw.line((0, (index + 1) * row, picture.width, (index + 1) * row), fill=_FAINT)
    return torch.cat([_image(picture), plot], 1)


def contact_sheet(rows: Sequence[tuple[str, Tensor]], side: int = 128) -> Tensor:
    """Draw videos as rows of frames, [1, h, w, 3].

    ``rows``: caption and frames [frames, h, w, 3] of each video. Every frame is fitted into ``side`` x ``side`` pixels.
    """
    columns = max(len(frames) for _, frames in rows)
    size = (columns * (side + _GAP) + _GAP, len(rows) * (side + _CAPTION + _GAP) + _GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for row, (caption, frames) in enumerate(rows):
        top = _GAP + row * (side + _CAPTION + _GAP)
        draw.text((_GAP, top + 2), caption, fill="black", font=font_for(caption))
        for column, frame in enumerate(frames):
            raise_if_cancelled()
            sheet.paste(_fitted(frame, side), (_GAP + column * (side + _GAP), top + _CAPTION))
    return _image(sheet)


def _fitted(frame: Tensor, side: int) -> Image.Image:
    picture = Image.fromarray((frame.clamp(0, 1) * 255).round().byte().cpu().numpy())
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    # Enlarging keeps hard pixels; reducing averages them.
    return picture.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)


def check_shape(name: str, frames: Tensor) -> None:
    """Refuse an IMAGE that holds no frames [frames, h, w, 3 or 4] of numbers in 0..1, by shape and type alone."""
    if frames.ndim != 4 or frames.shape[-1] not in (3, 4) or 0 in frames.shape:
        reason = f"shape {list(frames.shape)} is not that of frames [count, height, width, 3]"
        raise Refusal(name, reason, "Connect an IMAGE.")
    if not frames.is_floating_point():
        reason = f"its values are whole numbers ({str(frames.dtype).removeprefix('torch.')})"
        raise Refusal(name, reason, "An IMAGE goes from 0 to 1: convert it and divide by 255.")


def check_frames(name: str, frames: Tensor) -> None:
    """Refuse an IMAGE that holds no frames [frames, h, w, 3 or 4]. ``name``: the input's, for the message."""
    check_shape(name, frames)
    if not torch.isfinite(frames).all():
        raise Refusal(
            name,
            "it holds NaN or infinite values",
            "Check the nodes before this one. The usual cause is a VAE in fp16: start ComfyUI with --fp32-vae.",
        )


def check_mask(mask: Tensor) -> Tensor:
    """Return a MASK as [masks, h, w], float. Raises Refusal for one that is empty or goes beyond 0 to 1."""
    if mask.ndim < 2 or 0 in mask.shape:
        raise Refusal("mask", f"it is empty, its shape is {list(mask.shape)}", "Draw it again.")
    if not torch.isfinite(mask).all():
        raise Refusal("mask", "it holds values that are not finite (NaN or infinity)", "Draw it again.")
    mask = mask.reshape(-1, *mask.shape[-2:]).float()
    low, high = float(mask.min()), float(mask.max())
    if not (-BEYOND <= low and high <= 1 + BEYOND):
        raise Refusal(
            "mask",
            f"it holds values from {low:g} to {high:g}",
            "A mask is 0 where the clip stays and 1 where it changes: scale its values to 0..1.",
        )
    return mask.clamp(0, 1)


def shaded(images: Tensor, mask: Tensor) -> Tensor:
    """Return frames [frames, h, w, 3] dark and grey outside a MASK [1 or frames, h', w']; a fourth channel goes.

    Raises Refusal for a mask of another number of frames.
    """
    mask, images = check_mask(mask), images[..., :3]
    if len(mask) not in (1, len(images)):
        raise Refusal(
            "mask", f"it has {len(mask)} frames, the clip has {len(images)}", "Give one for all, or one each."
        )
    inside = torch.nn.functional.interpolate(mask[:, None], images.shape[1:3])[:, 0, :, :, None].to(images)
    return torch.lerp(images.mean(-1, keepdim=True) / 3, images, inside)


def side_by_side(videos: Sequence[tuple[str, Tensor]]) -> Tensor:
    """Put videos of one size next to each other with captions above, [frames, h', w', 3].

    ``videos``: caption and frames [frames, h, w, 3] of each. Shorter videos hold their last frame. The result's height
    and width are even, as video formats require. Raises Refusal for sizes that differ.
    """
    sizes = {tuple(frames.shape[1:3]) for _, frames in videos}
    if len(sizes) > 1:
        listed = ", ".join(f"{width}x{height}" for height, width in sorted(sizes))
        raise Refusal("source and edits", f"they differ in size ({listed})", "Scale them to one size first.")
    (height, width) = sizes.pop()
    length = max(len(frames) for _, frames in videos)
    whole = (_CAPTION + height + (_CAPTION + height) % 2, len(videos) * (width + _GAP) - _GAP)
    out = torch.ones(length, whole[0], whole[1] + whole[1] % 2, 3)
    for index, (caption, frames) in enumerate(videos):
        left = index * (width + _GAP)
        title = Image.new("RGB", (width, _CAPTION), "white")
        ImageDraw.Draw(title).text((2, 4), caption, fill="black", font=font_for(caption))
        out[:, :_CAPTION, left : left + width] = _image(title)
        held = torch.arange(length).clamp(max=len(frames) - 1)
        out[:, _CAPTION : _CAPTION + height, left : left + width] = frames[held, :, :, :3].float().cpu()
    return out
