"""The ways of editing a clip of the world that are compared, and what is measured of an edited clip."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, NamedTuple

import checker
import clips
import numpy as np
import torch
import world
from checker import Verdict
from clips import Clip, Edit, FrameRight, Match
from numpy.typing import NDArray
from torch import Tensor
from tune_a_video.tav_core import host, pipeline, schedule
from tune_a_video.tav_core.attention import SPATIAL_MODES, SpatialMode
from tune_a_video.tav_core.control.blend import composited
from tune_a_video.tav_core.control.settings import PRESETS, Control
from tune_a_video.tav_core.control.trajectory import Trajectory
from tune_a_video.tav_core.evaluation import metrics
from tune_a_video.tav_core.evaluation.background import background_psnr
from tune_a_video.tav_core.inflate import Inflation
from tune_a_video.tav_core.motion.file import Motion
from tune_a_video.tav_core.tiny_sd import model as tiny_sd
from tune_a_video.tav_core.tuning.trainer import TuneSettings
from world import Scene, Sprite

# Pixels around a sprite that are not background: its edge, and the autoencoder's blur.
_MARGIN = 2.0
# Fewest pixels in which two sprites must overlap before it can be said which one is in front.
_LEAST_OVERLAP = 12


class Method(NamedTuple):
    """A way of editing a clip. ``inflation`` None: the image model, frame by frame.

    ``fresh``: share of the variance of the inverted noise that is replaced by new noise, drawn for each frame.
    ``control``: what the edit keeps of the clip; it needs the inversion. ``negative``: sentence that guidance leads
    away from. ``guidance``: its scale, None for that of the settings. ``kinds``: the kinds of edits that it is meant
    for, none for all. ``tuned_on``: "all" frames in every step; "windows" of a quarter of them, another one each step
    (One-Shot Tune's frames_per_step); "spaced": a quarter of the frames, evenly spaced, and never another one.
    """

    name: str
    inflation: Inflation | None = Inflation()
    tuned: bool = True
    inverted: bool = True
    fresh: float = 0.0
    control: Control | None = None
    negative: Literal["empty", "source"] = "empty"
    guidance: float | None = None
    kinds: tuple[str, ...] = ()
    tuned_on: Literal["all", "windows", "spaced"] = "all"

    @property
    def seeded(self) -> bool:
        """Whether it draws anything: a tuning does, and fresh noise."""
        freed = self.control is not None and self.control.fresh_noise > 0
        return self.tuned or not self.inverted or self.fresh > 0 or freed

    @property
    def recipe(self) -> str:
        """Everything but its name and the edits that it is meant for."""
        return repr(self._replace(name="", kinds=()))


FULL = Method("full method")
_PER_FRAME = Inflation(attention="per frame")
METHODS = (
    FULL,
    Method("without ST-Attn", _PER_FRAME),
    Method("without inversion", inverted=False),
    Method("without tuning", tuned=False),
    # From noise that differs from frame to frame nothing but attention between frames can make them agree.
    Method("neither inversion nor ST-Attn", _PER_FRAME, inverted=False),
    Method("frame by frame", None, tuned=False),
)
LEVERS = (
    *(Method(f"self injection {share}", control=Control(self_share=share)) for share in (0.3, 0.5, 0.8)),
    Method("self injection 0.5, free inside", control=Control(self_share=0.5, free_inside=True)),
    Method("cross injection 0.8", control=Control(cross_share=0.8)),
    Method("feature injection 0.8", control=Control(feature_share=0.8)),
    Method("blend from 0.2", control=Control(blend_start=0.2)),
    Method("proximal guidance 0.5", control=Control(proximal=0.5)),
    Method("source sentence as negative", negative="source"),
    Method("freed noise 0.5", control=Control(fresh_noise=0.5)),
    Method("self, first and previous", Inflation(attention="self, first and previous")),
)
# Preset of edit control -> the kinds of edits that it is for. No preset is for two changes at once.
PRESET_KINDS = {
    "style": ("style",),
    "colour": ("colour, neighbour", "colour, opposite", "one of two"),
    "object": ("object, plain", "object, patterned"),
    "background": ("background",),
    "add or remove": ("accessory", "remove"),
}
CONTROLLED = tuple(
    Method(f"preset: {name}", control=PRESETS[name], kinds=kinds) for name, kinds in PRESET_KINDS.items()
)
# With the full method and "without ST-Attn": ST-Attn x injection.
INJECTED = (
    Method("self injection 0.5", control=Control(self_share=0.5)),
    Method("without ST-Attn, self injection 0.5", _PER_FRAME, control=Control(self_share=0.5)),
)
_OTHER_MODES: tuple[SpatialMode, ...] = tuple(mode for mode in SPATIAL_MODES if mode != Inflation().attention)
HALF_FRESH = Method("half fresh", fresh=0.5), Method("half fresh, per frame", _PER_FRAME, fresh=0.5)
ATTENTION = (*(Method(mode, Inflation(attention=mode)) for mode in _OTHER_MODES), *HALF_FRESH)
# How a clip too long for every step is tuned.
LENGTHS = (
    Method("tuned in windows of a quarter", tuned_on="windows"),
    Method("tuned on a quarter, evenly spaced", tuned_on="spaced"),
)
# A clip of fewer frames is not long: a quarter of it has no motion left.
LEAST_LONG = 16
COMPARISONS = {
    "ablations": METHODS,
    "levers": (FULL, *LEVERS),
    "control": (FULL, METHODS[1], *CONTROLLED, *INJECTED),
    "presets": (FULL, *CONTROLLED),
    "attention": (FULL, *ATTENTION),
    "length": (FULL, *LENGTHS),
}

# Measure -> whether a larger or a smaller value is better.
MEASURES = {
    "edit right": "larger",
    "all right": "larger",
    "look agreement": "larger",
    "look distance": "smaller",
    "path, px off": "smaller",
    "count errors": "smaller",
    "background loss, dB": "smaller",
    "opposite hue": "larger",
    "only one of two": "larger",
    "occlusion kept": "larger",
    "minus end-point error, px": "larger",
    "warp error": "smaller",
    "FF-alpha": "smaller",
    "FF-beta": "smaller",
}
_OF_MOTION = ("minus end-point error, px", "warp error", "FF-alpha", "FF-beta")
Measured = dict[str, float | None]


@dataclass(frozen=True)
class Settings:
    """How the model is tuned and sampled."""

    tune_steps: int = 120
    learning_rate: float = 3e-4
    ddim_steps: int = 20
    guidance: float = 5.0


class Source(NamedTuple):
    """A clip as its edits are held against it: frames [frames, SIZE, SIZE, 3] in 0..1, flows, and the round trip.

    ``round_trip``: the frames as the autoencoder gives them back.
    """

    frames: Tensor
    flows: tuple[Tensor, Tensor]
    round_trip: Tensor


def source_of(clip: Clip, vae: Any) -> Source:
    """Draw a clip, and send it through the autoencoder."""
    frames = clip.images()
    return Source(frames, metrics.source_flows(frames), vae.decode(vae.encode(frames)))


class Edited(NamedTuple):
    """An edit by a method: frames [frames, SIZE, SIZE, 3] in 0..1, and the processor's seconds that it took.

    A tuning and an inversion that several methods share are counted in ``seconds`` of the first edit alone.
    """

    method: Method
    edit: Edit
    frames: Tensor
    seconds: float


def edited_videos(
    parts: tuple[Any, Any, Any],
    clip: Clip,
    wanted: Sequence[tuple[Method, Sequence[Edit]]],
    settings: Settings,
    seed: int,
) -> Iterator[Edited]:
    """Yield the edits that are wanted of each method, in order. Call it in inference mode.

    ``parts``: MODEL, CLIP and VAE of the tiny model. Methods with the same tuning or inversion share it here as well.
    Edits under control have the clip's pixels outside their mask, as in the templates.
    """
    model, text, vae = parts
    images = clip.images()
    latent = vae.encode(images)
    source = tiny_sd.encode(text, clip.prompt)
    motions: dict[tuple[Inflation, str], Motion] = {}
    inversions: dict[tuple[Inflation | None, str | None], tuple[Tensor, Trajectory]] = {}
    for method, edits in wanted:
        started = time.process_time()
        ready = model
        if method.inflation is not None:
            tuning = method.inflation, method.tuned_on
            if method.tuned and tuning not in motions:
                motions[tuning] = _tuned(model, latent, source, method, settings, seed)
            ready = host.inflate_model(model, method.inflation, motions[tuning] if method.tuned else None)
        route = method.inflation, method.tuned_on if method.tuned else None
        if method.inverted and route not in inversions:
            inversions[route] = pipeline.invert_and_keep(ready, latent, source, settings.ddim_steps)
        inverted, trajectory = inversions[route] if method.inverted else (torch.zeros_like(latent), None)
        start = _with_fresh_noise(ready, inverted, method.fresh if method.inverted else 1.0, settings.ddim_steps, seed)
        for edit in edits:
            negative_text = clip.prompt if method.negative == "source" else ""
            _, positive, negative = host.encode_edit(text, clip.prompt, edit.prompt, negative=negative_text)
            control = method.control and pipeline.controlled(ready, method.control, trajectory, start, positive)
            guidance = settings.guidance if method.guidance is None else method.guidance
            latents = pipeline.sample(
                ready, start, positive, negative, settings.ddim_steps, guidance, control=control, seed=seed
            )
            frames = vae.decode(latents)
            if control is not None:
                frames = composited(images, frames, control.mask)
            yield Edited(method, edit, frames, time.process_time() - started)
            started = time.process_time()


def _tuned(model: Any, latent: Tensor, source: Any, method: Method, settings: Settings, seed: int) -> Motion:
    """Tune on a clip's latent [frames, c, h, w] in the way of a method that has an inflation."""
    quarter = max(2, len(latent) // 4)
    if method.tuned_on == "spaced":
        latent = latent[torch.linspace(0, len(latent) - 1, quarter).round().long()]
    tuning = TuneSettings(
        steps=settings.tune_steps,
        learning_rate=settings.learning_rate,
        seed=seed,
        frames_per_step=quarter if method.tuned_on == "windows" else 0,
    )
    assert method.inflation is not None
    return pipeline.tune(model, latent, source, tuning, method.inflation)[0]


def _with_fresh_noise(model: Any, inverted: Tensor, share: float, steps: int, seed: int) -> Tensor:
    """Replace a share of the variance of an inverted latent by noise of each frame's own, in LATENT scale."""
    if share == 0:
        return inverted
    sigma = float(schedule.sampling_sigmas(host.sigma_table(model), steps)[0])
    noise = torch.randn(inverted.shape, generator=torch.Generator().manual_seed(seed))
    spread = (1 + sigma**2) ** 0.5 / host.model_scale(model)
    return (1 - share) ** 0.5 * inverted + share**0.5 * spread * noise


def measure(source: Source, edited: Tensor, clip: Clip, edit: Edit) -> Measured:
    """Return all MEASURES of an edited clip [frames, SIZE, SIZE, 3] in 0..1; None where one does not apply.

    "edit right": share of frames in which everything that the edit changes is right. "all right": in which nothing is
    wrong. "look agreement": share of frames that show the changed sprite with the clip's commonest look. "look
    distance": mean distance of its looks (mean and deviation of the colours, 0..255) between frames that show it.
    "path, px off": mean distance of the sprites from where they should be. "count errors": share of frames.
    "background loss, dB": how much lower the PSNR outside the sprites is than the autoencoder's own.
    "opposite hue", "only one of two": share of frames in which these kinds of edits succeed, the latter with the other
    sprite as it was. "occlusion kept": share of frames with the right sprite in front, of those where two overlap.
    The rest: `tune_a_video.tav_core.evaluation`, not for removed sprites, whose motion should go.
    """
    pictures = (edited * 255).round().byte().numpy()
    verdicts = [checker.look(picture) for picture in pictures]
    rights = [clips.verdict_right(scene, seen) for scene, seen in zip(edit.scenes, verdicts, strict=True)]
    found = [clips.matches(scene, seen) for scene, seen in zip(edit.scenes, verdicts, strict=True)]
    changed = _mean(
        [
            change_right(before, after, *seen)
            for before, after, *seen in zip(clip.scenes, edit.scenes, verdicts, rights, found, strict=True)
        ]
    )
    agreement, distance = looks(_changed_sprites(clip.scenes[0], edit.scenes[0], found))
    kept = [occlusion_kept(scene, picture) for scene, picture in zip(edit.scenes, pictures, strict=True)]
    moves = edit.kind != "remove"
    figures = metrics.evaluate(source.frames, edited, flows=source.flows)[0] if moves else {}
    return {
        "edit right": changed,
        "all right": _mean([right.everything for right in rights]),
        "look agreement": agreement,
        "look distance": distance,
        "path, px off": _mean([right.off for right, sprites in zip(rights, found, strict=True) if sprites]),
        "count errors": _mean([not right.count for right in rights]),
        "background loss, dB": background_loss(source, edited, clip, edit),
        "opposite hue": changed if edit.kind == "colour, opposite" else None,
        "only one of two": _mean([_all_of_kind(sprites) for sprites in found]) if edit.kind == "one of two" else None,
        "occlusion kept": _mean(kept),
        **{name: figures.get(name) for name in _OF_MOTION},
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _all_of_kind(found: Sequence[Match]) -> bool | None:
    return all(match.of_kind for match in found) if len(found) > 1 else None


def change_right(
    before: Scene, after: Scene, verdict: Verdict, right: FrameRight, found: Sequence[Match]
) -> bool | None:
    """Say whether everything that an edit changes is right in a frame; None where it is not in the picture."""
    if len(before.sprites) != len(after.sprites):
        return right.count
    checks = [
        getattr(verdict, part) == getattr(after, part)
        for part in ("background", "style")
        if getattr(before, part) != getattr(after, part)
    ]
    for match in found:
        old = before.sprites[match.index]
        for part in ("shape", "colour", "accessory"):
            asked = getattr(match.sprite, part)
            if asked != getattr(old, part) and (part != "accessory" or match.dressed):
                checks.append(match.seen is not None and getattr(match.seen, part) == asked)
    return all(checks) if checks else None


def _changed_sprites(before: Scene, after: Scene, found: Sequence[Sequence[Match]]) -> list[list[Match]]:
    """Return the sprites of each frame that are of the changed kind, or of the first kind where none was changed.

    Those that are in part hidden or out of the picture are left out: half of a look is another one.
    """
    if not after.sprites:
        return [[] for _ in found]
    # Where sprites were removed, the others are as they were.
    pairs = zip(before.sprites, after.sprites, strict=True) if len(before.sprites) == len(after.sprites) else ()
    index = next((number for number, (old, new) in enumerate(pairs) if _kind(old) != _kind(new)), 0)
    kind = _kind(after.sprites[index])
    return [[match for match in sprites if _kind(match.sprite) == kind and match.whole] for sprites in found]


def _kind(sprite: Sprite) -> tuple[str, str, str]:
    return sprite.shape, sprite.colour, sprite.accessory


def looks(found: Sequence[Sequence[Match]]) -> tuple[float | None, float | None]:
    """Return the share of frames with the commonest look, and the mean distance of looks between frames.

    ``found``: for each frame its sprites of one kind. A frame without such sprites in the picture does not count. One
    that shows none of the right colour, or several with different looks, has no look. The shape may be wrong: whether
    it is right is measured apart, and a wrong one can have a look as well.
    """
    names, numbers, wanted = [], [], 0
    for sprites in found:
        wanted += bool(sprites)
        shown = [match.seen for match in sprites if match.seen and match.seen.colour == match.sprite.colour]
        if shown and len(shown) == len(sprites) and len({seen.look for seen in shown}) == 1:
            names.append(shown[0].look)
        if shown:
            numbers.append(np.mean([(*seen.rgb, *seen.deviation) for seen in shown], axis=0))
    if not wanted:
        return None, None
    agreement = max(Counter(names).values(), default=0) / wanted
    distances = [float(np.linalg.norm(one - other)) for one, other in combinations(numbers, 2)]
    return agreement, _mean(distances)


def background_loss(source: Source, edited: Tensor, clip: Clip, edit: Edit) -> float | None:
    """Return how much lower the PSNR of the background is than that of the autoencoder's round trip, in dB.

    None for edits that change the background.
    """
    first, second = clip.scenes[0], edit.scenes[0]
    if (first.background, first.style) != (second.background, second.style):
        return None
    mask = torch.from_numpy(np.stack([_sprites_of(*scenes) for scenes in zip(clip.scenes, edit.scenes, strict=True)]))
    if not (mask < 0.5).any():
        return None
    best = background_psnr(source.frames, source.round_trip, mask)
    return best - background_psnr(source.frames, edited, mask)


def _sprites_of(*scenes: Scene) -> NDArray[np.float32]:
    """Return where some scenes have a sprite or an accessory, [SIZE, SIZE], 0 or 1."""
    cover = np.zeros((world.SIZE, world.SIZE), bool)
    for scene in scenes:
        for sprite in (world.as_seen(one, scene.camera) for one in scene.sprites):
            for points in (world.outline(sprite.shape), *world.accessory_shapes(sprite)):
                cover |= world.coverage(world.placed(sprite, points, _MARGIN)) > 0.01
    return cover.astype(np.float32)


def occlusion_kept(scene: Scene, picture: NDArray[np.uint8]) -> bool | None:
    """Say whether sprites that overlap have the right one in front; None where none do, or they are of one colour.

    ``picture``: [SIZE, SIZE, 3] in 0..255. In front is the sprite whose colours most pixels of the overlap have.
    """
    placed = [world.as_seen(one, scene.camera) for one in scene.sprites]
    inside = [world.coverage(world.placed(one, world.outline(one.shape))) > 0.5 for one in placed]
    verdicts = []
    for one, other in combinations(range(len(placed)), 2):
        both = inside[one] & inside[other]
        if placed[one].colour == placed[other].colour or both.sum() < _LEAST_OVERLAP:
            continue
        front, back = sorted((placed[one], placed[other]), key=lambda sprite: sprite.depth)
        colours = checker.nearest_colours(picture)
        ours, theirs = (sum(int((colours[name] & both).sum()) for name in _colours(*pair)) for pair in (
            (front, back), (back, front)
        ))  # fmt: skip
        verdicts.append(ours > theirs)
    return all(verdicts) if verdicts else None


def _colours(sprite: Sprite, other: Sprite) -> tuple[str, ...]:
    """Return the colours that a sprite may have and another one may not: second colours where only it is patterned."""
    if sprite.shape in world.PATTERNED and other.shape not in world.PATTERNED:
        return sprite.colour, *world.SECONDS
    return (sprite.colour,)


def score(measured: Measured) -> float:
    """Return one number for choosing settings, 0..1: the mean of what an edit should change and what it should keep.

    Edit right, all right, look agreement, and how near the sprites are to their path: 1 on it, 0 from 16 pixels on.
    """
    off = measured["path, px off"]
    parts = [measured["edit right"], measured["all right"], measured["look agreement"]]
    parts.append(None if off is None else max(0.0, 1 - off / (world.SIZE / 4)))
    mean = _mean(parts)
    return math.nan if mean is None else mean
