"""A study on a running ComfyUI: uploads, graphs and fetched pictures; a server that is killed on the way."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "bench"), str(ROOT / "demo")]

from dataset import drawn, jobs, layouts, results, servers, sources  # noqa: E402
from dataset.editor import Editor  # noqa: E402

pytestmark = pytest.mark.host

SETTINGS = jobs.Settings(
    frames=4, width=64, height=64, tune_steps=2, learning_rate=3e-4, ddim_steps=2, guidance=5.0, seed=3
)


def studied(folder: Path) -> tuple[list[layouts.Row], list[jobs.Job]]:
    drawn.write(folder / "set")
    rows = layouts.read_dataset(folder / "set").rows[:4]
    made = []
    for number, row in enumerate(rows):
        sources.keep(folder, row, 4, (64, 64))
        clip = results.clip_id(row)
        method = (jobs.TUNED, jobs.TUNED, jobs.CONTROLLED, jobs.FRAME_BY_FRAME)[number]
        place = results.edit_folder(folder, method, row)
        made.append(jobs.Job(clip, method, row.source, row.edit, folder / "source" / clip, folder / "work", place))
    return rows, made


def test_a_server_that_is_killed_costs_its_edit_and_makes_what_this_process_makes(server: Any, tmp_path: Path) -> None:
    _, todo = studied(tmp_path)
    events = []

    def say(worker: str, job: jobs.Job, event: str) -> None:
        events.append(event)
        if len(events) == 1:
            os.kill(server.process_id, signal.SIGKILL)

    worker = servers.ServerWorker(f"127.0.0.1:{server.port}", SETTINGS, patience=1)
    outcome = jobs.share(todo, [worker], False, say)
    assert (outcome.made, outcome.deaths, outcome.left) == (1, 1, 3), events
    server.restart()
    motions = list(server.models_folder("tav").glob("study-*"))
    assert len(motions) == 1
    rest = [job for job in todo if not job.result.is_dir()]
    outcome = jobs.share(rest, [servers.ServerWorker(f"127.0.0.1:{server.port}", SETTINGS)], False, say)
    assert (outcome.made, outcome.failed) == (3, [])
    # The clip was not tuned again.
    assert list(server.models_folder("tav").glob("study-*")) == motions

    editor = Editor(SETTINGS)
    for job in todo:
        here = editor.edited(jobs.Job(**{**vars(job), "work": tmp_path / "here"}))
        there = results.read_frames(job.result).astype(int)
        results.write_frames(tmp_path / "mine" / job.result.name, here)
        mine = results.read_frames(tmp_path / "mine" / job.result.name)
        # Threads add numbers in another order there.
        assert np.abs(mine - there).max() <= 3


def test_a_server_without_the_checkpoint_is_left_out(server: Any, tmp_path: Path) -> None:
    _, todo = studied(tmp_path)
    bad = jobs.Settings(**{**vars(SETTINGS), "checkpoint": "nowhere.safetensors"})
    worker = servers.ServerWorker(f"127.0.0.1:{server.port}", bad)
    outcome = jobs.share(todo[:1], [worker], False, lambda *_: None)
    assert (outcome.made, outcome.failed, outcome.left) == (0, [], 1)
    assert outcome.lost == {worker.name: "it has no checkpoint nowhere.safetensors"}


def test_a_graph_that_fails_is_a_failed_edit_and_the_next_one_is_made(server: Any, tmp_path: Path) -> None:
    _, todo = studied(tmp_path)
    # Below the least number of steps.
    bad = jobs.Settings(**{**vars(SETTINGS), "ddim_steps": 0})
    outcome = jobs.share(todo[3:], [servers.ServerWorker(f"127.0.0.1:{server.port}", bad)], False, lambda *_: None)
    assert outcome.made == 0 and len(outcome.failed) == 1 and "steps" in outcome.failed[0][1]
    assert not todo[3].result.exists()


def test_a_server_that_is_not_there_leaves_the_edits(tmp_path: Path) -> None:
    _, todo = studied(tmp_path)
    outcome = jobs.share(todo, [servers.ServerWorker("127.0.0.1:1", SETTINGS, patience=0)], False, lambda *_: None)
    assert (outcome.made, outcome.left) == (0, 4)


def test_an_uploaded_clip_keeps_every_pixel(tmp_path: Path) -> None:
    from tune_a_video.tav_core.media.clip import load_clip

    for shape in ((4, 64, 64, 3), (3, 72, 120, 3)):
        pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        (tmp_path / "clip.mkv").write_bytes(servers.lossless(pixels))
        loaded = load_clip(tmp_path / "clip.mkv", 0.0, "frames", 0, 1, 64, 64, "keep").images
        assert np.array_equal((loaded * 255).round().byte().numpy(), pixels)
