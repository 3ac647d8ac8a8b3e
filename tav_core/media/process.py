"""Readers of clips, each in a process of its own: a hostile file can end that process and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from contextlib import suppress
from contextvars import copy_context
from pathlib import Path
from typing import Any, BinaryIO

from ..cancel import raise_if_cancelled

READER = str(Path(__file__).with_name("reader.py"))
# Bytes that a decoder may take, and pictures that it may hold at once.
DECODER_MEMORY, FRAMES_IN_FLIGHT = 2 * 2**30, 32
_SECONDS_BETWEEN_CHECKS = 0.25


class CannotReadError(Exception):
    """A reader has failed. Another one may manage."""


class TimeLimitError(CannotReadError):
    """A reader was stopped at its time limit."""


class _Watch:
    """Ends a process at a time limit, or when the user cancels: who reads from it waits and cannot ask."""

    def __init__(self, process: subprocess.Popen[bytes], seconds: float) -> None:
        self.late = False
        self.cancelled: BaseException | None = None
        self._process, self._end = process, time.monotonic() + seconds
        self._ended, self._context = threading.Event(), copy_context()
        self._thread = threading.Thread(target=self._run, name="tune-a-video-reader", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(_SECONDS_BETWEEN_CHECKS):
            try:
                self._context.run(raise_if_cancelled)
            except BaseException as error:  # the host's, whatever its class
                self.cancelled = error
            self.late = time.monotonic() >= self._end
            if self.late or self.cancelled is not None:
                self._process.kill()
                return

    def close(self) -> None:
        """Stop watching. Raises what the user's cancel raised."""
        self._ended.set()
        self._thread.join()
        if self.cancelled is not None:
            raise self.cancelled


def read(
    library: str, task: str, seconds: float, picture_bytes: int, **arguments: Any
) -> Generator[tuple[dict[str, Any], bytes], None, None]:
    """Yield what ``task`` of the reader for ``library`` ("av" or "decord") gives: headers with their bytes.

    ``seconds``: time limit; ``picture_bytes``: size of a decoded picture. Raises CannotReadError with the last line
    that the reader wrote to its log, and within ``cancellable`` what a cancel raises.
    """
    job = {
        "module_path": [str(Path(entry).absolute()) for entry in sys.path],
        "library": library,
        "task": task,
        "memory": DECODER_MEMORY + FRAMES_IN_FLIGHT * picture_bytes,
        "arguments": arguments,
    }
    command = [sys.executable, "-I", READER]
    with tempfile.TemporaryFile() as log:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log) as process:  # noqa: S603
            assert process.stdin is not None and process.stdout is not None
            watch = _Watch(process, seconds)
            try:
                with suppress(OSError):
                    process.stdin.write(json.dumps(job).encode())
                    process.stdin.close()
                while (line := process.stdout.readline()).endswith(b"\n"):
                    header = json.loads(line)
                    content = process.stdout.read(header["bytes"])
                    if len(content) < header["bytes"]:
                        break
                    yield header, content
                code = process.wait()
                if watch.late:
                    raise TimeLimitError(f"it was not read within {seconds:g} seconds")
                if code:
                    raise CannotReadError(last_line(log) or f"exit status {code}")
            finally:
                process.kill()
                watch.close()


def last_line(log: BinaryIO) -> str:
    """Return the last line of a program's log, empty if there is none."""
    log.seek(0)
    lines = log.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1].strip() if lines else ""
