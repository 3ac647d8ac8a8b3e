"""The demo's world: sprites on textured backgrounds in two drawing styles, 64x64 pixels, with captions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage
from world import (
    COLOURS,
    GRAIN_DEPTH,
    GRAIN_PERIOD,
    PAPER,
    PENCIL_BACKGROUND,
    PENCIL_SPRITE,
    SIZE,
    STYLES,
    Colour,
    outline,
)

# Sprites are drawn this much larger and averaged down.
_OVERSAMPLING = 4

Picture = NDArray[np.float32]

# Muted on purpose: the colour of a sprite can be told from any of them.
BACKGROUNDS: dict[str, Colour] = {
    "night sky": (30, 34, 62),
    "grass": (92, 128, 74),
    "sand": (205, 184, 142),
    "snow": (232, 237, 243),
    "bricks": (146, 98, 86),
    "sea": (72, 120, 140),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
_OTHER_WORDS = ("a", "an", "and", "on", "in", "the", "style")
# How light a sprite's colour is: its caption does not say, as no sentence says everything of what it is about.
SHADES = (0.8, 1.08)


class Sprite(NamedTuple):
    """A shape at x, y with a radius, in pixels; ``angle`` in degrees, counter-clockwise; ``shade`` times its colour."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    angle: float = 0.0
    shade: float = 1.0


@dataclass(frozen=True)
class Scene:
    """A picture to draw. ``texture``: the seed of the background's details. Later sprites lie on top."""

    sprites: Sequence[Sprite]
    background: str
    style: str
    texture: int = 0


def caption(scene: Scene, sizes: bool = False) -> str:
    """ "a red star on the night sky, pencil style"; with ``sizes`` a big or a small one."""

    def noun(sprite: Sprite) -> str:
        size = ("big " if sprite.radius >= 13 else "small " if sprite.radius < 10.5 else "") if sizes else ""
        return f"a {size}{sprite.colour} {sprite.shape}"

    return f"{' and '.join(map(noun, scene.sprites))} on the {scene.background}, {scene.style} style"


def training_caption(scene: Scene, chance: float) -> str:
    """The caption with sizes in 40 % of the cases; ``chance``: drawn from 0..1."""
    return caption(scene, chance < 0.4)


def words() -> list[str]:
    """Every word that a caption can have."""
    names = [*COLOURS, *SHAPES, *BACKGROUNDS, *STYLES]
    return sorted({word for name in names for word in name.split()} | {"big", "small", *_OTHER_WORDS})


def coverage(sprite: Sprite, size: int = SIZE, grow: float = 0.0) -> Picture:
    """How much of each pixel the sprite covers, [size, size] in 0..1; ``grow`` in pixels."""
    turn = math.radians(sprite.angle)
    rotation = np.array([(math.cos(turn), -math.sin(turn)), (math.sin(turn), math.cos(turn))])
    points = (outline(sprite.shape) @ rotation) * (sprite.radius + grow) + (sprite.x, sprite.y)
    fine = Image.new("L", (size * _OVERSAMPLING, size * _OVERSAMPLING))
    ImageDraw.Draw(fine).polygon([(x, y) for x, y in points * _OVERSAMPLING], fill=255)
    return np.asarray(fine.resize((size, size), Image.Resampling.BOX), np.float32) / 255


