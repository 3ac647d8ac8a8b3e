"""The state of a tuning run on disk, so that a run that was cut off goes on where it was.

A run is known by a fingerprint of all that decides its result, which is also its file's name: another run
never reads it. The files are safetensors with JSON in their metadata; they appear whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..motion.file import write_safetensors
from ..out_of_memory import is_out_of_memory

FORMAT = "tune-a-video run 1"
# Runs that nobody went on with go after this many seconds, and the oldest when there are more than so many.
KEPT_FOR = 3 * 24 * 3600.0
KEPT_RUNS = 3
# What this module names its files, and no other: a run, or what is being written of one.
_OURS = re.compile(r"[0-9a-f]{64}\.safetensors|\.[0-9a-f]{64}.*\.part")
# At most this share of the time is spent on writing.
_SHARE_OF_TIME = 0.05


@dataclass(frozen=True)
class State:
    """What a run needs to go on: tensors by name, and values that JSON gives back as they were."""

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]


def fingerprint(values: Any, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256, in hex, of JSON values and of tensors: names, dtypes, shapes and every byte, on any device."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for name, tensor in tensors:
        data = tensor.detach().cpu().contiguous()
        digest.update(f"\n{name} {data.dtype} {list(data.shape)}\n".encode())
        digest.update(data.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Checkpoint:
    """The file of one run in ``folder``.

    Written every ``interval`` seconds, or more seldom if writing is slow; 0 = after every step, however slow.
    No method raises for a file or a disk that fails: the run goes on without, and the log and ``warn`` say so.
    """

    def __init__(self, folder: Path, run: str, interval: float, warn: Callable[[str], None] | None = None) -> None:
        self.path = folder / f"{run}.safetensors"
        self._run, self._interval, self._tell = run, interval, warn
        self._due = time.monotonic() + interval

    def _warn(self, text: str) -> None:
        logging.warning("Tune-A-Video: %s", text)
        if self._tell is not None:
            self._tell(text)

    def check(self, size: int) -> None:
        """Say so, before the work, if the folder cannot take a state of ``size`` bytes."""
        folder = self.path.parent
        # While a state is written, the one before it is there still.
        needed = size if self.path.exists() else 2 * size
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                free = shutil.disk_usage(folder).free
        except OSError as error:
            reason = str(error)
        else:
            if free >= needed:
                return
            reason = f"{free / 2**20:.0f} MiB are left on the disk, {needed / 2**20:.0f} MiB are needed"
        self._warn(f"this run's state cannot be kept in {folder} ({reason}): if it is cut off, it starts anew")

    def due(self) -> bool:
        """Whether it is time to write."""
        return time.monotonic() >= self._due

    def write(self, state: State) -> None:
        """Put ``state`` in the place of what was written before."""
        began = time.monotonic()
        try:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
            metadata = {
                "format": FORMAT,
                "run": self._run,
                "values": json.dumps(state.values),
                "sha256": fingerprint(state.values, sorted(tensors.items())),
            }
            write_safetensors(tensors, metadata, self.path)
        except (OSError, RuntimeError, MemoryError, SafetensorError) as error:
            self._warn(f"this run's state cannot be written to {self.path} ({error})")
        now = time.monotonic()
        self._due = now + (max(self._interval, (now - began) / _SHARE_OF_TIME) if self._interval else 0.0)

    def read(self) -> State | None:
        """What was written last; None if there is nothing, or nothing that can be trusted."""
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
        return State(tensors, values)

    def remove(self) -> None:
        """Forget the run."""
        self.path.unlink(missing_ok=True)

    def tidy(self) -> None:
        """Remove runs that are too old or too many, and what writers that were killed left of this one."""
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
    """A file, or the folder that a writer which was killed left, with what is in it."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
