"""Curves on double logarithmic axes, as a PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

_WIDTH, _HEIGHT, _MARGIN = 640, 420, 56
_COLOURS = ((30, 90, 180), (200, 80, 30), (40, 140, 70), (130, 60, 160))


class Curve(NamedTuple):
    """Points in the order of ``xs``; all numbers are positive."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]


def plot(path: Path, panels: Sequence[tuple[str, Sequence[Curve]]]) -> None:
    """One panel for each (title, curves), next to each other."""
    picture = Image.new("RGB", (_WIDTH * len(panels), _HEIGHT), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=13)
    for index, (title, curves) in enumerate(panels):
        left, right = index * _WIDTH + _MARGIN, (index + 1) * _WIDTH - 16
        top, bottom = 36, _HEIGHT - 40
        draw.text((left, 8), title, fill="black", font=font)
        draw.rectangle((left, top, right, bottom), outline=(90, 90, 90))
        xs = [x for curve in curves for x in curve.xs]
        ys = [y for curve in curves for y in curve.ys]
        # The ordinate begins a decade below the largest value at the latest, so that flat curves look flat.
        x_range = (math.log(min(xs)), math.log(max(xs)))
        y_range = (math.log(min(*ys, max(ys) / 10)), math.log(max(ys) * 1.1))

        def at(
            x: float,
            y: float,
            box: tuple[int, int, int, int] = (left, top, right, bottom),
            x_range: tuple[float, float] = x_range,
            y_range: tuple[float, float] = y_range,
        ) -> tuple[float, float]:
            across = (math.log(x) - x_range[0]) / ((x_range[1] - x_range[0]) or 1)
            up = (math.log(y) - y_range[0]) / ((y_range[1] - y_range[0]) or 1)
            return box[0] + across * (box[2] - box[0]), box[3] - up * (box[3] - box[1])

        for x in sorted(set(xs)):
            place, _ = at(x, max(ys))
            draw.line((place, bottom, place, bottom + 4), fill=(90, 90, 90))
            draw.text((place - 8, bottom + 6), f"{x:g}", fill="black", font=font)
        for exponent in range(math.floor(y_range[0] / math.log(10)), math.ceil(y_range[1] / math.log(10)) + 1):
            for digit in (1, 2, 5):
                value = digit * 10.0**exponent
                if y_range[0] <= math.log(value) <= y_range[1]:
                    _, place = at(min(xs), value)
                    draw.line((left, place, right, place), fill=(225, 225, 225))
                    draw.text((left - 46, place - 8), f"{value:g}", fill="black", font=font)
        for number, curve in enumerate(curves):
            colour = _COLOURS[number % len(_COLOURS)]
            points = [at(x, y) for x, y in sorted(zip(curve.xs, curve.ys, strict=True))]
            draw.line(points, fill=colour, width=2)
            for x, y in points:
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
            draw.text((left + 10, top + 6 + 16 * number), curve.name, fill=colour, font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
