"""What is kept, what is recomputed, and that it makes no difference to what is learnt."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from tune_a_video.tav_core import host, memory
from tune_a_video.tav_core.inflate import Inflation
from tune_a_video.tav_core.memory import UnitCost, make_plan, total_bytes
from tune_a_video.tav_core.trainable import TrainScope
from tune_a_video.tav_core.tune import TuneSettings, one_shot_tune
from tune_a_video.tav_core.weights import Motion
from unets import UNETS, build_model

COST = st.builds(lambda saved, share: UnitCost(saved, saved * share), st.floats(1, 1e9), st.floats(0, 1))
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
    assert plan.kept | plan.recomputed == set(costs) and not plan.kept & plan.recomputed
    assert plan.bytes == total_bytes(costs, plan.recomputed)
    assert plan.bytes <= budget or not plan.kept
    if plan.recomputed and plan.kept:
        assert min(costs[p].saved - costs[p].input for p in plan.recomputed) >= max(
            costs[p].saved - costs[p].input for p in plan.kept
        )


def test_everything_is_kept_without_a_limit_and_nothing_without_a_budget() -> None:
    costs = {"a": UnitCost(100, 10), "b": UnitCost(50, 10)}
    assert not make_plan(costs, math.inf).recomputed
    assert not make_plan(costs, 0).kept


@pytest.mark.parametrize("scope", ["all", "middle and up"])
def test_recomputing_learns_the_same(scope: TrainScope) -> None:
    model = build_model(UNETS["tiny-sdxl"])
    (kept, losses), (recomputed, again) = (tune(model, scope=scope, budget=budget) for budget in (math.inf, 0))
    assert losses == again
    assert all(torch.equal(value, recomputed.tensors[key]) for key, value in kept.tensors.items())


@pytest.mark.parametrize("scope", ["all", "middle and up"])
def test_saved_bytes_are_predicted_from_the_probes(scope: TrainScope, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against what autograd really saves in a step of the asked size."""
    predicted: dict[str, UnitCost] = {}
    counted: dict[str, int] = {}
    measure, backward = memory.measure, host.TrainingUNet.predict

    def spy_measure(*args: Any) -> dict[str, UnitCost]:
        predicted.update(measure(*args))
        return predicted

    def spy_predict(self: host.TrainingUNet, noisy: Tensor, timestep: int) -> Tensor:
        if len(noisy) != 5 or counted:
            return backward(self, noisy, timestep)
        with memory._counting(self.unet) as (saved, _):
            out = backward(self, noisy, timestep)
        counted.update(saved)
        return out

    monkeypatch.setattr(memory, "measure", spy_measure)
    monkeypatch.setattr(host.TrainingUNet, "predict", spy_predict)
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
    forward = host.TrainingUNet.predict

    def scarce(self: host.TrainingUNet, noisy: Tensor, timestep: int) -> Tensor:
        nonlocal calls
        calls += 1
        if calls in (4, 5):  # the second step, twice; the first two calls are the probes
            raise torch.OutOfMemoryError("injected")
        return forward(self, noisy, timestep)

    monkeypatch.setattr(host.TrainingUNet, "predict", scarce)
    motion, losses = tune(model, budget=1e12)
    assert losses == expected_losses
    assert all(torch.equal(value, motion.tensors[key]) for key, value in expected.tensors.items())
    assert sum("out of memory in step 2" in record.message for record in caplog.records) == 2


def test_no_memory_even_with_everything_recomputed_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    forward = host.TrainingUNet.predict

    def none_left(self: host.TrainingUNet, noisy: Tensor, timestep: int) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise torch.OutOfMemoryError("injected")
        return forward(self, noisy, timestep)

    monkeypatch.setattr(host.TrainingUNet, "predict", none_left)
    with pytest.raises(RuntimeError, match="Out of memory, although.*fewer frames or a smaller size"):
        tune(build_model(UNETS["tiny"]))
