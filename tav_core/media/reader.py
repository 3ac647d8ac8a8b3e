"""A program, not a module: reads a clip in a process of its own, for ``process.read``.

The job comes as JSON on standard input: module_path, the sys.path of the program that asks; library and task, a
function of ``av_reader`` or ``decord_reader``; arguments for it; memory, the bytes that it may take. Each result goes
to standard output as a line of JSON and, after it, as many bytes as its "bytes" says. After a failure the last line on
standard error says why, and the exit status is not 0.
"""

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any


def limit_memory(extra: int) -> None:
    """Let this process take ``extra`` bytes more than it has now. Windows and macOS have no such limit."""
    with suppress(ImportError, OSError):
        import resource

        with open("/proc/self/statm") as pages:
            taken = int(pages.read().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        with suppress(ValueError):  # the administrator's limit is tighter
            resource.setrlimit(resource.RLIMIT_AS, (taken + extra, hard))


def main() -> None:
    """Do the job."""
    job = json.load(sys.stdin)
    sys.path[:] = [*job["module_path"], str(Path(__file__).parents[2])]
    if job["library"] == "decord":
        from tav_core.media import decord_reader

        task: Any = decord_reader.frames
    else:
        from tav_core.media import av_reader

        task = getattr(av_reader, job["task"])
    limit_memory(job["memory"])
    for header, content in task(**job["arguments"]):
        sys.stdout.buffer.write(json.dumps({**header, "bytes": len(content)}).encode() + b"\n")
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    try:
        main()
    except MemoryError as error:
        sys.exit(f"out of memory {error}")
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")
