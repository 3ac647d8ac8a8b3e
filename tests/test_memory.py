"""Plans of what is kept and what is recomputed, and that they make no difference to the learnt weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from tune_a_video.tav_core import host
from tune_a_video.tav_core.tuning import memory_probe, recompute
from tune_a_video.tav_core.tuning.memory_plan import LEVELS, Level, Plan, UnitCost, make_plan, peak
from tune_a_video.tav_core.tuning.trainable import TrainScope
from tune_a_video.tav_core.tuning.trainer import Trainer, TuneSettings
from tune_a_video.tav_core.tuning.training_unet import TrainingUNet
from tuning_runs import Result, assert_same, run, trainer_of
from unets import UNETS, build_model

COST = st.builds(
    lambda saved, input, attended, gradients: UnitCost(saved, saved * input, saved * attended, gradients),
    st.floats(1, 1e9),
    st.floats(0, 1),
    st.sampled_from([0.0, 0.1, 0.3]),
    st.floats(0, 1e8),
)
COSTS = st.lists(COST, min_size=1, max_size=12).map(lambda costs: {str(i): cost for i, cost in enumerate(costs)})
# How long an example takes says more about the machine than about the code.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@contextmanager
def tuning(
    model: Any, frames: int = 3, side: int = 8, scope: TrainScope = "all", level: Level | None = None, **options: Any
) -> Iterator[Trainer]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(frames, 4, side, side, generator=generator)
    pooled = {"pooled_output": torch.randn(1, 1280, generator=generator)}
    cond = [[torch.randn(1, 7, host.context_width(model), generator=generator), pooled]]
    settings = TuneSettings(steps=3, learning_rate=1e-3, train_scope=scope)
    with trainer_of(model, latents, cond, settings, **options) as trainer:
        if level is not None:
            trainer.plan = Plan.all_at(trainer.costs, level)
        yield trainer


def tune(model: Any, **options: Any) -> Result:
    with tuning(model, **options) as trainer:
        return run(trainer)


@patient
@given(COSTS, st.floats(0, 1e10))
def test_a_plan_keeps_within_the_budget_what_can_be_kept(costs: dict[str, UnitCost], budget: float) -> None:
    plan = make_plan(costs, budget)
    assert set(plan.levels) == set(costs)
    assert plan.bytes == peak(costs, plan.levels)
    assert plan.bytes <= budget or plan.smallest
    # The largest are given up first: a kept block is smaller than any that is recomputed.
    given_up = [costs[path].saved for path, level in plan.levels.items() if level == "recompute"]
    assert not given_up or min(given_up) >= max(
        (costs[path].saved for path, level in plan.levels.items() if level != "recompute"), default=0
    )


@patient
@given(COSTS, st.floats(0, 1e10), st.floats(1, 4))
def test_a_larger_budget_never_gives_up_more(costs: dict[str, UnitCost], budget: float, more: float) -> None:
    order = {level: rank for rank, level in enumerate(LEVELS)}
    small, large = make_plan(costs, budget), make_plan(costs, budget * more)
    assert all(order[large.levels[path]] <= order[small.levels[path]] for path in costs)


@patient
@given(COSTS)
def test_levels_hold_less_the_more_they_recompute(costs: dict[str, UnitCost]) -> None:
    for cost in costs.values():
        small = UnitCost(cost.saved, min(cost.input, 0.5 * cost.saved), min(cost.attended, 0.5 * cost.saved))
        assert small.held("recompute") <= small.held("selective") <= small.held("keep")


def test_everything_is_kept_without_a_limit_and_nothing_without_a_budget() -> None:
    costs = {"a": UnitCost(100, 10, 20), "b": UnitCost(50, 10)}
    assert set(make_plan(costs, math.inf).levels.values()) == {"keep"}
    assert make_plan(costs, 0).smallest
    assert Plan.all_at(costs, "selective").levels == {"a": "selective", "b": "keep"}


def test_attention_is_what_is_kept_longest() -> None:
    costs = {"residual": UnitCost(100, 10), "first": UnitCost(90, 10, 20), "last": UnitCost(80, 10, 20)}
    kept = Plan.all_at(costs, "keep").bytes
    assert make_plan(costs, kept - 1).levels == {"residual": "keep", "first": "selective", "last": "keep"}


def test_the_worst_moment_is_found_by_hand() -> None:
    costs = {"first": UnitCost(100, 10, gradients=7), "last": UnitCost(60, 10, 20, gradients=5)}
    # Between the units lies the larger of the two inputs.
    between = 10
    # Backward through "last": both are held, half of its own is in flight, and only its gradients come to be.
    assert peak(costs, {"first": "keep", "last": "keep"}) == between + 100 + 60 + 0.5 * 60 + 5
    # Both recomputed: at "first" its whole forward is there again, and the gradients of both are.
    assert peak(costs, {"first": "recompute", "last": "recompute"}) == between + 10 + 90 + 0.5 * 100 + 12


@pytest.mark.parametrize("level", ["selective", "recompute"])
@pytest.mark.parametrize("scope", ["all", "middle and up"])
def test_recomputing_learns_the_same(scope: TrainScope, level: Level) -> None:
    model = build_model(UNETS["tiny-sdxl"])
    assert_same(tune(model, scope=scope, level="keep"), tune(model, scope=scope, level=level))


def test_without_selective_checkpoints_units_are_kept_or_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on PyTorch 2.4."""
    model = build_model(UNETS["tiny"])
    kept = tune(model, level="keep")
    monkeypatch.setattr(recompute, "CheckpointPolicy", None)
    with tuning(model, level="selective") as trainer:
        assert_same(run(trainer), kept)
        assert set(trainer.plan.levels.values()) == {"keep"}
    with tuning(model, memory_budget=trainer.plan.bytes / 2) as trainer:
        assert_same(run(trainer), kept)
        assert trainer.plan.count("recompute") and not trainer.plan.count("selective")


