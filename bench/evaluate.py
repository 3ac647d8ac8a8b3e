"""The figures of the EvaluateVideo node, for two files."""

from __future__ import annotations

import argparse
from typing import Any

import comfy.clip_vision
import comfy.sd
import torch
from tune_a_video.tav_core import host
from tune_a_video.tav_core.evaluation import metrics
from tune_a_video.tav_core.media.clip import load_clip


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prints the table and returns its figures. Exits with a message where the two files don't fit together."""
    torch.set_num_threads(arguments.threads)
    source, edited = (
        load_clip(file, frame_count=0, resize="keep").images for file in (arguments.source, arguments.edited)
    )
    embeddings = text = None
    try:
        with torch.inference_mode():
            if arguments.clip_vision:
                embeddings = host.image_embeddings(comfy.clip_vision.load(str(arguments.clip_vision)), edited)
            if arguments.clip and arguments.prompt:
                clip = comfy.sd.load_clip([str(arguments.clip)], clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION)
                text = host.text_embedding(clip, arguments.prompt)
            figures, _ = metrics.evaluate(source, edited, embeddings, text)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    print(metrics.table(figures))
    return {"source": str(arguments.source), "edited": str(arguments.edited), **figures}
