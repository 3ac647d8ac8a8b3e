"""Metrics of videos whose motion and differences are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from tune_a_video.tav_core.errors import Refusal
from tune_a_video.tav_core.evaluation import clip_scores, metrics
from tune_a_video.tav_core.evaluation import optical_flow as flows
from tune_a_video.tav_core.media import pictures

FRAMES, SIDE = 6, 48


def blob_video(dx: float, dy: float, colour: tuple[float, float, float] = (0.9, 0.2, 0.2), seed: int = 0) -> Tensor:
    """Draw a soft disc that moves over a textured ground, [FRAMES, SIDE, SIDE, 3]."""
    generator = torch.Generator().manual_seed(seed)
    ground = torch.nn.functional.interpolate(
        torch.rand(1, 3, SIDE // 4, SIDE // 4, generator=generator), (SIDE, SIDE), mode="bicubic"
    )[0].movedim(0, -1)
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    frames = []
    for i in range(FRAMES):
        distance = ((x - (SIDE / 2 + dx * (i - 2.5))) ** 2 + (y - (SIDE / 2 + dy * (i - 2.5))) ** 2).sqrt()
        cover = torch.sigmoid(9 - distance)[..., None]
        frames.append(0.5 * ground + cover * (torch.tensor(colour) - 0.5 * ground))
    return torch.stack(frames).clamp(0, 1)


def test_frame_consistency_is_the_mean_cosine_over_pairs() -> None:
    embeddings = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    half = math.sqrt(0.5)
    assert clip_scores.frame_consistency(embeddings) == pytest.approx((0 + half + half) / 3)
    assert clip_scores.frame_consistency(embeddings[:1]) == 1.0


def test_textual_faithfulness_is_the_mean_cosine_with_the_text_times_100() -> None:
    embeddings = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert clip_scores.textual_faithfulness(embeddings, torch.tensor([0.0, 5.0])) == pytest.approx(50)


@pytest.mark.parametrize("dx, dy", [(2, 0), (0, -3), (5, 4), (-9, 6)])
def test_optical_flow_finds_a_known_shift(dx: int, dy: int) -> None:
    scene = blob_video(0, 0)[:1]
    flow = flows.optical_flow(scene, scene.roll((dy, dx), (1, 2)))
    inside = flow[0, :, 14:-14, 14:-14]
    assert inside[0].median() == pytest.approx(dx, abs=0.2)
    assert inside[1].median() == pytest.approx(dy, abs=0.2)


def test_what_stands_has_no_flow_beside_what_moves() -> None:
    video = blob_video(3, 0)
    assert flows.optical_flow(video[:1], video[1:2])[0, :, :6, :6].abs().max() < 0.5


def test_warping_along_a_constant_flow_shifts_the_image() -> None:
    image = torch.rand(1, 3, 8, 8)
    flow = torch.zeros(1, 2, 8, 8)
    flow[:, 0] = 2
    assert torch.allclose(flows.warp(image, flow)[..., :-2], image[..., 2:], atol=1e-6)


def test_motion_alignment_knows_the_same_motion_in_other_colours_from_another_motion() -> None:
    source = blob_video(3, 1)

    def alignment(edited: Tensor) -> float:
        return metrics.evaluate(source, edited)[0]["motion alignment"]

    assert alignment(source) == pytest.approx(1, abs=1e-5)
    assert alignment(blob_video(3, 1, (0.2, 0.9, 0.9))) > 0.8
    assert alignment(blob_video(-3, 1)) < 0.3
    assert alignment(source[:1].expand_as(source)) == 0


def test_warp_error_is_small_for_the_sources_motion_and_grows_with_flicker() -> None:
    source = blob_video(2, 0)

    def error(edited: Tensor) -> float:
        return metrics.evaluate(source, edited)[0]["warp error"]

    same = error(blob_video(2, 0, (0.2, 0.9, 0.9)))
    flickering = source * (1 - 0.2 * (torch.arange(FRAMES) % 2)).view(-1, 1, 1, 1)
    assert same < 0.05
    assert error(flickering) > same + 0.03
    assert error(blob_video(-2, 0)) > same + 0.01


def test_three_optical_flows_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []

    def counted(first: Tensor, second: Tensor) -> Tensor:
        computed.append(len(first))
        return flows.optical_flow(first, second)

    monkeypatch.setattr(metrics, "optical_flow", counted)
    metrics.evaluate(blob_video(2, 0), blob_video(2, 1))
    assert computed == [FRAMES - 1] * 3


def test_background_psnr_looks_outside_the_mask_only() -> None:
    source = blob_video(0, 0)
    edited = source.clone()
    edited[:, 10:20, 10:20] = 1 - edited[:, 10:20, 10:20]
    mask = torch.zeros(1, SIDE, SIDE)
    mask[:, 10:20, 10:20] = 1
    assert metrics.background_psnr(source, edited, mask) == math.inf
    edited = edited + 0.1 * (1 - mask[..., None])
    assert metrics.background_psnr(source, edited, mask) == pytest.approx(20, abs=0.01)
    per_frame = mask.expand(FRAMES, -1, -1)
    assert metrics.background_psnr(source, edited, per_frame) == metrics.background_psnr(source, edited, mask)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(1, SIDE, SIDE), "^mask: it covers every pixel"),
        (torch.zeros(1, SIDE - 1, SIDE), "^mask: it is 48x47, and the video's frames are 48x48"),
        (torch.zeros(FRAMES - 2, SIDE, SIDE), "^mask: it has 4 frames, and the video has 6"),
        (torch.zeros(0, SIDE, SIDE), "^mask: it has 0 frames"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask: Tensor, message: str) -> None:
    source = blob_video(0, 0)
    with pytest.raises(Refusal, match=message):
        metrics.evaluate(source, source, mask=mask)


@pytest.mark.parametrize("frames", [1, 2, FRAMES])
def test_every_figure_is_finite_for_short_videos(frames: int) -> None:
    source, edited = blob_video(2, 1)[:frames], blob_video(2, 1, seed=1)[:frames]
    embeddings = torch.randn(frames, 8, generator=torch.Generator().manual_seed(0))
    figures, curves = metrics.evaluate(source, edited, embeddings, embeddings[0], torch.zeros(1, SIDE, SIDE))
    assert set(figures) == {
        "frame consistency",
        "textual faithfulness",
        "motion alignment",
        "warp error",
        "background PSNR, dB",
    }
    assert all(map(math.isfinite, figures.values()))
    assert all(name in metrics.table(figures) for name in figures)
    assert len(curves["CLIP score"]) == frames
    assert pictures.frame_curves(curves).isfinite().all()


def test_videos_that_differ_are_refused() -> None:
    source = blob_video(1, 0)
    with pytest.raises(ValueError, match="6 frames of 48x48, the other 5 of 48x48"):
        metrics.evaluate(source, source[:-1])
    with pytest.raises(ValueError, match="halves|one CLIP"):
        metrics.evaluate(source, source, torch.ones(FRAMES, 8), torch.ones(4))


def test_a_contact_sheet_has_a_row_for_each_video_and_a_column_for_each_frame() -> None:
    sheet = pictures.contact_sheet([("one", torch.zeros(3, 10, 20, 3)), ("two", torch.ones(5, 10, 20, 3))], side=40)
    assert sheet.shape == (1, 2 * (40 + 26 + 6) + 6, 5 * 46 + 6, 3)
    # The first frame of the first row: black, twice as wide as high, at its place.
    assert sheet[0, 32 + 10, 6 + 20].max() == 0
    assert sheet[0, 32 + 30, 6 + 20].min() == 1


def test_videos_side_by_side_keep_their_pixels() -> None:
    one, two = torch.rand(3, 11, 21, 3), torch.rand(5, 11, 21, 3)
    out = pictures.side_by_side([("one", one), ("two", two)])
    assert len(out) == 5 and out.shape[1] % 2 == out.shape[2] % 2 == 0
    assert torch.equal(out[2, 26:37, :21], one[2])
    assert torch.equal(out[4, 26:37, :21], one[2])
    assert torch.equal(out[4, 26:37, 27:48], two[4])
    with pytest.raises(ValueError, match="differ in size"):
        pictures.side_by_side([("one", one), ("two", two[:, :-1])])
