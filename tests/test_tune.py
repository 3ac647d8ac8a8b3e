"""One-shot tuning: that it learns, what it leaves alone, that it stops."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from tune_a_video.tav_core import host, pipeline
from tune_a_video.tav_core.inflate import Inflation
from tune_a_video.tav_core.motion.file import Motion
from tune_a_video.tav_core.tuning.trainer import Trainer, TuneSettings, by_recipe
from tuning_runs import Draw, Result, assert_same, run, seeded_draw, trainer_of
from unets import UNETS, build_model

LATENT_SCALE = 0.18215


@pytest.fixture(autouse=True)
def on_the_server() -> Any:
    """Nodes run in inference mode."""
    with torch.inference_mode():
        yield


def clip(frames: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    still = torch.randn(1, 4, 8, 8, generator=generator)
    return torch.cat([still.roll(i, dims=-1) for i in range(frames)]) / LATENT_SCALE


def conditioning(model: Any) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    embedding = torch.randn(1, 7, host.context_width(model), generator=generator)
    return [[embedding, {"pooled_output": torch.randn(1, 1280, generator=generator)}]]


def started(
    model: Any, steps: int = 3, precision: torch.dtype | None = None, start: Any = None, **settings: Any
) -> AbstractContextManager[Trainer]:
    return trainer_of(model, clip(), conditioning(model), TuneSettings(steps, **settings), precision, start=start)


def tune(model: Any, *args: Any, draw: Draw | None = None, folder: Path | None = None, **options: Any) -> Result:
    with started(model, *args, **options) as trainer:
        return run(trainer, folder, draw)


@pytest.mark.parametrize(("size", "prediction"), [("tiny", "epsilon"), ("tiny-v", "v"), ("tiny-sdxl", "epsilon")])
def test_tuning_lowers_the_loss_on_the_clip(size: str, prediction: str) -> None:
    model = build_model(UNETS[size], prediction=prediction)
    timestep, noise = seeded_draw(clip(), 1000, 5)(0)
    _, losses = tune(model, 25, learning_rate=3e-3, draw=lambda step: (timestep, noise))
    assert losses[-1] < 0.7 * losses[0], losses


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_float32(dtype: torch.dtype) -> None:
    model = build_model(UNETS["tiny"])
    _, full = tune(model, 4, learning_rate=1e-3)
    motion, half = tune(model, 4, learning_rate=1e-3, precision=dtype)
    assert half == pytest.approx(full, rel=0.05)
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in motion.tensors.values())


def test_same_seed_same_weights() -> None:
    model = build_model(UNETS["tiny"])
    first, again, other = tune(model), tune(model), tune(model, seed=1)
    assert_same(first, again)
    assert any(not torch.equal(value, other[0].tensors[key]) for key, value in first[0].tensors.items())


def test_the_recipe_fast_is_a_fifth_of_the_steps_at_three_times_the_rate() -> None:
    given = TuneSettings(500, 3e-5)
    assert by_recipe(given, "released") is given
    assert by_recipe(given, "fast") == TuneSettings(100, 3 * 3e-5, warmup_steps=10)
    assert by_recipe(TuneSettings(2, warmup_steps=50), "fast") == TuneSettings(1, 3 * 3e-5, warmup_steps=50)


@pytest.mark.comfyui
def test_the_node_tunes_by_its_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    import pack_nodes

    hidden = SimpleNamespace(prompt={}, unique_id="3", extra_pnginfo=None)
    monkeypatch.setattr(pack_nodes.OneShotTune, "hidden", hidden)
    monkeypatch.setattr(f"{pack_nodes.OneShotTune.__module__}.state_folder", lambda warn: None)
    model = build_model(UNETS["tiny"])

    def motion(steps: int, rate: float, warmup: int, **recipe: str) -> Motion:
        inputs = (model, {"samples": clip()}, conditioning(model), steps, rate, 0, "all", "auto", warmup, 1.0)
        return pack_nodes.OneShotTune.execute(*inputs, **recipe).result[1]

    fast, same = motion(60, 1e-3, 0, recipe="fast"), motion(12, 3 * 1e-3, 10)
    assert fast.metadata == same.metadata and fast.metadata["steps"] == "12"
    assert all(torch.equal(value, same.tensors[name]) for name, value in fast.tensors.items())
    assert motion(3, 1e-3, 0).metadata == motion(3, 1e-3, 0, recipe="released").metadata


def test_middle_and_up_leaves_the_down_blocks_alone() -> None:
    motion, _ = tune(build_model(UNETS["tiny"]), train_scope="middle and up")
    assert motion.tensors and not any(key.startswith("input_blocks") for key in motion.tensors)


def test_going_on_starts_where_tuning_stopped() -> None:
    model = build_model(UNETS["tiny"])
    timestep, noise = seeded_draw(clip(), 1000, 5)(0)

    def draw(step: int) -> tuple[int, Tensor]:
        return timestep, noise

    motion, losses = tune(model, 8, learning_rate=1e-3, draw=draw)
    _, more = tune(model, 1, learning_rate=1e-3, draw=draw, start=motion)
    assert more[0] < min(losses)
    # The down blocks of a motion stay in it when only the rest is tuned further.
    further, _ = tune(model, 2, start=motion, train_scope="middle and up")
    for key, value in motion.tensors.items():
        same = torch.allclose(further.tensors[key], value, rtol=0, atol=1e-7)
        assert same == (key.startswith("input_blocks") or ".norm_temp." in key), key


def test_lora_is_part_of_what_is_tuned_on_and_not_of_the_motion() -> None:
    model = build_model(UNETS["tiny"])
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    lora = model.clone()
    lora.add_patches({key: ("diff", (torch.full((64, 64), 0.05),))})
    plain, _ = tune(model, 1)
    motion, losses = tune(lora, 1)
    delta = motion.query_deltas()[key.removeprefix("diffusion_model.")]
    assert float(delta.abs().max()) < 2 * TuneSettings.learning_rate
    assert losses != tune(model, 1)[1]
    assert plain.tensors.keys() == motion.tensors.keys()


@pytest.mark.parametrize("cancel_after", [1, 3])
def test_cancelling_leaves_the_model_as_it_was(cancel_after: int) -> None:
    model = build_model(UNETS["tiny"])
    unet = host.unet_of(model)
    before = {name: value.clone() for name, value in unet.state_dict().items()}

    class CancelledError(Exception):
        pass

    with pytest.raises(CancelledError), started(model, 5) as trainer:
        list(islice(trainer, cancel_after))
        raise CancelledError
    assert not any("forward" in module.__dict__ for module in unet.modules())
    assert torch.is_inference_mode_enabled()
    after = unet.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(value.is_inference() for value in after.values()), "the host's own tensors were replaced"


def draws(bad: Callable[[int], bool]) -> Draw:
    """The usual draws in a row, and one that no loss survives where ``bad(step)``."""
    usual = seeded_draw(clip(), 1000, 5)
    return lambda step: (500, torch.full((3, 4, 8, 8), float("nan"))) if bad(step) else usual(step)


@pytest.mark.parametrize(("steps", "precision"), [(1, None), (4, torch.bfloat16), (20, None), (60, torch.float16)])
def test_a_loss_that_was_never_finite_is_an_error(steps: int, precision: torch.dtype | None) -> None:
    with started(build_model(UNETS["tiny"]), steps, precision) as trainer:
        with pytest.raises(RuntimeError, match="stopped being a finite number.*Lower learning_rate"):
            run(trainer, draw=draws(lambda _: True))
        assert 0 < trainer.done <= 25


def test_a_step_without_a_finite_loss_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = build_model(UNETS["tiny"])
    expected = tune(model, 4, draw=draws(lambda _: False))
    motion, with_gaps = tune(model, 6, draw=draws(lambda step: step in (0, 3)))
    assert_same((motion, [loss for loss in with_gaps if loss == loss]), expected)
    assert "steps [1, 4]" in caplog.text


def test_many_steps_without_a_finite_loss_end_the_run_with_the_last_good_weights(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    model = build_model(UNETS["tiny"])
    expected, _ = tune(model, 3, draw=draws(lambda _: False))
    motion, losses = tune(model, 100, draw=draws(lambda step: step >= 3), folder=tmp_path)
    assert len(losses) == 10
    assert all(torch.equal(value, expected.tensors[key]) for key, value in motion.tensors.items())
    assert "not finite after step 3; tuning ends" in caplog.text
    assert not list(tmp_path.iterdir()), "it would be resumed"


def test_a_gradient_that_is_not_finite_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss may still be finite then."""
    model = build_model(UNETS["tiny"])
    expected, _ = tune(model, 2)
    clip_gradients, calls = torch.nn.utils.clip_grad_norm_, []

    def overflow(parameters: list[Tensor], limit: float) -> Tensor:
        calls.append(limit)
        if len(calls) == 3:
            assert parameters[0].grad is not None
            parameters[0].grad[0] = float("inf")
        return clip_gradients(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", overflow)
    motion, losses = tune(model, 3)
    assert torch.isfinite(torch.tensor(losses)).all() and len(calls) == 3
    assert all(torch.equal(value, expected.tensors[key]) for key, value in motion.tensors.items())


def test_a_motion_of_another_model_is_refused() -> None:
    motion, _ = tune(build_model(UNETS["tiny-sdxl"]), 1)
    with pytest.raises(ValueError, match="has no place in this model|does not fit the model"):
        tune(build_model(UNETS["tiny"]), start=motion)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_inverting_and_sampling_gives_the_clip_back(prediction: str) -> None:
    """At guidance 1 with the same prompt, the more closely the more steps."""
    model = build_model(UNETS["tiny"], prediction=prediction)
    # Random networks bend the path more than trained ones: a weaker head makes it as smooth as theirs.
    host.unet_of(model).out[2].weight.mul_(0.05)
    motion, _ = tune(model, 5)
    tuned = host.inflate_model(model, Inflation(), motion)
    cond, x = conditioning(model), clip()
    errors = []
    for steps in (5, 50):
        inverted = pipeline.invert(tuned, x, cond, steps)
        back = pipeline.sample(tuned, inverted, cond, cond, steps, 1.0)
        errors.append(float((back - x).norm() / x.norm()))
    assert errors[1] < errors[0] / 2, errors


def test_eta_draws_noise_by_its_seed() -> None:
    model = build_model(UNETS["tiny"])
    inflated = host.inflate_model(model, Inflation())
    cond = conditioning(model)

    def run(eta: float, seed: int) -> Tensor:
        return pipeline.sample(inflated, clip(), cond, cond, 4, 1.0, eta=eta, seed=seed)

    assert torch.equal(run(0.0, 1), run(0.0, 2))
    assert torch.equal(run(0.5, 1), run(0.5, 1))
    assert not torch.equal(run(0.5, 1), run(0.5, 2))
