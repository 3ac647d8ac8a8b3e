"""The paper's ablations on a drawn clip: each way of making the edited video, and what is measured of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import checker
import numpy as np
import sprites
import torch
from clips import Clip, Edit
from sprites import Scene
from torch import Tensor
from tune_a_video.tav_core import host, pipeline, schedule
from tune_a_video.tav_core.evaluation import metrics
from tune_a_video.tav_core.inflate import Inflation
from tune_a_video.tav_core.motion.file import Motion
from tune_a_video.tav_core.tiny_sd import model as tiny_sd
from tune_a_video.tav_core.tuning.trainer import TuneSettings

# A sprite that is not there is as far away as one in the middle would be from the border.
_MISSING = sprites.SIZE / 2


class Method(NamedTuple):
    """One row of the study. ``inflation`` None: the image model, frame by frame."""

    name: str
    inflation: Inflation | None
    tuned: bool
    inverted: bool

    @property
    def seeded(self) -> bool:
        """Whether it draws anything: a tuning does, and noise in the place of an inversion."""
        return self.tuned or not self.inverted


METHODS = (
    Method("full method", Inflation(), True, True),
    Method("without ST-Attn", Inflation(attention="per frame"), True, True),
    Method("without inversion", Inflation(), True, False),
    # From noise that differs from frame to frame nothing but attention between frames can make them agree.
    Method("neither inversion nor ST-Attn", Inflation(attention="per frame"), True, False),
    Method("without tuning", Inflation(), False, True),
    Method("frame by frame", None, False, True),
)


@dataclass(frozen=True)
class Settings:
    """How the demo's model is tuned and sampled; what suits a small model, in the order of Stable Diffusion's."""

    tune_steps: int = 120
    learning_rate: float = 3e-4
    ddim_steps: int = 20
    guidance: float = 5.0


Parts = tuple[Any, Any, Any]
Progress = Callable[[str], None]


def edited_videos(
    parts: Parts,
    clip: Clip,
    edits: Sequence[Edit],
    methods: Sequence[Method],
    settings: Settings,
    seed: int,
    say: Progress,
) -> dict[str, dict[str, Tensor]]:
    """By method and kind of edit: the frames [frames, SIZE, SIZE, 3] in 0..1. Call it in inference mode.

    ``parts``: MODEL, CLIP and VAE of the tiny model. Methods that share a tuning share it here as well.
    """
    model, text, vae = parts
    latent = vae.encode(clip.images())
    source = tiny_sd.encode(text, clip.prompt)
    empty = tiny_sd.encode(text, "")
    motions: dict[Inflation, Motion] = {}
    videos: dict[str, dict[str, Tensor]] = {}
    for method in methods:
        ready = model
        if method.inflation is not None:
            motion = None
            if method.tuned:
                if method.inflation not in motions:
                    tuning = TuneSettings(steps=settings.tune_steps, learning_rate=settings.learning_rate, seed=seed)
                    motions[method.inflation], _ = pipeline.tune(model, latent, source, tuning, method.inflation)
                motion = motions[method.inflation]
            ready = host.inflate_model(model, method.inflation, motion)
        if method.inverted:
            start = pipeline.invert(ready, latent, source, settings.ddim_steps)
        else:
            noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))
            sigma = float(schedule.sampling_sigmas(host.sigma_table(ready), settings.ddim_steps)[0])
            start = noise * sigma / host.model_scale(ready)
        videos[method.name] = {}
        for edit in edits:
            prompt = tiny_sd.encode(text, edit.prompt)
            latents = pipeline.sample(ready, start, prompt, empty, settings.ddim_steps, settings.guidance)
            videos[method.name][edit.kind] = vae.decode(latents)
        say(method.name)
    return videos


def measure(source: Tensor, edited: Tensor, edit: Edit, embed: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """What can be said of an edited video [frames, SIZE, SIZE, 3] in 0..1.

    ``edit``: what its frames should show and where. ``embed``: frames to image embeddings [frames, width].
    ``attributes``: share of right shapes, colours, backgrounds and styles; ``edit right``: of the changed one;
    ``trajectory``: mean distance from where the sprites should be, pixels; ``flicker``: deviation of the
    sprite's colour over the frames, in 0..255.
    """
    right: dict[str, list[float]] = {"object": [], "colour": [], "background": [], "style": []}
    distances, colours = [], []
    for scene, frame in zip(edit.scenes, edited, strict=True):
        verdict = checker.look((frame * 255).round().byte().numpy())
        found = [_nearest(verdict, scene, index) for index in range(len(scene.sprites))]
        changed = found[0]
        right["object"].append(changed is not None and changed.shape == scene.sprites[0].shape)
        right["colour"].append(changed is not None and changed.colour == scene.sprites[0].colour)
        right["background"].append(verdict.background == scene.background)
        right["style"].append(verdict.style == scene.style)
        for seen, (x, y) in zip(found, centres(scene), strict=True):
            distances.append(_MISSING if seen is None else math.hypot(seen.x - x, seen.y - y))
        if changed is not None:
            colours.append(changed.rgb)
    return {
        "attributes": float(np.mean(list(right.values()))),
        "edit right": float(np.mean(right[edit.kind])),
        "trajectory": float(np.mean(distances)),
        **metrics.evaluate(source, edited, embed(edited))[0],
        "flicker": float(np.std(colours, axis=0).mean()) if colours else 0.0,
    }


def centres(scene: Scene) -> list[tuple[float, float]]:
    """Centre of mass of each sprite, as the checker measures it."""
    found = []
    for sprite in scene.sprites:
        cover = sprites.coverage(sprite)
        y, x = np.mgrid[: sprites.SIZE, : sprites.SIZE] + 0.5
        found.append((float((cover * x).sum() / cover.sum()), float((cover * y).sum() / cover.sum())))
    return found


def _nearest(verdict: checker.Verdict, scene: Scene, index: int) -> checker.Seen | None:
    """The seen sprite that stands for a sprite of the scene: each seen one for the nearest of its own."""
    if not verdict.sprites:
        return None
    places = centres(scene)
    mine = [
        seen
        for seen in verdict.sprites
        if min(range(len(places)), key=lambda i: math.dist(places[i], (seen.x, seen.y))) == index
    ]
    # The biggest: a splinter nearby is not the sprite.
    return mine[0] if mine else None
