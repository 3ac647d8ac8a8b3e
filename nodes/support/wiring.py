"""Notice what is wired wrongly: latents that were not inverted, inversion and sampling that differ."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from typing import Any

import torch

from ...tav_core import host, schedule
from ...tav_core.errors import Refusal
from .types import CLIP_KEY, MADE_WITH_KEY

# Clean latents spread by about 1 in the model's own scale. Below this noise level the two are not told apart.
_CLEARLY_NOISE = 8.0
_MOTION_SAMPLE = 64


def made_with(model: Any, steps: int) -> dict[str, Any]:
    """Describe an inversion, for ``check_inverted``; plain values that are cheap to keep with a LATENT."""
    record = host.inflation_of(model)
    motion = hashlib.sha256()
    if record is not None and record.motion is not None:
        for key, value in sorted(record.motion.tensors.items()):
            some = value.flatten()[:: max(1, value.numel() // _MOTION_SAMPLE)].contiguous()
            motion.update(key.encode() + some.view(torch.uint8).numpy().tobytes())
    return {
        "steps": steps,
        "family": host.family(model),
        "prediction": host.prediction_type(model),
        "attention": "none" if record is None else record.inflation.attention,
        "motion": motion.hexdigest()[:16],
    }


def check_inverted(model: Any, latent: Mapping[str, Any], steps: int) -> None:
    """Refuse a LATENT that was never inverted, or by another family; log where the inversion differs otherwise.

    A LATENT that lost what it was made with, on disk or in other packs' nodes, is judged by its spread alone.
    """
    made = latent.get(MADE_WITH_KEY)
    if made is None:
        if CLIP_KEY not in latent:
            _check_spread(model, latent["samples"], steps)
        return
    here = made_with(model, steps)
    for key in ("family", "prediction"):
        if made[key] != here[key]:
            raise Refusal(
                "latent",
                f"it was inverted with {made['family']} ({made['prediction']}), and the model is {here['family']} "
                f"({here['prediction']})",
                "Connect the same model to DDIM Invert and TAV Sample.",
            )
    different = [f"{key} {made[key]} and {here[key]}" for key in ("steps", "attention") if made[key] != here[key]]
    different += ["another motion"] if made["motion"] != here["motion"] else []
    if different:
        logging.warning(
            "Tune-A-Video: inversion and sampling differ (%s); the edit keeps more of the clip's motion if they agree",
            ", ".join(different),
        )


def _check_spread(model: Any, samples: torch.Tensor, steps: int) -> None:
    noise = float(schedule.sampling_sigmas(host.sigma_table(model), steps)[0])
    spread = float(samples.float().std()) * host.model_scale(model)
    if noise > _CLEARLY_NOISE and spread < noise / 4:
        raise Refusal(
            "latent",
            f"it was not inverted: its standard deviation is {spread:.1f}, that of an inverted clip about {noise:.1f}",
            "Connect the output of DDIM Invert; if that node is bypassed, it passes the clip on as it is.",
        )
