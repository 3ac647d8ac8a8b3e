"""Devices without fused attention, without float64, and what they say when memory is short."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tune_a_video.tav_core import attention, host
from tune_a_video.tav_core.out_of_memory import mentions_oom
from tune_a_video.tav_core.tuning.memory_plan import LEVELS, Level, Plan
from tune_a_video.tav_core.tuning.trainer import TuneSettings
from tuning_runs import trainer_of
from unets import UNETS, build_model

SETTINGS = TuneSettings(steps=2, learning_rate=1e-3)
LATENTS = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
CONDITIONING: list[Any] = [[torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1)), {}]]


@pytest.fixture()
def no_fused_kernel() -> Iterator[None]:
    with sdpa_kernel(SDPBackend.MATH):
        yield


def largest_saved(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, int]:
    """The result, and the largest tensor that is kept for its backward pass."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return attention.attend(q, k, v, 2), max(sizes)


@pytest.mark.parametrize("slice_bytes", [1, 2000, 30_000, 2**26])
def test_slices_give_the_fused_result_and_gradients_and_keep_no_scores(
    slice_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 40, 8), (3, 90, 8), (3, 90, 8))
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    upper = torch.randn(3, 40, 8, generator=generator, dtype=torch.float64)
    expected = attention.attend(*leaves, 2)
    gradients = torch.autograd.grad(expected, leaves, upper)
    monkeypatch.setattr(attention, "SLICE_BYTES", slice_bytes)
    with sdpa_kernel(SDPBackend.MATH):
        assert not attention.is_fused(*(leaf.unflatten(-1, (2, 4)).transpose(1, 2) for leaf in leaves))
        found, saved = largest_saved(*leaves)
        ours = torch.autograd.grad(found, leaves, upper)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours, gradients)
    assert saved <= 3 * 90 * 8


def test_frozen_text_gets_no_gradient(no_fused_kernel: None) -> None:
    q = torch.randn(2, 5, 8, requires_grad=True)
    text = torch.randn(1, 3, 8).expand(2, -1, -1)
    attention.attend(q, text, text, 2).sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()


def test_a_tuning_in_slices_learns_the_same() -> None:
    model = build_model(UNETS["tiny"])

    def gradients(level: Level) -> dict[str, Tensor]:
        with trainer_of(model, LATENTS, CONDITIONING, SETTINGS) as trainer:
            trainer.plan = Plan.all_at(trainer.costs, level)
            trainer.backward(*trainer.draw())
            return {key: value.grad for key, value in trainer.trained.items() if value.grad is not None}

    expected = gradients("keep")
    with sdpa_kernel(SDPBackend.MATH):
        for level in LEVELS:
            torch.testing.assert_close(gradients(level), expected, rtol=1e-4, atol=1e-6)


def test_the_plan_without_fused_kernels_is_no_larger_than_with_them(caplog: pytest.LogCaptureFixture) -> None:
    """Scores would be several times the rest: 3 frames of 256 tokens attend to 512, in 4 heads."""
    model = build_model(UNETS["tiny"])
    caplog.set_level("INFO")

    def kept() -> float:
        with trainer_of(model, LATENTS, CONDITIONING, SETTINGS) as trainer:
            assert trainer.plan.fits
            return Plan.all_at(trainer.costs, "keep").bytes

    fused = kept()
    assert "runs in slices" not in caplog.text
    with sdpa_kernel(SDPBackend.MATH):
        assert kept() < 1.1 * fused
    assert "runs in slices" in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "Invalid buffer size: 24.00 GiB",
        "Could not allocate tensor with 4294967296 bytes. There is not enough GPU video memory available!",
        "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
        "Native API failed. Native API returns: -5 (PI_ERROR_OUT_OF_RESOURCES) -5 (PI_ERROR_OUT_OF_RESOURCES)",
        "XPU out of memory. Tried to allocate 2.00 GiB",
        "HIP error: hipErrorOutOfMemory",
    ],
)
def test_every_backends_words_for_no_memory_are_known(text: str) -> None:
    assert mentions_oom(text)


def no_double(tensor: Tensor) -> Tensor:
    raise TypeError("Cannot convert a MPS Tensor to float64 dtype")


@pytest.mark.parametrize(("has_bf16", "instead"), [(True, torch.bfloat16), (False, torch.float32)])
def test_fp16_without_float64(
    has_bf16: bool, instead: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = build_model(UNETS["tiny"])
    with trainer_of(model, LATENTS, CONDITIONING, SETTINGS, torch.float16) as trainer:
        assert trainer.unet.dtype == torch.float16
    monkeypatch.setattr(torch.Tensor, "double", no_double)
    monkeypatch.setattr(host, "inference_dtype", lambda model: torch.float16)
    monkeypatch.setattr(host, "computes_bfloat16", lambda device: has_bf16)
    monkeypatch.setattr("tune_a_video.tav_core.tuning.trainer.alphas_cumprod", lambda sigmas: sigmas)
    with trainer_of(model, LATENTS, CONDITIONING, SETTINGS) as trainer:
        assert trainer.unet.dtype == instead
    assert f"precision is {str(instead)[6:]}" in caplog.text
    with (
        pytest.raises(ValueError, match="precision: fp16 cannot be tuned on this device .* Set it to auto"),
        trainer_of(model, LATENTS, CONDITIONING, SETTINGS, torch.float16),
    ):
        pass
