"""python demo check: what the tiny model makes of prompts, judged by the fixed checker."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import checker
import comfy.sample
import numpy as np
import torch
import world
from checker import Verdict
from PIL import Image
from torch import Tensor
from tune_a_video.tav_core.tiny_sd import model as tiny_sd
from world import Scene

STEPS = 25
GUIDANCE = 5.0
_BATCH = 20


def generate(parts: tuple[Any, Any, Any], prompts: Sequence[str], seed: int) -> Tensor:
    """Draw pictures [n, SIZE, SIZE, 3] in 0..1 with the host's stock sampler; each prompt has a seed of its own."""
    model, clip, vae = parts
    empty = tiny_sd.encode(clip, "")
    side = world.SIZE // tiny_sd.PIXELS_PER_LATENT
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


def judge(scenes: Sequence[Scene], verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Return shares that are right: of pictures, and of the kinds of sprites in them for what a caption says of these.

    A kind's colour is right where a sprite has it; its shape and accessory, where sprites of its colour have them, all
    of them. The count is right where each kind has as many sprites as the caption says.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    for scene, verdict in zip(scenes, verdicts, strict=True):
        right["background"].append(verdict.background == scene.background)
        right["style"].append(verdict.style == scene.style)
        wanted = world.groups(scene)
        right["count"].append(len(verdict.sprites) == sum(wanted.values()))
        for shape, colour, accessory in wanted:
            alike = [seen for seen in verdict.sprites if seen.colour == colour]
            right["colour"].append(bool(alike))
            right["shape"].append(bool(alike) and all(seen.shape == shape for seen in alike))
            right["accessory"].append(bool(alike) and all(seen.accessory == accessory for seen in alike))
    return {name: float(np.mean(values)) for name, values in right.items()}


def looks(scenes: Sequence[Scene], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return how free looks come out of patterned kinds.

    ``agreement``: share of the pictures with several sprites of a patterned kind, all of its shape and colour, in which
    these have one look; each part of a look also alone. ``shares``: of each value of a part, over all such sprites.
    """
    agree: dict[str, list[bool]] = defaultdict(list)
    values: dict[str, Counter[str]] = defaultdict(Counter)
    for scene, verdict in zip(scenes, verdicts, strict=True):
        for (shape, colour, _), count in world.groups(scene).items():
            seen = [one.look for one in verdict.sprites if (one.shape, one.colour) == (shape, colour)]
            if shape not in world.PATTERNED or not seen:
                continue
            for part in world.Look._fields:
                values[part].update(getattr(look, part) for look in seen)
            if count > 1 and len(seen) == count:
                agree["look"].append(len(set(seen)) == 1)
                for part in world.Look._fields:
                    agree[part].append(len({getattr(look, part) for look in seen}) == 1)
    shares = {
        part: {name: number / counts.total() for name, number in counts.most_common()}
        for part, counts in values.items()
    }
    return {
        "agreement": {part: float(np.mean(found)) for part, found in agree.items()},
        "pictures with several": len(agree["look"]),
        "shares": shares,
    }


def check(weights: Path, count: int, seed: int, output: Path) -> dict[str, float]:
    """Draw prompts, judge the pictures, leave stills.png and stills.json in ``output``; return the shares right."""
    random = np.random.default_rng(1_000_000 + seed)
    scenes = [world.random_scene(random) for _ in range(count)]
    with torch.inference_mode():
        parts = tiny_sd.load(weights)
        pictures = generate(parts, [world.caption(scene) for scene in scenes], seed)
    shown = (pictures * 255).round().byte().numpy()
    verdicts = [checker.look(picture) for picture in shown]
    found, free = judge(scenes, verdicts), looks(scenes, verdicts)
    report = {
        "prompts": count,
        "seed": seed,
        "guidance": GUIDANCE,
        "steps": STEPS,
        "sampler": "dpmpp_2m, karras",
        "right": found,
        "free looks": free,
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "stills.json").write_text(json.dumps(report, indent=2) + "\n")
    columns = 16
    rows = [np.concatenate(list(shown[i : i + columns]), 1) for i in range(0, len(shown) // columns * columns, columns)]
    Image.fromarray(np.concatenate(rows[:8])).save(output / "stills.png")
    return found | {f"one {part}": share for part, share in free["agreement"].items()}
