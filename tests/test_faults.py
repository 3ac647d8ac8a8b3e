"""Faults of an edit, in words: each fault made on purpose, and right edits that get no complaint."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor
from tune_a_video.tav_core.evaluation.faults import Fault, faults, in_words
from tune_a_video.tav_core.evaluation.metrics import source_flows

FRAMES, SIZE = 10, 64


def centre(frame: int) -> float:
    return 14 + 4 * frame


def disc(frame: int, radius: float = 9) -> Tensor:
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    return torch.from_numpy(np.clip(radius - np.hypot(x - centre(frame), y - 30) + 0.5, 0, 1)).float()[..., None]


def texture(seed: int, sigma: float) -> Tensor:
    noise = gaussian_filter(np.random.default_rng(seed).standard_normal((SIZE, SIZE, 3)), (sigma, sigma, 0))
    return torch.from_numpy(noise / noise.std()).float()


BACKGROUND = (0.5 + 0.08 * texture(0, 2)).clamp(0, 1)


def clip(colour: tuple[float, float, float], background: Tensor = BACKGROUND) -> Tensor:
    """A disc with a pattern of its own that crosses the picture."""
    pattern, frames = 0.12 * texture(1, 1.5), []
    for frame in range(FRAMES):
        moved = torch.roll(pattern, 4 * frame, 1)
        paint = (torch.tensor(colour) + moved).clamp(0, 1)
        frames.append(background + disc(frame) * (paint - background))
    return torch.stack(frames)


SOURCE, EDIT = clip((0.8, 0.2, 0.2)), clip((0.2, 0.3, 0.85))
MASK = torch.stack([disc(frame, 12)[..., 0] for frame in range(FRAMES)])
FLOWS = source_flows(SOURCE)


def found(edited: Tensor, mask: Tensor | None = MASK) -> dict[str, tuple[int, ...]]:
    return {fault.text: fault.frames for fault in faults(SOURCE, edited, FLOWS, mask)}


@pytest.mark.parametrize("mask", [MASK, None])
def test_a_right_edit_gets_no_complaint(mask: Tensor | None) -> None:
    assert found(EDIT, mask) == {}
    assert in_words([]) == "Nothing wrong was found."


def test_so_does_another_background_without_a_mask() -> None:
    assert found(clip((0.8, 0.2, 0.2), (0.3 + 0.08 * texture(5, 2)).clamp(0, 1)), None) == {}


def test_an_edit_that_was_not_made() -> None:
    noise = 0.02 * torch.randn(SOURCE.shape, generator=torch.Generator().manual_seed(0))
    everywhere = tuple(range(FRAMES))
    assert found(SOURCE + noise) == {"The edit was hardly made": everywhere}
    some = EDIT.clone()
    some[2:4] = SOURCE[2:4]
    assert found(some)["The edit was hardly made"] == (2, 3)


def test_a_background_that_changed() -> None:
    changed = EDIT.clone()
    changed[6:] = clip((0.2, 0.3, 0.85), (BACKGROUND + 0.15).clamp(0, 1))[6:]
    assert found(changed)["The background changed"] == (6, 7, 8, 9)
    # Without a mask nobody knows what is background.
    assert "The background changed" not in found(changed, None)


def test_motion_that_was_lost() -> None:
    assert found(EDIT[:1].expand_as(EDIT))["The motion was lost"] == tuple(range(FRAMES))
    assert found(EDIT.flip(0), None)["The motion was lost"]
    stops = EDIT.clone()
    stops[5:] = EDIT[5]
    assert found(stops, None)["The motion was lost"] == (5, 6, 7, 8, 9)


def test_flicker() -> None:
    light = torch.ones(FRAMES, 1, 1, 1)
    light[4] = 1.4
    flickers = found((EDIT * light).clamp(0, 1))
    assert flickers["The picture flickers"] == (3, 4)
    assert flickers["The background changed"] == (4,)


def test_a_single_frame_has_no_motion() -> None:
    assert faults(SOURCE[:1], EDIT[:1], None, MASK[:1]) == []
    assert [fault.frames for fault in faults(SOURCE[:1], SOURCE[:1])] == [(0,)]


def test_frames_are_named_as_people_count_them() -> None:
    assert str(Fault("It broke", (0,))) == "It broke in frame 1."
    assert str(Fault("It broke", (0, 1, 2, 6, 8, 9))) == "It broke in frames 1 to 3, 7 and 9 to 10."
