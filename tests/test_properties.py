"""Properties of any input: frame selection and sizes, layouts of videos and frames, files of motions."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from tune_a_video.tav_core.attention import SPATIAL_MODES, gather_frames, temporal_attend
from tune_a_video.tav_core.media import select
from tune_a_video.tav_core.motion.file import Motion, load_motion, save_motion
from tune_a_video.tav_core.motion.low_rank import SEED_KEY, compress, expand
from tune_a_video.tav_core.norm import pooled_group_norm

# How long an example takes says more about the machine than about the code.
patient = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])

GAPS = st.lists(st.floats(1e-3, 5.0), min_size=0, max_size=40)
TIMES = GAPS.map(lambda gaps: [math.fsum(gaps[:number]) for number in range(len(gaps) + 1)])


@patient
@given(
    TIMES,
    st.floats(1e-3, 5.0),
    st.floats(0, 100),
    st.sampled_from(select.START_UNITS),
    st.integers(0, 50),
    st.integers(1, 10),
)
def test_selected_frames_are_every_stepth_from_the_start(
    times: list[float], last: float, start: float, unit: str, count: int, step: int
) -> None:
    end = times[-1] + last
    try:
        chosen = select.select_frames(times, end, start, unit, count, step)
    except ValueError as error:
        late = round(start) >= len(times) if unit == "frames" else start >= end
        assert late and str(error).startswith("start: ")
        return
    assert 0 <= chosen[0] and chosen[-1] < len(times)
    assert all(later - earlier == step for earlier, later in zip(chosen, chosen[1:], strict=False))
    assert len(chosen) == count or (chosen[-1] + step >= len(times) and (not count or len(chosen) < count))
    if unit == "frames":
        assert chosen[0] == round(start)
    else:
        assert abs(times[chosen[0]] - start) == min(abs(time - start) for time in times)


SIDES = st.integers(8, 4000)
ASKED = st.integers(1, 64).map(lambda number: 8 * number)


@patient
@given(SIDES, SIDES, ASKED, ASKED, st.sampled_from(select.RESIZE_MODES))
def test_sizes_suit_the_vae_and_boxes_lie_in_the_picture(
    wide: int, high: int, width: int, height: int, resize: str
) -> None:
    target = select.fitted_size((wide, high), width, height, resize)
    assert all(side >= 8 and side % 8 == 0 for side in target)
    if resize == "fit":
        assert target[0] <= max(width, 8) and target[1] <= max(height, 8)
    left, top, right, bottom = select.source_box((wide, high), target, resize)
    assert -1e-6 <= left < right <= wide + 1e-6 and -1e-6 <= top < bottom <= high + 1e-6
    # Centred, and undistorted unless that is asked for. Whole pixels may be one off the middle.
    assert abs(left + right - wide) <= 1 and abs(top + bottom - high) <= 1
    if resize != "stretch":
        assert (right - left) * target[1] == pytest.approx((bottom - top) * target[0], rel=1e-6)


LAYOUT = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))


def numbered(rows: int, *shape: int, seed: int) -> Tensor:
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed))


@patient
@given(LAYOUT, st.sampled_from(SPATIAL_MODES), st.integers(0, 99))
def test_videos_in_one_batch_look_at_their_own_frames_alone(
    layout: tuple[int, int, int, int, int], mode: Any, seed: int
) -> None:
    videos, frames, tiles, n, c = layout
    tokens = numbered(videos * frames * tiles, n, c, seed=seed)
    together = gather_frames(tokens, frames, videos, mode)
    apart = [gather_frames(part, frames, 1, mode) for part in tokens.chunk(videos)]
    assert torch.equal(together, torch.cat(apart))
    # Every key that is looked at is some frame's own.
    own = {tuple(row) for row in tokens.flatten(0, 1).tolist()}
    assert {tuple(row) for row in together.flatten(0, 1).tolist()} <= own


@patient
@given(LAYOUT, st.sampled_from([1, 2]), st.integers(0, 99))
def test_temporal_attention_knows_videos_and_pixels_apart_and_no_order(
    layout: tuple[int, int, int, int, int], heads: int, seed: int
) -> None:
    videos, frames, _, n, c = layout
    q, k, v = (numbered(videos * frames, n, c * heads, seed=seed + i) for i in range(3))
    together = temporal_attend(q, k, v, heads, frames)
    for video_number in range(videos):
        rows = slice(video_number * frames, (video_number + 1) * frames)
        for pixel in range(n):
            alone = temporal_attend(*(t[rows, pixel : pixel + 1] for t in (q, k, v)), heads, frames)
            torch.testing.assert_close(together[rows, pixel : pixel + 1], alone)
    order = torch.randperm(frames, generator=torch.Generator().manual_seed(seed))
    shuffled = (torch.arange(videos)[:, None] * frames + order).flatten()
    again = temporal_attend(q[shuffled], k[shuffled], v[shuffled], heads, frames)
    torch.testing.assert_close(again, together[shuffled])


@patient
@given(LAYOUT, st.integers(1, 3), st.booleans(), st.integers(0, 99))
def test_pooled_norms_know_videos_apart_and_no_order(
    layout: tuple[int, int, int, int, int], groups: int, silu: bool, seed: int
) -> None:
    videos, frames, high, wide, c = layout
    x = numbered(videos * frames, c * groups, high, wide + 1, seed=seed)
    weight, bias = numbered(2, c * groups, seed=seed + 1)
    together = pooled_group_norm(x, frames, groups, weight, bias, 1e-5, silu)
    apart = [pooled_group_norm(part, frames, groups, weight, bias, 1e-5, silu) for part in x.chunk(videos)]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-4, atol=1e-5)
    order = torch.randperm(frames, generator=torch.Generator().manual_seed(seed))
    shuffled = (torch.arange(videos)[:, None] * frames + order).flatten()
    again = pooled_group_norm(x[shuffled], frames, groups, weight, bias, 1e-5, silu)
    torch.testing.assert_close(again, together[shuffled], rtol=1e-4, atol=1e-5)


# Any text that a file can hold; half characters are none.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NAME = st.text("abcdefghij._0123456789", min_size=1, max_size=20)
TENSOR = st.tuples(
    st.lists(st.integers(1, 4), max_size=3),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    st.integers(0, 99),
)


@patient
@given(st.dictionaries(NAME, TENSOR, max_size=8), st.dictionaries(TEXT, TEXT, max_size=5))
def test_motions_come_back_as_they_went(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    metadata = {key: value for key, value in metadata.items() if key not in ("format", "format_version")}
    motion = Motion(
        {name: numbered(1, *shape, seed=seed)[0].to(dtype) for name, (shape, dtype, seed) in tensors.items()}, metadata
    )
    with tempfile.TemporaryDirectory() as folder:
        save_motion(motion, Path(folder, "motion.safetensors"))
        again = load_motion(Path(folder, "motion.safetensors"))
    assert again.metadata == metadata and again.tensors.keys() == motion.tensors.keys()
    for name, value in motion.tensors.items():
        assert again.tensors[name].dtype == value.dtype and torch.equal(again.tensors[name], value)


@patient
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_a_higher_rank_keeps_no_less(rows: int, columns: int, rank: int, seed: int) -> None:
    motion = Motion({"a.attn1.to_q.diff": numbered(rows, columns, seed=seed)}, {SEED_KEY: "0"})
    less, more = compress(motion, rank), compress(motion, rank + 1)
    assert 0 <= float(less.metadata["kept"]) <= float(more.metadata["kept"]) + 1e-3 <= 1.002
    back = expand(less).tensors["a.attn1.to_q.diff"].float()
    lost = float((back - motion.tensors["a.attn1.to_q.diff"]).square().sum())
    whole = float(motion.tensors["a.attn1.to_q.diff"].square().sum())
    assert 1 - lost / whole == pytest.approx(float(less.metadata["kept"]), abs=0.01)
