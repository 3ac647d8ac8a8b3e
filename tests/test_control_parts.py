"""The parts of edit control as plain functions on tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from tune_a_video.tav_core.control.blend import composited, difference_mask, frame_masks, grid, resized_mask
from tune_a_video.tav_core.control.guidance import proximal
from tune_a_video.tav_core.control.injection import BoundCall, Call, Step, _one_text
from tune_a_video.tav_core.control.noise import freed_noise
from tune_a_video.tav_core.control.settings import Control
from tune_a_video.tav_core.control.words import EditWords, aligned, occurrences, positions
from tune_a_video.tav_core.inflate import Layout


@pytest.mark.comfyui
def test_outside_a_mask_the_pixels_are_the_clips_as_the_templates_make_them() -> None:
    from comfy_extras.nodes_mask import ImageCompositeMasked

    generator = torch.Generator().manual_seed(0)
    clip, edited = (torch.rand(2, 32, 48, 3, generator=generator) for _ in range(2))
    mask = torch.zeros(2, 1, 8, 12)
    mask[0, 0, 2:4, 5:9] = 1
    kept = composited(clip, edited, mask)
    assert torch.equal(kept[1], clip[1]) and torch.equal(kept[0, :, :18], clip[0, :, :18])
    assert torch.equal(kept[0, 10:14, 22:34], edited[0, 10:14, 22:34])
    assert composited(clip, edited, None) is edited
    node = ImageCompositeMasked()
    made = node.execute if hasattr(node, "execute") else node.composite
    host = made(clip, edited, 0, 0, False, mask[:, 0])
    assert torch.allclose((host.args if hasattr(host, "args") else host)[0], kept, atol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "size", "expected"),
    [
        (4096, (64, 64), (64, 64, 0)),
        (256, (64, 64), (16, 16, 2)),
        (24, (8, 12), (4, 6, 1)),
        (15, (9, 5), (5, 3, 1)),
        (7, (8, 12), None),
    ],
)
def test_the_grid_of_a_layer(tokens: int, size: tuple[int, int], expected: Any) -> None:
    assert grid(tokens, *size) == expected


def test_a_cell_that_a_mask_touches_belongs_to_it() -> None:
    mask = torch.zeros(2, 64, 96)
    mask[1, 9, 17] = 1
    small = resized_mask(mask, 2, 8, 12)
    assert small.shape == (2, 1, 8, 12) and small.sum() == 1 and small[1, 0, 1, 2] == 1
    assert resized_mask(torch.ones(1, 2, 2), 3, 8, 8).shape == (3, 1, 8, 8)
    assert frame_masks(None, torch.zeros(3, 4, 8, 12)).sum() == 3 * 8 * 12


def differences(frames: int, size: int, *places: tuple[int, int], levels: int = 3) -> list[Tensor]:
    """Differences that are small everywhere and large in a square of 5 cells around each place of every frame."""
    generator = torch.Generator().manual_seed(0)
    found = [0.1 * torch.randn(frames, 4, size, size, generator=generator) for _ in range(levels)]
    for level in found:
        for y, x in places:
            level[:, :, y - 2 : y + 3, x - 2 : x + 3] += torch.randn(frames, 4, 5, 5, generator=generator)
    return found


@pytest.mark.parametrize("size", [16, 64])
def test_a_found_mask_is_where_the_sentences_differ(size: int) -> None:
    places = (4, 4), (size - 6, size - 5)
    mask = difference_mask(differences(3, size, *places), 0.3)
    assert mask.shape == (3, 1, size, size) and set(mask.unique().tolist()) == {0.0, 1.0}
    truth = torch.zeros(size, size)
    for y, x in places:
        truth[y - 2 : y + 3, x - 2 : x + 3] = 1
    assert float((mask * truth).sum() / (3 * truth.sum())) > 0.95
    assert float((mask * (1 - truth)).mean()) < 0.12


def test_a_frame_that_hardly_differs_has_no_place() -> None:
    found = differences(6, 16, (8, 8))
    for level in found:
        level[3:] = 0.1 * torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    mask = difference_mask(found, 0.3)
    assert mask[:2, 0, 8, 8].all() and mask[4:].mean() < 0.05


def test_what_changes_may_be_the_larger_part() -> None:
    """As in another place behind the same thing: most of the picture differs, one square hardly does."""
    generator = torch.Generator().manual_seed(2)
    kept = torch.zeros(16, 16, dtype=torch.bool)
    kept[5:11, 5:11] = True
    found = [torch.where(kept, 0.1, 1.0) * (1 + 0.2 * torch.rand(3, 4, 16, 16, generator=generator)) for _ in range(3)]
    mask = difference_mask(found, 0.2)[:, 0]
    assert mask[:, ~kept].mean() > 0.95 and mask[:, 7:9, 7:9].mean() == 0


def test_sentences_that_differ_nowhere_leave_nothing_to_change() -> None:
    assert not difference_mask([torch.zeros(2, 4, 8, 8)] * 3, 0.2).any()


def test_a_lower_threshold_finds_more() -> None:
    found = differences(2, 16, (8, 8))
    areas = [float(difference_mask(found, threshold).mean()) for threshold in (0.1, 0.3, 0.6)]
    assert areas[0] > areas[1] > areas[2] > 0


def test_proximal_guidance_drops_the_weaker_part() -> None:
    unconditional = torch.zeros(1, 1, 2, 5)
    conditional = torch.tensor([1.0, -2, 3, -4, 5, 6, -7, 8, 9, -10]).view(1, 1, 2, 5)
    kept = proximal(conditional, unconditional, 0.7)
    assert kept.flatten().tolist() == [0, 0, 0, 0, 0, 0, 0, 8, 9, -10]
    assert torch.equal(proximal(conditional, unconditional, 1.0), unconditional)


def test_freed_noise_keeps_the_variance_and_is_shared_between_frames() -> None:
    noise = torch.randn(2, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    freed = freed_noise(noise, 0.5, seed=1)
    assert float(freed.std()) == pytest.approx(1, abs=0.02)
    fresh = (freed - 0.5**0.5 * noise) / 0.5**0.5
    torch.testing.assert_close(fresh[0], fresh[1], rtol=1e-4, atol=1e-4)
    mask = torch.zeros(2, 1, 64, 64)
    mask[..., :32] = 1
    inside = freed_noise(noise, 0.5, seed=1, mask=mask)
    assert torch.equal(inside[..., 32:], noise[..., 32:]) and torch.equal(inside[..., :32], freed[..., :32])


def test_two_attentions_at_their_own_places_are_two_attentions_mixed_by_the_mask() -> None:
    """out = M attend(q, k) + (1 - M) attend(clip's q, clip's k), for masks that are 0, 1 and between."""
    frames, side, chunks = 3, 8, 2
    mask = torch.zeros(frames, 1, side, side)
    mask[0, :, 2:5, 1:4], mask[1, :, 0], mask[2, :, 5:, 5:] = 1, 0.5, 1
    control = Control(self_share=1.0, layers="all", free_inside=True)
    step = Step(control, None, torch.zeros(frames, 4, side, side), mask, True, False, False)
    generator = torch.Generator().manual_seed(0)
    source, edit = (torch.randn(2, n * frames, side * side, 6, generator=generator) for n in (1, chunks))
    values, queries = torch.randn(chunks * frames, side * side, 6, generator=generator), []

    def attend(q: Tensor, k: Tensor, name: str) -> Tensor:
        queries.append((name, q.shape[1]))
        return (q @ k.transpose(1, 2)).softmax(-1) @ values[: len(q)]

    def bound(source: bool, chunks: int) -> BoundCall:
        return BoundCall(Call(step, source, (0, 1, 2)), Layout(frames, chunks), (side, side), [True] * chunks)

    bound(True, 1).self_attention("input_blocks.1", *source, attend)
    found = bound(False, chunks).self_attention("input_blocks.1", *edit, attend)
    clips = (source[0].repeat(chunks, 1, 1), source[1].repeat(chunks, 1, 1))
    m = mask.flatten(1)[:, :, None].repeat(chunks, 1, 1)
    expected = m * attend(*edit, "") + (1 - m) * attend(*clips, "")
    torch.testing.assert_close(found, expected)
    # As many as the frame with the most of them has: nine cells of three by three, and all outside the second frame's.
    assert queries[1:3] == [("k", 9), ("k of the clip", 64)]


def sentence(text: str) -> list[Any]:
    return [((word,), (number + 1,)) for number, word in enumerate(text.split())]


@pytest.mark.parametrize(
    ("source", "edit", "goes", "new"),
    [
        ("a man is skiing", "a panda is skiing", {1}, {1}),
        ("a man is skiing", "a man is skiing on the beach", set(), {4, 5, 6}),
        ("a man and a dog run", "a man runs", {2, 3, 4, 5}, {2}),
        ("a man", "a man", set(), set()),
        ("", "a man", set(), {0, 1}),
    ],
)
def test_sentences_are_aligned_word_by_word(source: str, edit: str, goes: set[int], new: set[int]) -> None:
    found = aligned(sentence(source), sentence(edit))
    assert found[:2] == (goes, new)
    words = source.split(), edit.split()
    assert all(words[0][a] == words[1][b] for a, b in found[2])


def test_named_words_and_their_positions() -> None:
    words = sentence("a red car and a red bus")
    assert occurrences(sentence("red"), words) == {1, 5}
    # A phrase of the sentence, words in another order, and a word that it lacks.
    assert occurrences(sentence("red bus"), words) == {5, 6}
    assert occurrences(sentence("bus car"), words) == {2, 6}
    assert occurrences(sentence("red tram"), words) == set()
    assert positions(words, {5, 1}) == (2, 6)


def test_which_token_stands_for_which() -> None:
    words = EditWords(None, (1,), (2,), ((0, 0), (2, 1)), (3, 4))
    assert words.kept().shape == (3, 4) and words.kept().nonzero().tolist() == [[0, 0], [2, 1]]


def test_a_text_that_the_host_repeats_is_one_text() -> None:
    text = torch.arange(12.0).view(2, 3, 2)
    assert _one_text(text, 3) is text
    repeated = _one_text(text.repeat(1, 2, 1), 3)
    assert repeated is not None and torch.equal(repeated, text)
    assert _one_text(torch.cat([text, text + 1], 1), 3) is None
    assert _one_text(text, 2) is None and _one_text(text, 4) is None
