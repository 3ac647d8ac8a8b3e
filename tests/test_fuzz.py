"""A short run of `python tests/fuzz`; that command goes on for as long as one likes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_spoilt_input_gives_a_result_or_a_clear_error(comfyui: Path | None) -> None:
    kinds = ["video", "motion", "inputs", "tensors"] if comfyui else ["video", "motion"]
    command = [sys.executable, Path(__file__).with_name("fuzz"), "--count", "40", "--kinds", ",".join(kinds)]
    command += ["--comfyui", comfyui] if comfyui else []
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert {kind: line.split(",")[0] for kind, line in lines.items()} == dict.fromkeys(
        kinds, f"{40 // len(kinds)} cases"
    )
