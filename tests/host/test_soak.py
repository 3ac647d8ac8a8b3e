"""A short run of `python tests/soak`; that command goes on for as long as one likes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.host

# A seed whose graphs are of four kinds and few different ones, each of which takes a clean server.
SEED, RUNS = 1025, 8


def test_graphs_of_all_kinds_and_interrupts_leave_each_other_alone(comfyui, exercised):
    command = [sys.executable, Path(__file__).parent.parent / "soak", "--seed", str(SEED), "--runs", str(RUNS)]
    done = subprocess.run([*command, "--repeats", "0", "--comfyui", comfyui], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if " graphs, " in line]
    assert sum(int(line.split(": ")[1].split()[0]) for line in lines) == RUNS
    assert sum(int(line.split(", ")[1].split()[0]) for line in lines) >= RUNS // 4, "hardly a graph came to its end"
    exercised.append(f"soak: {RUNS} graphs; {done.stdout.splitlines()[-1]}")
