"""An edit that is to be made, and how edits are shared among workers."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

# Ways to make an edit: the method without and with edit control, and two baselines.
TUNED, CONTROLLED, UNTUNED, FRAME_BY_FRAME = "tune-a-video", "edit-control", "without-tuning", "frame-by-frame"
METHODS = (TUNED, CONTROLLED, UNTUNED, FRAME_BY_FRAME)
WITH_MOTION = (TUNED, CONTROLLED)
# Parts of the names that data sets give to kinds of edits -> preset of edit control; "object" for all others.
_PRESETS = {"style": "style", "background": "background", "colo": "colour", "add": "add or remove"}
_PRESETS |= {"remov": "add or remove"}
_OTHER_PRESET = "object"
# Files of a clip's work folder: its tuning, and its inverted noise by each method.
MOTION, NOISE = "motion.safetensors", "noise-{}.safetensors"
# An edit that has ended this many workers is given up; after half of them another worker tries it, if there is one.
_MOST_DEATHS = 4
# A worker that this many edits in a row have ended is left out: the edits are not at fault.
_MOST_IN_A_ROW = 3
# Seconds that workers may take to end.
_CLOSE = 5


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
    that the edit's pictures go to; ``clip`` names the clip, and jobs of one clip share its tuning; ``preset``: that of
    edit control, for the method that has it."""

    clip: str
    method: str
    source: str
    edit: str
    frames: Path
    work: Path
    result: Path
    preset: str = _OTHER_PRESET


def preset_of(kind: str) -> str:
    """Return edit control's preset for a kind of edit."""
    return next((preset for part, preset in _PRESETS.items() if part in kind.lower()), _OTHER_PRESET)


class WorkerDied(RuntimeError):
    """The worker ended in the middle of an edit; the edit can be made by another one."""


class WorkerLost(WorkerDied):
    """The worker can make no edit, whichever it is; another worker may."""


class EditFailed(RuntimeError):
    """The edit cannot be made, by this worker or another."""


class Worker(Protocol):
    """Makes edits, one at a time."""

    name: str

    def edit(self, job: Job) -> None:
        """Make an edit and put its pictures in place. Raises WorkerDied, WorkerLost or EditFailed."""

    def revive(self) -> bool:
        """Start again after a death; False if that is impossible."""

    def close(self) -> None:
        """End at once, also in the middle of an edit. Called from another thread."""


@dataclass
class Outcome:
    """``failed``: job and reason; ``lost``: why a worker was left out; ``left``: jobs that no worker was left for."""

    made: int = 0
    deaths: int = 0
    failed: list[tuple[Job, str]] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)
    left: int = 0