def test_at_the_selective_level_no_attention_runs_twice() -> None:
    runs: dict[str, int] = {}
    for level in LEVELS:
        with memory_probe._AttentionResults(lambda size, level=level: runs.update({level: runs.get(level, 0) + 1})):
            tune(build_model(UNETS["tiny"]), level=level)
    assert runs["selective"] == runs["keep"] < runs["recompute"]


@pytest.mark.parametrize("scope", ["all", "middle and up"])
def test_saved_bytes_are_predicted_from_the_probes(scope: TrainScope) -> None:
    """Against what autograd really saves in a step of the asked size."""
    with tuning(build_model(UNETS["tiny"]), frames=5, side=24, scope=scope, memory_budget=math.inf) as trainer:
        predicted = trainer.costs
        with memory_probe._counting(trainer.unet.module) as counted:
            trainer.backward(*trainer.draw())
    assert set(predicted) and set(predicted) <= set(counted)
    for path, cost in predicted.items():
        # The few percent are weights that autograd saves too; they don't grow with the clip.
        assert counted[path].saved == pytest.approx(cost.saved, rel=0.05), path
    if scope == "middle and up":
        assert not any(path.startswith("input_blocks") for path in predicted)


def fail(monkeypatch: pytest.MonkeyPatch, times: float) -> None:
    """Have the next ``times`` forward passes run out of memory."""
    forward = TrainingUNet.predict

    def scarce(self: TrainingUNet, *args: Any) -> Tensor:
        nonlocal times
        times -= 1
        if times >= 0:
            raise torch.OutOfMemoryError("injected")
        return forward(self, *args)

    monkeypatch.setattr(TrainingUNet, "predict", scarce)


def test_running_out_of_memory_repeats_the_step_with_a_smaller_plan(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = build_model(UNETS["tiny"])
    expected = tune(model)
    with tuning(model, memory_budget=1e12) as trainer:
        next(iter(trainer))
        first = trainer.plan
        fail(monkeypatch, times=2)
        assert_same(run(trainer), expected)
        assert trainer.plan.bytes < first.bytes
    assert sum("out of memory in step 2" in record.message for record in caplog.records) == 2


def test_no_memory_even_with_everything_recomputed_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with tuning(build_model(UNETS["tiny"])) as trainer:
        assert trainer.plan.levels  # probed while there was memory
        fail(monkeypatch, times=math.inf)
        with pytest.raises(RuntimeError, match="out of memory, although.*fewer frames or a smaller size"):
            next(iter(trainer))
