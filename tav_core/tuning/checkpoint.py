"""Keep the state of a tuning run on disk, so that a run that was cut off resumes.

A run is known by a fingerprint of everything that decides its result, which is also its file's name: another run
never reads it. The files are safetensors with JSON in their metadata; they appear whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..cancel import raise_if_cancelled
from ..motion.file import write_safetensors
from ..out_of_memory import is_out_of_memory
from .trainer import Trainer

FORMAT = "tune-a-video run 1"
# Unfinished runs are deleted after KEPT_FOR seconds; of the others the KEPT_RUNS newest are kept.
KEPT_FOR = 3 * 24 * 3600.0
KEPT_RUNS = 3
# The names that this module gives its files: a run, or a run that is being written.
_OURS = re.compile(r"[0-9a-f]{64}\.safetensors|\.[0-9a-f]{64}.*\.part")
# The largest share of the time that writing may take.
_SHARE_OF_TIME = 0.05


def fingerprint(values: Any, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256, in hex, of JSON values and of tensors: names, dtypes, shapes and every byte.

    Each tensor is hashed by itself, so that all cores take part. Few wait at a time: the tensors may be copies.
    """
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    threads = os.cpu_count() or 1
    waiting: deque[Future[bytes]] = deque()
    with ThreadPoolExecutor(threads, "tune-a-video-fingerprint") as pool:
        for name, tensor in tensors:
            waiting.append(pool.submit(_digest, name, tensor.detach().cpu().contiguous()))
            if len(waiting) > threads:
                digest.update(waiting.popleft().result())
        for each in waiting:
            digest.update(each.result())
    return digest.hexdigest()


def _digest(name: str, data: Tensor) -> bytes:
    found = hashlib.sha256(f"{name} {data.dtype} {list(data.shape)}\n".encode())
    found.update(data.flatten().view(torch.uint8).numpy().data)
    return found.digest()


def _unless_cancelled(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors for as long as the user does not cancel: a checkpoint's weights take seconds to hash."""
    for each in tensors:
        raise_if_cancelled()
        yield each


class Checkpoint:
    """The file of one run in ``folder``; as a context, it restores the run and saves it whatever ends it.

    Entering loads an earlier state of the same run into ``trainer``. ``save`` writes when it is due: every ``interval``
    seconds, or more seldom if writing is slow; 0 = after every step. Leaving writes the last consistent state, also on
    an exception; a run that has diverged is forgotten. A file or a disk that fails stops no run: the log and ``warn``
    report it. ``folder`` None keeps nothing.
    """

    def __init__(
        self,
        folder: Path | None,
        trainer: Trainer,
        warn: Callable[[str], None] | None = None,
        interval: float = 60.0,
    ) -> None:
        self._trainer, self._interval, self._report = trainer, interval, warn
        self._file: RunFile | None = None
        if folder is not None:
            run = fingerprint(trainer.decisive, _unless_cancelled(trainer.decisive_tensors()))
            self._file = RunFile(folder / f"{run}.safetensors", run)
        self._due = time.monotonic() + interval

    def __enter__(self) -> Checkpoint:
        if self._file is not None:
            self._file.tidy()
            if trouble := self._file.trouble(self._trainer.state_bytes):
                self._warn(f"{trouble}: if the run is cut off, it starts again from the beginning")
            state = self._file.read()
            if state is not None:
                self._trainer.load_state_dict(*state)
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if self._file is None:
            return
        if self._trainer.diverged:
            self._file.path.unlink(missing_ok=True)
        elif self._trainer.is_consistent:
            self._write()

    def save_if_due(self) -> None:
        """Write the run's state when it is time to."""
        if self._file is not None and time.monotonic() >= self._due:
            self._write()

    def _write(self) -> None:
        assert self._file is not None
        began = time.monotonic()
        try:
            self._file.write(*self._trainer.state_dict())
        except (OSError, RuntimeError, MemoryError, SafetensorError) as error:
            self._warn(f"this run's state cannot be written to {self._file.path} ({error})")
        now = time.monotonic()
        self._due = now + (max(self._interval, (now - began) / _SHARE_OF_TIME) if self._interval else 0.0)

    def _warn(self, text: str) -> None:
        logging.warning("Tune-A-Video: %s", text)
        if self._report is not None:
            self._report(text)


class RunFile:
    """The state of one run on disk. ``run``: its fingerprint, which tells it from files of other runs."""

    def __init__(self, path: Path, run: str) -> None:
        self.path, self._run = path, run

    def trouble(self, size: int) -> str:
        """Say why the folder cannot take a state of ``size`` bytes; "" if it can."""
        folder = self.path.parent
        # The previous state stays until the new one is written.
        needed = size if self.path.exists() else 2 * size
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                free = shutil.disk_usage(folder).free
        except OSError as error:
            return f"this run's state cannot be kept in {folder} ({error})"
        if free >= needed:
            return ""
        figures = f"{free / 2**20:.0f} MiB are left on the disk, {needed / 2**20:.0f} MiB are needed"
        return f"this run's state cannot be kept in {folder} ({figures})"

    def write(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Replace the state. Raises OSError, RuntimeError, MemoryError or SafetensorError where that fails."""
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {
            "format": FORMAT,
            "run": self._run,
            "values": json.dumps(values),
            "sha256": fingerprint(values, sorted(on_cpu.items())),
        }
        write_safetensors(on_cpu, metadata, self.path)

    def read(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the tensors and values written last; None if there are none, or none that can be trusted."""
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, framework="pt", device="cpu") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            values = json.loads(metadata["values"])
            ours = {"format": FORMAT, "run": self._run, "sha256": fingerprint(values, sorted(tensors.items()))}
            wrong = next((key for key, value in ours.items() if metadata[key] != value), None)
            if wrong is not None:
                raise ValueError(f"its {wrong} is another")
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            if is_out_of_memory(error):
                raise
            logging.warning("Tune-A-Video: %s is damaged (%s); tuning starts from the beginning", self.path, error)
            return None
        return tensors, values

    def tidy(self) -> None:
        """Delete runs that are too old or too many, and the partial files of this one."""
        try:
            for partial in self.path.parent.glob(f".{self._run}*.part"):
                _remove(partial)
            files = [path for path in self.path.parent.glob("*") if _OURS.fullmatch(path.name)]
            newest = sorted(files, key=lambda path: path.stat().st_mtime, reverse=True)
            for place, path in enumerate(newest):
                old = time.time() - path.stat().st_mtime > KEPT_FOR
                if path != self.path and (old or place >= KEPT_RUNS):
                    _remove(path)
        except OSError as error:
            logging.warning("Tune-A-Video: %s cannot be tidied (%s)", self.path.parent, error)


def _remove(path: Path) -> None:
    """Delete a file, or the folder that a killed writer left."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
