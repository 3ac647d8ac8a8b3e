"""The demo's job: one drawn clip, one sentence for it, four edits, plain and controlled; what is kept of them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_patcher
import torch
from clips import CLIPS, FPS, Edit, edits
from study import Settings, measure, source_of
from torch import Tensor
from tune_a_video.tav_core.media.clip import load_clip
from tune_a_video.tav_core.media.encode import save_clip

CLIP = next(clip for clip in CLIPS if clip.name == "bounce")
# Kind of edit -> its preset of Edit Control, which also names its files.
PRESETS = {"object, patterned": "object", "colour, neighbour": "colour", "background": "background", "style": "style"}
EDITS = tuple(edit for edit in edits(CLIP) if edit.kind in PRESETS)
SETTINGS = Settings()
SEED = 0
# Saved videos are enlarged by this: each pixel of the tiny model is a square of them.
ENLARGED = 4
SOURCE_FILE = "source.mp4"
CONTACT_SHEET = "contact-sheet.png"
LOSS_CURVE = "loss-curve.png"
MOTION = "motion.safetensors"
REPORT = "report.json"


class Take(NamedTuple):
    """One way of making an edit: plain sampling, or ``controlled`` by its preset at the default strength."""

    edit: Edit
    controlled: bool = False

    @property
    def name(self) -> str:
        """Say which edit it is, and how it is made."""
        return f"{self.edit.kind}, controlled" if self.controlled else self.edit.kind

    @property
    def preset(self) -> str:
        """Return the preset of Edit Control for the edit."""
        return PRESETS[self.edit.kind]

    @property
    def file(self) -> str:
        """Return the name of its video."""
        return f"edit-{self.preset}{'-controlled' if self.controlled else ''}.mp4"


def takes() -> list[Take]:
    """Return all videos to make. Edit control needs wrappers, which engines before 2025 lack."""
    ways = [False, True] if hasattr(comfy.model_patcher.ModelPatcher, "add_wrapper_with_key") else [False]
    return [Take(edit, controlled) for edit in EDITS for controlled in ways]


def files() -> list[str]:
    """Return all that the job leaves, the report last."""
    return [SOURCE_FILE, LOSS_CURVE, MOTION, *(take.file for take in takes()), CONTACT_SHEET, REPORT]


def fingerprint(*sources: Path) -> str:
    """Hash everything that decides the results; when it changes, they are made again."""
    decides = [asdict(SETTINGS), SEED, CLIP.name, CLIP.prompt, [(take.file, take.edit.prompt) for take in takes()]]
    digest = hashlib.sha256(json.dumps(decides).encode())
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def enlarged(images: Tensor) -> Tensor:
    """[frames, h, w, 3] -> [frames, ENLARGED h, ENLARGED w, 3]."""
    return images.repeat_interleave(ENLARGED, 1).repeat_interleave(ENLARGED, 2)


def reduced(images: Tensor) -> Tensor:
    """Invert ``enlarged``: a mean over each square, in which what compression did to single pixels cancels."""
    return torch.nn.functional.avg_pool2d(images.movedim(-1, 1), ENLARGED).movedim(1, -1)


def results(folder: Path, vae: Any) -> list[dict[str, Any]]:
    """Measure the videos in a folder, from the files themselves. ``vae``: the demo model's."""
    source = source_of(CLIP, vae)
    found = []
    for take in takes():
        frames = reduced(load_clip(folder / take.file, frame_count=0, resize="keep").images)
        measured = measure(source, frames, CLIP, take.edit)
        found.append({"edit": take.name, "prompt": take.edit.prompt, "file": take.file, **measured})
    return found


def save_source(folder: Path) -> None:
    """Write the clip itself, for LoadVideo and for looking at."""
    save_clip(enlarged(CLIP.images()), FPS, folder / SOURCE_FILE, quality=100)
