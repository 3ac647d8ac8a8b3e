"""Readers of clips, each in a process of its own: a hostile file can end that process and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

READER = str(Path(__file__).with_name("reader.py"))
# Bytes that a decoder may take, and pictures that it may hold at once.
DECODER_MEMORY, FRAMES_IN_FLIGHT = 2 * 2**30, 32


class CannotReadError(Exception):
    """A reader has failed. Another one may manage."""


class TimeLimitError(CannotReadError):
    """A reader was stopped at its time limit."""


def read(
    library: str, task: str, seconds: float, picture_bytes: int, **arguments: Any
) -> Generator[tuple[dict[str, Any], bytes], None, None]:
    """Yield what ``task`` of the reader for ``library`` ("av" or "decord") gives: headers with their bytes.

    ``seconds``: time limit; ``picture_bytes``: size of a decoded picture. Raises CannotReadError with the last line
    that the reader wrote to its log.
    """
    job = {
        "module_path": [str(Path(entry).absolute()) for entry in sys.path],
        "library": library,
        "task": task,
        "memory": DECODER_MEMORY + FRAMES_IN_FLIGHT * picture_bytes,
        "arguments": arguments,
    }
    command = [sys.executable, "-I", READER]
    late = threading.Event()
    with tempfile.TemporaryFile() as log:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log) as process:  # noqa: S603

            def stop() -> None:
                late.set()
                process.kill()

            assert process.stdin is not None and process.stdout is not None
            limit = threading.Timer(seconds, stop)
            limit.start()
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
                if late.is_set():
                    raise TimeLimitError(f"it was not read within {seconds:g} seconds")
                if code:
                    raise CannotReadError(last_line(log) or f"exit status {code}")
            finally:
                limit.cancel()
                process.kill()


def last_line(log: BinaryIO) -> str:
    """Return the last line of a program's log, empty if there is none."""
    log.seek(0)
    lines = log.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1].strip() if lines else ""
