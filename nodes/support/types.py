"""Names that all schemas use."""

import dataclasses

from comfy_api.latest import io

CATEGORY = "Tune-A-Video"

# Kept in an inverted LATENT beside its samples, so that a masked edit can keep the clip outside its mask.
CLIP_KEY = "tav_clip"

# Model, steps and attention mode of an inversion; see ``wiring.made_with``.
MADE_WITH_KEY = "tav_made_with"

# The latents of every step of an inversion (``control.trajectory.Trajectory``), for edit control.
TRAJECTORY_KEY = "tav_trajectory"

ControlType = io.Custom("TAV_CONTROL")
MotionType = io.Custom("TAV_MOTION")

_TAKES_ALIASES = "search_aliases" in {field.name for field in dataclasses.fields(io.Schema)}


def search_aliases(*words: str) -> dict[str, list[str]]:
    """Return the search words of a node for `io.Schema(**...)`. Older hosts do not take search words."""
    return {"search_aliases": ["tune a video", "tune-a-video", "tav", *words]} if _TAKES_ALIASES else {}
