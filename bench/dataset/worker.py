"""A process that makes edits: jobs come as lines of JSON on its input, answers go out as lines of JSON.

It ends when its input ends, so that it never outlives the study.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """Serve jobs until the input ends. The first line of the input has the settings."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    # Other output belongs in the log.
    os.dup2(2, 1)
    start = json.loads(sys.stdin.readline())
    sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "bench")]
    sys.path.append(str(ROOT / "demo"))

    import engine

    engine.load_engine(Path(start["comfyui"]) if start["comfyui"] else None)
    engine.load_pack()
    import torch

    torch.set_num_threads(start["threads"])
    from dataset.editor import Editor
    from dataset.jobs import Job, Settings

    editor = Editor(Settings(**start["settings"]))
    print(json.dumps({"ready": True}), file=answers)
    for line in iter(_lines().get, None):
        values: dict[str, Any] = json.loads(line)
        paths = {key: Path(values[key]) for key in ("frames", "work", "result")}
        answer: dict[str, Any] = {"ok": True}
        try:
            editor.edit(Job(**{**values, **paths}))
        except Exception as error:  # the study continues with the other edits
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers)


def _lines() -> queue.Queue[str | None]:
    """Read the input in a thread of its own; when it ends, end the process even in the middle of an edit."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return lines


if __name__ == "__main__":
    main()
