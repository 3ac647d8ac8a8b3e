"""Mutation testing in short; `python tests/mutants` tries every change."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).with_name("mutants")


@pytest.fixture(scope="module")
def changes() -> ModuleType:
    spec = importlib.util.spec_from_file_location("changes", FOLDER / "changes.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["changes"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("x = a + b", ["x = a - b"]),
        ("x = a < b", ["x = a <= b", "x = a >= b"]),
        ("x = a and -b", ["x = a or -b", "x = a and +b"]),
        ("x = a if b else 1.5", ["x = a if not b else 1.5", "x = a if b else 3.0"]),
        ("x = f(a, b, c=True)", ["x = f(b, a, c=True)", "x = f(a, b)", "x = f(a, b, c=False)"]),
        ("x += f'{a}b'", ["x -= f'{a}b'", "x += f'{a}bx'"]),
        ("f(a)", ["None"]),
        ("while a:\n    b = 0", ["while not a:", "b = 1"]),
        ("if not a:\n    raise ValueError(f'{a} is wrong')", ["if not not a:", "raise _not_raised"]),
        ("@f(1)\ndef g(x: int=1) -> int:\n    'A text.'\n    return x", ["@f(1)", "return None"]),
        ("x: Literal['a'] = None", []),
    ],
)
def test_changes_are_one_at_a_time_and_of_what_runs(changes: ModuleType, before: str, after: list[str]) -> None:
    assert [change.after for change in changes.changes_of(before)] == after


def test_some_changes_are_tried_and_noticed(comfyui: Path | None) -> None:
    command = [sys.executable, FOLDER, "--files", "schedule", "--count", "6", "--seed", "1"]
    command += ["--comfyui", comfyui] if comfyui else []
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("schedule: 6 changes, ")
