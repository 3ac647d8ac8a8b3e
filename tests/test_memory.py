"""Plans of what is kept and what is recomputed, and that they make no difference to the learnt weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from tune_a_video.tav_core import host
from tune_a_video.tav_core.inflate import Inflation
from tune_a_video.tav_core.motion.file import Motion
from tune_a_video.tav_core.tuning import memory_probe, recompute
from tune_a_video.tav_core.tuning.memory_plan import LEVELS, Level, Plan, UnitCost, make_plan, peak
from tune_a_video.tav_core.tuning.trainable import TrainScope
from tune_a_video.tav_core.tuning.trainer import TuneSettings
from tune_a_video.tav_core.tuning.training_unet import TrainingUNet
from tuning_runs import one_shot_tune
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


def tune(
    model: Any, frames: int = 3, side: int = 8, scope: TrainScope = "all", **options: Any
) -> tuple[Motion, list[float]]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(frames, 4, side, side, generator=generator)
    pooled = {"pooled_output": torch.randn(1, 1280, generator=generator)}
    cond = [[torch.randn(1, 7, host.context_width(model), generator=generator), pooled]]
    settings = TuneSettings(steps=3, learning_rate=1e-3, train_scope=scope)
    return one_shot_tune(model, latents, cond, settings, Inflation(), **options)


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
    (kept, losses), (recomputed, again) = (tune(model, scope=scope, level=each) for each in ("keep", level))
    assert losses == again
    assert all(torch.equal(value, recomputed.tensors[key]) for key, value in kept.tensors.items())


def test_without_selective_checkpoints_units_are_kept_or_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on PyTorch 2.4."""
    model, plans = build_model(UNETS["tiny"]), []
    kept, _ = tune(model, level="keep")
    monkeypatch.setattr(recompute, "CheckpointPolicy", None)
    motion, _ = tune(model, level="selective", on_plan=plans.append)
    assert all(torch.equal(value, motion.tensors[key]) for key, value in kept.tensors.items())
    tune(model, budget=plans[0].bytes / 2, on_plan=plans.append)
    assert set(plans[0].levels.values()) == {"keep"}
    assert "recompute" in plans[1].levels.values() and "selective" not in plans[1].levels.values()


@pytest.mark.skipif(recompute.CheckpointPolicy is None, reason="PyTorch 2.4 has no selective checkpoints")
def test_at_the_selective_level_no_attention_runs_twice() -> None:
    runs: dict[str, int] = {}
    for level in LEVELS:
        with memory_probe._AttentionResults(lambda size, level=level: runs.update({level: runs.get(level, 0) + 1})):
            tune(build_model(UNETS["tiny"]), level=level)
    assert runs["selective"] == runs["keep"] < runs["recompute"]


@pytest.mark.parametrize("scope", ["all", "middle and up"])
def test_saved_bytes_are_predicted_from_the_probes(scope: TrainScope, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against what autograd really saves in a step of the asked size."""
    predicted: dict[str, UnitCost] = {}
    counted: dict[str, int] = {}
    measure, backward = memory_probe.measure, TrainingUNet.predict

    def spy_measure(*args: Any) -> dict[str, UnitCost]:
        predicted.update(measure(*args))
        return predicted

    def spy_predict(self: TrainingUNet, noisy: Tensor, timestep: int) -> Tensor:
        if len(noisy) != 5 or counted:
            return backward(self, noisy, timestep)
        with memory_probe._counting(self.module) as found:
            out = backward(self, noisy, timestep)
        counted.update({path: unit.saved for path, unit in found.items()})
        return out

    monkeypatch.setattr(memory_probe, "measure", spy_measure)
    monkeypatch.setattr(TrainingUNet, "predict", spy_predict)
    tune(build_model(UNETS["tiny"]), frames=5, side=24, scope=scope, budget=math.inf)
    assert set(predicted) and set(predicted) <= set(counted)
    for path, cost in predicted.items():
        # The few percent are weights that autograd saves too; they don't grow with the clip.
        assert counted[path] == pytest.approx(cost.saved, rel=0.05), path
    if scope == "middle and up":
        assert not any(path.startswith("input_blocks") for path in predicted)


def test_running_out_of_memory_repeats_the_step_with_a_smaller_plan(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = build_model(UNETS["tiny"])
    expected, expected_losses = tune(model)
    calls = 0
    forward = TrainingUNet.predict

    def scarce(self: TrainingUNet, noisy: Tensor, timestep: int) -> Tensor:
        nonlocal calls
        calls += 1
        if calls in (5, 6):  # the second step, twice; the first three calls are the probes
            raise torch.OutOfMemoryError("injected")
        return forward(self, noisy, timestep)

    monkeypatch.setattr(TrainingUNet, "predict", scarce)
    motion, losses = tune(model, budget=1e12)
    assert losses == expected_losses
    assert all(torch.equal(value, motion.tensors[key]) for key, value in expected.tensors.items())
    assert sum("out of memory in step 2" in record.message for record in caplog.records) == 2


def test_no_memory_even_with_everything_recomputed_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    forward = TrainingUNet.predict

    def none_left(self: TrainingUNet, noisy: Tensor, timestep: int) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 3:  # those were the probes
            raise torch.OutOfMemoryError("injected")
        return forward(self, noisy, timestep)

    monkeypatch.setattr(TrainingUNet, "predict", none_left)
    with pytest.raises(RuntimeError, match="out of memory, although.*fewer frames or a smaller size"):
        tune(build_model(UNETS["tiny"]))
