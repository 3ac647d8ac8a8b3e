"""The method edits: the shortened ablation with the demo's model, for as long as it takes (docs/ablation.md)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# Scripts import what lies beside them by its plain name.
sys.path += [str(ROOT / "demo"), str(ROOT / "bench")]

import ablation  # noqa: E402
import verdicts  # noqa: E402
from study import FULL  # noqa: E402
from tune_a_video.tav_core.tiny_sd import model as tiny_sd  # noqa: E402


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The shortened study, run once."""
    plan = ablation.quick_plan(tiny_sd.WEIGHTS, tmp_path_factory.mktemp("ablation"))
    ablation._make([plan], 1)
    yield plan


def test_each_part_of_the_method_is_worth_something(plan: Any) -> None:
    differences = ablation.figures(plan, ablation.QUICK_CLAIMS, ())["differences"]
    assert verdicts.failed(differences, ablation.QUICK_CLAIMS) == []


@pytest.mark.parametrize("part", [method for method, *_ in ablation.QUICK_CLAIMS])
def test_a_method_without_a_part_is_told_apart(plan: Any, part: str) -> None:
    """The ablation in the place of the full method: its claim must fail."""
    broken = ablation.with_broken_method(plan, part)
    failed = verdicts.failed(ablation.figures(broken, ablation.QUICK_CLAIMS, ())["differences"], ablation.QUICK_CLAIMS)
    assert any(claim.startswith(f"{part} is not worse than") for claim in failed)


def test_most_edits_are_made(plan: Any) -> None:
    made = [row["edit right"] for row in plan.rows() if row["method"] == FULL.name]
    assert torch.tensor(made).mean() >= 0.5
