"""An edit that is to be made, and how edits are shared among workers."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

# Ways to make an edit; the last two are baselines.
TUNED, UNTUNED, FRAME_BY_FRAME = "tune-a-video", "without-tuning", "frame-by-frame"
METHODS = (TUNED, UNTUNED, FRAME_BY_FRAME)
# Files of a clip's work folder: its tuning, and its inverted noise by each method.
MOTION, NOISE = "motion.safetensors", "noise-{}.safetensors"
# An edit that has ended this many workers is given up.
_MOST_DEATHS = 4


@dataclass(frozen=True)
class Settings:
    """All that decides an edit's pixels beside its clip and sentences. ``checkpoint`` "": the demo's model."""

    checkpoint: str = ""
    frames: int = 0
    width: int = 512
    height: int = 512
    tune_steps: int = 500
    learning_rate: float = 3e-5
    ddim_steps: int = 50
    guidance: float = 12.5
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Job:
    """One edit. ``frames``: folder of the source's pictures; ``work``: folder of the clip's tuning; ``result``: folder
    that the edit's pictures go to; ``clip`` names the clip, and jobs of one clip share its tuning."""

    clip: str
    method: str
    source: str
    edit: str
    frames: Path
    work: Path
    result: Path


class WorkerDied(RuntimeError):
    """The worker ended in the middle of an edit; the edit can be made by another one."""


class EditFailed(RuntimeError):
    """The edit cannot be made, by this worker or another."""


class Worker(Protocol):
    """Makes edits, one at a time."""

    name: str

    def edit(self, job: Job) -> None:
        """Make an edit and put its pictures in place. Raises WorkerDied or EditFailed."""

    def revive(self) -> bool:
        """Start again after a death; False if that is impossible."""

    def close(self) -> None:
        """End at once, also in the middle of an edit. Called from another thread."""


@dataclass
class Outcome:
    """``failed``: job and reason; ``left``: jobs that no worker was left for."""

    made: int = 0
    deaths: int = 0
    failed: list[tuple[Job, str]] | None = None
    left: int = 0


class _Pool:
    """Jobs by clip. A worker keeps to a clip until its jobs are done; ``shared``: others may then help it."""

    def __init__(self, jobs: Sequence[Job], shared: bool) -> None:
        self.changed = threading.Condition()
        self.shared = shared
        self.waiting: dict[str, deque[Job]] = {}
        for job in jobs:
            self.waiting.setdefault(job.clip, deque()).append(job)
        self.owner: dict[str, str] = {}
        self.ready: set[str] = set()
        self.running: dict[str, Job] = {}
        self.deaths: dict[Job, int] = {}
        self.outcome = Outcome(failed=[])
        self.stopped = False

    def take(self, worker: str) -> Job | None:
        """Return the next job for a worker, waiting for one that may come back; None when all are done."""
        with self.changed:
            while not self.stopped:
                for clip in self._choices(worker):
                    self.owner.setdefault(clip, worker)
                    job = self.waiting[clip].popleft()
                    self.running[worker] = job
                    return job
                if not self.running and not any(self.waiting.values()):
                    return None
                self.changed.wait(0.5)
            return None

    def _choices(self, worker: str) -> list[str]:
        open_clips = [clip for clip, jobs in self.waiting.items() if jobs]
        own = [clip for clip in open_clips if self.owner.get(clip) == worker]
        free = [clip for clip in open_clips if clip not in self.owner]
        helped = [clip for clip in open_clips if self.shared and clip in self.ready]
        return own or free or sorted(helped, key=lambda clip: -len(self.waiting[clip]))

    def done(self, worker: str, error: Exception | None) -> None:
        """Note the end of a worker's job."""
        with self.changed:
            job = self.running.pop(worker)
            if error is None:
                self.outcome.made += 1
                self.ready.add(job.clip)
            elif isinstance(error, WorkerDied):
                self.outcome.deaths += 1
                self.deaths[job] = self.deaths.get(job, 0) + 1
                if self.deaths[job] >= _MOST_DEATHS:
                    self._fail(job, f"it has ended {_MOST_DEATHS} workers: {error}")
                else:
                    self.waiting[job.clip].appendleft(job)
            else:
                self._fail(job, str(error))
            self.changed.notify_all()

    def _fail(self, job: Job, reason: str) -> None:
        assert self.outcome.failed is not None
        self.outcome.failed.append((job, reason))

    def leave(self, worker: str) -> None:
        """Give a worker's clips to others."""
        with self.changed:
            self.owner = {clip: owner for clip, owner in self.owner.items() if owner != worker}
            self.changed.notify_all()

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.changed.notify_all()


def share(
    jobs: Sequence[Job], workers: Sequence[Worker], shared: bool, say: Callable[[str, Job, str], None]
) -> Outcome:
    """Make all jobs. ``shared``: workers see each other's tunings. ``say(worker, job, event)`` tells the progress.

    A worker that dies loses the edit in its hands, which is made again. Ctrl-C ends all workers and is raised again.
    """
    pool = _Pool(jobs, shared)

    def work(worker: Worker) -> None:
        while (job := pool.take(worker.name)) is not None:
            error: Exception | None = None
            try:
                # A worker can die between the last picture and its answer.
                if not job.result.is_dir():
                    worker.edit(job)
            except Exception as raised:  # a failed edit must not end the others
                error = raised
            if pool.stopped:
                return
            pool.done(worker.name, error)
            say(worker.name, job, "made" if error is None else f"{type(error).__name__}: {error}")
            if isinstance(error, WorkerDied) and not worker.revive():
                pool.leave(worker.name)
                return

    threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in workers]
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            for thread in threads:
                thread.join(0.2)
    finally:
        pool.stop()
        for worker in workers:
            worker.close()
    pool.outcome.left = sum(map(len, pool.waiting.values()))
    return pool.outcome
