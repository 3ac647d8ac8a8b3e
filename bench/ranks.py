"""Measure the loss of saving a motion at a rank, with the demo's model: its edits beside the whole motion's."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from typing import Any

import study
import torch
from clips import CLIPS, Clip, Edit
from clips import edits as edits_of
from torch import Tensor
from tune_a_video.tav_core import host, pipeline
from tune_a_video.tav_core.inflate import Inflation
from tune_a_video.tav_core.motion import low_rank
from tune_a_video.tav_core.motion.file import Motion
from tune_a_video.tav_core.tiny_sd import model as tiny_sd
from tune_a_video.tav_core.tuning.trainer import TuneSettings

SHOWN = ("kept", "psnr", "edit right", "all right", "look agreement", "path, px off", "warp error")
Parts = tuple[Any, Any, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the clips, edits and ranks."""
    parser.add_argument("--clips", type=int, default=3)
    parser.add_argument("--edits", type=int, default=4)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16, 32, 64])


def run(clips: int, edits: int, ranks: list[int]) -> dict[str, Any]:
    """Return, by form of the motion (whole, each rank, untuned), the means over clips and edits.

    ``kept``: the share of the tuned change that a rank keeps (``low_rank.compress``). ``psnr``: an edit against the
    whole motion's edit, dB.
    """
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        parts = tiny_sd.load()
        for clip in CLIPS[:clips]:
            rows += _rows(parts, clip, edits, ranks)
    forms = dict.fromkeys(row["form"] for row in rows)
    summary = {form: _means([row for row in rows if row["form"] == form]) for form in forms}
    print(f"{'':<10}" + "".join(f"{name:>19}" for name in SHOWN))
    for form, means in summary.items():
        print(f"{form:<10}" + "".join(f"{means[name]:>19.3f}" for name in SHOWN))
    return {"rows": rows, "summary": summary}


def _rows(parts: Parts, clip: Clip, count: int, ranks: Sequence[int]) -> list[dict[str, Any]]:
    """Tune on one clip, and measure its first edits with every form of the motion."""
    settings = study.Settings()
    model, text, vae = parts
    tuning = TuneSettings(steps=settings.tune_steps, learning_rate=settings.learning_rate)
    source, latent = tiny_sd.encode(text, clip.prompt), vae.encode(clip.images())
    tuned, _ = pipeline.tune(model, latent, source, tuning)
    motion = Motion(tuned.tensors, {low_rank.SEED_KEY: str(tuning.seed)})
    forms: dict[str, tuple[Motion | None, float]] = {"whole": (motion.to(torch.float16), 1.0)}
    for rank in ranks:
        small = low_rank.compress(motion, rank)
        forms[f"rank {rank}"] = low_rank.expand(small), float(small.metadata["kept"])
    forms["untuned"] = None, 0.0

    rows: list[dict[str, Any]] = []
    whole: dict[str, Tensor] = {}
    drawn = study.source_of(clip, vae)
    for form, (weights, kept) in forms.items():
        videos = _edited(parts, latent, source, weights, edits_of(clip)[:count], settings)
        whole = whole or videos
        for edit in edits_of(clip)[:count]:
            error = (videos[edit.kind] - whole[edit.kind]).square().mean()
            row = {"clip": clip.name, "edit": edit.kind, "form": form, "kept": kept, "psnr": -10 * error.log10().item()}
            rows.append({**row, **study.measure(drawn, videos[edit.kind], clip, edit)})
        print(f"{clip.name}: {form}", flush=True)
    return rows


def _edited(
    parts: Parts, latent: Tensor, source: Any, motion: Motion | None, asked: Sequence[Edit], settings: Any
) -> dict[str, Tensor]:
    """Return the frames of each edit, by kind."""
    model, text, vae = parts
    ready = host.inflate_model(model, Inflation(), motion)
    noise = pipeline.invert(ready, latent, source, settings.ddim_steps)
    empty = tiny_sd.encode(text, "")
    videos = {}
    for edit in asked:
        prompt = tiny_sd.encode(text, edit.prompt)
        edited = pipeline.sample(ready, noise, prompt, empty, settings.ddim_steps, settings.guidance)
        videos[edit.kind] = vae.decode(edited)
    return videos


def _means(rows: list[dict[str, Any]]) -> dict[str, float]:
    values = {name: [row[name] for row in rows if row[name] is not None] for name in SHOWN}
    return {name: statistics.fmean(found) if found else math.nan for name, found in values.items()}
