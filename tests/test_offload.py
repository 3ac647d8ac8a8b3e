"""Memory that is given up when it is short, and that it makes no difference to the learnt weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import comfy.ops
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tune_a_video.tav_core import host
from tune_a_video.tav_core.host import lend
from tune_a_video.tav_core.tuning import adamw
from tune_a_video.tav_core.tuning import memory_plan as memory
from tune_a_video.tav_core.tuning import trainer as trainer_module
from tune_a_video.tav_core.tuning.adamw import AdamW
from tune_a_video.tav_core.tuning.checkpoint import Checkpoint
from tune_a_video.tav_core.tuning.trainer import Trainer, TuneSettings
from tune_a_video.tav_core.tuning.training_unet import TrainingUNet
from tuning_runs import Result, assert_same, result_of, run, trainer_of
from unets import UNETS, build_model


@contextmanager
def tuning(model: Any = None, steps: int = 4, **options: Any) -> Iterator[Trainer]:
    model = model or build_model(UNETS["tiny"])
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    cond = [[torch.randn(1, 7, host.context_width(model), generator=generator), {}]]
    with trainer_of(model, latents, cond, TuneSettings(steps=steps, learning_rate=1e-3), **options) as trainer:
        yield trainer


def tune(**options: Any) -> Result:
    with tuning(**options) as trainer:
        return run(trainer)


@pytest.fixture(scope="module")
def undisturbed() -> Result:
    return tune()


@pytest.fixture
def as_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU taken for a device beside RAM: what is copied there and back is copied, and decisions are a card's."""
    monkeypatch.setattr(trainer_module, "_has_own_memory", lambda device: True)


# --- the optimiser ----------------------------------------------------------------------------------------


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(8, side, generator=generator)) for side in (3, 5, 7, 2)]


def descend(
    optimizer: torch.optim.AdamW, steps: range, before: Callable[[int], None] = lambda step: None
) -> list[Tensor]:
    learnt = optimizer.param_groups[0]["params"]
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in learnt:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        # Left out on the device, as a step is whose gradient is not finite.
        optimizer.found_inf = torch.tensor(float(step == 2))  # type: ignore[attr-defined]
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        before(step)
        optimizer.step()
    return [parameter.detach().clone() for parameter in learnt]


