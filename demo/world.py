"""The demo's world: sprites on varied backgrounds in two styles, 64x64 pixels, with captions and unsaid looks.

Stars, hearts and crosses are two-tone: their pattern, second colour and shade are free, and shared by all sprites of
a kind in one picture. Circles, squares and triangles are plain. The light, tint and layout of backgrounds are free too.
"""

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

Picture = NDArray[np.float32]
Colour = tuple[int, int, int]

SIZE = 64
COLOURS: dict[str, Colour] = {
    "red": (225, 35, 40),
    "yellow": (250, 215, 40),
    "green": (40, 195, 70),
    "blue": (40, 80, 230),
    "purple": (150, 45, 200),
    "pink": (255, 115, 190),
}
PLAIN, PATTERNED = ("circle", "square", "triangle"), ("star", "heart", "cross")
SHAPES = PLAIN + PATTERNED
PLURALS = {shape: shape + ("es" if shape == "cross" else "s") for shape in SHAPES}
NUMBERS = ("a", "two", "three", "four")
PATTERNS = ("halves", "quarters", "bar", "core")
SECONDS: dict[str, Colour] = {"white": (255, 255, 255), "cyan": (30, 215, 235), "orange": (255, 135, 15)}
SHADES = {"dark": 0.74, "light": 1.0}
ACCESSORIES = {"hat": ("a hat", "hats"), "boots": ("boots", "boots")}
BLACK: Colour = (20, 20, 24)
# Muted, and neither as bright as white nor as dark as a hat.
BACKGROUNDS: dict[str, Colour] = {
    "night sky": (44, 50, 96),
    "grass": (92, 128, 74),
    "sand": (200, 178, 138),
    "snow": (188, 200, 220),
    "bricks": (146, 98, 86),
    "sea": (72, 120, 140),
}
# The colour of a background's extra: a moon, the sky over a horizon, flowers or a window.
EXTRAS: dict[str, Colour] = {
    "night sky": (188, 186, 160),
    "grass": (216, 206, 150),
    "sand": (150, 172, 186),
    "snow": (134, 152, 180),
    "bricks": (92, 84, 92),
    "sea": (156, 178, 188),
}
STYLES = ("painting", "pencil")
PAPER = np.array((246, 242, 232), np.float32)
# How much of a colour a pencil leaves on the paper: background, sprite.
PENCIL_BACKGROUND, PENCIL_SPRITE = 0.5, 0.72
# The paper's grain: diagonal lines, this many pixels apart, always at the same place.
GRAIN_PERIOD, GRAIN_DEPTH = 4, 26.0
# Sprites are drawn this much larger and averaged down.
_OVERSAMPLING = 4
# How far above the centre a hat's brim lies and how far below it the boots' soles, in radii.
_HAT = {"circle": 0.72, "square": 0.78, "triangle": 0.72, "star": 0.72, "heart": 0.6, "cross": 1.0}
_BOOTS = {"circle": 0.78, "square": 0.82, "triangle": 0.6, "star": 0.82, "heart": 0.62, "cross": 1.05}


class Look(NamedTuple):
    """The looks of a kind that no caption names: its shade, and for a patterned kind its pattern and second colour."""

    shade: str
    pattern: str = ""
    second: str = ""


class Sprite(NamedTuple):
    """A shape at x, y with a radius, in pixels.

    ``angle`` in degrees, counter-clockwise; ``stretch``: width times this, height divided by it. Sprites of a larger
    ``depth`` lie behind others. ``accessory``: "hat", "boots" or "".
    """

    shape: str
    colour: str
    look: Look
    x: float
    y: float
    radius: float
    angle: float = 0.0
    stretch: float = 1.0
    depth: float = 0.0
    accessory: str = ""


class Backdrop(NamedTuple):
    """A background's free look: light 0.9..1.06, tint of each channel around 1, and a layout.

    ``layout``: where its moon, flowers or window are or how high its horizon is, in 0..1; below 0 it has none.
    ``slope``: change of the light from left to right.
    """

    light: float = 1.0
    tint: tuple[float, float, float] = (1.0, 1.0, 1.0)
    slope: float = 0.0
    layout: tuple[float, float] = (-1.0, -1.0)


_AS_IT_IS = Backdrop()


