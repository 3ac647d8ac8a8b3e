"""Clips longer than a context window: frame 0 stays what ST-Attn looks at."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from tune_a_video.tav_core import host, schedule
from tune_a_video.tav_core.attention import gather_frames
from tune_a_video.tav_core.host.windows import FirstFrameCache
from tune_a_video.tav_core.inflate import Inflation, Layout
from tune_a_video.tav_core.sample import ddim_sample
from unets import UNETS, build_model


def window(*indices: int) -> SimpleNamespace:
    return SimpleNamespace(index_list=list(indices))


def options(sigmas: Tensor, indices: list[int], uuids: list[str]) -> dict[str, Any]:
    return {
        "context_window": window(*indices),
        "sample_sigmas": sigmas,
        "uuids": uuids,
        "cond_or_uncond": list(range(len(uuids))),
    }


def tokens_of(frames: list[int], prompts: list[int]) -> Tensor:
    """[prompts, frames, 1 tile, 2 tokens, 3 channels]: the numbers say whose they are."""
    values = torch.tensor([[100.0 * prompt + frame for frame in frames] for prompt in prompts])
    return values[:, :, None, None, None].expand(-1, -1, 1, 2, 3)


def test_a_first_frame_from_elsewhere_takes_the_place_of_the_first() -> None:
    frames = torch.arange(4.0).view(4, 1, 1)
    first = torch.full((1, 1, 1, 1, 1), 9.0)
    assert gather_frames(frames, 4, 1, "sparse-causal", first)[..., 0].tolist() == [[9, 0], [9, 0], [9, 1], [9, 2]]
    assert gather_frames(frames, 4, 1, "first frame only", first)[..., 0].tolist() == [[9]] * 4
    assert gather_frames(frames, 4, 1, "sparse-causal")[..., 0].tolist() == [[0, 0], [0, 0], [0, 1], [0, 2]]


def test_later_windows_get_frame_0_of_their_own_prompt() -> None:
    windows, sigmas = FirstFrameCache(), torch.ones(3)
    begin = windows.lookup(Layout(3, 2), options(sigmas, [0, 1, 2], ["a", "b"]))
    assert begin is not None
    assert torch.equal(begin("x", "k", tokens_of([0, 1, 2], [1, 2])), tokens_of([0], [1, 2]))
    # The host may run the prompts apart, and in another order.
    for uuids, prompts in ((["b"], [2]), (["b", "a"], [2, 1])):
        later = windows.lookup(Layout(3, len(uuids)), options(sigmas, [2, 3, 4], uuids))
        assert later is not None
        assert torch.equal(later("x", "k", tokens_of([2, 3, 4], prompts)), tokens_of([0], prompts))
        assert later("x", "v", tokens_of([2, 3, 4], prompts)) is None


def test_a_frame_that_the_host_puts_ahead_is_not_taken_for_frame_0() -> None:
    windows, sigmas = FirstFrameCache(), torch.ones(3)
    looped = windows.lookup(Layout(4, 1), options(sigmas, [5, 0, 1], ["a"]))
    assert looped is not None
    assert torch.equal(looped("x", "k", tokens_of([4, 5, 0, 1], [1])), tokens_of([0], [1]))


def test_another_run_starts_without_a_first_frame() -> None:
    windows, sigmas = FirstFrameCache(), torch.ones(3)
    begin = windows.lookup(Layout(2, 1), options(sigmas, [0, 1], ["a"]))
    assert begin is not None
    begin("x", "k", tokens_of([0, 1], [1]))
    later = windows.lookup(Layout(2, 1), options(torch.ones(3), [2, 3], ["a"]))
    assert later is not None and later("x", "k", tokens_of([2, 3], [1])) is None
    assert windows.lookup(Layout(2, 1), {"cond_or_uncond": [0]}) is None
    del sigmas, begin, later
    assert len(windows._runs) == 0


@pytest.mark.comfyui
def test_windows_without_overlap_see_frame_0_through_st_attn() -> None:
    """On a real UNet: changing frame 0 changes windows that don't hold it, and only through what is kept of it."""
    with torch.inference_mode():
        model = host.inflate_model(build_model(UNETS["tiny"]), Inflation())
        base, sigmas = model.model, torch.ones(3)
        generator = torch.Generator().manual_seed(0)
        video = torch.randn(6, 4, 8, 8, generator=generator)
        context = torch.randn(1, 7, host.context_width(model), generator=generator).expand(3, -1, -1)

        def second_window(first: Tensor) -> Tensor:
            out = torch.empty(0)
            for indices in ([0, 1, 2], [3, 4, 5]):
                x = torch.cat([first, video[1:]])[indices]
                transformer_options = {**options(sigmas, indices, ["a"]), "wrappers": model.wrappers}
                out = base.apply_model(x, torch.ones(3), c_crossattn=context, transformer_options=transformer_options)
            return out

        model.patch_model()
        same, again, other = (second_window(each) for each in (video[:1], video[:1], -video[:1]))
        assert torch.equal(same, again)
        assert (same - other).abs().max() > 1e-3


def test_a_hint_for_each_frame_is_refused_where_windows_would_mix_them_up() -> None:
    with torch.inference_mode():
        model = build_model(UNETS["tiny"])
    embedding = torch.zeros(1, 7, host.context_width(model))

    def check(hints: int, length: int) -> None:
        windowed = model.clone()
        windowed.model_options["context_handler"] = SimpleNamespace(context_length=length)
        first = SimpleNamespace(cond_hint_original=torch.zeros(hints, 3, 8, 8), previous_controlnet=None)
        second = SimpleNamespace(cond_hint_original=torch.zeros(1, 3, 8, 8), previous_controlnet=first)
        host.check_conditioning(windowed, "positive", [[embedding, {"control": second}]], 8)

    check(hints=1, length=4)
    check(hints=8, length=8)
    with pytest.raises(ValueError, match="positive: .*4 of 8 frames at a time"):
        check(hints=8, length=4)


@pytest.mark.comfyui
@pytest.mark.parametrize("frames", [4, 6, 9])
def test_any_number_of_frames_goes_through_windows_at_any_number_of_steps(frames: int) -> None:
    """The host compares timesteps with sigmas; of both there may be any number here, one for each frame."""
    from comfy import context_windows, sample

    steps = 3
    with torch.inference_mode():
        model = host.inflate_model(build_model(UNETS["tiny"]), Inflation())
        begun: list[int] = []

        def two_halves(count: int, handler: Any, model_options: Any) -> list[list[int]]:
            begun.append(handler._step)
            return [list(range(count // 2)), list(range(count // 2, count))]

        halves = context_windows.ContextSchedule("halves", two_halves)
        fuse = context_windows.get_matching_fuse_method("flat")
        model.model_options["context_handler"] = context_windows.IndexListContextHandler(halves, fuse, context_length=2)
        latent = torch.randn(frames, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        prompt = [[torch.zeros(1, 7, host.context_width(model)), {}]]
        sigmas = schedule.sampling_sigmas(host.sigma_table(model), steps)
        ours = host.run_sampler(model, ddim_sample, sigmas, (prompt, prompt), 7.5, latent)
        assert begun == [*range(steps)] and torch.isfinite(ours).all()
        begun.clear()
        zeros = torch.zeros_like(latent)
        theirs = sample.sample(model, latent, steps, 7.5, "euler", "normal", prompt, prompt, zeros, seed=0)
        assert begun == [*range(steps)] and torch.isfinite(theirs).all()