@pytest.fixture
def small_visits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "_VISIT", 300)


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert all(torch.equal(our, their) for our, their in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("offload_before", [None, 0, 3])
def test_the_weights_are_those_of_pytorchs_adamw(offload_before: int | None, small_visits: None) -> None:
    expected = descend(torch.optim.AdamW(parameters(), lr=0.1, weight_decay=0.1, fused=True), range(6))
    optimizer = AdamW(parameters(), 0.1, 0.1)
    resident = optimizer.resident_bytes
    assert resident == 2 * 4 * 8 * (3 + 5 + 7 + 2)
    ours = descend(optimizer, range(6), lambda step: optimizer.offload() if step == offload_before else None)
    assert_equal(ours, expected)
    assert optimizer.resident_bytes == (resident if offload_before is None else 0)


def test_few_moments_are_on_the_device_at_a_time(small_visits: None, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = AdamW(parameters(), 0.1, 0.1, offloaded=True)
    homes = {(p, name): optimizer.state[p][name] for p in optimizer._parameters() for name in adamw.MOMENTS}
    step, away = torch.optim.AdamW.step, []

    def spy(self: AdamW) -> Any:
        away.append(
            {p for p in optimizer.state for name in adamw.MOMENTS if optimizer.state[p][name] is not homes[p, name]}
        )
        return step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    descend(optimizer, range(1))
    assert [len(visit) for visit in away] == [2, 1, 1]
    assert set.union(*away) == set(optimizer._parameters())
    assert all(optimizer.state[p][name] is home for (p, name), home in homes.items())
    assert all(home.count_nonzero() for home in homes.values()), "what was updated did not come home"


@pytest.mark.parametrize("fails_at", ["arriving", "kernel"])
@pytest.mark.parametrize("offloaded", [False, True])
def test_an_update_that_runs_out_of_memory_goes_on(
    fails_at: str, offloaded: bool, small_visits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = descend(torch.optim.AdamW(parameters(), lr=0.1, weight_decay=0.1, fused=True), range(6))
    optimizer = AdamW(parameters(), 0.1, 0.1, offloaded)
    calls = 0

    def failing(original: Any, at: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                raise torch.OutOfMemoryError("injected")
            return original(*args, **kwargs)

        return call

    if fails_at == "kernel":  # after it has counted the step
        monkeypatch.setattr(torch, "_fused_adamw_", failing(torch._fused_adamw_, 5))
    else:
        monkeypatch.setattr(Tensor, "to", failing(Tensor.to, 15))
    failures = 0
    step = optimizer.step

    def patient() -> None:
        nonlocal failures
        try:
            step()
        except torch.OutOfMemoryError:
            failures += 1
            patient()

    monkeypatch.setattr(optimizer, "step", patient)
    assert_equal(descend(optimizer, range(6)), expected)
    assert failures == (1 if offloaded or fails_at == "kernel" else 0)


def test_a_state_that_is_loaded_stays_in_ram() -> None:
    optimizer = AdamW(parameters(), 0.1, 0.1)
    descend(optimizer, range(3))
    # The third step was left out, so that its count shows, too.
    saved = copy.deepcopy(optimizer.state_dict())
    again = AdamW([torch.nn.Parameter(p.detach().clone()) for p in optimizer._parameters()], 0.1, 0.1, offloaded=True)
    homes = [again.state[p][name] for p in again._parameters() for name in adamw.MOMENTS]
    again.load_moments(saved["state"])
    assert again.offloaded and again.resident_bytes == 0
    # Copied to where moments are kept: nothing is allocated, on the device or in RAM.
    kept = [again.state[p][name] for p in again._parameters() for name in adamw.MOMENTS]
    assert all(before is after for before, after in zip(homes, kept, strict=True))
    assert_equal(descend(again, range(3, 6)), descend(optimizer, range(3, 6)))


def test_moments_go_to_ordinary_memory_where_no_more_can_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    value, empty, asked = torch.randn(3, 4), torch.empty, []

    def refusing(*size: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        asked.append(pin_memory)
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", refusing)
    assert torch.equal(adamw._in_ram(value, pinned=True), value) and asked == [True, False]


def test_the_pinned_memory_of_moments_is_given_back(as_on_a_card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    given_back: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with tuning() as trainer:
        monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: given_back.append(len(trainer.optimizer.state)))
        trainer.optimizer.offload()
        trainer.close()
    assert given_back == [0], "the moments are still there"


# --- the model's device -----------------------------------------------------------------------------------


def test_weights_are_lent_while_the_models_device_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[torch.device] = []

    @contextmanager
    def current_device(device: torch.device) -> Iterator[None]:
        entered.append(device)
        yield
        entered.pop()

    lent, load = host.lent, host.load_for_training
    monkeypatch.setattr(host, "current_device", current_device)
    inside: list[bool] = []
    monkeypatch.setattr(host, "lent", lambda *args: inside.append(bool(entered)) or lent(*args))
    monkeypatch.setattr(host, "load_for_training", lambda *args: inside.append(bool(entered)) or load(*args))
    with tuning(steps=1) as trainer:
        assert entered == [trainer.unet.device]
        run(trainer)
    assert len(inside) > 10 and all(inside) and not entered


def test_a_cuda_device_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[Any] = []

    @contextmanager
    def device(device: torch.device) -> Iterator[None]:
        entered.append(device)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    for name in ("cpu", "cuda:1"):
        with host.current_device(torch.device(name)):
            pass
    assert entered == [torch.device("cuda:1")]


def test_a_buffer_that_the_host_keeps_is_written_in_both_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts with a stream of copies cast into one buffer, in whatever mode it was made."""
    buffers: list[Tensor] = []

    def cast_bias_weight(layer: Any, x: Tensor, offloadable: bool) -> Any:
        if not buffers:
            buffers.append(torch.empty_like(layer.weight))
        return buffers[0].copy_(layer.weight), None, None

    monkeypatch.setattr(lend, "_TAKES_BACK", True)
    monkeypatch.setattr(comfy.ops, "cast_bias_weight", cast_bias_weight)
    monkeypatch.setattr(comfy.ops, "uncast_bias_weight", lambda *args: None, raising=False)
    layer = comfy.ops.disable_weight_init.Linear(4, 4, bias=False)
    torch.nn.init.normal_(layer.weight)
    layer.comfy_cast_weights = True
    for inference in (True, False):
        with torch.inference_mode(inference), host.lent(layer, torch.zeros(1, 4)) as (weight, _):
            assert torch.equal(weight, layer.weight)


# --- plans ------------------------------------------------------------------------------------------------


def test_moments_leave_only_where_nothing_fits_beside_them() -> None:
    costs = {"a": memory.UnitCost(100, 10, 20), "b": memory.UnitCost(50, 10)}
    least = memory.Plan.all_at(costs, "recompute").bytes
    fitting = memory.make_plan(costs, least + 40, moments=40)
    assert fitting.fits and not fitting.offload
    offloaded = memory.make_plan(costs, least + 39, moments=40)
    assert offloaded.offload and offloaded.fits
    assert offloaded.levels == memory.make_plan(costs, least + 39).levels
    hopeless = memory.make_plan(costs, least - 1, moments=40)
    assert hopeless.offload and hopeless.smallest and not hopeless.fits
    assert "moments in RAM" in str(offloaded) and "RAM" not in str(fitting)
    assert memory.make_plan({}, 0).bytes == 0


def test_a_budget_too_small_for_the_moments_offloads_them(
    as_on_a_card: None, undisturbed: Result, tmp_path: Path
) -> None:
    for budget in (math.inf, 1.0):
        with tuning(memory_budget=budget) as trainer:
            assert_same(run(trainer), undisturbed)
            assert trainer.plan.offload == trainer.plan.smallest == trainer.optimizer.offloaded == (budget == 1.0)
    # Cut off with moments in RAM, and resumed with them there and with them on the device.
    for budget in (1.0, math.inf):
        folder = tmp_path / str(budget)
        with tuning(memory_budget=1.0) as trainer, Checkpoint(folder, trainer):
            assert len(list(islice(trainer, 2))) == 2 and trainer.optimizer.offloaded
        with tuning(memory_budget=budget) as trainer, Checkpoint(folder, trainer):
            assert trainer.done == 2
            assert_same(run(trainer), undisturbed)
            assert trainer.optimizer.offloaded == (budget == 1.0)


# --- out of memory ----------------------------------------------------------------------------------------


class Scarce:
    """A callable that runs out of memory at its first calls after ``skip`` ones."""

    def __init__(self, original: Callable[..., Any], skip: int = 0, failures: int = 1) -> None:
        self.original, self.skip, self.left = original, skip, failures

    def __get__(self, instance: Any, owner: Any) -> Any:
        return lambda *args, **kwargs: self(instance, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.skip -= 1
        if self.skip < 0 < self.left:
            self.left -= 1
            raise torch.OutOfMemoryError("injected")
        return self.original(*args, **kwargs)


PLACES = {
    "probe": (TrainingUNet, "predict", 0),
    "forward": (TrainingUNet, "predict", 4),
    "backward": (Tensor, "backward", 1),
    "clipping": (torch.nn.utils, "clip_grad_norm_", 1),
    "first update": (torch, "_fused_adamw_", 0),
    "update": (torch, "_fused_adamw_", 1),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("failures", [1, 2])
def test_running_out_anywhere_gives_up_memory_and_goes_on(
    place: str,
    failures: int,
    as_on_a_card: None,
    undisturbed: Result,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    owner, name, skip = PLACES[place]
    scarce = Scarce(getattr(owner, name), skip, failures)
    monkeypatch.setattr(owner, name, scarce)
    # On a device that is RAM no weights can be seen to move: tests/host has that case.
    asked: list[float] = []
    monkeypatch.setattr(host, "offload_weights", lambda model, size: asked.append(size) or 1.0)
    assert_same(tune(memory_budget=1e12), undisturbed)
    assert scarce.left == 0
    told = [record.message for record in caplog.records if "out of memory" in record.message]
    assert len(told) == failures
    if place in ("forward", "backward"):
        assert all("in step 2; repeated with blocks: " in message for message in told) and not asked
    else:
        assert "moments in RAM" in told[0]
        assert len(asked) == failures - 1


def test_when_nothing_is_left_to_give_up_it_is_said_so(as_on_a_card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_fused_adamw_", Scarce(torch._fused_adamw_, 1, 10**6))
    with pytest.raises(RuntimeError, match="latent: out of memory. Use fewer frames or a smaller size"):
        tune(memory_budget=1e12)


def test_weights_that_the_host_moves_away_in_mid_run_are_fetched(undisturbed: Result) -> None:
    """With a LoRA, which the host then applies as they are fetched."""
    results = []
    for moves in (False, True):
        model = build_model(UNETS["tiny"])
        key = "diffusion_model.middle_block.0.in_layers.2.weight"
        model.add_patches({key: ("diff", (torch.full((64, 64, 3, 3), 0.01),))})
        with tuning(model) as trainer:
            for step in trainer:
                if moves and step.number == 2:
                    assert model.partially_unload(model.offload_device, 1e12) > 0
            results.append(result_of(trainer))
    (there, losses), (away, other_losses) = results
    assert losses != undisturbed[1]
    assert other_losses == pytest.approx(losses, rel=1e-5)
    for tensor_key, value in there.tensors.items():
        torch.testing.assert_close(away.tensors[tensor_key], value, rtol=1e-3, atol=1e-5)


# --- converted weights ------------------------------------------------------------------------------------


def test_converted_weights_are_kept_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    conversions = 0
    lent = host.lent

    def spy(module: torch.nn.Module, x: Tensor) -> Any:
        nonlocal conversions
        conversions += x.dtype == torch.bfloat16 and isinstance(module, torch.nn.Conv2d)
        return lent(module, x)

    monkeypatch.setattr(host, "lent", spy)

    def with_all_kept(budget: float) -> Result:
        with tuning(precision=torch.bfloat16, memory_budget=budget) as trainer:
            trainer.plan = memory.Plan.all_at(trainer.costs, "keep")
            return run(trainer)

    expected = with_all_kept(1.0)
    uncached, conversions = conversions, 0
    assert_same(with_all_kept(1e12), expected)
    # Three probes and one time of four steps, forward and backward.
    assert conversions < uncached / 2
    # And given up first when memory turns out to be short.
    predict = Scarce(TrainingUNet.predict, 4)
    monkeypatch.setattr(TrainingUNet, "predict", predict)
    with tuning(precision=torch.bfloat16, memory_budget=1e12) as trainer:
        assert [trainer.unet.cast_cache.keep for _ in trainer] == [True, False, False, False]
        assert predict.left == 0 and trainer.plan.count("keep") == len(trainer.plan.levels)
        assert_same(result_of(trainer), expected)


# --- waiting for the device -------------------------------------------------------------------------------


class _Reads(TorchDispatchMode):
    """Counts what reads a tensor's values into Python, for which a device would have to be waited for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_no_step_reads_back_from_the_device(precision: torch.dtype | None, as_on_a_card: None) -> None:
    timestep, noise = 500, torch.randn(2, 4, 8, 8)
    with tuning(steps=10, precision=precision) as trainer:
        trainer.train_step(timestep, noise)
        with _Reads() as reads:
            while not trainer.ended:
                trainer.train_step(timestep, noise)
                assert not reads.count, f"step {trainer.done}"
        assert trainer.done == 10