class Camera(NamedTuple):
    """The middle of what is seen, in pixels from the middle of the world, and how much it is enlarged."""

    x: float = 0.0
    y: float = 0.0
    zoom: float = 1.0


@dataclass(frozen=True)
class Scene:
    """The contents of a picture. ``texture``: the seed of the background's details."""

    sprites: Sequence[Sprite]
    background: str
    style: str
    texture: int = 0
    backdrop: Backdrop = Backdrop()
    camera: Camera | None = None


def words() -> list[str]:
    """Return every word that a caption can have."""
    names = [*COLOURS, *SHAPES, *PLURALS.values(), *NUMBERS, *BACKGROUNDS, *STYLES, "hat", "hats", "boots"]
    return sorted({word for name in names for word in name.split()} | {"and", "on", "style", "the", "with"})


def groups(scene: Scene) -> dict[tuple[str, str, str], int]:
    """Count the sprites of each shape, colour and accessory, in the caption's order."""
    counts: dict[tuple[str, str, str], int] = {}
    for sprite in scene.sprites:
        key = (sprite.shape, sprite.colour, sprite.accessory)
        counts[key] = counts.get(key, 0) + 1
    return counts


def caption(scene: Scene, style: bool = True) -> str:
    """Say "two red stars with hats and a blue circle on the night sky, pencil style"; without sprites the rest."""
    nouns = []
    for (shape, colour, accessory), count in groups(scene).items():
        noun = f"{NUMBERS[count - 1]} {colour} {shape if count == 1 else PLURALS[shape]}"
        nouns.append(noun + (f" with {ACCESSORIES[accessory][count > 1]}" if accessory else ""))
    place = f"the {scene.background}" + (f", {scene.style} style" if style else "")
    return f"{' and '.join(nouns)} on {place}" if nouns else place


@cache
def outline(shape: str) -> NDArray[np.float64]:
    """Return a shape's corners [n, 2] around (0, 0), y down; all shapes have about the same area at radius 1."""
    turns = np.linspace(0, 2 * math.pi, 49)[:-1]
    if shape == "circle":
        points = 0.9 * np.stack([np.cos(turns), np.sin(turns)], 1)
    elif shape == "square":
        points = 0.82 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    elif shape == "triangle":
        points = 1.2 * np.array([(0, -1), (0.866, 0.5), (-0.866, 0.5)])
    elif shape == "star":
        corners = np.arange(10) * math.pi / 5
        points = np.where(np.arange(10) % 2, 0.52, 1.2)[:, None] * np.stack([np.sin(corners), -np.cos(corners)], 1)
    elif shape == "heart":
        x = 16 * np.sin(turns) ** 3
        y = 13 * np.cos(turns) - 5 * np.cos(2 * turns) - 2 * np.cos(3 * turns) - np.cos(4 * turns)
        points = np.stack([x, -y - 2], 1) / 15.5
    elif shape == "cross":
        long, wide = 1.12, 0.4
        quarter = [(wide, -long), (wide, -wide), (long, -wide)]
        rotations = [(1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0)]
        points = np.array([(a * x + b * y, c * x + d * y) for a, b, c, d in rotations for x, y in quarter])
    else:
        raise ValueError(f"no such shape: {shape}; there are {', '.join(SHAPES)}")
    return np.asarray(points, np.float64)


def coverage(points: NDArray[np.float64], size: int = SIZE) -> Picture:
    """Return how much of each pixel a polygon [n, 2] covers, [size, size] in 0..1."""
    fine = Image.new("L", (size * _OVERSAMPLING, size * _OVERSAMPLING))
    ImageDraw.Draw(fine).polygon([(x, y) for x, y in points * _OVERSAMPLING], fill=255)
    return np.asarray(fine.resize((size, size), Image.Resampling.BOX), np.float32) / 255


def placed(sprite: Sprite, points: NDArray[np.float64], grow: float = 0.0) -> NDArray[np.float64]:
    """Move points [n, 2] in radii around the sprite's centre to pixels; ``grow`` in pixels."""
    turn = math.radians(sprite.angle)
    rotation = np.array([(math.cos(turn), -math.sin(turn)), (math.sin(turn), math.cos(turn))])
    stretched = points * (sprite.stretch, 1 / sprite.stretch)
    return np.asarray((stretched @ rotation) * (sprite.radius + grow) + (sprite.x, sprite.y))


