"""The losses of a tuning step: what they count, and what they don't."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

# Scripts import what lies beside them by its plain name.
sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))

from losses import Loss, appearance_debiased, frame_differences, mean_squared  # noqa: E402

SHAPE = (2, 5, 4, 3, 3)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("loss", [mean_squared, appearance_debiased, frame_differences])
@pytest.mark.parametrize("shape", [SHAPE, SHAPE[1:], (1, 4, 3, 3)])
def test_a_perfect_prediction_costs_nothing_and_any_other_something(loss: Loss, shape: tuple[int, ...]) -> None:
    target = drawn(*shape)
    assert loss(target, target).item() == pytest.approx(0, abs=1e-12)
    wrong = loss(drawn(*shape, seed=1), target)
    assert wrong.ndim == 0
    # A single frame has no differences.
    assert wrong > 0.1 or (loss is frame_differences and shape[-4] == 1)


def test_the_released_loss_is_pytorchs_to_the_bit() -> None:
    predicted, target = drawn(*SHAPE).float(), drawn(*SHAPE, seed=1).float()
    assert torch.equal(mean_squared(predicted, target), torch.nn.functional.mse_loss(predicted, target))


def test_the_debiased_loss_is_the_papers_mean_over_all_reference_frames() -> None:
    predicted, target = drawn(*SHAPE), drawn(*SHAPE, seed=1)

    def debiased(frames: Tensor, reference: int) -> Tensor:
        return 2**0.5 * frames - frames[:, reference : reference + 1]

    papers = [
        torch.nn.functional.mse_loss(debiased(predicted, reference), debiased(target, reference))
        for reference in range(SHAPE[1])
    ]
    assert appearance_debiased(predicted, target).item() == pytest.approx(torch.stack(papers).mean().item())


def test_the_debiased_loss_counts_what_all_frames_share_little_and_the_frames_own_thrice() -> None:
    target = drawn(*SHAPE)
    shared = drawn(SHAPE[0], 1, *SHAPE[2:], seed=2).expand(SHAPE)
    own = drawn(*SHAPE, seed=3)
    own = own - own.mean(1, keepdim=True)
    once = [mean_squared(target + error, target) for error in (shared, own)]
    counted = [appearance_debiased(target + error, target) for error in (shared, own)]
    assert (counted[0] / once[0]).item() == pytest.approx((2**0.5 - 1) ** 2)
    assert (counted[1] / once[1]).item() == pytest.approx(3)


def test_frame_differences_ignore_what_all_frames_share_and_how_large_they_are() -> None:
    target = drawn(*SHAPE)
    shared = drawn(SHAPE[0], 1, *SHAPE[2:], seed=2)
    assert frame_differences(3 * target + shared, target).item() == pytest.approx(0, abs=1e-12)
    assert frame_differences(-target, target).item() == pytest.approx(2)


@pytest.mark.parametrize("loss", [mean_squared, appearance_debiased, frame_differences])
def test_a_step_against_the_gradient_lowers_the_loss(loss: Loss) -> None:
    predicted, target = drawn(*SHAPE[1:], seed=1).requires_grad_(), drawn(*SHAPE[1:])
    before = loss(predicted, target)
    (gradient,) = torch.autograd.grad(before, predicted)
    assert loss(predicted - 0.1 * gradient / gradient.norm(), target) < before


def test_order_matters_to_frame_differences_alone() -> None:
    predicted, target = drawn(*SHAPE), drawn(*SHAPE, seed=1)
    order = [3, 0, 4, 1, 2]
    for loss in (mean_squared, appearance_debiased):
        assert loss(predicted[:, order], target[:, order]).item() == pytest.approx(loss(predicted, target).item())
    moved = frame_differences(predicted[:, order], target[:, order])
    assert moved.item() != pytest.approx(frame_differences(predicted, target).item())
