"""Print the figures of the Evaluate Video node for two files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.sd
import torch
from tune_a_video.tav_core import host
from tune_a_video.tav_core.evaluation import metrics
from tune_a_video.tav_core.media.clip import load_clip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the two files and the CLIP models."""
    parser.add_argument("source", type=Path, help="the clip that was edited")
    parser.add_argument("edited", type=Path, help="the edit; its frames are compared one by one with the source's")
    parser.add_argument("--prompt", default="", help="a sentence that says what the edit should show")
    parser.add_argument("--clip-vision", type=Path, help="a CLIP Vision file")
    parser.add_argument("--clip", type=Path, help="the text half of the same CLIP, with its projection")


def run(source: Path, edited: Path, prompt: str, clip_vision: Path | None, clip: Path | None) -> dict[str, Any]:
    """Print the table and return its figures. Exits with a message if the two files do not fit together."""
    clips = [load_clip(file, frame_count=0, resize="keep").images for file in (source, edited)]
    embeddings = text = None
    try:
        with torch.inference_mode():
            if clip_vision:
                embeddings = host.image_embeddings(comfy.clip_vision.load(str(clip_vision)), clips[1])
            if clip and prompt:
                encoder = comfy.sd.load_clip([str(clip)], clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION)
                text = host.text_embedding(encoder, prompt)
            figures, _ = metrics.evaluate(*clips, embeddings, text)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    print(metrics.table(figures))
    return {"source": str(source), "edited": str(edited), **figures}