class _Pool:
    """Jobs by clip. A worker keeps to a clip until its jobs are done; ``shared``: others may then help it."""

    def __init__(self, jobs: Sequence[Job], workers: Sequence[str], shared: bool) -> None:
        self.changed = threading.Condition()
        self.shared = shared
        self.waiting: dict[str, deque[Job]] = {}
        for job in jobs:
            self.waiting.setdefault(job.clip, deque()).append(job)
        self.present = set(workers)
        self.owner: dict[str, str] = {}
        self.ready: set[str] = set()
        self.running: dict[str, Job] = {}
        # Workers that a job has ended, and jobs that have ended a worker in a row.
        self.deaths: dict[Job, list[str]] = {}
        self.in_a_row: dict[str, set[Job]] = {}
        self.outcome = Outcome()
        self.stopped = False

    def take(self, worker: str) -> Job | None:
        """Return the next job for a worker, waiting for one that may come back; None when all are done."""
        with self.changed:
            while not self.stopped:
                for job in self._choices(worker):
                    self.waiting[job.clip].remove(job)
                    self.running[worker] = job
                    return job
                if not self.running and not any(self.waiting.values()):
                    return None
                self.changed.wait(0.5)
            return None

    def _choices(self, worker: str) -> list[Job]:
        """Return one job of each clip that a worker may work on, and make it the owner of a clip that has none."""
        mine = {clip: job for clip in self.waiting if (job := self._next(clip, worker)) is not None}
        for clip in mine:
            if self.owner.get(clip) == worker:
                return [mine[clip]]
        for clip in mine:
            if clip not in self.owner or self._next(clip, self.owner[clip]) is None:
                self.owner[clip] = worker
                return [mine[clip]]
        helped = [clip for clip in mine if self.shared and clip in self.ready]
        return [mine[clip] for clip in sorted(helped, key=lambda clip: -len(self.waiting[clip]))]

    def _next(self, clip: str, worker: str) -> Job | None:
        """Return the first waiting job of a clip but for those that are better tried by another worker."""

        def is_for_others(job: Job) -> bool:
            return self.deaths.get(job, []).count(worker) >= _MOST_DEATHS // 2 and bool(self.present - {worker})

        return next((job for job in self.waiting[clip] if not is_for_others(job)), None)

    def done(self, worker: str, error: Exception | None) -> bool:
        """Note the end of a worker's job; return whether the worker is of use."""
        with self.changed:
            job = self.running.pop(worker)
            in_a_row = self.in_a_row.setdefault(worker, set())
            if error is None:
                self.outcome.made += 1
                self.ready.add(job.clip)
                in_a_row.clear()
            elif isinstance(error, WorkerDied):
                self.outcome.deaths += 1
                in_a_row.add(job)
                ended = self.deaths.setdefault(job, [])
                # A worker that can make nothing says nothing about the edit.
                ended += [] if isinstance(error, WorkerLost) else [worker]
                if len(ended) >= _MOST_DEATHS:
                    self.outcome.failed.append((job, f"it has ended {_MOST_DEATHS} workers: {error}"))
                else:
                    self.waiting[job.clip].appendleft(job)
            else:
                said = str(error) if isinstance(error, EditFailed) else f"{type(error).__name__}: {error}"
                self.outcome.failed.append((job, said))
            self.changed.notify_all()
            return len(in_a_row) < _MOST_IN_A_ROW

    def leave(self, worker: str, reason: str = "") -> None:
        """Give a worker's clips to others, and the edit in its hands if there is one. ``reason``: why it was lost."""
        with self.changed:
            self.present.discard(worker)
            if reason:
                self.outcome.lost[worker] = reason
            if (job := self.running.pop(worker, None)) is not None:
                self.waiting[job.clip].appendleft(job)
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

    A worker that dies loses the edit in its hands, which is made again. The edits of one that does not come back go to
    the others. Ctrl-C ends all workers and is raised again.
    """
    pool = _Pool(jobs, [worker.name for worker in workers], shared)
    threads = [threading.Thread(target=_work, args=(pool, worker, say), daemon=True) for worker in workers]
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            for thread in threads:
                thread.join(0.2)
    finally:
        pool.stop()
        _close_all(workers)
    pool.outcome.left = sum(map(len, pool.waiting.values()))
    return pool.outcome


def _work(pool: _Pool, worker: Worker, say: Callable[[str, Job, str], None]) -> None:
    """Make jobs of the pool until there are none, or until the worker is lost."""
    reason = ""
    try:
        while (job := pool.take(worker.name)) is not None:
            error = _error_of(worker, job)
            if pool.stopped:
                return
            is_of_use = pool.done(worker.name, error)
            say(worker.name, job, "made" if error is None else f"{type(error).__name__}: {error}")
            if isinstance(error, WorkerDied) and not (is_of_use and _comes_back(worker, error)):
                reason = str(error)
                say(worker.name, job, "the worker is left out; others make its edits")
                return
    finally:
        # The others must not wait for this worker, even after an error.
        pool.leave(worker.name, reason)


def _error_of(worker: Worker, job: Job) -> Exception | None:
    try:
        # A worker can die between the last picture and its answer.
        if not job.result.is_dir():
            worker.edit(job)
    except Exception as error:  # a failed edit must not end the others
        return error
    return None


def _comes_back(worker: Worker, error: WorkerDied) -> bool:
    try:
        return not isinstance(error, WorkerLost) and worker.revive()
    except Exception:  # whatever it is, the worker is not there
        return False


def _close_all(workers: Sequence[Worker]) -> None:
    """Close all workers at once: one that hangs must not keep the others alive."""
    threads = [threading.Thread(target=worker.close, daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_CLOSE)
