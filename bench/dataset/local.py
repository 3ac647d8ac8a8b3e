"""Workers on this machine: one process a device."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .jobs import EditFailed, Job, Settings, WorkerDied, WorkerLost

WORKER = Path(__file__).with_name("worker.py")


class LocalWorker:
    """A process of ``worker.py``. ``device``: a CUDA device's number, None for the CPU or the only device."""

    def __init__(
        self,
        name: str,
        settings: Settings,
        logs: Path,
        threads: int,
        comfyui: Path | None,
        device: str | None = None,
        program: Sequence[str | Path] = (sys.executable, "-u", WORKER),
    ) -> None:
        self.name = name
        self._start = {"settings": settings.to_json(), "threads": threads, "comfyui": str(comfyui or "")}
        self._log, self._device, self._program = logs / f"{name}.log", device, program
        self._process: subprocess.Popen[str] | None = None
        self._closed = self._ready = False

    @property
    def process_id(self) -> int:
        """The running process's id, 0 if there is none."""
        return self._process.pid if self._process else 0

    def edit(self, job: Job) -> None:
        if self._process is None:
            if self._closed:
                raise WorkerDied("the study has ended")
            self._ready = False
            self._process = self._launch()
            self._answer()
            self._ready = True
        values = {key: str(value) for key, value in dataclasses.asdict(job).items()}
        self._send(values)
        answer = self._answer()
        if "error" in answer:
            raise EditFailed(str(answer["error"]))

    def _launch(self) -> subprocess.Popen[str]:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        environment = dict(os.environ)
        if self._device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self._device
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                list(map(str, self._program)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                # Ctrl-C on the terminal reaches the study alone, which then ends its workers.
                start_new_session=True,
            )
        self._process = process
        self._send(self._start)
        return process

    def _send(self, values: object) -> None:
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(values) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._death() from error

    def _answer(self) -> dict[str, object]:
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise self._death()
        found: dict[str, object] = json.loads(line)
        return found

    def _death(self) -> WorkerDied:
        assert self._process is not None
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        said = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        self._process = None
        if code >= 0 and not self._ready:
            # It would end the same way with every edit.
            return WorkerLost(f"it does not start ({said}); its log is {self._log}")
        return WorkerDied(f"{said}; its log is {self._log}")

    def revive(self) -> bool:
        return not self._closed

    def close(self) -> None:
        self._closed = True
        process = self._process
        if process is not None:
            process.kill()
            process.wait()
