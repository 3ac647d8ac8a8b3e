"""docs/neighbours.md names a test for every neighbour, and the test is there."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
VERDICTS = ("works", "refused", "known limit")
# The neighbours that the table must cover.
EXPECTED = (
    "LoRA before or after", "LoRA hooks with a schedule", "one hint for each frame", "one hint for all frames",
    "strength and timestep range", "two at once", "T2I-Adapter", "IPAdapter", "FreeU", "PAG", "SAG", "ModelMerge",
    "CLIP skip", "textual inversion", "prompt scheduling", "area and mask", "noise mask", "TorchCompile", "--lowvram",
    "--novram", "--disable-smart-memory", "Create Video", "Load Video", "context windows",
    "Tiled Diffusion", "Sage attention",
)  # fmt: skip


def rows() -> list[list[str]]:
    """Return the table's rows: neighbour, verdict, note, test."""
    lines = (ROOT / "docs" / "neighbours.md").read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if line.startswith("| ")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_a_row_has_a_verdict_and_a_test_that_exists(row: list[str]) -> None:
    name, verdict, to_know, test = row
    assert verdict in VERDICTS
    assert to_know or verdict == "works", f"{name} does not say what its limit is"
    file, _, function = test.strip("`").partition("::")
    path = next(path for path in (ROOT / "tests" / "host" / file, ROOT / "tests" / file) if path.is_file())
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_neighbour_is_listed(name: str) -> None:
    assert any(name in row[0] for row in rows())


def test_every_test_of_the_neighbours_file_is_in_the_table() -> None:
    tree = ast.parse((ROOT / "tests" / "host" / "test_neighbours.py").read_text(encoding="utf-8"))
    tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}
    listed = {row[3].strip("`").partition("::")[2] for row in rows()}
    assert tests <= listed