def background(name: str, texture: int) -> Picture:
    """A textured background [SIZE, SIZE, 3] in 0..255."""
    random = np.random.default_rng(texture)
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    picture = np.empty((SIZE, SIZE, 3), np.float32)
    picture[:] = BACKGROUNDS[name]

    def cloud(sigma: float | tuple[float, float], depth: float) -> Picture:
        noise = ndimage.gaussian_filter(random.standard_normal((SIZE, SIZE)), sigma, mode="wrap")
        return np.asarray(depth * noise / noise.std(), np.float32)[..., None]

    if name == "night sky":
        picture += np.float32(10) * (1 - y / SIZE)[..., None] + cloud(8, 3)
        for _ in range(14):
            at = random.uniform(0, SIZE, 2)
            glow = np.exp(-((x - at[0]) ** 2 + (y - at[1]) ** 2) / random.uniform(0.5, 1.2))
            picture += (glow * random.uniform(90, 170))[..., None]
    elif name == "grass":
        picture += cloud((3.0, 0.9), 13) * np.array((0.8, 1.0, 0.6), np.float32) + cloud(6, 5)
    elif name == "sand":
        ripple = np.sin(y / 2.6 + 1.5 * np.sin(x / 11 + random.uniform(0, 6)) + random.uniform(0, 6))
        picture += 9 * ripple[..., None] + cloud(1.2, 5)
    elif name == "snow":
        picture += cloud(5, 7) * np.array((1.2, 1.0, 0.6), np.float32)
    elif name == "bricks":
        row = (y + random.integers(8)) // 8
        shift = x + 8 * (row % 2) + random.integers(16)
        mortar = ((y + 0) % 8 < 1.5) & False | ((row != np.roll(row, 1, 0)) | (shift % 16 < 1))
        tones = random.normal(0, 8, (16, 16))
        picture += tones[row.astype(int) % 16, (shift // 16).astype(int) % 16][..., None].astype(np.float32)
        picture = np.where(mortar[..., None], np.float32((176, 150, 138)), picture)
    elif name == "sea":
        waves = np.sin(y / 1.7 + 1.2 * np.sin(x / 7 + random.uniform(0, 6)) + random.uniform(0, 6))
        picture += 13 * waves[..., None] + cloud(5, 5)
    return picture


@cache
def grain() -> Picture:
    """The pencil's strokes on the whole page, [SIZE, SIZE] around 0."""
    y, x = np.mgrid[:SIZE, :SIZE]
    return np.asarray(GRAIN_DEPTH * np.sin(2 * math.pi * (x + y) / GRAIN_PERIOD), np.float32)


def draw(scene: Scene) -> NDArray[np.uint8]:
    """The picture, [SIZE, SIZE, 3] in 0..255."""
    pencil = scene.style == "pencil"
    picture = background(scene.background, scene.texture)
    if pencil:
        picture = PAPER + PENCIL_BACKGROUND * (picture - PAPER)
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    for sprite in scene.sprites:
        colour = sprite.shade * np.array(COLOURS[sprite.colour], np.float32)
        edge = 0.25 * colour if not pencil else np.array((55, 52, 50), np.float32)
        if pencil:
            fill = np.broadcast_to(PAPER + PENCIL_SPRITE * (colour - PAPER), picture.shape)
        else:
            # Light from the upper left.
            light = -((x - sprite.x) + (y - sprite.y)) / sprite.radius
            fill = colour + 18 * np.clip(light, -1.2, 1.2)[..., None]
        for paint, grow in ((edge, 1.1), (fill, 0.0)):
            cover = coverage(sprite, grow=grow)[..., None]
            picture = picture + cover * (paint - picture)
    if pencil:
        picture = picture + grain()[..., None]
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def hardness(first: bool) -> dict[str, float]:
    """More of the scenes are hard ones after the first cycle; the prompts that are asked have a quarter of pairs."""
    return {"pairs": 0.25 if first else 0.4}


def random_scene(random: np.random.Generator, pairs: float = 0.25) -> Scene:
    """One sprite, or in a share ``pairs`` of the scenes two of different colour and shape that hardly touch."""
    count = 2 if random.random() < pairs else 1
    shapes = random.choice(SHAPES, 2, replace=False)
    colours = random.choice(list(COLOURS), 2, replace=False)
    while True:
        sprites = []
        for shape, colour in zip(shapes[:count], colours[:count], strict=True):
            radius = random.uniform(9, 15) if count == 1 else random.uniform(9, 12)
            angle = float(np.clip(random.normal(0, 20), -45, 45))
            x, y = random.uniform(radius, SIZE - radius, 2)
            shade = float(random.uniform(*SHADES))
            sprites.append(Sprite(str(shape), str(colour), float(x), float(y), float(radius), angle, shade))
        apart = math.dist(sprites[0][2:4], sprites[-1][2:4])
        if count == 1 or apart > 0.9 * (sprites[0].radius + sprites[1].radius):
            break
    background_name = str(random.choice(list(BACKGROUNDS)))
    return Scene(sprites, background_name, str(random.choice(STYLES)), int(random.integers(2**31)))
