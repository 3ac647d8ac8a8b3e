"""Pictures for docs/guide.md: one clip, edited with one setting changed at a time by the demo's model.

    python tools/guide_pictures.py [--comfyui PATH] [--to FOLDER] [NAME ...]

Writes docs/guide/*.png, and the figures of each row to docs/guide/figures.json. Takes minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import engine

SIDE = 96
TUNE_STEPS = (30, 60, 120)
GUIDANCES = (1.0, 2.0, 5.0, 8.0, 12.0)
DDIM_STEPS = (5, 10, 20, 50)
STRENGTHS = (1.0, 0.75, 0.5, 0.25, 0.0)
SEED = 0


class Workbench:
    """The demo's model and clip, with the tunings and inversions made so far."""

    def __init__(self) -> None:
        import job
        from tune_a_video.tav_core.tiny_sd import model as tiny_sd

        self.settings, self.clip = job.SETTINGS, job.CLIP
        self.edits = {job.PRESETS[edit.kind]: edit for edit in job.EDITS}
        self.model, self.text, vae = tiny_sd.load(tiny_sd.WEIGHTS)
        self.vae = vae
        self.frames = self.clip.images()
        self.latent = vae.encode(self.frames)
        self.encode: Callable[[str], Any] = lambda sentence: tiny_sd.encode(self.text, sentence)
        self.tuned: dict[int, Any] = {0: self._inflated(None)}
        self.inverted: dict[Any, Any] = {}

    def _inflated(self, motion: Any) -> Any:
        from tune_a_video.tav_core import host
        from tune_a_video.tav_core.inflate import Inflation

        return host.inflate_model(self.model, Inflation(), motion)

    def tune(self, counts: tuple[int, ...]) -> None:
        """Tune once, and keep the motion at each number of steps."""
        from tune_a_video.tav_core.tuning.trainer import Trainer, TuneSettings
        from tune_a_video.tav_core.tuning.training_unet import training_unet

        settings = TuneSettings(steps=max(counts), learning_rate=self.settings.learning_rate, seed=SEED)
        motions: dict[int, Any] = {}
        with training_unet(self.model, self.latent, self.encode(self.clip.prompt)) as unet:
            trainer = Trainer(unet, settings)
            for step in trainer:
                if step.number in counts:
                    motions[step.number] = trainer.motion()
                    print(f"tuned {step.number} steps", flush=True)
        self.tuned |= {count: self._inflated(motion) for count, motion in motions.items()}

    def sampled(
        self,
        prompt: str,
        guidance: float | None = None,
        tune_steps: int | None = None,
        ddim_steps: int | None = None,
        inverted_with: str | None = None,
        preset: str = "free",
        strength: float = 0.5,
    ) -> Any:
        """Return an edit's frames [frames, h, w, 3]. The demo's settings are the defaults."""
        from tune_a_video.tav_core import host, pipeline
        from tune_a_video.tav_core.control.blend import composited
        from tune_a_video.tav_core.control.settings import PRESETS, at_strength

        model = self.tuned[self.settings.tune_steps if tune_steps is None else tune_steps]
        steps = ddim_steps or self.settings.ddim_steps
        with_prompt = self.encode(self.clip.prompt if inverted_with is None else inverted_with)
        inversion = (id(model), steps, inverted_with)
        if inversion not in self.inverted:
            self.inverted[inversion] = pipeline.invert_and_keep(model, self.latent, with_prompt, steps)
        scale = self.settings.guidance if guidance is None else guidance
        noise, trajectory = self.inverted[inversion]
        _, positive, negative = host.encode_edit(self.text, self.clip.prompt, prompt)
        levers = at_strength(PRESETS[preset], strength)
        control = pipeline.controlled(model, levers, trajectory, noise, positive) if levers.acts else None
        edited = pipeline.sample(model, noise, positive, negative, steps, scale, control=control, seed=SEED)
        frames = self.vae.decode(edited)
        return frames if control is None else composited(self.frames, frames, control.mask)


Row = tuple[str, Any, Any]  # caption, frames, the edit that it should show, or None