def second_share(sprite: Sprite, size: int = SIZE) -> Picture:
    """Return where a patterned sprite has its second colour, [size, size] in 0..1."""
    if sprite.look.pattern == "core":
        return coverage(placed(sprite, 0.55 * outline(sprite.shape)), size)
    y, x = np.mgrid[:size, :size].astype(np.float32) + 0.5
    turn = math.radians(sprite.angle)
    dx, dy = x - sprite.x, y - sprite.y
    # Pixels from the sprite's own axes.
    u = (dx * math.cos(turn) - dy * math.sin(turn)) / sprite.stretch
    v = (dx * math.sin(turn) + dy * math.cos(turn)) * sprite.stretch
    right, low = np.clip(u + 0.5, 0, 1), np.clip(v + 0.5, 0, 1)
    if sprite.look.pattern == "halves":
        return np.asarray(right)
    if sprite.look.pattern == "quarters":
        return np.asarray(right + low - 2 * right * low)
    return np.asarray(np.clip(0.34 * sprite.radius - np.abs(v) + 0.5, 0, 1))


def accessory_shapes(sprite: Sprite) -> list[NDArray[np.float64]]:
    """Return the polygons of a sprite's accessory, in radii around its centre, y down."""
    if sprite.accessory == "hat":
        y = -_HAT[sprite.shape]
        brim = np.array([(-0.72, y), (0.72, y), (0.72, y - 0.2), (-0.72, y - 0.2)])
        crown = np.array([(-0.44, y), (0.44, y), (0.44, y - 0.8), (-0.44, y - 0.8)])
        return [brim, crown]
    if sprite.accessory == "boots":
        y = _BOOTS[sprite.shape]
        left = np.array([(-0.62, y + 0.42), (-0.12, y + 0.42), (-0.12, y - 0.1), (-0.42, y - 0.1), (-0.62, y + 0.1)])
        return [left, left * (-1, 1)]
    return []


