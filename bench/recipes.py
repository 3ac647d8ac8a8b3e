"""Compare recipes of tuning: the quality of edits over the number of tuning steps, on clips of the demo's world."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import paired
import study
import torch
import verdicts
from ablation import ROOT, Plan
from clips import CLIPS, KINDS, Clip, Edit
from clips import edits as edits_of
from losses import Loss, appearance_debiased, frame_differences, mean_squared
from torch import Tensor
from tune_a_video.tav_core import host, pipeline
from tune_a_video.tav_core.inflate import Inflation, swapped
from tune_a_video.tav_core.motion.file import Motion
from tune_a_video.tav_core.schedule import add_noise, training_target
from tune_a_video.tav_core.temporal import TemporalLayer, temporal_layers
from tune_a_video.tav_core.tiny_sd import model as tiny_sd
from tune_a_video.tav_core.tuning.trainer import Trainer, TuneSettings
from tune_a_video.tav_core.tuning.training_unet import training_unet

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

OUTPUT = ROOT / "recipes-output"
# Timesteps, as shares of all, at which the error on the clip is measured, with noise that no tuning sees.
_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
_NOISE_SEED = 2**40


def _with_debiased(predicted: Tensor, target: Tensor) -> Tensor:
    return mean_squared(predicted, target) + appearance_debiased(predicted, target)


def _with_differences(predicted: Tensor, target: Tensor) -> Tensor:
    return mean_squared(predicted, target) + frame_differences(predicted, target)


class Recipe(NamedTuple):
    """A way of tuning. ``rate``: a factor of the study's learning rate. ``warmup``: steps; ``rank``: 0 for whole.

    ``timesteps``: the part of the training timesteps that is drawn from, uniformly, as shares. ``centred``: the
    temporal layers' norm subtracts the mean and does no more, in tuning and afterwards (EI2, arXiv 2308.07926).
    """

    name: str
    loss: Loss = mean_squared
    rate: float = 1.0
    warmup: int = 0
    rank: int = 0
    timesteps: tuple[float, float] = (0.0, 1.0)
    centred: bool = False

    @property
    def decides(self) -> list[Any]:
        """Return all but the name."""
        return [self.loss.__name__, *self[2:]]


RELEASED = Recipe("released")
RECIPES = (
    RELEASED,
    Recipe("debiased term", _with_debiased),
    Recipe("frame differences", _with_differences),
    Recipe("frame differences alone", frame_differences),
    Recipe("centred norm", centred=True),
    Recipe("rate x0.1", rate=0.1),
    Recipe("rate x3", rate=3.0, warmup=10),
    Recipe("rate x10", rate=10.0, warmup=10),
    Recipe("noisy half", timesteps=(0.5, 1.0)),
    Recipe("clean half", timesteps=(0.0, 0.5)),
    Recipe("rank 8", rank=8),
    Recipe("rank 8, rate x10", rate=10.0, warmup=10, rank=8),
    Recipe("debiased term, rate x3", _with_debiased, rate=3.0, warmup=10),
)
_NAMES = [recipe.name for recipe in RECIPES]

# Measure -> whether a larger or a smaller value is better.
MEASURES = {"score": "larger", **study.MEASURES, "error on the clip": "smaller"}
# Measures that recipes are compared in; each one more costs power.
LOOKED_AT = ("score", "minus end-point error, px", "warp error")
SHOWN = ("score", "edit right", "all right", "look agreement", "path, px off", "background loss, dB",
         "minus end-point error, px", "warp error", "error on the clip")  # fmt: skip
Row = dict[str, Any]


class RecipeTrainer(Trainer):
    """A ``Trainer`` whose loss and timesteps are a recipe's."""

    def __init__(self, recipe: Recipe, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.recipe = recipe

    def draw_timestep(self, generator: torch.Generator) -> int:
        """Draw a timestep of the recipe's part."""
        low, high = (round(share * len(self._alpha_bars)) for share in self.recipe.timesteps)
        return int(torch.randint(low, high, (1,), generator=generator))

    def loss(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Return the recipe's loss."""
        return self.recipe.loss(predicted, target)

    @contextmanager
    def norms(self) -> Iterator[None]:
        """Give the temporal layers the recipe's norm."""
        with _norms(self.recipe, self._weights.layers.values()):
            yield

    @torch.no_grad()
    def error_on_the_clip(self) -> float:
        """Return the released loss, mean over fixed timesteps and noise that tuning has not drawn."""
        x0, generator = self.unet.latents, torch.Generator().manual_seed(_NOISE_SEED)
        errors = []
        with swapped(self._forwards):
            for share in _LEVELS:
                timestep = round(share * (len(self._alpha_bars) - 1))
                noise = torch.randn(x0.shape, generator=generator).to(x0)
                predicted = self.unet.predict(add_noise(x0, noise, self._alpha_bars[timestep]), timestep)
                target = training_target(x0, noise, self._alpha_bars[timestep], self.unet.prediction)
                errors.append(float(mean_squared(predicted, target)))
        return sum(errors) / len(errors)


@contextmanager
def _norms(recipe: Recipe, layers: Any) -> Iterator[None]:
    """Give temporal layers the recipe's norm."""
    centred = [(layer.norm_temp, lambda x: x - x.mean(-1, keepdim=True)) for layer in layers if recipe.centred]
    with swapped(centred):
        yield


@dataclass(frozen=True)
class Study:
    """The clips, recipes and settings of a study, and the folder that keeps each row when it is made.

    ``steps``: ascending numbers of tuning steps after which edits are made. ``most``: recipes but the released one are
    tuned to at most this many.
    """

    clips: tuple[Clip, ...]
    recipes: tuple[Recipe, ...]
    steps: tuple[int, ...]
    most: int
    kinds: tuple[str, ...]
    settings: study.Settings
    weights: Path
    output: Path

    def steps_of(self, recipe: Recipe) -> list[int]:
        """Return the numbers of steps at which a recipe is measured."""
        return [count for count in self.steps if recipe == RELEASED or count <= self.most]

    def edits_of(self, clip: Clip) -> list[Edit]:
        """Return the edits that are made of a clip."""
        return [edit for edit in edits_of(clip) if edit.kind in self.kinds]

    def key(self, recipe: Recipe, steps: int, edit: Edit) -> str:
        """Name what decides a row beside its clip, the weights and the code. Untuned, all but the norm are equal."""
        settings = self.settings
        decides = [*(recipe.decides if steps else []), settings.learning_rate, settings.ddim_steps, settings.guidance]
        return f"{steps} {edit.kind} {hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:12]}"

    def kept(self, clip: Clip) -> dict[str, Row]:
        """Return the rows that are kept of a clip, by their keys."""
        file = self._file(clip)
        content = json.loads(file.read_text()) if file.exists() else {}
        return content["rows"] if content.get("fingerprint") == self._fingerprint else {}

    def keep(self, clip: Clip, rows: dict[str, Row]) -> None:
        """Write the rows of a clip, whole or not at all."""
        temporary = self._file(clip).with_suffix(".tmp")
        temporary.write_text(json.dumps({"fingerprint": self._fingerprint, "rows": rows}))
        os.replace(temporary, self._file(clip))

    def rows(self) -> list[Row]:
        """Return the rows that are kept of this study, with their names."""
        found = []
        for clip in self.clips:
            kept = self.kept(clip)
            for recipe in self.recipes:
                for steps in self.steps_of(recipe):
                    for edit in self.edits_of(clip):
                        row = kept.get(self.key(recipe, steps, edit))
                        if row is not None:
                            names = {"clip": clip.name, "recipe": recipe.name, "steps": steps, "edit": edit.kind}
                            found.append({**names, **row})
        return found

    def _file(self, clip: Clip) -> Path:
        return self.output / f"{clip.name}-{len(clip.scenes)}.json"

    @property
    def _fingerprint(self) -> str:
        # The code that decides is that of the other study on these clips.
        return Plan((), (), self.settings, self.weights, self.output).fingerprint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the size of the study."""
    parser.add_argument("--clips", type=int, default=6, help="at most this many")
    parser.add_argument("--on", choices=["held out", "first"], default="held out", help="clips; settings are not "
                        "chosen on held-out ones")  # fmt: skip
    parser.add_argument("--recipes", nargs="+", choices=_NAMES, default=_NAMES, metavar="RECIPE",
                        help="; ".join(_NAMES))  # fmt: skip
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 20, 50, 100, 200, 500])
    parser.add_argument("--most", type=int, default=100, help="steps of recipes but the released one")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, metavar="KIND", help="edits: " + "; ".join(KINDS),
                        default=["object, patterned", "colour, neighbour", "background"])  # fmt: skip
    parser.add_argument("--frames", type=int, default=8, help="clips are thinned to at most this many")
    parser.add_argument("--learning-rate", type=float, default=study.Settings().learning_rate)
    parser.add_argument("--ddim-steps", type=int, default=study.Settings().ddim_steps)
    parser.add_argument("--weights", type=Path, default=tiny_sd.WEIGHTS, help="file of the demo's model")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for results as they come")


def run(
    clips: int,
    on: str,
    recipes: Sequence[str],
    steps: Sequence[int],
    most: int,
    kinds: Sequence[str],
    frames: int,
    learning_rate: float,
    ddim_steps: int,
    weights: Path,
    output: Path,
) -> dict[str, Any]:
    """Tune, edit and measure what is missing; write a table and a curve, and return the figures.

    A recipe is tuned once to its last number of steps; the weights of the others are kept on the way. A later run with
    the same settings, weights and code takes the rows that are there.
    """
    chosen = [clip.thinned(frames) for clip in CLIPS if clip.held_out == (on == "held out")][:clips]
    asked = tuple(recipe for recipe in RECIPES if recipe.name in recipes)
    settings = study.Settings(learning_rate=learning_rate, ddim_steps=ddim_steps)
    plan = Study(tuple(chosen), asked, tuple(sorted(set(steps))), most, tuple(kinds), settings, weights, output)
    output.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        parts = tiny_sd.load(weights)
        if not hasattr(parts[0], "additional_models"):
            raise SystemExit("recipes: this engine of ComfyUI keeps no models beside a model. Update ComfyUI.")
        for clip in plan.clips:
            for recipe in plan.recipes:
                _finish(plan, parts, clip, recipe)
    report = figures(plan, plan.rows())
    markdown = table(report)
    (output / "recipes.md").write_text(markdown)
    _curve(report, output / "recipes.png")
    print(f"\n{markdown}\nTable and curve: {output}")
    return report


def _finish(plan: Study, parts: tuple[Any, Any, Any], clip: Clip, recipe: Recipe) -> None:
    """Tune with a recipe, and make, measure and keep the edits that are missing."""
    rows, edits = plan.kept(clip), plan.edits_of(clip)
    missing = [count for count in plan.steps_of(recipe) if any(plan.key(recipe, count, edit) not in rows
                                                               for edit in edits)]  # fmt: skip
    if not missing:
        return
    started = time.process_time()
    model, text, vae = parts
    latent, source = vae.encode(clip.images()), tiny_sd.encode(text, clip.prompt)
    drawn = study.source_of(clip, vae)
    motions = _motions(plan.settings, recipe, model, latent, source, missing)
    print(f"{clip.name}, {recipe.name}: tuned, {time.process_time() - started:.0f} s of CPU", flush=True)
    for count, (motion, error) in motions.items():
        videos = _edited(plan.settings, recipe, parts, latent, source, motion, edits)
        for edit, frames in zip(edits, videos, strict=True):
            measured = study.measure(drawn, frames, clip, edit)
            known = {"score": study.score(measured), **measured, "error on the clip": error}
            rows[plan.key(recipe, count, edit)] = known
        plan.keep(clip, rows)
        score = sum(rows[plan.key(recipe, count, edit)]["score"] for edit in edits) / len(edits)
        spent = time.process_time() - started
        print(f"  {count} steps: score {score:.3f}, error {error:.4f}, {spent:.0f} s of CPU", flush=True)


def _motions(
    settings: study.Settings, recipe: Recipe, model: Any, latent: Tensor, source: Any, steps: Sequence[int]
) -> dict[int, tuple[Motion, float]]:
    """Tune once; return the motion and the error on the clip after each of some numbers of steps."""
    tuning = TuneSettings(
        steps=max(*steps, 1),
        learning_rate=settings.learning_rate * recipe.rate,
        warmup_steps=recipe.warmup,
        rank=recipe.rank,
    )
    found = {}
    with training_unet(host.without_inflation(model), latent, source) as unet:
        trainer = RecipeTrainer(recipe, unet, tuning)
        with trainer.norms():
            if 0 in steps:
                found[0] = trainer.motion(), trainer.error_on_the_clip()
            if max(steps):
                for step in trainer:
                    if step.number in steps:
                        found[step.number] = trainer.motion(), trainer.error_on_the_clip()
    return found


def _edited(
    settings: study.Settings, recipe: Recipe, parts: Any, latent: Tensor, source: Any, motion: Motion,
    edits: Sequence[Edit],
) -> list[Tensor]:  # fmt: skip
    """Invert the clip once and return the frames of each edit."""
    model, text, vae = parts
    ready = host.inflate_model(model, Inflation(), motion)
    beside = [patcher.model for patchers in ready.additional_models.values() for patcher in patchers]
    layers: list[TemporalLayer] = [layer for root in beside for layer in temporal_layers(root).values()]
    with _norms(recipe, layers):
        noise = pipeline.invert(ready, latent, source, settings.ddim_steps)
        empty = tiny_sd.encode(text, "")
        return [
            vae.decode(
                pipeline.sample(
                    ready, noise, tiny_sd.encode(text, edit.prompt), empty, settings.ddim_steps, settings.guidance
                )
            )
            for edit in edits
        ]


def figures(plan: Study, rows: Sequence[Row]) -> dict[str, Any]:
    """Return means by recipe and steps, and each recipe against the released one, paired over clips.

    A recipe is compared with the released tuning twice: after the same number of steps, and after the released tuning's
    last step. The tests are two-sided, with Holm's correction over all. "by" is above 0 where the recipe is better.
    """
    places = list(dict.fromkeys((row["recipe"], row["steps"]) for row in rows))
    last = max((steps for name, steps in places if name == RELEASED.name), default=0)
    tested = []
    for name, steps in places:
        pairs = [] if name == RELEASED.name else [(RELEASED.name, steps)]
        if steps < last:
            pairs.append((RELEASED.name, last))
        for other in dict.fromkeys(pair for pair in pairs if pair in places and pair != (name, steps)):
            for measure in LOOKED_AT:
                values = _differences(rows, (name, steps), other, measure)
                if values and steps:
                    tested.append(((name, steps), other, measure, paired.difference(values, "two-sided")))
    corrected = paired.holm([found.p for *_, found in tested])
    return {
        "clips": [clip.name for clip in plan.clips],
        "kinds": list(plan.kinds),
        "learning_rate": plan.settings.learning_rate,
        "means": [
            {
                "recipe": name,
                "steps": steps,
                "clips": len(_by_clip(rows, (name, steps), "score")),
                **{measure: _mean(rows, (name, steps), measure) for measure in MEASURES},
            }
            for name, steps in places
        ],
        "differences": [
            {
                "recipe": one[0],
                "steps": one[1],
                "than": f"{other[0]}, {other[1]} steps",
                "measure": measure,
                **{"by": found.mean, "standard_error": found.error, "n": found.n, "p": found.p, "p_corrected": p},
            }
            for (one, other, measure, found), p in zip(tested, corrected, strict=True)
        ],
        "rows": list(rows),
    }


def _by_clip(rows: Sequence[Row], place: tuple[str, int], measure: str) -> dict[str, float]:
    chosen = [{**row, "method": "it"} for row in rows if (row["recipe"], row["steps"]) == place]
    return verdicts.by_clip(chosen, "it", measure)


def _mean(rows: Sequence[Row], place: tuple[str, int], measure: str) -> tuple[float, float | None] | None:
    values = list(_by_clip(rows, place, measure).values())
    return paired.difference(values, "two-sided")[:2] if values else None


def _differences(rows: Sequence[Row], one: tuple[str, int], other: tuple[str, int], measure: str) -> list[float]:
    sign = 1.0 if MEASURES[measure] == "larger" else -1.0
    ours, theirs = _by_clip(rows, one, measure), _by_clip(rows, other, measure)
    return [sign * (ours[clip] - theirs[clip]) for clip in ours if clip in theirs]


def table(report: dict[str, Any]) -> str:
    """Return a report as Markdown."""
    lines = [
        f"{len(report['clips'])} clips ({', '.join(report['clips'])}); edits: {', '.join(report['kinds'])}; "
        f"learning rate {report['learning_rate']:g}. Mean (standard error over clips).",
        "",
        *verdicts.markdown_table(
            ["recipe", "steps", "clips", *SHOWN],
            [
                [row["recipe"], row["steps"], row["clips"], *(_cell(row[name]) for name in SHOWN)]
                for row in report["means"]
            ],
        ),
    ]
    if report["differences"]:
        cells = [
            [f"{one['recipe']}, {one['steps']} steps", one["than"], one["measure"],
             _cell((one["by"], one["standard_error"])), one["n"], *(_p(one[name]) for name in ("p", "p_corrected"))]
            for one in report["differences"]
        ]  # fmt: skip
        head = ["recipe", "than", "is better in", "by (standard error)", "clips", "p", "p corrected"]
        lines += ["", "Paired t-test over clips, two-sided; Holm's correction over this table.", ""]
        lines += verdicts.markdown_table(head, cells)
    return "\n".join(lines) + "\n"


def _cell(found: tuple[float, float | None] | None) -> str:
    if found is None:
        return ""
    return " ".join([f"{found[0]:.4g}", *([] if found[1] is None else [f"({found[1]:.2g})"])])


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _curve(report: dict[str, Any], path: Path) -> None:
    """Draw the compared measures over the steps, a line a recipe."""
    figure, axes = plt.subplots(1, len(LOOKED_AT), figsize=(14, 4.4), layout="constrained")
    for axis, measure in zip(axes, LOOKED_AT, strict=True):
        for name in dict.fromkeys(row["recipe"] for row in report["means"]):
            points = [
                (row["steps"], *row[measure]) for row in report["means"] if row["recipe"] == name and row[measure]
            ]
            steps, means, errors = zip(*points, strict=True)
            spread = [error or 0.0 for error in errors] if name == RELEASED.name else None
            axis.errorbar(steps, means, spread, marker="o", capsize=3, label=name, zorder=2 + (spread is not None))
        axis.set_xscale("symlog", linthresh=20)
        ticks = sorted({row["steps"] for row in report["means"]})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.set(title=f"{measure} ({MEASURES[measure]} is better)", xlabel="tuning steps")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=100)
    plt.close(figure)
