"""Drawn clips with known motion, and the edits that are asked of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import sprites
import torch
from sprites import Scene, Sprite
from torch import Tensor

FRAMES = 8
FPS = 8.0

Path = Callable[[float], dict[str, float]]


@dataclass(frozen=True)
class Clip:
    """A scene in motion: one scene per frame, all alike but for where the sprites are."""

    name: str
    scenes: tuple[Scene, ...]

    @property
    def prompt(self) -> str:
        """The sentence that describes it."""
        return sprites.caption(self.scenes[0])

    def images(self) -> Tensor:
        """[FRAMES, SIZE, SIZE, 3] in 0..1."""
        return torch.from_numpy(np.stack([sprites.draw(scene) for scene in self.scenes])).float() / 255


@dataclass(frozen=True)
class Edit:
    """A change to a clip, and the scenes that its frames should then show."""

    kind: str
    scenes: tuple[Scene, ...]

    @property
    def prompt(self) -> str:
        """The sentence to sample with."""
        return sprites.caption(self.scenes[0])


def _clip(name: str, background: str, style: str, texture: int, *movers: tuple[Sprite, Path]) -> Clip:
    scenes = []
    for frame in range(FRAMES):
        along = frame / (FRAMES - 1)
        placed = [sprite._replace(**path(along)) for sprite, path in movers]
        scenes.append(Scene(tuple(placed), background, style, texture))
    return Clip(name, tuple(scenes))


def _sprite(colour: str, shape: str, radius: float = 12.0) -> Sprite:
    return Sprite(shape, colour, sprites.SIZE / 2, sprites.SIZE / 2, radius)


def _line(x0: float, y0: float, x1: float, y1: float) -> Path:
    return lambda t: {"x": x0 + t * (x1 - x0), "y": y0 + t * (y1 - y0)}


CLIPS: tuple[Clip, ...] = (
    _clip("line", "grass", "painting", 1, (_sprite("red", "star"), _line(15, 34, 49, 30))),
    _clip(
        "arc",
        "sea",
        "painting",
        2,
        (_sprite("yellow", "circle"), lambda t: {"x": 14 + 36 * t, "y": 46 - 28 * math.sin(math.pi * t)}),
    ),
    _clip(
        "bounce",
        "sand",
        "painting",
        3,
        (_sprite("blue", "heart"), lambda t: {"x": 15 + 34 * t, "y": 46 - 28 * abs(math.cos(math.pi * 1.5 * t))}),
    ),
    _clip("rotation", "snow", "painting", 4, (_sprite("green", "cross", 15), lambda t: {"angle": 40 - 80 * t})),
    _clip("scale", "night sky", "painting", 5, (_sprite("pink", "square"), lambda t: {"radius": 9 + 7 * t})),
    _clip("diagonal", "bricks", "painting", 6, (_sprite("purple", "triangle", 13), _line(16, 48, 48, 17))),
    _clip(
        "crossing",
        "sand",
        "painting",
        7,
        (_sprite("green", "square", 10), _line(50, 18, 14, 18)),
        (_sprite("red", "circle", 10), _line(13, 44, 51, 44)),
    ),
    _clip(
        "circle",
        "grass",
        "pencil",
        8,
        (
            _sprite("yellow", "star"),
            lambda t: {"x": 32 + 15 * math.cos(5.5 * t), "y": 32 + 15 * math.sin(5.5 * t)},
        ),
    ),
)

# What takes the place of what. Colours change to a neighbour: the noise that a sprite was inverted to still says its
# colour, and asked for the opposite one the model draws the sprite somewhere else (docs/ablation.md).
_OTHER_SHAPE = {
    "star": "circle",
    "circle": "square",
    "heart": "star",
    "cross": "heart",
    "square": "cross",
    "triangle": "heart",
}
_OTHER_COLOUR = {
    "red": "pink",
    "yellow": "green",
    "blue": "purple",
    "green": "yellow",
    "pink": "red",
    "purple": "blue",
}
_OTHER_BACKGROUND = {
    "grass": "night sky",
    "sea": "sand",
    "sand": "grass",
    "snow": "bricks",
    "night sky": "snow",
    "bricks": "sea",
}


def edits(clip: Clip) -> tuple[Edit, ...]:
    """Object, colour, background and style; of two sprites the first one is changed."""
    first = clip.scenes[0]
    shape = _OTHER_SHAPE[first.sprites[0].shape]
    colour = _OTHER_COLOUR[first.sprites[0].colour]
    style = next(name for name in sprites.STYLES if name != first.style)

    def changed(**changes: str) -> Callable[[Scene], Scene]:
        return lambda scene: replace(scene, sprites=(scene.sprites[0]._replace(**changes), *scene.sprites[1:]))

    ways: dict[str, Callable[[Scene], Scene]] = {
        "object": changed(shape=shape),
        "colour": changed(colour=colour),
        "background": lambda scene: replace(scene, background=_OTHER_BACKGROUND[first.background]),
        "style": lambda scene: replace(scene, style=style),
    }
    return tuple(Edit(kind, tuple(map(way, clip.scenes))) for kind, way in ways.items())
