"""python bench gpu: its parts run apart, and what one of them loses is its own figures only."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def bench(tmp_path: Path, pytestconfig: pytest.Config) -> Any:
    """A run on the CPU with some options; its report."""

    def run(*options: str) -> dict[str, Any]:
        engine = ["--engine", "pypi"] if pytestconfig.option.engine == "pypi" else []
        files = ["--json", tmp_path / "report.json", "--results", tmp_path / "lines.jsonl"]
        command = [sys.executable, ROOT / "bench", "gpu", *engine, "--threads", "1", "--on", "cpu", *files, *options]
        subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
        return json.loads((tmp_path / "report.json").read_text())  # type: ignore[no-any-return]

    return run


def test_every_figure_is_written_with_its_part(bench: Any) -> None:
    report = bench("--parts", "half precision", "lengths")
    assert [state["ended"] for state in report["parts"].values()] == ["done", "done"]
    errors = {row["precision"]: row["relative_error"] for row in report["rows"] if row["part"] == "half precision"}
    assert 0 < errors["fp16"] < errors["bf16"] < 0.1
    steps = {row["kind"]: row for row in report["rows"] if row["part"] == "lengths"}
    assert steps.keys() == {"tune-step", "invert-step", "sample-step"}
    assert all(0 < row["median_s"] < 60 and row["flops"] > 0 for row in steps.values())


def test_a_part_that_is_too_slow_is_stopped_and_the_next_ones_are_told(bench: Any) -> None:
    report = bench("--parts", "steps", "lengths", "--minutes", "0.1")
    assert report["parts"]["steps"]["ended"].startswith("stopped after its")
    assert report["parts"]["lengths"]["ended"] == "no time was left"
    assert report["parts"]["steps"]["seconds"] < 30
