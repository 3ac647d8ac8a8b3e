"""A study on a Ray cluster of two workers on this machine: the same pixels, also when an actor is killed."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "bench"), str(ROOT / "demo")]

from dataset import drawn, jobs, layouts, ray_cluster, results, sources  # noqa: E402
from dataset.editor import Editor  # noqa: E402

pytestmark = pytest.mark.ray

SETTINGS = jobs.Settings(
    frames=4, width=64, height=64, tune_steps=2, learning_rate=3e-4, ddim_steps=2, guidance=5.0, seed=3
)


def test_actors_make_the_pixels_of_this_process_and_one_may_be_killed(tmp_path: Path, comfyui: Path | None) -> None:
    drawn.write(tmp_path / "set")
    todo = []
    for row in layouts.read_dataset(tmp_path / "set").rows[:8]:
        sources.keep(tmp_path, row, 4, (64, 64))
        clip, place = results.clip_id(row), results.edit_folder(tmp_path, jobs.TUNED, row)
        folders = (tmp_path / "source" / clip, tmp_path / "work" / clip, place)
        todo.append(jobs.Job(clip, jobs.TUNED, row.source, row.edit, *folders))
    ray = ray_cluster.connect("")
    try:
        workers = [
            ray_cluster.RayWorker(ray, f"actor-{i}", SETTINGS, comfyui, 1, num_cpus=1, num_gpus=0) for i in range(2)
        ]
        assert all(worker.free_memory() > 0 for worker in workers)
        killed = []

        def say(worker: str, job: jobs.Job, event: str) -> None:
            if not killed:
                killed.append(workers[0].process_id())
                os.kill(killed[0], signal.SIGKILL)

        outcome = jobs.share(todo, workers, True, say)
    finally:
        ray.shutdown()
    assert (outcome.made, outcome.failed, outcome.left) == (8, [], 0) and outcome.deaths <= 1
    torch.set_num_threads(1)
    editor = Editor(SETTINGS)
    for job in (todo[0], todo[-1]):
        here = jobs.Job(**{**vars(job), "work": tmp_path / "here" / job.clip, "result": tmp_path / job.result.name})
        editor.edit(here)
        assert results.digest([here.result]) == results.digest([job.result])
