"""Evaluate Video and Compare Videos, with a CLIP whose embeddings are known."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from tune_a_video.tav_core import host
from tune_a_video.tav_core.errors import Refusal
from tune_a_video.tav_core.evaluation import optical_flow
from tune_a_video.tav_core.media import pictures

pytestmark = pytest.mark.comfyui


class Vision:
    """Embeds a picture as its mean colour, and records the batch sizes."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def encode_image(self, images: Tensor) -> dict[str, Tensor]:
        self.batches.append(len(images))
        return {"image_embeds": images[..., :3].mean(dim=(1, 2))}


def text_model(projection: Tensor | None, pooled: Tensor, projected: bool = False) -> Any:
    """Build a CLIP that returns this pooled output for any text."""
    model = torch.nn.Module()
    model.part = torch.nn.Module()
    if projection is not None:
        model.part.return_projected_pooled = projected
        model.part.transformer = torch.nn.Module()
        model.part.transformer.text_projection = torch.nn.Linear(3, 3, bias=False)
        model.part.transformer.text_projection.weight.data = projection

    def encode(tokens: str, return_pooled: bool) -> tuple[None, Tensor]:
        assert tokens == "tokens of red" and return_pooled
        return None, pooled

    return SimpleNamespace(cond_stage_model=model, tokenize=lambda text: f"tokens of {text}", encode_from_tokens=encode)


@pytest.fixture
def nodes() -> Any:
    from tune_a_video.nodes.compare_videos import CompareVideos
    from tune_a_video.nodes.evaluate_video import EvaluateVideo

    return SimpleNamespace(EvaluateVideo=EvaluateVideo, CompareVideos=CompareVideos)


def red(frames: int = 20) -> Tensor:
    video = torch.rand(frames, 32, 32, 3, generator=torch.Generator().manual_seed(0)) * 0.01
    video[..., 0] += 0.5
    return video


def value(table: str, row: str) -> float:
    found = re.search(rf"{row} \| (\S+) \|", table)
    assert found, table
    return float(found[1])


def test_what_clip_says_is_in_the_table(nodes: Any) -> None:
    vision = Vision()
    clip = text_model(2 * torch.eye(3)[[1, 0, 2]], torch.tensor([[0.0, 1.0, 0.0]]))
    table, curves, _ = nodes.EvaluateVideo.execute(red(), red(), "red", vision, clip).result
    assert vision.batches == [16, 4]
    assert value(table, "consistency") == pytest.approx(1, abs=0.01)
    assert value(table, "faithfulness") == pytest.approx(100, abs=1)
    assert curves.ndim == 4 and curves.shape[-1] == 3
    alone, _, verdict = nodes.EvaluateVideo.execute(red(), red(), "red").result
    assert "aithfulness" not in alone
    assert verdict == "The edit was hardly made in frames 1 to 20."


def test_half_a_clip_is_refused(nodes: Any) -> None:
    clip = text_model(torch.eye(3), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="^clip_vision: it is missing.*Load CLIP Vision"):
        nodes.EvaluateVideo.execute(red(2), red(2), "red", None, clip)
    with pytest.raises(ValueError, match="^source and edited: one has 2 frames"):
        nodes.EvaluateVideo.execute(red(2), red(3))


def test_text_embeddings_are_projected_once() -> None:
    pooled, projection = torch.tensor([[1.0, 2.0, 3.0]]), 2 * torch.eye(3)[[1, 0, 2]]
    assert host.text_embedding(text_model(projection, pooled), "red").tolist() == [4, 2, 6]
    assert host.text_embedding(text_model(projection, pooled, projected=True), "red").tolist() == [1, 2, 3]
    # The last one is what was in the memory of a layer that no file filled.
    left_over = torch.ones(3, 3) * torch.tensor([[0.1], [0.1], [300]])
    for nothing in (
        torch.zeros(3, 3),
        torch.eye(3),
        torch.full((3, 3), float("nan")),
        torch.full((3, 3), 1e6),
        left_over,
    ):
        with pytest.raises(ValueError, match="^clip: it has no text projection.*clip_l"):
            host.text_embedding(text_model(nothing, pooled), "red")
    with pytest.raises(ValueError, match="^clip: it is not a CLIP text model"):
        host.text_embedding(text_model(None, pooled), "red")


