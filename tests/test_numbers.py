"""Numbers that are not finite: none is taken, none is handed on, and half precision finds its scale by itself."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tune_a_video.tav_core import host
from tune_a_video.tav_core.inflate import Inflation
from tune_a_video.tav_core.motion.file import Motion
from tune_a_video.tav_core.tuning.trainer import Trainer, TuneSettings
from tuning_runs import Result, assert_same, run, trainer_of
from unets import UNETS, build_model

NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def on_the_server() -> Iterator[None]:
    """Nodes run in inference mode."""
    with torch.inference_mode():
        yield


def latent(value: float | None = None) -> dict[str, Any]:
    samples = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    if value is not None:
        samples[1, 2, 3, 4] = value
    return {"samples": samples}


def conditioning(value: float | None = None, pooled: float | None = None) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    embedding, other = torch.randn(1, 7, 32, generator=generator), torch.randn(1, 1280, generator=generator)
    if value is not None:
        embedding[0, 1, 2] = value
    if pooled is not None:
        other[0, 1] = pooled
    return [[embedding, {"pooled_output": other}]]


def overflowing(model: Any) -> Any:
    """The model with a head that gives infinity."""
    host.unet_of(model).out[2].weight.fill_(INF)
    return model


@pytest.fixture
def nodes() -> SimpleNamespace:
    from tune_a_video.nodes import invert, sample, tune

    hidden = {"hidden": SimpleNamespace(prompt=None, unique_id="1", extra_pnginfo=None)}
    tuning = type("OneShotTune", (tune.OneShotTune,), hidden)

    def run_tune(model: Any, latent: Any, prompt: Any, steps: int = 2, rate: float = 1e-3) -> Motion:
        return tuning.execute(model, latent, prompt, steps, rate, 0, "all", "auto", 0, 1.0).result[1]

    return SimpleNamespace(
        tune=run_tune,
        invert=lambda model, latent, prompt: invert.DDIMInvert.execute(model, latent, prompt, 2).result[0],
        sample=lambda model, latent, prompt: sample.TAVSample.execute(
            model, prompt, prompt, latent, 2, 3.0, 0.0, 0
        ).result[0],
    )


@pytest.mark.comfyui
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("node", ["tune", "invert", "sample"])
def test_values_that_are_not_finite_are_refused_at_the_socket(nodes: SimpleNamespace, node: str, value: float) -> None:
    run, model = getattr(nodes, node), build_model(UNETS["tiny"])
    with pytest.raises(ValueError, match="^latent: .*not finite.*Encode the clip again"):
        run(model, latent(value), conditioning())
    with pytest.raises(ValueError, match=r"^(conditioning|positive): .*NaN or infinity. Encode the prompt again"):
        run(model, latent(), conditioning(value))
    with pytest.raises(
        ValueError, match=r"^(conditioning|positive): .*pooled.*NaN or infinity. Encode the prompt again"
    ):
        run(model, latent(), conditioning(pooled=value))
    with pytest.raises(ValueError, match="^latent: its noise mask holds .*not finite"):
        run(model, {**latent(), "noise_mask": torch.full((1, 8, 8), value)}, conditioning())
    run(model, latent(), conditioning())


@pytest.mark.comfyui
@pytest.mark.parametrize("node", ["invert", "sample"])
def test_a_model_that_overflows_hands_nothing_on(nodes: SimpleNamespace, node: str) -> None:
    model = host.inflate_model(overflowing(build_model(UNETS["tiny"])), Inflation())
    with pytest.raises(RuntimeError, match="^model: what it predicted is not finite.*--fp32-unet"):
        getattr(nodes, node)(model, latent(), conditioning())


@pytest.mark.comfyui
def test_a_model_that_overflows_cannot_be_tuned(nodes: SimpleNamespace) -> None:
    with pytest.raises(RuntimeError, match="loss stopped being a finite number around step 1.*Lower learning_rate"):
        nodes.tune(overflowing(build_model(UNETS["tiny"])), latent(), conditioning())


@pytest.mark.comfyui
def test_weights_that_half_precision_cannot_hold_are_no_motion(
    nodes: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def grown(trainer: Trainer) -> Motion:
        return Motion({key: value * 1e9 for key, value in learnt(trainer).tensors.items()})

    learnt = Trainer.motion
    monkeypatch.setattr(Trainer, "motion", grown)
    with pytest.raises(RuntimeError, match="^learning_rate: the tuned weights are too large.*Lower it"):
        nodes.tune(build_model(UNETS["tiny"]), latent(), conditioning())


def in_fp16(steps: int) -> Result:
    model, settings = build_model(UNETS["tiny"]), TuneSettings(steps=steps, learning_rate=1e-3)
    with trainer_of(model, latent()["samples"], conditioning(), settings, torch.float16) as trainer:
        return run(trainer)


def test_gradients_that_overflow_in_fp16_find_their_scale(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Steps at the beginning are left out until the scale fits, and what is learnt then is finite and repeatable."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**26))
    motion, losses = in_fp16(16)
    assert "left out, loss or gradient is not finite: steps [1, 2" in caplog.text
    assert "steps [12" not in caplog.text and "tuning ends" not in caplog.text
    assert all(value.isfinite().all() for value in motion.tensors.values()) and all(loss == loss for loss in losses)
    learnt = [key for key, value in motion.tensors.items() if key.endswith("to_out.0.weight") and value.abs().max() > 0]
    assert learnt, "no step was taken"
    assert_same((motion, losses), in_fp16(16))


@pytest.mark.comfyui
def test_sage_attention_is_named_where_it_may_be_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    model, bad = build_model(UNETS["tiny"]), torch.full((1, 4, 8, 8), NAN)
    with pytest.raises(RuntimeError, match="Half precision has overflowed"):
        host.check_prediction(model, bad)

    def attention_sage_kj(*args: Any, **kwargs: Any) -> None: ...

    patched = model.clone()
    patched.model_options["transformer_options"]["optimized_attention_override"] = attention_sage_kj
    with pytest.raises(RuntimeError, match="without --use-sage-attention"):
        host.check_prediction(patched, bad)
    monkeypatch.setattr("comfy.ldm.modules.attention.optimized_attention", attention_sage_kj)
    with pytest.raises(RuntimeError, match="without --use-sage-attention"):
        host.check_prediction(model, bad)