def sheets(bench: Workbench) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
    """Yield the name of each picture, and what makes its rows."""
    from tune_a_video.tav_core.control.settings import PRESETS

    shape, place, source = bench.edits["object"], bench.edits["background"], bench.clip.prompt
    yield (
        "tuning-steps",
        lambda: [
            (f"{count} tuning steps", bench.sampled(place.prompt, tune_steps=count), place)
            for count in (0, *TUNE_STEPS)
        ],
    )
    yield (
        "guidance",
        lambda: [(f"guidance {scale:g}", bench.sampled(shape.prompt, guidance=scale), shape) for scale in GUIDANCES],
    )
    yield (
        "ddim-steps",
        lambda: [(f"{count} steps", bench.sampled(shape.prompt, ddim_steps=count), shape) for count in DDIM_STEPS],
    )
    yield (
        "inversion",
        lambda: [
            (f"{what}, inverted with {said}", bench.sampled(prompt, scale, inverted_with=given), edit)
            for what, prompt, scale, edit in (
                ("the clip again (guidance 1)", source, 1.0, None),
                ("edit", shape.prompt, None, shape),
            )
            for said, given in (("the clip's sentence", source), ("the empty prompt", ""))
        ],
    )
    yield (
        "prompts",
        lambda: [
            ("one word changed", bench.sampled(shape.prompt), shape),
            ("another place", bench.sampled(place.prompt), place),
            ("the new word alone", bench.sampled(_noun(shape.prompt)), shape),
            ("not a word of the clip's", bench.sampled("two green circles on bricks, pencil style"), None),
        ],
    )
    yield (
        "strength",
        lambda: [
            (f"strength {strength:g}", bench.sampled(shape.prompt, preset="object", strength=strength), shape)
            for strength in STRENGTHS
        ],
    )
    yield (
        "presets",
        lambda: [
            (f"{kind}, {said}", bench.sampled(edit.prompt, preset=preset), edit)
            for kind, edit in bench.edits.items()
            if kind in PRESETS
            for said, preset in (("plain", "free"), (f"preset {kind}", kind))
        ],
    )


def _noun(prompt: str) -> str:
    """Return a caption without its place and style."""
    return prompt.partition(" on ")[0]


@contextmanager
def _demo() -> Iterator[None]:
    """Put the demo's modules on the path and enter inference mode, as the server does."""
    import torch

    sys.path.append(str(engine.PACK_ROOT / "demo"))
    with torch.inference_mode():
        yield


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description="Make the guide's pictures with the demo's model.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="pictures to make; default: all")
    parser.add_argument("--comfyui", metavar="PATH", help="default: $COMFYUI_PATH, else ~/comfy/ComfyUI")
    parser.add_argument("--to", type=Path, default=engine.PACK_ROOT / "docs" / "guide")
    options = parser.parse_args()
    engine.load_pack()
    print(engine.load_engine(engine.find_comfyui(options.comfyui)), flush=True)
    options.to.mkdir(parents=True, exist_ok=True)
    kept = options.to / "figures.json"
    figures: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if options.names and kept.exists() else {}
    with _demo():
        from PIL import Image
        from study import measure, source_of
        from tune_a_video.tav_core.media import pictures

        bench = Workbench()
        source = source_of(bench.clip, bench.vae)
        bench.tune(TUNE_STEPS)
        for name, rows in sheets(bench):
            if options.names and name not in options.names:
                continue
            shown = [(f"source: {bench.clip.prompt}", bench.frames)]
            for caption, frames, edit in rows():
                if edit is not None:
                    found = measure(source, frames, bench.clip, edit)
                    shown_figures = ("edit right", "all right", "path, px off")
                    figures.setdefault(name, {})[caption] = {key: round(found[key] or 0, 3) for key in shown_figures}
                    caption += f": right {found['all right']:.0%}, {found['path, px off']:.1f} px off the path"
                shown.append((caption, frames))
            sheet = (pictures.contact_sheet(shown, SIDE)[0] * 255).round().byte().numpy()
            Image.fromarray(sheet).quantize(256).save(options.to / f"{name}.png", optimize=True)
            print(name, figures.get(name), flush=True)
    kept.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
