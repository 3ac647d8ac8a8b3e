"""Metrics of videos whose motion and differences are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from tune_a_video.tav_core.errors import Refusal
from tune_a_video.tav_core.evaluation import background, clip_scores, metrics, motion, warping
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


def test_edits_of_one_source_share_its_flows(monkeypatch: pytest.MonkeyPatch) -> None:
    source, edited = blob_video(2, 0), blob_video(2, 1)
    alone, shared = metrics.evaluate(source, edited), metrics.source_flows(source)
    computed: list[int] = []

    def counted(first: Tensor, second: Tensor) -> Tensor:
        computed.append(len(first))
        return flows.optical_flow(first, second)

    monkeypatch.setattr(metrics, "optical_flow", counted)
    assert metrics.evaluate(source, edited, flows=shared) == alone
    assert computed == [FRAMES - 1]


def pan(dx: int, dy: int = 0, seed: int = 0) -> Tensor:
    """Cut a window that moves over a textured ground, so that all pixels move by (-dx, -dy) a frame."""
    generator = torch.Generator().manual_seed(seed)
    ground = torch.nn.functional.interpolate(
        torch.rand(1, 3, 40, 40, generator=generator), (160, 160), mode="bicubic"
    ).clamp(0, 1)[0]
    starts = [(50 + dy * i, 50 + dx * i) for i in range(FRAMES)]
    return torch.stack([ground[:, y : y + SIDE, x : x + SIDE].movedim(0, -1) for y, x in starts])


def constant(dx: float, dy: float) -> Tensor:
    """Build a flow that is (dx, dy) at every pixel."""
    return torch.tensor([float(dx), float(dy)]).view(1, 2, 1, 1).expand(FRAMES - 1, -1, SIDE, SIDE).contiguous()


def test_a_clip_compared_with_itself_has_the_best_value_of_every_figure() -> None:
    source = pan(3)
    figures, _ = metrics.evaluate(source, source, mask=torch.zeros(1, SIDE, SIDE))
    assert figures["motion alignment"] == pytest.approx(1, abs=1e-5)
    assert figures["minus end-point error, px"] == 0
    assert figures["motion fidelity"] == pytest.approx(1, abs=1e-9)
    assert figures["FF-beta"] == pytest.approx(0, abs=1e-6)
    assert figures["background SSIM"] == pytest.approx(1)
    assert figures["semantic score"] == 0
    # The clip's own motion is estimated, and what leaves the frame cannot be warped back.
    assert figures["WarpSSIM"] > 0.9 and figures["FF-alpha"] < 3


@pytest.mark.parametrize(
    ("edited", "end_point", "beta", "fidelity"),
    [((3, 0), 0, 0, 1), ((6, 0), -3, 0, 1), ((-3, 0), -6, 2, -1), ((0, 4), -5, 1, 0), ((0, 0), -3, 1, 0)],
)
def test_motion_measures_of_known_flows(edited: tuple[int, int], end_point: int, beta: int, fidelity: int) -> None:
    source, other = constant(3, 0), constant(*edited)
    assert motion.end_point_error(source, other) == pytest.approx(end_point)
    assert motion.ff_beta(source, other) == pytest.approx(beta)
    # A cosine cannot tell double speed.
    assert motion.motion_alignment(source, other) == pytest.approx(0 if edited == (0, 0) else 1 - beta)
    assert motion.motion_fidelity(source, other) == pytest.approx(fidelity, abs=1e-4)


def test_a_pixel_that_stands_in_both_videos_is_no_difference_to_ff_beta() -> None:
    flow = constant(3, 0)
    flow[..., : SIDE // 2] = 0
    assert motion.ff_beta(flow, flow) == pytest.approx(0, abs=1e-9)
    assert motion.ff_beta(flow, -flow) == pytest.approx(1)
    assert motion.ff_beta(flow, constant(3, 0)) == pytest.approx(0.5)


def test_tracks_follow_a_translation() -> None:
    paths = motion.tracks(constant(3, 0))
    assert paths.shape == (32 * 32, FRAMES, 2)
    assert torch.equal(paths[:, 0, 0].amin(), torch.tensor(0.0)) and paths[:, 0, 0].amax() == SIDE - 1
    assert torch.allclose(paths[..., 0], paths[:, :1, 0] + 3 * torch.arange(FRAMES), atol=1e-4)
    assert torch.allclose(paths[..., 1], paths[:, :1, 1].expand(-1, FRAMES), atol=1e-4)


def test_motion_fidelity_does_not_care_where_a_motion_takes_place() -> None:
    source, elsewhere = blob_video(3, 0), blob_video(3, 0).roll(10, 1)
    figures = metrics.evaluate(source, elsewhere)[0]
    assert figures["motion fidelity"] > 0.8 > figures["motion alignment"]


def test_a_pan_of_3_pixels_has_the_end_point_error_of_its_speed() -> None:
    found = metrics.evaluate(pan(3), pan(0))[0]
    assert found["minus end-point error, px"] == pytest.approx(-3, abs=0.6)
    assert found["motion fidelity"] == 0
    assert metrics.evaluate(pan(3), pan(-3))[0]["minus end-point error, px"] == pytest.approx(-6, abs=1.2)


def test_ff_alpha_is_the_flicker_in_grey_levels() -> None:
    source, still = torch.full((FRAMES, SIDE, SIDE, 3), 0.5), constant(0, 0)
    edited = source.clone()
    edited[1::2, ..., 1] += 10 / 255
    assert warping.ff_alpha(source, source, still) == 0
    assert warping.ff_alpha(source, edited, still) == pytest.approx(10, abs=1e-3)
    # Where the source flickers as well, nothing can be said: 40 % of the pixels are too many.
    source[1::2, : round(0.4 * SIDE)] += 20 / 255
    assert warping.ff_alpha(source, edited, still) is None
    source[1::2, round(0.2 * SIDE) : round(0.4 * SIDE)] -= 20 / 255
    assert warping.ff_alpha(source, edited, still) == pytest.approx(10, abs=1e-3)


def test_warpssim_and_ssim_of_flat_pictures_are_the_formulas() -> None:
    first, second = torch.full((1, 20, 20, 3), 0.2), torch.full((1, 20, 20, 3), 0.6)
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert float(background.structural_similarity(first, second).mean()) == pytest.approx(expected, rel=1e-5)
    video = torch.cat([first, second])
    assert warping.warp_ssim(video, torch.zeros(1, 2, 20, 20)) == pytest.approx(expected, rel=1e-5)
    still = pan(0)
    assert warping.warp_ssim(still, constant(0, 0)) == pytest.approx(1)
    # A pan along its own motion: exact but for the strip that has left the frame.
    moving = pan(3)
    inner = background_free_similarity(moving)
    assert inner == pytest.approx(1, abs=1e-4)


def background_free_similarity(video: Tensor) -> float:
    """Return the SSIM of a pan with its next frame, warped back by the known 3 pixels, away from the border."""
    warped = flows.warp(flows.channels_first(video[1:]), constant(-3, 0)).movedim(1, -1)
    return float(background.structural_similarity(warped, video[:-1])[:, 9:-9, 9:-9].mean())


def test_ssim_matches_a_value_computed_from_the_definition() -> None:
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.rand(1, 21, 21, 1, generator=generator) for _ in range(2))
    offsets = torch.arange(-5, 6).double()
    line = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = line[:, None] * line / line.sum() ** 2
    a, b = (each[0, 5:16, 5:16, 0].double() for each in (first, second))
    mean_a, mean_b = (window * a).sum(), (window * b).sum()
    var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
    covariance = (window * (a - mean_a) * (b - mean_b)).sum()
    expected = (2 * mean_a * mean_b + 1e-4) * (2 * covariance + 9e-4)
    expected /= (mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4)
    found = background.structural_similarity(first, second)[0, 10, 10]
    assert float(found) == pytest.approx(float(expected), abs=1e-9)


def test_what_changes_inside_the_mask_is_no_loss_and_what_changes_outside_is() -> None:
    source = pan(0)
    mask = torch.zeros(1, SIDE, SIDE)
    mask[:, :, : SIDE // 2] = 1
    inside, outside = source.clone(), source.clone()
    inside[:, :, : SIDE // 2] = 1 - inside[:, :, : SIDE // 2]
    outside[:, :, 3 * SIDE // 4 :, 2] = (outside[:, :, 3 * SIDE // 4 :, 2] - 0.5) * 0.5 + 0.5
    kept = metrics.evaluate(source, inside, mask=mask)[0]
    assert kept["background SSIM"] == pytest.approx(1) and kept["semantic score"] == 0
    lost = metrics.evaluate(source, outside, mask=mask)[0]
    assert lost["background SSIM"] < 0.999
    expected = 255 * float((source - outside).abs()[:, :, SIDE // 2 :].amax(-1).mean())
    assert lost["semantic score"] == pytest.approx(expected, rel=1e-5)


def test_a_shift_of_20_grey_levels_in_half_of_the_background_scores_10() -> None:
    source, mask = torch.full((2, 8, 8, 3), 0.5), torch.zeros(2, 8, 8)
    mask[1] = 1  # a frame without background does not count
    edited = source.clone()
    edited[:, :4, :, 0] += 20 / 255
    assert metrics.evaluate(source, edited, mask=mask)[0]["semantic score"] == pytest.approx(10, rel=1e-5)


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
    assert list(figures) == [
        "frame consistency",
        "textual faithfulness",
        "motion alignment",
        "warp error",
        "background PSNR, dB",
        *(["minus end-point error, px", "motion fidelity", "FF-beta", "FF-alpha", "WarpSSIM"] if frames > 1 else []),
        "background SSIM",
        "semantic score",
    ]
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
