"""A study's edits with edit control on, made by the demo's model with the fewest steps."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "bench"), str(ROOT / "demo")]

from dataset import drawn, jobs, layouts, results, servers, sources  # noqa: E402
from dataset.editor import Editor  # noqa: E402
from tune_a_video.tav_core.control.settings import PRESETS  # noqa: E402

SETTINGS = jobs.Settings(
    frames=4, width=64, height=64, tune_steps=2, learning_rate=3e-4, ddim_steps=4, guidance=5.0, seed=3
)


@pytest.mark.parametrize(
    ("kind", "preset"),
    [
        ("style", "style"),
        ("Background change", "background"),
        ("colour", "colour"),
        ("color", "colour"),
        ("object removal", "add or remove"),
        ("multiple", "object"),
        ("1", "object"),
        ("", "object"),
    ],
)
def test_a_kind_of_edit_has_a_preset(kind: str, preset: str) -> None:
    assert jobs.preset_of(kind) == preset and preset in PRESETS


@pytest.mark.comfyui
def test_control_keeps_more_of_the_clip_and_a_resumed_edit_is_the_same(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    drawn.write(tmp_path / "set")
    row = next(row for row in layouts.read_dataset(tmp_path / "set").rows if row.kind == "object")
    sources.keep(tmp_path, row, 4, (64, 64))
    clip = results.clip_id(row)
    source = results.read_frames(tmp_path / "source" / clip).astype(int)

    def edited(method: str, preset: str = "object") -> np.ndarray:
        folders = (tmp_path / "source" / clip, tmp_path / "work", tmp_path / "unused")
        return Editor(SETTINGS).edited(jobs.Job(clip, method, row.source, row.edit, *folders, preset)).astype(int)

    plain, controlled = edited(jobs.TUNED), edited(jobs.CONTROLLED)
    assert np.abs(controlled - source).mean() < np.abs(plain - source).mean()
    # The free preset has every lever off: the same pixels as without control.
    assert np.array_equal(edited(jobs.CONTROLLED, "free"), plain)
    kept = {file.name: file.read_bytes() for file in (tmp_path / "work").glob("*.safetensors")}
    assert {"noise-edit-control.safetensors", "motion.safetensors"} <= set(kept)
    assert np.array_equal(edited(jobs.CONTROLLED), controlled)
    assert {file.name: file.read_bytes() for file in (tmp_path / "work").glob("*.safetensors")} == kept


def test_a_servers_graph_has_the_control_only_where_it_is_asked_for(tmp_path: Path) -> None:
    def graph(method: str) -> servers.Graph:
        job = jobs.Job("c", method, "a dog", "a cat", tmp_path, tmp_path, tmp_path, "style")
        return servers.edit_graph(SETTINGS, "clip.mkv", job, "motion" if method in jobs.WITH_MOTION else "")

    controlled, tuned = graph(jobs.CONTROLLED), graph(jobs.TUNED)
    assert controlled["control"]["inputs"] == {"preset": "style", "strength": 0.5}
    assert controlled["sample"]["inputs"]["control"] == ["control", 0]
    assert controlled["sample"]["inputs"]["positive"] == ["edit", 1]
    assert controlled["save"]["inputs"]["images"] == ["kept", 0] and tuned["save"]["inputs"]["images"] == ["decode", 0]
    assert controlled["kept"]["inputs"]["mask"] == ["sample", 1]
    assert controlled["edit"]["class_type"] == "TAV_EditPrompt" and controlled["motion"] == tuned["motion"]
    assert "control" not in tuned and "control" not in tuned["sample"]["inputs"]
    assert "motion" not in graph(jobs.UNTUNED) and "inflated" not in graph(jobs.FRAME_BY_FRAME)
