"""Clips of the world with known motion, the edits that are asked of them, and what an edited frame gets right."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import checker
import numpy as np
import torch
import world
from torch import Tensor
from world import Backdrop, Camera, Look, Scene, Sprite

FPS = 8.0
Path = Callable[[float], dict[str, float]]


@dataclass(frozen=True)
class Clip:
    """A scene in motion: one scene per frame. ``held_out``: no setting is ever chosen on it."""

    name: str
    scenes: tuple[Scene, ...]
    held_out: bool = False

    @property
    def prompt(self) -> str:
        """The sentence that describes it."""
        return world.caption(self.scenes[0])

    def images(self) -> Tensor:
        """Draw the frames, [frames, SIZE, SIZE, 3] in 0..1."""
        return torch.from_numpy(np.stack([world.draw(scene) for scene in self.scenes])).float() / 255

    def thinned(self, frames: int) -> Clip:
        """Return the clip with at most this many frames, at equal distances, the first and the last among them."""
        if len(self.scenes) <= frames:
            return self
        chosen = np.linspace(0, len(self.scenes) - 1, frames).round().astype(int)
        return replace(self, scenes=tuple(self.scenes[index] for index in chosen))


@dataclass(frozen=True)
class Edit:
    """A change of a clip: ``scenes`` are what its frames should then show.

    A look that the edit leaves open is drawn in ``scenes`` as one of many: `frame_right` does not ask for it.
    """

    kind: str
    scenes: tuple[Scene, ...]

    @property
    def prompt(self) -> str:
        """The sentence to sample with."""
        return world.caption(self.scenes[0])


class FrameRight(NamedTuple):
    """The parts of a frame that are right: shares in 0..1, except ``count`` (yes or no) and ``off`` (pixels)."""

    shape: float
    colour: float
    accessory: float
    background: float
    style: float
    count: bool
    off: float

    @property
    def everything(self) -> bool:
        """Whether nothing is wrong, wherever the sprites are."""
        return self.count and min(self.shape, self.colour, self.accessory, self.background, self.style) == 1


class Match(NamedTuple):
    """A sprite that a frame should show, where the camera sees it, and the one that is seen in its place.

    ``index``: in the scene. ``whole``: whether nearly all of it is in the picture, not behind others; ``dressed``:
    whether the place of its accessory is.
    """

    index: int
    sprite: Sprite
    seen: checker.Seen | None
    whole: bool
    dressed: bool

    @property
    def of_kind(self) -> bool:
        """Whether the sprite that is seen has the shape and the colour that are wanted."""
        return self.seen is not None and self.seen.kind[:2] == (self.sprite.shape, self.sprite.colour)


def frame_right(scene: Scene, picture: np.ndarray) -> FrameRight:
    """Hold a frame [SIZE, SIZE, 3] in 0..255 against the scene that it should show."""
    return verdict_right(scene, checker.look(picture))


def verdict_right(scene: Scene, verdict: checker.Verdict) -> FrameRight:
    """Hold what the checker sees in a frame against the scene that it should show.

    A sprite that none is left for is wrong in everything, and off by half the picture.
    """
    shape, colour, accessory, off = [], [], [], []
    found = matches(scene, verdict)
    for _, sprite, seen, _, dressed in found:
        shape.append(seen is not None and seen.shape == sprite.shape)
        colour.append(seen is not None and seen.colour == sprite.colour)
        if dressed:
            accessory.append(seen is not None and seen.accessory == sprite.accessory)
        off.append(_apart(seen, sprite) if seen else world.SIZE / 2)
    parts = (float(np.mean(values)) if values else 1.0 for values in (shape, colour, accessory))
    background, style = float(verdict.background == scene.background), float(verdict.style == scene.style)
    most = sum(body > 0.03 for _, body, _ in _in_view(scene))
    count = len(found) <= len(verdict.sprites) <= most
    return FrameRight(*parts, background, style, count, float(np.mean(off)) if off else 0.0)


def matches(scene: Scene, verdict: checker.Verdict) -> list[Match]:
    """Give each sprite that is at least half in the picture the nearest one that is seen, of its own kind first."""
    left, found = list(verdict.sprites), []
    for index, (sprite, body, worn) in enumerate(_in_view(scene)):
        if body < 0.5:
            continue
        seen = min(
            left,
            key=lambda one: (one.kind[:2] != (sprite.shape, sprite.colour), _apart(one, sprite)),  # noqa: B023
            default=None,
        )
        if seen is not None:
            left.remove(seen)
        found.append(Match(index, sprite, seen, body >= 0.9, worn >= 0.7))
    return found


@lru_cache(maxsize=4096)
def _in_view(scene: Scene) -> list[tuple[Sprite, float, float]]:
    """Return each sprite where the camera sees it, and the visible shares of it and of its accessory's place."""
    placed = [world.as_seen(one, scene.camera) for one in scene.sprites]
    return [(one, *_visible(one, placed)) for one in placed]


