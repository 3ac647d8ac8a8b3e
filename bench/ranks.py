"""What a motion loses when it is saved at a rank, with the demo's model: its edits beside those of the whole motion."""

from __future__ import annotations

import argparse
from typing import Any

import study
import torch
from clips import CLIPS, edits
from torch import Tensor
from tune_a_video.tav_core import host, schedule
from tune_a_video.tav_core.inflate import Inflation
from tune_a_video.tav_core.invert import ddim_invert
from tune_a_video.tav_core.motion import low_rank
from tune_a_video.tav_core.motion.file import Motion
from tune_a_video.tav_core.sample import ddim_sample
from tune_a_video.tav_core.tiny_sd import model as tiny_sd
from tune_a_video.tav_core.tuning.trainer import TuneSettings, one_shot_tune

SHOWN = ("attributes", "edit right", "trajectory", "motion alignment", "frame consistency")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """By rank, 0 for the whole motion: means over clips and edits, and how far the pictures are from the whole's.

    ``kept``: share of what tuning changed (``low_rank.compress``); ``psnr``: of an edit against the whole motion's
    edit, dB. Last, the model without a motion, for what there is to lose.
    """
    torch.set_num_threads(arguments.threads)
    settings = study.Settings()
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        parts, embed = tiny_sd.load(), tiny_sd.embedder()
        for clip in CLIPS[: arguments.clips]:
            asked = edits(clip)[: arguments.edits]
            tuning = TuneSettings(steps=settings.tune_steps, learning_rate=settings.learning_rate)
            source = tiny_sd.encode(parts[1], clip.prompt)
            latent = parts[2].encode(clip.images())
            tuned, _ = one_shot_tune(parts[0], latent, source, tuning)
            motion = Motion(tuned.tensors, {low_rank.SEED_KEY: str(tuning.seed)})
            forms: dict[str, Motion | None] = {"whole": motion.to(torch.float16)}
            kept = {"whole": 1.0}
            for rank in arguments.ranks:
                small = low_rank.compress(motion, rank)
                forms[f"rank {rank}"], kept[f"rank {rank}"] = low_rank.expand(small), float(small.metadata["kept"])
            forms["untuned"], kept["untuned"] = None, 0.0
            whole: dict[str, Tensor] = {}
            for form, weights in forms.items():
                for edit, video in zip(asked, _edited(parts, latent, source, weights, asked, settings), strict=True):
                    whole.setdefault(edit.kind, video)
                    error = float((video - whole[edit.kind]).square().mean())
                    figures = study.measure(clip.images(), video, edit, embed)
                    rows.append(
                        {
                            "clip": clip.name,
                            "edit": edit.kind,
                            "form": form,
                            "kept": kept[form],
                            "psnr": float("inf") if error == 0 else -10 * torch.tensor(error).log10().item(),
                            **figures,
                        }
                    )
                print(f"{clip.name}: {form}", flush=True)
    summary = {form: _means([row for row in rows if row["form"] == form]) for form in forms}
    print(f"{'':<10}" + "".join(f"{name:>19}" for name in ("kept", "psnr", *SHOWN)))
    for form, means in summary.items():
        print(f"{form:<10}" + "".join(f"{means[name]:>19.3f}" for name in ("kept", "psnr", *SHOWN)))
    return {"rows": rows, "summary": summary}


def _edited(
    parts: study.Parts, latent: Tensor, source: Any, motion: Motion | None, asked: Any, settings: study.Settings
) -> list[Tensor]:
    model, text, vae = parts
    ready = host.inflate_model(model, Inflation(), motion)
    levels = host.sigma_table(ready)
    rising = schedule.inversion_sigmas(levels, settings.ddim_steps)
    falling = schedule.sampling_sigmas(levels, settings.ddim_steps)
    start = host.run_sampler(ready, ddim_invert, rising, source, source, 1.0, latent)
    empty = tiny_sd.encode(text, "")
    videos = []
    for edit in asked:
        prompt = tiny_sd.encode(text, edit.prompt)
        sampled = host.run_sampler(ready, ddim_sample, falling, prompt, empty, settings.guidance, start)
        videos.append(vae.decode(sampled))
    return videos


def _means(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in ("kept", "psnr", *SHOWN)}
