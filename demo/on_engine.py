"""The demo's job in this process, on ComfyUI's engine alone: no server, no nodes, no text encoder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import comfy.sd
import tiny_checkpoint
import torch
from job import DDIM_STEPS, EDIT_PROMPTS, FILES, FPS, GUIDANCE, LEARNING_RATE, SEED, SOURCE_PROMPT, TUNE_STEPS
from PIL import Image
from tune_a_video.tav_core import host, pictures, schedule, video, weights
from tune_a_video.tav_core.inflate import Inflation
from tune_a_video.tav_core.invert import ddim_invert
from tune_a_video.tav_core.sample import ddim_sample
from tune_a_video.tav_core.tune import TuneSettings, one_shot_tune

CAPTION = "edit by a random text embedding in place of: {prompt}"
EXERCISED = (
    "NOT exercised: ComfyUI's server, the nodes, and prompts. The engine from PyPI has no tokenizer, so each\n"
    "prompt stood for a random text embedding of its own."
)


def run(folder: Path) -> None:
    """Does the job on `folder`'s clip and leaves the edits, the loss curve and the motion beside it."""
    checkpoint = folder / FILES.checkpoint
    parts = tiny_checkpoint.checkpoint_weights(tiny_checkpoint.SD1_SHALLOW, SEED)
    tiny_checkpoint.save({k: v for k, v in parts.items() if not k.startswith("cond_stage_model.")}, checkpoint)
    # As on a server, where nodes run in inference mode and a checkpoint's weights are inference tensors.
    with torch.inference_mode():
        model, _, vae, *_ = comfy.sd.load_checkpoint_guess_config(str(checkpoint), output_clip=False)
        checkpoint.unlink()
        clip = video.load_clip(folder / FILES.clip, frame_count=0, resize="keep")
        latent = vae.encode(clip.images)
        contexts = random_contexts(SOURCE_PROMPT, "", *EDIT_PROMPTS)

        started = time.monotonic()
        settings = TuneSettings(steps=TUNE_STEPS, learning_rate=LEARNING_RATE, seed=SEED)
        motion, losses = one_shot_tune(model, latent, contexts[SOURCE_PROMPT], settings)
        print(f"  tuning: {TUNE_STEPS} steps, {time.monotonic() - started:.0f} s", flush=True)
        curve = (pictures.loss_curve(losses)[0] * 255).round().byte().numpy()
        Image.fromarray(curve).save(folder / FILES.loss_curve)
        weights.save_motion(motion.to(torch.float16), folder / FILES.motion)

        tuned = host.inflate_model(model, Inflation(), motion)
        levels = host.sigma_table(tuned)
        started = time.monotonic()
        source = contexts[SOURCE_PROMPT]
        rising = schedule.inversion_sigmas(levels, DDIM_STEPS)
        inverted = host.run_sampler(tuned, ddim_invert, rising, source, source, 1.0, latent)
        print(f"  inversion: {DDIM_STEPS} steps, {time.monotonic() - started:.0f} s", flush=True)
        falling = schedule.sampling_sigmas(levels, DDIM_STEPS)
        for name, prompt in zip(FILES.edits, EDIT_PROMPTS, strict=True):
            started = time.monotonic()
            edited = host.run_sampler(tuned, ddim_sample, falling, contexts[prompt], contexts[""], GUIDANCE, inverted)
            video.save_clip(vae.decode(edited), FPS, folder / name, quality=90)
            print(f"  sampling: {DDIM_STEPS} steps, {time.monotonic() - started:.0f} s", flush=True)


def random_contexts(*prompts: str) -> dict[str, Any]:
    """A CONDITIONING with a random text embedding [1, 77, 768] for each prompt; all alike, as sentences' are."""
    generator = torch.Generator().manual_seed(SEED)

    def draw() -> torch.Tensor:
        return torch.randn(1, 77, 768, generator=generator)

    shared = draw()
    return {prompt: [[shared + 0.3 * draw(), {}]] for prompt in prompts}