def _apart(seen: checker.Seen, sprite: Sprite) -> float:
    return math.dist((seen.x, seen.y), (sprite.x, sprite.y))


def _kind(sprite: Sprite) -> tuple[str, str, str]:
    return sprite.shape, sprite.colour, sprite.accessory


def _visible(sprite: Sprite, sprites: Sequence[Sprite]) -> tuple[float, float]:
    """Return the shares of a sprite and of its accessory that are in the picture and behind no other sprite.

    Without an accessory the second share is that of the place where none must be, above the sprite.
    """
    # A canvas that holds the sprite wherever it is.
    size, middle = 2 * world.SIZE, world.SIZE / 2

    def cover(one: Sprite, points: np.ndarray) -> np.ndarray:
        return world.coverage(world.placed(one._replace(x=one.x + middle, y=one.y + middle), points), size) > 0.5

    free = np.zeros((size, size), bool)
    free[world.SIZE // 2 : -world.SIZE // 2, world.SIZE // 2 : -world.SIZE // 2] = True
    for other in sprites:
        if other.depth < sprite.depth:
            free &= ~cover(other, world.outline(other.shape))
    body = cover(sprite, world.outline(sprite.shape))
    place = sprite if sprite.accessory else sprite._replace(accessory="hat")
    worn = np.any([cover(place, points) for points in world.accessory_shapes(place)], axis=0)
    return tuple(float((mask & free).sum() / max(mask.sum(), 1)) for mask in (body, worn))  # type: ignore[return-value]


def _sprite(colour: str, shape: str, radius: float = 12.0, look: Look | None = None, **more: object) -> Sprite:
    plain = Look("light") if shape in world.PLAIN else Look("light", "halves", "cyan")
    sprite = Sprite(shape, colour, look or plain, world.SIZE / 2, world.SIZE / 2, radius)
    return sprite._replace(**more)  # type: ignore[arg-type]


def _line(x0: float, y0: float, x1: float, y1: float) -> Path:
    return lambda t: {"x": x0 + t * (x1 - x0), "y": y0 + t * (y1 - y0)}


def _still(x: float, y: float) -> Path:
    return lambda t: {"x": x, "y": y}


def _arc(t: float) -> dict[str, float]:
    return {"x": 14 + 36 * t, "y": 46 - 26 * math.sin(math.pi * t)}


def _bounce(t: float) -> dict[str, float]:
    return {"x": 15 + 34 * t, "y": 46 - 26 * abs(math.cos(math.pi * 1.5 * t))}


def _circle(t: float) -> dict[str, float]:
    return {"x": 32 + 15 * math.cos(5.5 * t), "y": 34 + 13 * math.sin(5.5 * t)}


def _squash(t: float) -> dict[str, float]:
    height = abs(math.cos(math.pi * 1.5 * t))
    return {"x": 18 + 28 * t, "y": 46 - 26 * height, "stretch": 1.2 - 0.32 * height}


def _clip(
    name: str,
    background: str,
    style: str,
    texture: int,
    *movers: tuple[Sprite, Path],
    frames: int = 8,
    backdrop: Backdrop | None = None,
    camera: Path | None = None,
    held_out: bool = False,
) -> Clip:
    scenes = []
    for frame in range(frames):
        t = frame / (frames - 1)
        sprites = tuple(sprite._replace(**path(t)) for sprite, path in movers)  # type: ignore[arg-type]
        view = Camera(**camera(t)) if camera else None
        scenes.append(Scene(sprites, background, style, texture, backdrop or Backdrop(), view))
    return Clip(name, tuple(scenes), held_out)


_MOON, _HORIZON = Backdrop(layout=(0.75, 0.22)), Backdrop(layout=(0.4, 0.3))
_WARM = Backdrop(0.98, (1.05, 1.0, 0.95), 0.1)
_COLD = Backdrop(1.0, (0.95, 1.0, 1.05), -0.1, (0.3, 0.2))

CLIPS: tuple[Clip, ...] = (
    _clip("line", "grass", "painting", 1, (_sprite("red", "circle"), _line(15, 36, 49, 32)), backdrop=_WARM),
    _clip("arc", "sea", "painting", 2, (_sprite("yellow", "square", 11), _arc), backdrop=_HORIZON),
    _clip("bounce", "sand", "painting", 3, (_sprite("blue", "heart"), _bounce)),
    _clip("rotation", "snow", "painting", 4, (_sprite("green", "cross", 14), lambda t: {"angle": 36 - 72 * t})),
    _clip("scale", "night sky", "painting", 5, (_sprite("pink", "circle"), lambda t: {"radius": 9 + 7 * t}),
          backdrop=_MOON),
    _clip("diagonal", "bricks", "painting", 6, (_sprite("purple", "heart", 13), _line(16, 46, 47, 19)), frames=16),
    _clip(
        "crossing", "sand", "painting", 7,
        (_sprite("green", "square", 11, depth=1.0), _line(50, 30, 14, 30)),
        (_sprite("red", "circle", 10), _line(13, 36, 51, 36)),
        frames=16,
    ),
    _clip("circle", "grass", "pencil", 8, (_sprite("yellow", "circle"), _circle), frames=24, backdrop=_COLD),
    _clip("pan", "night sky", "painting", 9, (_sprite("red", "star", 13), _still(34, 34)), backdrop=_MOON,
          camera=lambda t: {"x": 16 * t - 8}),
    _clip("zoom", "bricks", "painting", 10, (_sprite("blue", "square", 11), _still(32, 33)),
          camera=lambda t: {"zoom": 0.85 + 0.5 * t}),
    _clip("squash", "snow", "painting", 11, (_sprite("pink", "circle", 11), _squash), frames=12),
    _clip("leaves and returns", "sea", "painting", 12,
          (_sprite("purple", "triangle"), lambda t: {"x": 40 + 40 * math.sin(math.pi * t), "y": 36.0}), frames=12),
    _clip("two motions", "sand", "pencil", 13,
          (_sprite("blue", "star"), lambda t: {"x": 16 + 32 * t, "y": 34.0, "angle": 28 - 56 * t})),
    _clip("hat on the way", "grass", "painting", 14,
          (_sprite("yellow", "heart", 11, accessory="hat"), _line(16, 40, 48, 36))),
    _clip("pair", "snow", "pencil", 15, (_sprite("red", "square", 10), _line(14, 18, 30, 18)),
          (_sprite("red", "square", 10), _line(34, 46, 50, 46))),
    _clip("long bounce", "night sky", "pencil", 16, (_sprite("green", "circle", 11), _bounce), frames=64),
    _clip("held line", "sand", "painting", 31, (_sprite("purple", "circle"), _line(48, 40, 16, 28)), held_out=True),
    _clip("held arc", "grass", "painting", 32, (_sprite("red", "triangle", 11), _arc), backdrop=_COLD, held_out=True),
    _clip("held crossing", "sea", "painting", 33, (_sprite("red", "star", 11), _line(14, 32, 50, 32)),
          (_sprite("blue", "circle", 11, depth=1.0), _line(50, 38, 14, 38)), frames=16, held_out=True),
    _clip("held pan", "bricks", "pencil", 34, (_sprite("green", "square"), _still(32, 32)),
          camera=lambda t: {"x": 8 - 16 * t, "y": 6 * t}, held_out=True),
    _clip("held zoom", "snow", "painting", 35, (_sprite("purple", "cross", 12), _still(32, 33)),
          camera=lambda t: {"zoom": 1.3 - 0.45 * t}, frames=12, held_out=True),
    _clip("held squash", "grass", "pencil", 36, (_sprite("blue", "square", 11), _squash), frames=12, held_out=True),
    _clip("held return", "night sky", "painting", 37,
          (_sprite("pink", "heart"), lambda t: {"x": 24 - 40 * math.sin(math.pi * t), "y": 34.0}),
          frames=16, held_out=True),
    _clip("held boots", "sea", "painting", 38, (_sprite("red", "circle", 11, accessory="boots"),
          lambda t: {"x": 16 + 32 * t, "y": 32.0, "radius": 9 + 4 * t}), frames=32, backdrop=_HORIZON, held_out=True),
)  # fmt: skip

_PLAIN_KIND = {
    "circle": "square",
    "square": "triangle",
    "triangle": "circle",
    "star": "circle",
    "heart": "square",
    "cross": "triangle",
}
_PATTERNED_KIND = {
    "circle": "star",
    "square": "heart",
    "triangle": "cross",
    "star": "cross",
    "heart": "star",
    "cross": "heart",
}
_NEIGHBOUR = {"red": "pink", "yellow": "green", "blue": "purple", "green": "yellow", "pink": "red", "purple": "blue"}
_OPPOSITE = {"red": "green", "yellow": "blue", "blue": "yellow", "green": "pink", "pink": "green", "purple": "yellow"}
_OTHER_BACKGROUND = {
    "grass": "night sky",
    "sea": "sand",
    "sand": "grass",
    "snow": "bricks",
    "night sky": "snow",
    "bricks": "sea",
}
KINDS = (
    "object, plain",
    "object, patterned",
    "colour, neighbour",
    "colour, opposite",
    "background",
    "style",
    "accessory",
    "remove",
    "one of two",
    "two at once",
)


def edits(clip: Clip) -> tuple[Edit, ...]:
    """Return every kind of edit that the clip allows: "one of two" needs two sprites, "accessory" one without.

    An edit changes all sprites of the first kind, but "one of two" the last sprite alone.
    """
    first = clip.scenes[0]
    kind = _kind(first.sprites[0])
    shape, colour, _ = kind

    def of_kind(change: Callable[[Sprite], Sprite]) -> Callable[[Scene], Scene]:
        return lambda scene: replace(
            scene, sprites=tuple(change(one) if _kind(one) == kind else one for one in scene.sprites)
        )

    def other_shape(name: str) -> Callable[[Sprite], Sprite]:
        look = Look("light") if name in world.PLAIN else Look("light", "halves", "white")
        return lambda one: one._replace(shape=name, look=look)

    def last(scene: Scene) -> Scene:
        *others, one = scene.sprites
        return replace(scene, sprites=(*others, one._replace(colour=_one_colour(first))))

    ground = _OTHER_BACKGROUND[first.background]
    style = next(name for name in world.STYLES if name != first.style)
    ways: dict[str, Callable[[Scene], Scene]] = {
        "object, plain": of_kind(other_shape(_PLAIN_KIND[shape])),
        "object, patterned": of_kind(other_shape(_PATTERNED_KIND[shape])),
        "colour, neighbour": of_kind(lambda one: one._replace(colour=_NEIGHBOUR[colour])),
        "colour, opposite": of_kind(lambda one: one._replace(colour=_OPPOSITE[colour])),
        "background": lambda scene: replace(scene, background=ground),
        "style": lambda scene: replace(scene, style=style),
        "remove": lambda scene: replace(scene, sprites=tuple(one for one in scene.sprites if _kind(one) != kind)),
        "two at once": lambda scene: replace(
            of_kind(lambda one: one._replace(colour=_NEIGHBOUR[colour]))(scene), background=ground
        ),
    }
    if not any(one.accessory for one in first.sprites):
        ways["accessory"] = of_kind(lambda one: one._replace(accessory="hat"))
    if len(first.sprites) == 2:
        ways["one of two"] = last
    return tuple(Edit(kind, tuple(map(ways[kind], clip.scenes))) for kind in KINDS if kind in ways)


def _one_colour(scene: Scene) -> str:
    """Return a colour that no sprite of a scene has."""
    taken = {sprite.colour for sprite in scene.sprites}
    return next(name for name in world.COLOURS if name not in taken)