def test_a_text_projection_is_read_as_the_host_uses_it() -> None:
    """Scaled, quantised and patched weights are made when the layer is used."""
    import comfy.ops

    pooled, projection = torch.tensor([[1.0, 2.0, 3.0]]), 2 * torch.eye(3)[[1, 0, 2]]
    clip = text_model(projection, pooled)
    layer = comfy.ops.manual_cast.Linear(3, 3, bias=False)
    layer.weight = torch.nn.Parameter(projection)
    layer.weight_function = [lambda weight: 3 * weight]
    clip.cond_stage_model.part.transformer.text_projection = layer
    assert host.text_embedding(clip, "red").tolist() == layer(pooled)[0].tolist() == [12, 6, 18]


def test_clips_stand_side_by_side_under_their_captions(nodes: Any) -> None:
    source, edit = red(3), red(3).flip(-1)
    video, sheet = nodes.CompareVideos.execute(source, edit, "the clip\n\n", edit_3=source).result
    named = [("the clip", source), ("edit 1", edit), ("edit 3", source)]
    assert torch.equal(video, pictures.side_by_side(named)) and torch.equal(sheet, pictures.contact_sheet(named))
    assert len(video) == 3 and video.shape[2] >= 3 * 32
    other = pictures.side_by_side([("source", source), ("edit 1", edit), ("edit 3", source)])
    assert not torch.equal(video, other)


def test_three_flows_serve_the_table_and_the_verdict(nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs: list[int] = []
    finest = optical_flow._refined

    def counted(source: Tensor, target: Tensor, flow: Tensor) -> Tensor:
        if source.shape[-1] == 32:
            pairs.append(len(source))
        return finest(source, target, flow)

    monkeypatch.setattr(optical_flow, "_refined", counted)
    frames = torch.rand(4, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    nodes.EvaluateVideo.execute(frames, frames.flip(0))
    assert sum(pairs) == 3 * optical_flow._ITERATIONS * (len(frames) - 1)


def test_alpha_of_one_of_two_videos_is_not_compared(nodes: Any) -> None:
    with_alpha = torch.cat([red(3), torch.rand(3, 32, 32, 1)], -1)
    same = nodes.EvaluateVideo.execute(with_alpha, red(3))
    assert same.result[0] == nodes.EvaluateVideo.execute(red(3), red(3)).result[0]


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (torch.zeros(3, 32, 32, 1), "shape .* is not that of frames"),
        (torch.zeros(32, 32, 3), "shape .* is not that of frames"),
        (torch.zeros(0, 32, 32, 3), "shape .* is not that of frames"),
        (torch.full((3, 32, 32, 3), float("nan")), "holds NaN"),
    ],
    ids=["one channel", "one picture", "no frames", "NaN"],
)
def test_what_is_no_clip_is_refused(nodes: Any, frames: Tensor, message: str) -> None:
    with pytest.raises(Refusal, match=f"^edited: .*{message}"):
        nodes.EvaluateVideo.execute(red(3), frames)
    with pytest.raises(Refusal, match=f"^edit 1: .*{message}"):
        nodes.CompareVideos.execute(red(3), frames)


@pytest.mark.parametrize(
    ("mask", "message"), [(torch.ones(1, 0, 0), "is empty"), (torch.full((1, 32, 32), float("nan")), "not finite")]
)
def test_masks_that_are_none_are_refused(nodes: Any, mask: Tensor, message: str) -> None:
    from tune_a_video.nodes.edit_control import EditControl, ShowMask

    with pytest.raises(Refusal, match=f"^mask: .*{message}"):
        nodes.EvaluateVideo.execute(red(3), red(3), mask=mask)
    with pytest.raises(Refusal, match=f"^mask: .*{message}"):
        ShowMask.execute(red(3), mask)
    with pytest.raises(Refusal, match=f"^mask: .*{message}"):
        EditControl.execute("object", 1.0, mask)
    half = (torch.arange(32) < 16).expand(32, 32)  # one mask without its batch axis
    assert torch.equal(ShowMask.execute(red(3), half).result[0][:, :, :16], red(3)[:, :, :16])
