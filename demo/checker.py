"""Says what a picture of the world shows, from its pixels alone: nearest colours, overlap with drawn outlines.

Nothing here was trained; the palette and the outlines are those that the world is drawn with.

Limits, on 500 random drawings of a seed that it was not adjusted on, right: style 100 %, background 99.8 %, count
99.6 %, colour 99.9 %, shape 99.2 %, pattern 99.3 %, second colour 99.6 %, shade 99.3 %, accessory 96.9 %. That
one is weak, mostly in pencil: small boots are missed, and dark edges that touch may pass for a hat or boots. Sprites
of one kind that touch may be taken for one. Angles beyond 40 degrees and radii outside 7 to 20 pixels are unknown.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import NamedTuple

import numpy as np
import world
from numpy.typing import NDArray
from scipy import ndimage

Mask = NDArray[np.bool_]

# Least number of pixels that count as a sprite, and the least share of the largest sprite of its colour.
_LEAST_AREA, _LEAST_SHARE = 26, 0.22
# Side of the window that an outline is looked for in, in pixels.
_WINDOW = 54
# How much worse a look that does not suit a shape may fit, in intersection over union.
_WRONG_KIND = 0.08
# How much better a look counts that explains all pixels of a sprite, not hardly any.
_MORE_EXPLAINED = 0.12
# Least share of black pixels where an accessory would be.
_WORN = 0.5


class Seen(NamedTuple):
    """One sprite as found: its centre and radius in pixels, mean and deviation of the colours that are seen of it.

    Both in 0..255 for each channel, in the painting's colours in either style.
    """

    shape: str
    colour: str
    look: world.Look
    accessory: str
    x: float
    y: float
    radius: float
    angle: float
    area: float
    rgb: tuple[float, float, float]
    deviation: tuple[float, float, float]

    @property
    def kind(self) -> tuple[str, str, str]:
        """The shape, colour and accessory."""
        return self.shape, self.colour, self.accessory


class Verdict(NamedTuple):
    """The contents of a picture as the checker sees them; the largest sprite comes first."""

    style: str
    background: str
    sprites: tuple[Seen, ...]

    def counts(self) -> Counter[tuple[str, str, str]]:
        """Count the sprites of each shape, colour and accessory."""
        return Counter(sprite.kind for sprite in self.sprites)


def look(picture: NDArray[np.uint8]) -> Verdict:
    """Judge a picture [SIZE, SIZE, 3] in 0..255."""
    style, pixels = _as_painted(picture)
    name = _background(pixels, style)
    labels = _labels(pixels, style, name)
    found = [seen for colour in world.COLOURS for seen in _of_colour(labels, pixels, colour)]
    return Verdict(style, name, tuple(sorted(found, key=lambda seen: -seen.area)))


def grain_depth(pixels: NDArray[np.float32]) -> float:
    """Return the amplitude of the pencil's diagonal grain, the median over 8x8 patches; its phase may drift."""
    grey = pixels.mean(-1)
    grey = grey - ndimage.uniform_filter(grey, 8)
    y, x = np.mgrid[: grey.shape[0], : grey.shape[1]]
    wave = grey * np.exp(-2j * np.pi * (x + y) / world.GRAIN_PERIOD)
    height, width = (side // 8 * 8 for side in grey.shape)
    patches = wave[:height, :width].reshape(height // 8, 8, width // 8, 8).mean((1, 3))
    return float(2 * np.median(np.abs(patches)))


def nearest_colours(picture: NDArray[np.uint8]) -> dict[str, Mask]:
    """Return where each colour of sprites and accessories is the nearest one, by name."""
    style, pixels = _as_painted(picture)
    return _labels(pixels, style, _background(pixels, style))


def _as_painted(picture: NDArray[np.uint8]) -> tuple[str, NDArray[np.float32]]:
    """Return a picture's style, and its pixels with the pencil undone: back to the sprites' colours at least."""
    pixels = picture.astype(np.float32)
    style = "pencil" if grain_depth(pixels) > 0.4 * world.GRAIN_DEPTH else "painting"
    if style == "pencil":
        pixels = _without_grain(pixels)
        pixels = world.PAPER + (pixels - world.PAPER) / world.PENCIL_SPRITE
    return style, pixels


def _without_grain(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Average along the diagonal over half a period of the grain, where it takes itself away."""
    wide = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    return np.asarray((wide[:-2, :-2] + 2 * pixels + wide[2:, 2:]) / 4, np.float32)


def _behind(colour: tuple[float, ...], style: str) -> NDArray[np.float32]:
    """Return how a background's colour comes out in the scale of the sprites' colours."""
    value = np.array(colour, np.float32)
    strength = world.PENCIL_BACKGROUND / world.PENCIL_SPRITE if style == "pencil" else 1.0
    return np.asarray(world.PAPER + strength * (value - world.PAPER))


def _segments(
    style: str, background: str, base: tuple[float, float, float]
) -> tuple[list[str], NDArray[np.float32], NDArray[np.float32]]:
    """Return the names and the two ends of every colour's range; what lies behind the sprites has no name."""
    ranges = [(name, 0.68, 1.06, np.array(colour, np.float32)) for name, colour in world.COLOURS.items()]
    ranges += [(name, 0.95, 1.04, np.array(colour, np.float32)) for name, colour in world.SECONDS.items()]
    ranges += [("black", 0.5, 1.4, np.array(world.BLACK, np.float32))]
    names = [name for name, *_ in ranges]
    low = [from_ * colour for _, from_, _, colour in ranges]
    high = [to * colour for _, _, to, colour in ranges]
    extra = tuple(base[c] / world.BACKGROUNDS[background][c] * world.EXTRAS[background][c] for c in range(3))
    behind = [(base, 0.86, 1.14), (extra, 0.88, 1.1)]
    if background == "bricks":
        behind.append(((172, 146, 134), 0.82, 1.12))
    for colour, from_, to in behind:
        names.append("")
        low.append(_behind(tuple(from_ * part for part in colour), style))  # type: ignore[arg-type]
        high.append(_behind(tuple(to * part for part in colour), style))  # type: ignore[arg-type]
    if background == "night sky":
        names.append("")
        low.append(_behind(base, style))
        high.append(_behind((170, 176, 210), style))
    return names, np.stack(low), np.stack(high)


def _labels(pixels: NDArray[np.float32], style: str, background: str) -> dict[str, Mask]:
    """Return where each colour is the nearest one."""
    nominal = world.BACKGROUNDS[background]
    # First as if the background had no tint, then with the tint that it has.
    names, low, high = _segments(style, background, nominal)
    half = pixels[pixels.shape[0] // 2 :]
    plain = _distances(half, low, high).argmin(-1) == names.index("")
    strength = world.PENCIL_BACKGROUND / world.PENCIL_SPRITE if style == "pencil" else 1.0
    if plain.sum() > 100:
        seen = world.PAPER + (np.median(half[plain], axis=0) - world.PAPER) / strength
        nominal = tuple(float(c) for c in np.clip(seen, 0.85 * np.array(nominal), 1.15 * np.array(nominal)))
    names, low, high = _segments(style, background, nominal)
    nearest = _distances(pixels, low, high).argmin(-1)
    return {name: nearest == index for index, name in enumerate(names) if name}


def _background(pixels: NDArray[np.float32], style: str) -> str:
    """Return the background that most pixels are nearest to, not counting sprites and what else it may show."""
    # A horizon is never lower than this.
    low = ndimage.gaussian_filter(pixels, (1, 1, 0))[pixels.shape[0] // 2 :]
    names, from_, to = [], [], []
    for name, colour in world.BACKGROUNDS.items():
        names.append(name)
        from_.append(_behind(tuple(0.84 * part for part in colour), style))  # type: ignore[arg-type]
        to.append(_behind(tuple(1.14 * part for part in colour), style))  # type: ignore[arg-type]
    for bright in (*world.COLOURS.values(), *world.SECONDS.values(), world.BLACK):
        names.append("")
        from_.append(0.68 * np.array(bright, np.float32))
        to.append(1.06 * np.array(bright, np.float32))
    nearest = _distances(low, np.stack(from_), np.stack(to)).argmin(-1)
    votes = {name: int((nearest == index).sum()) for index, name in enumerate(names) if name}
    return max(votes, key=lambda name: votes[name])


def _distances(pixels: NDArray[np.float32], low: NDArray[np.float32], high: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the distance of every pixel from every range between two colours [n, 3], [h, w, n]."""
    along = high - low
    offset = pixels[:, :, None] - low
    share = np.clip((offset * along).sum(-1) / (along**2).sum(-1), 0, 1)
    return np.asarray(np.linalg.norm(offset - share[..., None] * along, axis=-1))


def _kept(mask: Mask) -> Mask:
    """Return the parts of a mask that are thicker than a line."""
    core = ndimage.binary_opening(mask, np.ones((3, 3), bool))
    return np.asarray(ndimage.binary_propagation(core, mask=mask))


def _closed(mask: Mask) -> Mask:
    return np.asarray(ndimage.binary_closing(np.pad(mask, 4), np.ones((3, 3), bool))[4:-4, 4:-4] | mask)


def _touch(mask: Mask, other: Mask) -> bool:
    return bool((ndimage.binary_dilation(mask, iterations=3) & other).sum() >= 4)


@cache
def _templates() -> tuple[list[tuple[str, float, float, float]], NDArray[np.float32]]:
    """Return shape, radius, angle and stretch of every template, and their pixels [n, _WINDOW**2] in 0..1."""
    named, pictures = [], []
    for shape in world.SHAPES:
        for radius in np.geomspace(7.0, 20.0, 14):
            for angle in range(-40, 41, 8) if shape != "circle" else (0,):
                for stretch in (0.88, 1.0, 1.14):
                    middle = _WINDOW / 2
                    sprite = world.Sprite(
                        shape, "", world.Look("light"), middle, middle, float(radius), angle, stretch
                    )  # fmt: skip
                    points = world.placed(sprite, world.outline(shape))
                    named.append((shape, float(radius), float(angle), stretch))
                    pictures.append(world.coverage(points, _WINDOW).ravel())
    return named, np.stack(pictures)


class _Fit(NamedTuple):
    score: float
    sprite: world.Sprite
    cover: NDArray[np.float32]


def _fit(positive: Mask, unknown: Mask, patterned: bool) -> _Fit:
    """Find the outline that overlaps best (intersection over union) with a mask, disregarding unknown pixels."""
    named, pictures = _templates()
    y, x = ndimage.center_of_mass(positive)
    centre = (round(float(y)), round(float(x)))
    area = float(positive.sum())
    radii = np.array([radius for _, radius, _, _ in named])
    guess = np.sqrt(area / 2.2)
    chosen = np.flatnonzero((radii > 0.62 * guess) & (radii < max(1.5 * guess, 8.2)))
    if not len(chosen):
        chosen = np.flatnonzero(radii == radii.max())
    penalty = np.array([_WRONG_KIND * (patterned != (named[index][0] in world.PATTERNED)) for index in chosen])
    border = _WINDOW
    inside = np.pad(positive.astype(np.float32), border)
    known = np.pad(np.where(unknown & ~positive, 0, 1).astype(np.float32), border)

    def scores(
        offsets: list[tuple[int, int]], rows: NDArray[np.intp], less: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        crops = []
        for dy, dx in offsets:
            top, left = (border + at + by - _WINDOW // 2 for at, by in zip(centre, (dy, dx), strict=True))
            crops.append((slice(top, top + _WINDOW), slice(left, left + _WINDOW)))
        both = np.stack([inside[crop].ravel() for crop in crops]) @ pictures[rows].T
        seen = np.stack([known[crop].ravel() for crop in crops]) @ pictures[rows].T
        return np.asarray(both / (area + seen - both) - less, np.float64)

    coarse = [(dy, dx) for dy in range(-8, 9, 2) for dx in range(-8, 9, 2)]
    values = scores(coarse, chosen, penalty)
    keep = np.argsort(-values.max(0))[:60]
    best = np.unravel_index(int(values.argmax()), values.shape)[0]
    fine = [(coarse[best][0] + dy, coarse[best][1] + dx) for dy in (-2, -1, 0, 1, 2) for dx in (-2, -1, 0, 1, 2)]
    values = scores(fine, chosen[keep], penalty[keep])
    at, column = np.unravel_index(int(values.argmax()), values.shape)
    shape, radius, angle, stretch = named[chosen[keep[column]]]
    dy, dx = fine[at]
    sprite = world.Sprite(
        shape, "", world.Look("light"), float(centre[1] + dx), float(centre[0] + dy), radius, angle, stretch
    )
    cover = world.coverage(world.placed(sprite, world.outline(shape)))
    return _Fit(float(values.max()), sprite, cover)


def _of_colour(labels: dict[str, Mask], pixels: NDArray[np.float32], colour: str) -> list[Seen]:
    """Find the sprites of a first colour."""
    own = _kept(labels[colour])
    others = np.zeros_like(own)
    for name in world.COLOURS:
        if name != colour:
            others |= _kept(labels[name])
    # Hats and boots, not edges.
    black = ndimage.binary_dilation(ndimage.binary_opening(labels["black"], np.ones((3, 3), bool)))
    seconds = {name: _kept(labels[name]) for name in world.SECONDS}
    left, found = own.copy(), []
    while True:
        parts, count = ndimage.label(left)
        sizes = ndimage.sum_labels(left, parts, np.arange(1, count + 1)) if count else np.zeros(0)
        if not count or sizes.max() < 12:
            break
        seed = parts == int(sizes.argmax()) + 1
        hypotheses = []
        for second in ("", *seconds):
            # The line where two colours meet is neither: a closing bridges it.
            body = left | seconds[second] if second else left
            body = _closed(body) & ~others & ~black
            positive = ndimage.binary_propagation(seed, mask=body | seed)
            if second:
                added = positive & seconds[second]
                if added.sum() < 10:
                    continue
                # Where it belongs to no other sprite, it is this one's.
                hypotheses = [other for other in hypotheses if other[0]] if not _touch(added, others) else hypotheses
            unknown = others | black | (own & ~positive)
            for name, mask in seconds.items():
                if name != second:
                    unknown = unknown | mask
            hypotheses.append((second, positive, unknown))
        largest_body = max(float(positive.sum()) for _, positive, _ in hypotheses)
        fits = []
        for second, positive, unknown in hypotheses:
            fit = _fit(positive, unknown, bool(second))
            fits.append((fit.score + _MORE_EXPLAINED * float(positive.sum()) / largest_body, second, fit, positive))
        _, second, fit, positive = max(fits, key=lambda entry: entry[0])
        taken = ndimage.binary_dilation(fit.cover > 0.3, iterations=1)
        body = positive & taken
        area = float(body.sum())
        if area >= _LEAST_AREA:
            found.append(_seen(fit.sprite, colour, second, body, labels, others, pixels))
        rest = _kept(left & ~taken)
        left = rest if (rest & seed).sum() < 0.8 * seed.sum() else rest & ~seed
    largest = max((seen.area for seen in found), default=0.0)
    return [seen for seen in found if seen.area >= _LEAST_SHARE * largest]


def _seen(
    sprite: world.Sprite,
    colour: str,
    second: str,
    body: Mask,
    labels: dict[str, Mask],
    others: Mask,
    pixels: NDArray[np.float32],
) -> Seen:
    """Describe a sprite whose outline and visible pixels are known."""
    tone = np.array(world.COLOURS[colour], np.float32)
    first = body & labels[colour]
    core = ndimage.binary_erosion(first)
    first = core if core.sum() >= 8 else first
    shade = float(np.median((pixels[first if first.any() else body] @ tone) / (tone @ tone)))
    pattern = ""
    if second:
        plain = labels[colour] & body
        two = labels[second] & body
        agreement = {}
        for name in world.PATTERNS:
            share = world.second_share(sprite._replace(look=world.Look("light", name, second)))
            agreement[name] = float(
                (share * two).sum() / max(two.sum(), 1) + ((1 - share) * plain).sum() / max(plain.sum(), 1)
            )
        pattern = max(agreement, key=lambda name: agreement[name])
    turns = range(-32, 33, 8) if sprite.shape == "circle" else (sprite.angle,)
    worn = {
        name: max(
            _worn(sprite._replace(accessory=name, angle=float(turn)), labels["black"], body | others) for turn in turns
        )
        for name in world.ACCESSORIES
    }
    accessory = max(worn, key=lambda name: worn[name])
    accessory = accessory if worn[accessory] > _WORN else ""
    # Without its edge, whose share depends on the size.
    inner = ndimage.binary_erosion(body)
    colours = pixels[inner if inner.sum() >= 12 else body]
    rgb, deviation = (tuple(map(float, values)) for values in (colours.mean(0), colours.std(0)))
    return Seen(
        sprite.shape,
        colour,
        world.Look(min(world.SHADES, key=lambda name: abs(world.SHADES[name] - shade)), pattern, second),
        accessory,
        sprite.x,
        sprite.y,
        sprite.radius,
        sprite.angle,
        float(body.sum()),
        rgb,  # type: ignore[arg-type]
        deviation,  # type: ignore[arg-type]
    )


def _worn(sprite: world.Sprite, black: Mask, taken: Mask) -> float:
    """Return how black the place of a sprite's accessory is, 0..1."""
    hat = sprite.accessory == "hat"
    cover = np.zeros(black.shape, np.float32)
    # Not the brim, nor the boots' shafts: those may be the sprite's edge.
    for points in world.accessory_shapes(sprite)[-1 if hat else 0 :]:
        kept = points if hat else np.maximum(points, (-9.0, points[:, 1].max() - 0.34))
        cover = np.maximum(cover, world.coverage(world.placed(sprite, kept)))
    found = 0.0
    # The fit may be off by a pixel or two.
    for dy in (-2, -1, 0) if hat else (0, 1):
        for dx in (-1, 0, 1):
            moved = ndimage.shift(cover, (dy, dx), order=0) > 0.5
            free = moved & ~taken
            if free.sum() >= max(5, 0.6 * moved.sum()):
                found = max(found, float(black[free].mean()))
    return found
