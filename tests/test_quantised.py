"""Quantised checkpoints: tuned, inverted and sampled as the weights that they stand for, or refused in a sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.ops
import pytest
import torch
import torch.nn.functional as F
from packed_layers import SecretOps, keep_secret
from quantised import CONFIG, KINDS, dequantised, random_weights
from torch import Tensor
from tune_a_video.tav_core import host, pipeline
from tune_a_video.tav_core.errors import Refusal
from tune_a_video.tav_core.host import inflated_model
from tune_a_video.tav_core.inflate import Inflation
from tune_a_video.tav_core.tuning.checkpoint import fingerprint
from tune_a_video.tav_core.tuning.trainer import TuneSettings
from tuning_runs import trainer_of
from unets import build_model

LATENTS = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
COND = [[torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1)), {}]]
SETTINGS = TuneSettings(steps=4, learning_rate=1e-3)
TO_Q = "middle_block.1.transformer_blocks.0.attn1.to_q"

Build = Callable[[], Any]


@pytest.fixture(params=KINDS)
def build(request: pytest.FixtureRequest) -> Build:
    return KINDS[request.param]


def sampled(model: Any) -> Tensor:
    with torch.inference_mode():
        return pipeline.sample(model, LATENTS, COND, COND, 3, 2.0)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-3) -> None:
    assert (ours - theirs).norm() <= tolerance * theirs.norm()


@torch.inference_mode()
def test_a_tuning_learns_what_the_dequantised_model_learns(build: Build) -> None:
    model = build()
    expected, losses = pipeline.tune(dequantised(model), LATENTS, COND, SETTINGS)
    motion, ours = pipeline.tune(model, LATENTS, COND, SETTINGS)
    assert ours == pytest.approx(losses, rel=1e-3)
    assert len(set(losses)) == SETTINGS.steps
    for key, value in expected.tensors.items():
        torch.testing.assert_close(motion.tensors[key], value, rtol=1e-2, atol=1e-4)


@torch.inference_mode()
def test_inversion_and_sampling_are_those_of_the_dequantised_model(build: Build) -> None:
    """Query deltas as large as after a few hundred steps, which a patch in 8 bits would round away."""
    model = build()
    motion, _ = pipeline.tune(dequantised(model), LATENTS, COND, SETTINGS)
    noises = []
    for plain in (model, dequantised(model)):
        inflated = host.inflate_model(plain, Inflation(), motion, 0.7)
        noise = pipeline.invert(inflated, LATENTS, COND, 4)
        noises += [noise, pipeline.sample(inflated, noise, COND, COND, 4, 3.0)]
    # The host quantises the inputs of int8 layers, too: no two such models agree better.
    tolerance = 0.25 if build is KINDS.get("mixed int8_tensorwise") else 1e-3
    close(noises[0], noises[2], tolerance)
    close(noises[1], noises[3], tolerance)
    off = host.inflate_model(model, Inflation(), motion, 0.0)
    assert (sampled(off) - sampled(host.inflate_model(model, Inflation(), motion))).norm() > 1e-2


# ComfyUI-GGUF applies LoRAs in a patcher of its own.
@pytest.mark.parametrize(("kind", "lora"), [*((k, False) for k in KINDS), *((k, True) for k in KINDS if k != "gguf")])
@torch.inference_mode()
def test_sampling_sees_the_queries_that_training_saw(kind: str, lora: bool) -> None:
    model = KINDS[kind]()
    if lora:
        patch = 0.05 * torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
        assert model.add_patches({f"diffusion_model.{TO_Q}.weight": ("diff", (patch,))}, 0.8)
    with trainer_of(model, LATENTS, COND, SETTINGS) as trainer:
        before = trainer.unet.weight(TO_Q)
        for _ in trainer:
            pass
        motion, query = trainer.motion(), trainer._weights.queries[f"{TO_Q}.weight"].detach()
    assert (query - before).norm() > 1e-3 * before.norm()
    seen: list[tuple[Tensor, Tensor]] = []
    layer = model.model.diffusion_model.get_submodule(TO_Q)
    hook = layer.register_forward_hook(lambda layer, args, out: seen.append((args[0].clone(), out.clone())))
    sampled(host.inflate_model(model, Inflation(), motion))
    hook.remove()
    for x, out in seen:
        close(out, F.linear(x, query))
    assert seen


@pytest.mark.comfyui
@torch.inference_mode()
def test_a_motion_comes_off_again_and_can_be_read_from_the_model(build: Build) -> None:
    model = build()
    motion, _ = pipeline.tune(model, LATENTS, COND, SETTINGS)
    inflated = host.inflate_model(model, Inflation(temporal_strength=0.5), motion, 0.5)
    carried = host.carried_motion(inflated)
    assert carried is not None
    for key, delta in motion.query_deltas().items():
        torch.testing.assert_close(carried.query_deltas()[key], 0.5 * delta)
    plain = sampled(host.without_inflation(inflated))
    assert torch.equal(plain, sampled(model))
    assert not torch.equal(plain, sampled(inflated))
    # Off and on again, and the weights themselves are untouched.
    assert torch.equal(
        sampled(host.inflate_model(inflated, Inflation(), motion)),
        sampled(host.inflate_model(model, Inflation(), motion)),
    )


@torch.inference_mode()
def test_weights_that_are_cast_again_or_kept_are_the_same(build: Build) -> None:
    losses = []
    for budget in (1.0, 1e12):
        with trainer_of(build(), LATENTS, COND, SETTINGS, memory_budget=budget) as trainer:
            losses.append([float(step.loss) for step in trainer])
            assert trainer.unet.cast_cache.keep == (budget > 1)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@torch.inference_mode()
def test_the_room_for_dequantised_weights_is_counted(build: Build) -> None:
    with trainer_of(build(), LATENTS, COND, SETTINGS) as trainer:
        layers = [m for m in trainer.unet.module.modules() if host.is_coarse(m) and host.weight_shape(m)]
        whole = sum(4 * torch.Size(host.weight_shape(m)).numel() for m in layers)
        assert trainer.unet.cast_cache.bytes == whole > 0


@torch.inference_mode()
def test_a_run_is_known_by_the_weights_as_they_are_stored(build: Build) -> None:
    def key(model: Any) -> str:
        with trainer_of(model, LATENTS, COND, SETTINGS) as trainer:
            return fingerprint(trainer.decisive, trainer.decisive_tensors())

    model, other = build(), build()
    assert key(model) == key(other)
    weight = other.model.diffusion_model.get_submodule(TO_Q).weight
    stored = getattr(weight, "_qdata", weight).as_subclass(Tensor).view(torch.uint8)
    stored[0, 0] ^= 4
    assert key(model) != key(other)


class Bytes(comfy.ops.manual_cast.Linear):
    """A weight without the layer's shape, which only the layer's forward knows."""

    def forward_comfy_cast_weights(self, input: Tensor) -> Tensor:
        weight = self.weight.to(input.dtype).reshape(self.out_features, self.in_features) / 64
        return F.linear(input, weight, self.bias)


@pytest.mark.parametrize("raw", [False, True])
@torch.inference_mode()
def test_weights_that_cannot_be_read_are_refused_before_any_work(raw: bool) -> None:
    model = build_model(CONFIG, random_weights(), operations=SecretOps)
    keep_secret(model.model.diffusion_model)
    for layer in model.model.diffusion_model.modules():
        if raw and isinstance(layer, SecretOps.Linear):
            layer.__class__ = Bytes
            layer.weight = torch.nn.Parameter(layer.weight.flatten(), requires_grad=False)
    with (
        pytest.raises(Refusal, match="model: its weights are quantised as int8 in .* Load an fp16 or bf16 checkpoint"),
        trainer_of(model, LATENTS, COND, SETTINGS),
    ):
        raise AssertionError("a trainer was made")


def test_a_weight_that_the_model_holds_in_8_bits_is_coarse() -> None:
    """With dynamic VRAM an fp16 file stays as it is, and weight_dtype says what lies on the device."""
    model = build_model(CONFIG)
    layer = host.unet_of(model).get_submodule(TO_Q)
    assert not host.is_coarse(layer)
    names = {name for name, _ in host.stored_tensors(model)}
    for holder, name in ((layer, "weight_comfy_model_dtype"), (layer.weight, "_model_dtype")):
        setattr(holder, name, torch.float8_e4m3fn)
        assert host.is_coarse(layer)
        # The same file in another dtype is another model: a run on it does not resume on this one.
        assert {name for name, _ in host.stored_tensors(model)} - names == {f"dtype of diffusion_model.{TO_Q}.weight"}
        delattr(holder, name)
        assert not host.is_coarse(layer)


@torch.inference_mode()
def test_weights_are_lent_one_at_a_time(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts that copy in two streams may reuse the memory of a loan before the last."""
    model = build()
    motion, _ = pipeline.tune(model, LATENTS, COND, SETTINGS)
    lent, out = inflated_model.lent, [0, 0]

    @contextmanager
    def counted(*args: Any) -> Iterator[Any]:
        out[0] += 1
        out[1] = max(out)
        with lent(*args) as loan:
            yield loan
        out[0] -= 1

    monkeypatch.setattr(inflated_model, "lent", counted)
    sampled(host.inflate_model(model, Inflation(), motion))
    assert out == [0, 1]
