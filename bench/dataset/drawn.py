"""The demo's drawn clips as a data set in the layout of LOVEU-TGVE 2023."""

from __future__ import annotations

from pathlib import Path

import yaml
from clips import CLIPS, edits

from . import results

SPLIT = "drawn_64p"
CLIPS_DRAWN = 8
# Kind of an edit -> the name of its kind in that layout.
NAMES = {"style": "style", "object, patterned": "object", "background": "background", "two at once": "multiple"}


def write(folder: Path) -> None:
    """Write each clip's frames and its yaml with four named edits below a folder; what is there stays."""
    for clip in CLIPS[:CLIPS_DRAWN]:
        frames = folder / "data" / SPLIT / clip.name
        if not frames.is_dir():
            results.write_frames(frames, (clip.images() * 255).round().byte().numpy(), ".png")
        prompts = {NAMES[edit.kind]: edit.prompt for edit in edits(clip) if edit.kind in NAMES}
        config = {
            "train_data": {
                "video_path": f"./data/{SPLIT}/{clip.name}",
                "prompt": clip.prompt,
                "num_frames": len(clip.scenes),
                "frame_rate": 1,
            },
            "validation_data": {"prompts": prompts},
        }
        results.write_whole(folder / "configs" / SPLIT / f"{clip.name}.yaml", yaml.safe_dump(config, sort_keys=False))