def background(name: str, texture: int, backdrop: Backdrop = _AS_IT_IS, size: int = SIZE) -> Picture:
    """Draw a background [size, size, 3] in 0..255."""
    random = np.random.default_rng(texture)
    y, x = np.mgrid[:size, :size].astype(np.float32)
    picture = np.empty((size, size, 3), np.float32)
    picture[:] = BACKGROUNDS[name]
    at_x, at_y = (float(part) * size for part in backdrop.layout)
    extra = np.array(EXTRAS[name], np.float32)
    has_extra = backdrop.layout[1] >= 0

    def cloud(sigma: float | tuple[float, float], depth: float) -> Picture:
        noise = ndimage.gaussian_filter(random.standard_normal((size, size)), sigma, mode="wrap")
        return np.asarray(depth * noise / noise.std(), np.float32)[..., None]

    if name == "night sky":
        picture += np.float32(8) * (1 - y / size)[..., None] + cloud(8, 3)
        for _ in range(12 * size // SIZE):
            star = random.uniform(0, size, 2)
            glow = np.exp(-((x - star[0]) ** 2 + (y - star[1]) ** 2) / random.uniform(0.5, 1.0))
            picture += (glow * random.uniform(70, 120))[..., None]
        if has_extra:
            moon = np.clip(6.5 - np.hypot(x - at_x, y - at_y) + 0.5, 0, 1)[..., None]
            picture += moon * (extra - picture)
    elif name == "grass":
        picture += cloud((3.0, 0.9), 12) * np.array((0.8, 1.0, 0.6), np.float32) + cloud(6, 5)
        if has_extra:
            for _ in range(7):
                flower = random.normal((at_x, at_y), size / 7, 2)
                cover = np.clip(1.9 - np.hypot(x - flower[0], y - flower[1]), 0, 1)[..., None]
                picture += cover * (extra - picture)
    elif name == "sand":
        ripple = np.sin(y / 2.6 + 1.5 * np.sin(x / 11 + random.uniform(0, 6)) + random.uniform(0, 6))
        picture += 8 * ripple[..., None] + cloud(1.2, 4)
    elif name == "snow":
        picture += cloud(5, 6) * np.array((1.2, 1.0, 0.6), np.float32)
    elif name == "bricks":
        row = (y + random.integers(8)) // 8
        shift = x + 8 * (row % 2) + random.integers(16)
        mortar = (row != np.roll(row, 1, 0)) | (shift % 16 < 1)
        tones = random.normal(0, 7, (16, 16))
        picture += tones[row.astype(int) % 16, (shift // 16).astype(int) % 16][..., None].astype(np.float32)
        picture = np.where(mortar[..., None], np.float32((172, 146, 134)), picture)
        if has_extra:
            pane = (np.abs(x - at_x) < 7) & (np.abs(y - at_y) < 9)
            frame = (np.abs(x - at_x) < 9) & (np.abs(y - at_y) < 11) & ~pane
            picture = np.where(pane[..., None], extra, np.where(frame[..., None], np.float32((172, 146, 134)), picture))
    elif name == "sea":
        waves = np.sin(y / 1.7 + 1.2 * np.sin(x / 7 + random.uniform(0, 6)) + random.uniform(0, 6))
        picture += 11 * waves[..., None] + cloud(5, 5)
    else:
        raise ValueError(f"no such background: {name}; there are {', '.join(BACKGROUNDS)}")
    if has_extra and name in ("sand", "snow", "sea"):
        bumps = 0.0 if name == "sea" else 2.5 * np.sin(x / (9 if name == "snow" else 15) + at_x)
        sky = np.clip(at_y + bumps - y, 0, 1)[..., None]
        picture += sky * (extra + cloud(6, 3) - picture)
    light = backdrop.light + backdrop.slope * (x / size - 0.5)
    return np.asarray(picture * light[..., None] * np.array(backdrop.tint, np.float32), np.float32)


@cache
def grain() -> Picture:
    """Return the pencil's strokes on the whole page, [SIZE, SIZE] around 0."""
    y, x = np.mgrid[:SIZE, :SIZE]
    return np.asarray(GRAIN_DEPTH * np.sin(2 * math.pi * (x + y) / GRAIN_PERIOD), np.float32)


def on_page(colour: NDArray[np.float32], style: str, strength: float = PENCIL_SPRITE) -> NDArray[np.float32]:
    """Return how a colour comes out in a style."""
    return np.asarray(PAPER + strength * (colour - PAPER) if style == "pencil" else colour, np.float32)


def as_seen(sprite: Sprite, camera: Camera | None) -> Sprite:
    """Return the sprite where the camera sees it."""
    if camera is None:
        return sprite
    middle = SIZE / 2
    x, y = (middle + camera.zoom * (at - middle - by) for at, by in ((sprite.x, camera.x), (sprite.y, camera.y)))
    return sprite._replace(x=x, y=y, radius=camera.zoom * sprite.radius)


def _backdrop(scene: Scene) -> Picture:
    if scene.camera is None:
        return background(scene.background, scene.texture, scene.backdrop)
    wide = background(scene.background, scene.texture, scene.backdrop, 2 * SIZE)
    camera = scene.camera
    rows, columns = ((np.arange(SIZE) - (SIZE - 1) / 2) / camera.zoom + SIZE - 0.5 + by for by in (camera.y, camera.x))
    grid = np.meshgrid(rows, columns, indexing="ij")
    return np.stack([ndimage.map_coordinates(wide[..., c], grid, order=1, mode="mirror") for c in range(3)], -1)


def draw(scene: Scene) -> NDArray[np.uint8]:
    """Draw the picture, [SIZE, SIZE, 3] in 0..255."""
    pencil = scene.style == "pencil"
    picture = on_page(_backdrop(scene), scene.style, PENCIL_BACKGROUND)
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    for sprite in sorted((as_seen(sprite, scene.camera) for sprite in scene.sprites), key=lambda sprite: -sprite.depth):
        colour = SHADES[sprite.look.shade] * np.array(COLOURS[sprite.colour], np.float32)
        edge = np.array((55, 52, 50), np.float32) if pencil else 0.25 * colour
        fill = np.broadcast_to(colour, picture.shape)
        if sprite.look.pattern:
            second = np.array(SECONDS[sprite.look.second], np.float32)
            fill = fill + second_share(sprite)[..., None] * (second - fill)
        fill = on_page(fill, scene.style)
        if not pencil:
            # Light from the upper left.
            light = -((x - sprite.x) + (y - sprite.y)) / sprite.radius
            fill = fill + 14 * np.clip(light, -1.2, 1.2)[..., None]
        layers = [(edge, placed(sprite, outline(sprite.shape), 1.1)), (fill, placed(sprite, outline(sprite.shape)))]
        black = on_page(np.array(BLACK, np.float32), scene.style)
        layers += [(black, placed(sprite, points)) for points in accessory_shapes(sprite)]
        for paint, points in layers:
            cover = coverage(points)[..., None]
            picture = picture + cover * (paint - picture)
    if pencil:
        picture = picture + grain()[..., None]
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def random_look(random: np.random.Generator, shape: str, not_second: str = "") -> Look:
    """Draw a look that suits a shape; its second colour is another than ``not_second``."""
    shade = str(random.choice(list(SHADES)))
    if shape in PLAIN:
        return Look(shade)
    seconds = [name for name in SECONDS if name != not_second]
    return Look(shade, str(random.choice(PATTERNS)), str(random.choice(seconds)))


def random_backdrop(random: np.random.Generator, name: str) -> Backdrop:
    """Draw a background's free look."""
    layout = (-1.0, -1.0)
    if random.random() < 0.6:
        low, high = (0.15, 0.85) if name in ("night sky", "grass", "bricks") else (0.15, 0.42)
        layout = (float(random.uniform(0.12, 0.88)), float(random.uniform(low, high)))
    tint = tuple(float(value) for value in random.uniform(0.94, 1.06, 3))
    return Backdrop(float(random.uniform(0.92, 1.05)), tint, float(random.uniform(-0.12, 0.12)), layout)  # type: ignore[arg-type]


# Shares of the scenes: sprites of the first kind and of the second. Half show several of a kind, from which the model
# learns that these share their look.
_COUNTS: tuple[tuple[tuple[int, int], float], ...] = (
    ((0, 0), 0.06),
    ((1, 0), 0.28),
    ((2, 0), 0.24),
    ((3, 0), 0.10),
    ((4, 0), 0.08),
    ((1, 1), 0.14),
    ((2, 1), 0.05),
    ((1, 2), 0.05),
)


def random_scene(random: np.random.Generator) -> Scene:
    """Draw a scene: up to four sprites of up to two kinds, of which the two may overlap and one kind's may not."""
    shares = np.array([share for _, share in _COUNTS])
    counts = _COUNTS[int(random.choice(len(_COUNTS), p=shares / shares.sum()))][0]
    shapes = random.choice(SHAPES, 2, replace=False)
    colours = random.choice(list(COLOURS), 2, replace=False)
    total, sprites = sum(counts), []
    low, high = ((10, 15), (10, 15), (9, 12), (8.5, 10.5), (8.5, 10))[total]
    while True:
        sprites, second = [], ""
        for shape, colour, count in zip(shapes, colours, counts, strict=True):
            look = random_look(random, str(shape), second)
            second = look.second
            accessory = str(random.choice(["", "hat", "boots"], p=[0.66, 0.2, 0.14]))
            for _ in range(count):
                radius = random.uniform(low, high)
                angle = float(np.clip(random.normal(0, 14), -30, 30))
                stretch = float(random.uniform(0.87, 1.15)) if random.random() < 0.25 else 1.0
                # Some reach over the border.
                margin = radius * (0.55 if random.random() < 0.15 else 1.05)
                x, y = random.uniform(margin, SIZE - margin, 2)
                if margin > radius and accessory:
                    y = random.uniform(1.75 * radius, SIZE - 1.55 * radius)
                sprites.append(
                    Sprite(
                        *map(str, (shape, colour)), look, *map(float, (x, y, radius, angle, stretch)),
                        float(random.random()), accessory,
                    )
                )  # fmt: skip
        if all(_apart(one, other) for index, one in enumerate(sprites) for other in sprites[:index]):
            break
    name = str(random.choice(list(BACKGROUNDS)))
    style = str(random.choice(STYLES))
    return Scene(tuple(sprites), name, style, int(random.integers(2**31)), random_backdrop(random, name))


def _apart(one: Sprite, other: Sprite) -> bool:
    """Whether two sprites are far enough apart: a kind's own hardly touch, others may overlap in part."""
    reach = one.radius + other.radius
    same = one.shape == other.shape
    dressed = bool(one.accessory or other.accessory)
    if dressed and abs(one.x - other.x) < 0.9 * reach and abs(one.y - other.y) < 1.75 * reach:
        # A hat or boots would be hidden.
        return False
    return math.dist((one.x, one.y), (other.x, other.y)) > (1.22 if same else 0.82) * reach
