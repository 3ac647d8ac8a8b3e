"""Full control on the demo's trained model: with the clip's own sentence it gives the clip's reconstruction."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from tune_a_video.tav_core import host
from tune_a_video.tav_core.control.settings import Control
from tune_a_video.tav_core.inflate import Inflation
from tune_a_video.tav_core.pipeline import controlled, invert_and_keep, sample
from tune_a_video.tav_core.tiny_sd import model as tiny_sd

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "demo"))

import job  # noqa: E402

pytestmark = pytest.mark.comfyui

STEPS = 20
FULL = Control(self_share=1.0, layers="all", cross_share=1.0, feature_share=1.0)


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal to noise of two videos in 0..1, dB."""
    return -10 * math.log10(float((a - b).square().mean()))


def test_with_the_clips_own_sentence_at_guidance_1_it_gives_the_reconstruction() -> None:
    """The injected queries and keys come from the stored trajectory, which DDIM's way back leaves a little."""
    with torch.inference_mode():
        model, text, vae = tiny_sd.load()
        model = host.inflate_model(model, Inflation())
        clip, prompt = job.CLIP.images(), job.CLIP.prompt
        source, own, negative = host.encode_edit(text, prompt, prompt, "", "", "")
        noise, trajectory = invert_and_keep(model, vae.encode(clip), source, STEPS)

        def video(control: Control | None) -> Tensor:
            run = control and controlled(model, control, trajectory, noise, own)
            return vae.decode(sample(model, noise, own, negative, STEPS, 1.0, control=run))

        reconstruction, full = video(None), video(FULL)
        round_trip = vae.decode(vae.encode(clip))
    # Far less than what the autoencoder loses, some 32 dB: half of its error or less.
    assert psnr(full, reconstruction) > psnr(round_trip, clip) + 6
    assert psnr(full, clip) > psnr(reconstruction, clip) - 0.5
