"""A program, not a module: frames of a clip by decord, as raw rgb24 on standard output.

It runs in a process of its own because a damaged clip can end the process that decord is in. Its one argument is
JSON: module_path, the sys.path to find decord on; path, of the clip; width, height and frames that it is said to
have; wanted, a range of the frames to give (start, stop, step); memory, bytes that decoding may take. If it cannot
give them, the last line on standard error says why, and the exit status is not 0.
"""

import json
import sys
from contextlib import suppress


def limit_memory(extra: int) -> None:
    """Let this process take so many bytes more than it has now; where the system has no such limit, do nothing."""
    with suppress(ImportError, OSError):
        import resource

        with open("/proc/self/statm") as pages:
            taken = int(pages.read().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        with suppress(ValueError):  # the administrator's limit is tighter
            resource.setrlimit(resource.RLIMIT_AS, (taken + extra, hard))


def main() -> None:
    job = json.loads(sys.argv[1])
    sys.path[:] = job["module_path"]
    import decord

    limit_memory(job["memory"])
    reader = decord.VideoReader(job["path"], num_threads=1)
    # It also counts the frames that an edit list hides, and loses the first ones of some containers.
    if len(reader) != job["frames"]:
        sys.exit("its frame numbers would be wrong")
    wanted = range(*job["wanted"])
    # Read on from frame to frame: where a clip's groups of frames are open (HEVC's default), decord's own access
    # by number, and its skip_frames, give a frame some numbers off, without an error.
    for index in range(wanted[-1] + 1):
        frame = reader.next()
        if index not in wanted:
            continue
        pixels = frame.asnumpy()
        if pixels.shape != (job["height"], job["width"], 3):
            sys.exit(f"a frame of {pixels.shape[1]}x{pixels.shape[0]}")
        sys.stdout.buffer.write(pixels.tobytes())
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
