"""Clips longer than a context window: frame 0 stays what ST-Attn looks at."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hints import HintReader, controlnet, t2i_adapter, with_hints
from torch import Tensor
from tune_a_video.tav_core import host, schedule
from tune_a_video.tav_core.attention import gather_frames
from tune_a_video.tav_core.host.windows import FirstFrameCache, window_frames
from tune_a_video.tav_core.inflate import Inflation, Layout
from tune_a_video.tav_core.sample import ddim_sample
from unets import UNETS, build_model


def options(sigmas: Tensor, frames: list[int], uuids: list[str]) -> dict[str, Any]:
    return {
        "ad_params": {"sub_idxs": frames},
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
    looped = windows.lookup(Layout(4, 1), options(sigmas, [4, 5, 0, 1], ["a"]))
    assert looped is not None
    assert torch.equal(looped("x", "k", tokens_of([4, 5, 0, 1], [1])), tokens_of([0], [1]))


def test_a_looped_window_can_hold_all_frames_in_another_order() -> None:
    def told(frames: list[int], full_length: int) -> list[int] | None:
        return window_frames({"ad_params": {"sub_idxs": frames, "full_length": full_length}}, 4)

    assert told([2, 3, 0, 1], 4) == [2, 3, 0, 1] == told([2, 3, 0, 1], 9)
    assert told([0, 1, 2, 3], 4) is None
    # Left over from a longer video, or of another length.
    assert told([4, 5, 6, 7], 4) is None and told([0, 1], 9) is None


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


LENGTH, FRAMES, STEPS = 3, 7, 3
LATENT = torch.randn(FRAMES, 4, 8, 8, generator=torch.Generator().manual_seed(0))
SCHEDULES = ["standard_static", "standard_uniform", "looped_uniform", "batched"]


def windowed(model: Any, schedule: str = "standard_static", **changes: Any) -> Any:
    """The same MODEL, which sees LENGTH frames at a time."""
    from comfy import context_windows

    clone = model.clone()
    clone.model_options["context_handler"] = context_windows.IndexListContextHandler(
        context_windows.get_matching_context_schedule(schedule),
        context_windows.get_matching_fuse_method("flat"),
        context_length=LENGTH,
        context_overlap=1,
        **changes,
    )
    return clone


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


class PerFrame:
    """A model whose frames are sampled as single pictures, so that windows must give what the whole clip gives."""

    def __init__(self, size: str = "tiny") -> None:
        self.model = host.inflate_model(build_model(UNETS[size]), Inflation("per frame", pool_group_norm=False))
        self.generator = torch.Generator().manual_seed(0)

    def prompt(self, count: int = 1, **extra: Any) -> Any:
        embedding = torch.randn(count, 7, host.context_width(self.model), generator=self.generator)
        return [[embedding, {"pooled_output": torch.randn(count, 1280, generator=self.generator), **extra}]]

    def sample(self, positive: Any, negative: Any, model: Any = None) -> Tensor:
        sigmas = schedule.sampling_sigmas(host.sigma_table(self.model), STEPS)
        return host.run_sampler(model or self.model, ddim_sample, sigmas, (positive, negative), 3.0, LATENT)


def for_each_frame(kind: str, scene: PerFrame) -> Any:
    """A positive prompt with something for each frame."""
    if kind == "prompts":
        return scene.prompt(FRAMES)
    if kind.startswith("masks"):
        masks = torch.linspace(0.2, 1, int(kind.split()[1]))[:, None, None] * torch.linspace(0.5, 1, 8)
        return scene.prompt(mask=masks.expand(-1, 8, 8)) + scene.prompt()
    control = {
        "ControlNet": lambda: controlnet(FRAMES),
        "T2I-Adapter": lambda: t2i_adapter(FRAMES),
        "fewer hints than frames": lambda: controlnet(2),
        "more hints than frames": lambda: controlnet(9),
        "ControlNet after one with a single hint": lambda: controlnet(FRAMES, previous=controlnet(1)),
        "a single hint after T2I-Adapter": lambda: controlnet(1, previous=t2i_adapter(FRAMES)),
    }[kind]()
    return scene.prompt(control=control, control_apply_to_uncond=True)


KINDS = [
    "prompts",
    f"masks {FRAMES}",
    "masks 9",
    "ControlNet",
    "T2I-Adapter",
    "fewer hints than frames",
    "more hints than frames",
    "ControlNet after one with a single hint",
    "a single hint after T2I-Adapter",
]


@pytest.mark.comfyui
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_given_for_each_frame_follows_its_window(kind: str) -> None:
    with torch.inference_mode():
        scene = PerFrame("tiny-sdxl" if kind == "prompts" else "tiny")
        positive, negative = for_each_frame(kind, scene), scene.prompt()
        whole = scene.sample(positive, negative)
        plain = scene.sample(scene.prompt(), negative)
        assert off(plain, whole) > 1e-3
        for each in SCHEDULES:
            in_windows = scene.sample(positive, negative, windowed(scene.model, each))
            assert off(in_windows, whole) < 1e-5


@pytest.mark.comfyui
def test_together_and_apart_the_hints_follow_and_no_more_than_a_window_of_them_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import comfy.model_base

    with torch.inference_mode():
        scene, net = PerFrame(), controlnet(FRAMES)
        # The stock node gives both prompts the same object.
        positive, negative = (scene.prompt(control=net) for _ in range(2))
        whole, model = scene.sample(positive, negative), windowed(scene.model)
        rows = net.control_model.rows
        assert set(rows) == {2 * FRAMES}
        rows.clear()
        together = scene.sample(positive, negative, model)
        assert set(rows) <= {2 * LENGTH, 2 * LENGTH + 2}  # newer hosts put a frame ahead of a window
        rows.clear()
        needed = lambda self, shape, *_, **__: 1e30 if shape[0] > LENGTH + 1 else 1.0  # noqa: E731
        monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", needed)
        apart = scene.sample(positive, negative, model)
        assert set(rows) <= {LENGTH, LENGTH + 1}
        for each in (together, apart):
            assert off(each, whole) < 1e-5


@pytest.mark.comfyui
@pytest.mark.parametrize("cancelled", [False, True])
def test_the_hosts_controls_are_as_they_were_even_after_a_cancelled_run(cancelled: bool) -> None:
    with torch.inference_mode():
        scene, net = PerFrame(), controlnet(FRAMES, previous=t2i_adapter(FRAMES))
        positive = scene.prompt(control=net)
        scene.sample(positive, scene.prompt())
        chain = net, net.previous_controlnet
        before = [dict(vars(each)) for each in chain]
        if cancelled:
            calls = len(net.control_model.rows) + 4

            def stop(*_: Any) -> None:
                if len(net.control_model.rows) > calls:
                    raise KeyboardInterrupt

            hook = net.control_model.register_forward_hook(stop)
            with pytest.raises(KeyboardInterrupt):
                scene.sample(positive, scene.prompt(), windowed(scene.model))
            hook.remove()
        else:
            scene.sample(positive, scene.prompt(), windowed(scene.model))
        for control, values in zip(chain, before, strict=True):
            for name in ("cond_hint_original", "cond_hint", "control_input", "extra_concat", "extra_concat_orig"):
                assert vars(control).get(name) is values.get(name), name


@pytest.mark.comfyui
def test_controls_that_cut_their_hints_themselves_are_told_the_frames() -> None:
    """As Advanced-ControlNet does: it reads which frames a call looks at."""
    import comfy.controlnet

    class Advanced(comfy.controlnet.ControlNet):
        sub_idxs: Any = None

        def get_control(self, x: Tensor, t: Tensor, cond: Any, batched: int, transformer_options: Any) -> Any:
            told = transformer_options["ad_params"]
            assert told["full_length"] == FRAMES and told["context_length"] == len(x) // batched
            assert len(self.cond_hint_original) == FRAMES
            self.cond_hint = self.cond_hint_original[told["sub_idxs"]]
            return super().get_control(x, t, cond, batched, transformer_options)

    with torch.inference_mode():
        scene = PerFrame()
        own = with_hints(Advanced(HintReader(), load_device=torch.device("cpu")), FRAMES, previous=t2i_adapter(FRAMES))
        theirs = controlnet(FRAMES, previous=t2i_adapter(FRAMES))
        positive, negative = scene.prompt(control=theirs), scene.prompt()
        advanced = [[positive[0][0], {**positive[0][1], "control": own}]]
        whole = scene.sample(positive, negative)
        for each in SCHEDULES:
            in_windows = scene.sample(advanced, negative, windowed(scene.model, each))
            assert off(in_windows, whole) < 1e-5


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
