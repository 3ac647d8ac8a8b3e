"""python demo check: what the tiny model makes of prompts, judged by the fixed checker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import checker
import comfy.sample
import numpy as np
import sprites
import torch
from PIL import Image
from sprites import Scene
from torch import Tensor
from tune_a_video.tav_core.tiny_sd import model as tiny_sd

STEPS = 25
GUIDANCE = 5.0
_BATCH = 20


def generate(parts: tuple[Any, Any, Any], prompts: list[str], seed: int) -> Tensor:
    """Pictures [n, SIZE, SIZE, 3] in 0..1, by the host's stock sampler; each prompt has a seed of its own."""
    model, clip, vae = parts
    empty = tiny_sd.encode(clip, "")
    side = sprites.SIZE // tiny_sd.PIXELS_PER_LATENT
    pictures = []
    for start in range(0, len(prompts), _BATCH):
        indices = range(start, min(start + _BATCH, len(prompts)))
        generators = [torch.Generator().manual_seed(seed + index) for index in indices]
        noise = torch.cat([torch.randn(1, 4, side, side, generator=generator) for generator in generators])
        embeddings = torch.cat([tiny_sd.encode(clip, prompts[index])[0][0] for index in indices])
        samples = comfy.sample.sample(
            model,
            noise,
            STEPS,
            GUIDANCE,
            "dpmpp_2m",
            "karras",
            [[embeddings, {}]],
            empty,
            torch.zeros_like(noise),
            disable_pbar=True,
        )
        pictures.append(vae.decode(samples))
        print(f"pictures: {indices.stop} of {len(prompts)}", flush=True)
    return torch.cat(pictures)


def judge(scenes: list[Scene], pictures: Tensor) -> dict[str, float]:
    """Shares of pictures [n, SIZE, SIZE, 3] in 0..1 that are right: of all sprites for shape and colour."""
    right: dict[str, list[bool]] = {"shape": [], "colour": [], "background": [], "style": [], "count": []}
    for scene, picture in zip(scenes, pictures, strict=True):
        verdict = checker.look((picture * 255).round().byte().numpy())
        right["background"].append(verdict.background == scene.background)
        right["style"].append(verdict.style == scene.style)
        right["count"].append(len(verdict.sprites) == len(scene.sprites))
        seen = [(sprite.shape, sprite.colour) for sprite in verdict.sprites]
        for sprite in scene.sprites:
            # Shape and colour belong together: of two sprites, each must have its own.
            right["shape"].append(any(shape == sprite.shape and colour == sprite.colour for shape, colour in seen))
            right["colour"].append(any(colour == sprite.colour for _, colour in seen))
    return {name: float(np.mean(values)) for name, values in right.items()}


def check(weights: Path, count: int, seed: int, output: Path) -> dict[str, float]:
    """Draws prompts, generates, judges; leaves stills.png and stills.json in ``output``."""
    random = np.random.default_rng(1_000_000 + seed)
    scenes = [sprites.random_scene(random) for _ in range(count)]
    with torch.inference_mode():
        parts = tiny_sd.load(weights)
        pictures = generate(parts, [sprites.caption(scene) for scene in scenes], seed)
    found = judge(scenes, pictures)
    singles = [index for index, scene in enumerate(scenes) if len(scene.sprites) == 1]
    found_singles = judge([scenes[index] for index in singles], pictures[singles])
    report = {
        "prompts": count,
        "seed": seed,
        "guidance": GUIDANCE,
        "steps": STEPS,
        "sampler": "dpmpp_2m, karras",
        "right": found,
        "right_with_one_sprite": found_singles,
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "stills.json").write_text(json.dumps(report, indent=2) + "\n")
    columns = 16
    shown = (pictures[: len(pictures) // columns * columns] * 255).round().byte().numpy()
    rows = [np.concatenate(list(shown[i : i + columns]), 1) for i in range(0, len(shown), columns)][:8]
    Image.fromarray(np.concatenate(rows)).save(output / "stills.png")
    return found
