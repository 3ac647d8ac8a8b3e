"""A study on a Ray cluster of two workers on this machine: the same pixels, also when an actor is killed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


@pytest.fixture
def small_cluster() -> Iterator[Any]:
    """A cluster whose only machine has two CPUs, whatever this one has."""
    import ray

    ray.init("local", num_cpus=2, num_gpus=0, log_to_driver=False, include_dashboard=False, logging_level="error")
    yield ray
    ray.shutdown()


def test_more_actors_than_the_cluster_has_room_for(small_cluster: Any, comfyui: Path | None) -> None:
    said: list[str] = []
    actors = ray_cluster.start_actors(small_cluster, 5, SETTINGS, comfyui, 2, said.append)
    assert len(actors) == 2 and len({actor.process_id() for actor in actors}) == 2
    assert said == ["The cluster has room for 2 of 5 actors, each of which takes 1 CPU; 2 work."]
    with pytest.raises(SystemExit, match=r"^--on ray: the cluster has no room for an actor, which takes 1 CPU\.$"):
        ray_cluster.start_actors(small_cluster, 1, SETTINGS, comfyui, 2, said.append)
    for actor in actors:
        actor.close()


def test_an_actor_whose_room_is_taken_does_not_come_back(small_cluster: Any, comfyui: Path | None) -> None:
    (actor,) = ray_cluster.start_actors(small_cluster, 1, SETTINGS, comfyui, 1, lambda line: None)
    os.kill(actor.process_id(), signal.SIGKILL)
    assert actor.revive()
    os.kill(actor.process_id(), signal.SIGKILL)
    assert small_cluster.util.placement_group([{"CPU": 1}] * 2).wait(60)  # somebody else's
    actor.patience = 2
    assert not actor.revive()


def test_an_actor_that_cannot_start_is_named(small_cluster: Any, tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(SystemExit, match=r"^--on ray: no actor has started\.$"):
        ray_cluster.start_actors(small_cluster, 1, SETTINGS, tmp_path / "no-comfyui", 1, said.append)
    assert len(said) == 1 and said[0].startswith("actor-0 is left out: it does not start (")


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
