"""Says what a picture of the demo's world shows, from its pixels alone: thresholds, mean colours, overlap of shapes.

Nothing here was trained; the palette and the outlines are those that the world is drawn with.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import sprites
import world_checker
from numpy.typing import NDArray
from scipy import ndimage

# Least number of pixels that count as a sprite: a fifth of the smallest one drawn.
_LEAST_AREA = 40
_RASTER = 40
_RASTER_RADIUS = 13.0


class Seen(NamedTuple):
    """One sprite as found: its centre in pixels, area in pixels, and mean colour in 0..255."""

    shape: str
    colour: str
    x: float
    y: float
    area: float
    rgb: tuple[float, float, float]


class Verdict(NamedTuple):
    """The content of a picture; sprites by falling area."""

    style: str
    background: str
    sprites: tuple[Seen, ...]


def look(picture: NDArray[np.uint8]) -> Verdict:
    """Judge a picture [SIZE, SIZE, 3] in 0..255."""
    pixels = picture.astype(np.float32)
    style = "pencil" if world_checker.grain_depth(pixels) > 0.4 * sprites.GRAIN_DEPTH else "painting"
    smooth = pixels
    if style == "pencil":
        # Over one period of the grain it averages out.
        smooth = np.asarray(ndimage.uniform_filter(pixels, (sprites.GRAIN_PERIOD, 1, 1), mode="nearest"))
    found = _sprites(smooth, style)
    free = np.ones(picture.shape[:2], bool)
    for mask, _ in found:
        free &= ~ndimage.binary_dilation(mask, iterations=4)
    if not free.any():
        free[:] = True
    mean = np.median(smooth[free], axis=0)
    distances = {
        name: float(np.abs(mean - _page(colour, style, sprites.PENCIL_BACKGROUND)).sum())
        for name, colour in sprites.BACKGROUNDS.items()
    }
    return Verdict(style, min(distances, key=lambda name: distances[name]), tuple(seen for _, seen in found))


def _page(colour: sprites.Colour, style: str, strength: float) -> NDArray[np.float32]:
    """How a colour comes out on the page."""
    value = np.array(colour, np.float32)
    return sprites.PAPER + strength * (value - sprites.PAPER) if style == "pencil" else value


def _sprites(pixels: NDArray[np.float32], style: str) -> list[tuple[NDArray[np.bool_], Seen]]:
    """Blobs of vivid colour with their descriptions, by falling area."""
    names = list(sprites.COLOURS)
    palette = np.stack([_page(colour, style, sprites.PENCIL_SPRITE) for colour in sprites.COLOURS.values()])
    blurred = ndimage.gaussian_filter(pixels, (0.6, 0.6, 0))
    chroma = blurred.max(-1) - blurred.min(-1)
    vivid = chroma > (70.0 if style == "pencil" else 95.0)
    nearest = _nearest_hue(blurred, palette)
    found = []
    for index, name in enumerate(names):
        mask = ndimage.binary_opening(vivid & (nearest == index), iterations=1)
        labels, count = ndimage.label(mask)
        for label in range(1, count + 1):
            blob = ndimage.binary_fill_holes(labels == label)
            area = int(blob.sum())
            if area >= _LEAST_AREA:
                y, x = ndimage.center_of_mass(blob)
                rgb = tuple(float(value) for value in pixels[blob].mean(0))
                found.append((blob, Seen(_shape(blob), name, float(x) + 0.5, float(y) + 0.5, float(area), rgb)))
    return sorted(found, key=lambda entry: -entry[1].area)


def _nearest_hue(pixels: NDArray[np.float32], palette: NDArray[np.float32]) -> NDArray[np.intp]:
    """Index of the palette's colour whose direction away from grey is nearest: shading does not matter."""

    def direction(colours: NDArray[np.float32]) -> NDArray[np.float32]:
        away = colours - colours.mean(-1, keepdims=True)
        return np.asarray(away / (np.linalg.norm(away, axis=-1, keepdims=True) + 1e-6), np.float32)

    # Pink is a light red-purple, purple a dark one: lightness breaks the tie that their hues nearly are.
    hue = direction(pixels) @ direction(palette).T
    light = pixels.mean(-1, keepdims=True) - palette.mean(-1)
    return np.asarray((hue - 0.002 * np.abs(light)).argmax(-1))


@cache
def _templates() -> tuple[tuple[str, ...], NDArray[np.float32]]:
    """Every shape at every 6 degrees, as flat rasters of equal area."""
    names, rasters = [], []
    for shape in sprites.SHAPES:
        for angle in range(0, 360, 6):
            centre = _RASTER / 2
            sprite = sprites.Sprite(shape, "", centre, centre, _RASTER_RADIUS, angle)
            rasters.append(_normalised(sprites.coverage(sprite, _RASTER) > 0.5).ravel())
            names.append(shape)
    return tuple(names), np.stack(rasters)


def _normalised(mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """A mask moved and scaled to the raster's middle and to a common area, [_RASTER, _RASTER] in 0..1."""
    scale = np.sqrt(mask.sum() / (np.pi * _RASTER_RADIUS**2 * 0.8))
    centre = np.array(ndimage.center_of_mass(mask))
    offset = centre - scale * (_RASTER - 1) / 2
    soft = ndimage.affine_transform(mask.astype(np.float32), (scale, scale), offset, (_RASTER, _RASTER), order=1)
    return np.asarray(np.clip((soft - 0.5) * 4 * max(scale, 0.5) + 0.5, 0, 1), np.float32)


def _shape(mask: NDArray[np.bool_]) -> str:
    """The shape whose template overlaps best (intersection over union)."""
    names, rasters = _templates()
    flat = _normalised(mask).ravel()
    both = np.minimum(rasters, flat).sum(1)
    either = np.maximum(rasters, flat).sum(1)
    return names[int((both / either).argmax())]
