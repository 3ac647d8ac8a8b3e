"""The method edits: the shortened ablation, one clip and one edit with the demo's model.

Fails if the full method stops making the edit, or stops beating an ablation in what it beats it in (docs/ablation.md:
on drawn sprites ST-Attn makes no difference that could be held here, so it is not among them).
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "demo"))

import clips  # noqa: E402
import sprites  # noqa: E402
import study  # noqa: E402
from tune_a_video.tav_core.tiny_sd import model as tiny_sd  # noqa: E402

CLIP = next(clip for clip in clips.CLIPS if clip.name == "bounce")
KIND = "object"
METHODS = tuple(method for method in study.METHODS if "ST-Attn" not in method.name)

Measured = dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def measured() -> Measured:
    """Figures by method."""
    edit = next(edit for edit in clips.edits(CLIP) if edit.kind == KIND)
    with torch.inference_mode():
        videos = study.edited_videos(tiny_sd.load(), CLIP, [edit], METHODS, study.Settings(), 0, lambda name: None)
        embed = tiny_sd.embedder()
        return {method: study.measure(CLIP.images(), made[KIND], edit, embed) for method, made in videos.items()}


def test_the_full_method_makes_the_edit_and_keeps_the_motion(measured: Measured) -> None:
    full = measured["full method"]
    assert full["attributes"] >= 0.8
    assert full["trajectory"] <= 0.1 * sprites.SIZE


def test_without_inversion_the_motion_is_lost(measured: Measured) -> None:
    assert measured["without inversion"]["trajectory"] > 2 * measured["full method"]["trajectory"]
    assert measured["without inversion"]["motion alignment"] < 0.5 * measured["full method"]["motion alignment"]
    assert measured["without inversion"]["frame consistency"] < measured["full method"]["frame consistency"]


def test_without_tuning_the_edit_follows_the_motion_less_closely(measured: Measured) -> None:
    ablated, full = measured["without tuning"], measured["full method"]
    assert ablated["motion alignment"] < full["motion alignment"]
    assert ablated["warp error"] > full["warp error"]
    assert ablated["frame consistency"] < full["frame consistency"]


def test_frame_by_frame_the_edit_follows_the_motion_less_closely(measured: Measured) -> None:
    assert measured["frame by frame"]["motion alignment"] < measured["full method"]["motion alignment"]
