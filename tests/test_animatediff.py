"""AnimateDiff-Evolved's changes to a MODEL: windows by a wrapper of its own, and layers inserted into the UNet."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from tune_a_video.tav_core import host, pipeline, schedule
from tune_a_video.tav_core.control.settings import PRESETS, Control
from tune_a_video.tav_core.errors import Refusal
from tune_a_video.tav_core.host.inflated_model import layout_of
from tune_a_video.tav_core.host.windows import conds_in_window, window_frames
from tune_a_video.tav_core.inflate import Inflation
from tune_a_video.tav_core.sample import ddim_sample
from tune_a_video.tav_core.tuning.trainer import TuneSettings
from unets import UNETS, build_model

pytestmark = pytest.mark.comfyui

FRAMES = 7
WINDOWS = [[0, 1, 2], [2, 3, 4], [4, 5, 6]]
LATENT = torch.randn(FRAMES, 4, 8, 8, generator=torch.Generator().manual_seed(0))
SETTINGS = TuneSettings(steps=3, learning_rate=1e-3)


def prompt(seed: int = 1, rows: int = 1) -> Any:
    return [[torch.randn(rows, 7, 32, generator=torch.Generator().manual_seed(seed)), {}]]


def told(window: list[int]) -> dict[str, Any]:
    return {"ad_params": {"sub_idxs": window, "context_length": len(window), "full_length": FRAMES}}


def with_windows(model: Any, windows: list[list[int]] = WINDOWS, tell: bool = True) -> Any:
    """As context options put it: windows that overlap, evaluated one by one and averaged."""

    def calc_cond_batch(
        executor: Any, base: Any, conds: list[Any], x: Tensor, timestep: Tensor, model_options: dict[str, Any]
    ) -> list[Tensor]:
        totals, counts = [torch.zeros_like(x) for _ in conds], torch.zeros(len(x), 1, 1, 1)
        for window in windows:
            options = {**model_options["transformer_options"], **(told(window) if tell else {})}
            parts = [None if cond is None else conds_in_window(cond, window, len(x)) for cond in conds]
            outs = executor(base, parts, x[window], timestep[window], {**model_options, "transformer_options": options})
            counts[window] += 1
            for total, out in zip(totals, outs, strict=True):
                total[window] += out
        return [total / counts for total in totals]

    clone = model.clone()
    clone.add_wrapper_with_key("calc_cond_batch", "ADE", calc_cond_batch)
    return clone


def with_the_hosts(model: Any) -> Any:
    """The same windows by the host's own handler."""
    from comfy import context_windows

    kind = context_windows.IndexListContextHandler
    # Newer hosts would put the frame before a window in front of it.
    ahead = {"causal_window_fix": False} if "causal_window_fix" in inspect.signature(kind).parameters else {}
    clone = model.clone()
    clone.model_options["context_handler"] = kind(
        context_windows.ContextSchedule("test", lambda *_: WINDOWS),
        context_windows.get_matching_fuse_method("flat"),
        context_length=3,
        **ahead,
    )
    return clone


class Mixing(torch.nn.Module):
    """A layer over frames, as motion modules are: it needs to know how many prompts share the batch."""

    def forward(self, x: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        videos = x.unflatten(0, (len(transformer_options["cond_or_uncond"]), -1))
        return (0.5 * videos + 0.5 * videos.roll(1, 1)).flatten(0, 1)


def with_layers(model: Any) -> Any:
    """As Use Evolved Sampling puts it: layers that are inserted as the model is loaded, before what follows them."""
    from comfy.patcher_extension import PatcherInjection

    def inject(patcher: Any) -> None:
        for block in patcher.model.diffusion_model.output_blocks:
            block.insert(2, Mixing())

    def eject(patcher: Any) -> None:
        for block in patcher.model.diffusion_model.output_blocks:
            for at in reversed(range(len(block))):
                if isinstance(block[at], Mixing):
                    block.pop(at)

    def embed(layer: Any, x: Tensor, emb: Any, context: Any, transformer_options: Any, *_: Any) -> Tensor:
        return layer(x, transformer_options)

    clone = model.clone()
    clone.set_injections("ADE", [PatcherInjection(inject=inject, eject=eject)])
    clone.set_model_forward_timestep_embed_patch((Mixing, embed))
    return clone


def layers_in(model: Any) -> int:
    return sum(isinstance(module, Mixing) for module in host.unet_of(model).modules())


def sampled(model: Any) -> Tensor:
    sigmas = schedule.sampling_sigmas(host.sigma_table(model), 3)
    return host.run_sampler(model, ddim_sample, sigmas, (prompt(), prompt(2)), 7.5, 20 * LATENT)


def off(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@torch.inference_mode()
def test_windows_see_the_clips_first_frame_as_the_hosts_own_do() -> None:
    plain = build_model(UNETS["tiny"])
    inflated = host.inflate_model(plain, Inflation())
    expected = sampled(with_the_hosts(inflated))
    assert off(sampled(with_windows(inflated)), expected) < 1e-5
    # Context options may stand before inflation, too.
    assert off(sampled(host.inflate_model(with_windows(plain), Inflation())), expected) < 1e-5
    assert off(sampled(with_windows(inflated, tell=False)), expected) > 1e-3


def test_a_window_left_over_from_an_earlier_step_is_none() -> None:
    assert window_frames(told([2, 3, 4]), 3) == [2, 3, 4]
    assert window_frames(told([2, 3, 4]), FRAMES) is None
    assert window_frames(told([*range(FRAMES)]), FRAMES) is None
    assert window_frames({"ad_params": {"sub_idxs": None, "full_length": FRAMES}}, FRAMES) is None


def test_tiles_of_windows_are_refused() -> None:
    options = {"sigmas": torch.ones(3), "cond_or_uncond": [0, 1]}
    assert layout_of(12, options).chunks == 4
    with pytest.raises(Refusal, match="tiles and context windows"):
        layout_of(12, options | told([2, 3, 4]))


@torch.inference_mode()
def test_edit_control_follows_the_window() -> None:
    """Frame by frame, windows are as good as the whole clip. The clip has a sentence of its own for each frame."""
    model = host.inflate_model(build_model(UNETS["tiny"]), Inflation("per frame", pool_group_norm=False))
    noise, trajectory = pipeline.invert_and_keep(model, LATENT, prompt(3, FRAMES), 3)
    control = Control(self_share=0.8, layers="all", feature_share=0.6, proximal=0.3)
    edits = []
    for each in (model, with_windows(model), with_windows(model, [[0, 1, 2], [3, 4], [5, 6]])):
        run = pipeline.controlled(each, control, trajectory, noise, prompt(1))
        edits.append(pipeline.sample(each, noise, prompt(1), prompt(2), 3, 3.0, control=run))
    assert off(edits[1], edits[0]) < 1e-4
    assert off(edits[2], edits[0]) < 1e-4
    assert off(pipeline.sample(model, noise, prompt(1), prompt(2), 3, 3.0), edits[0]) > 1e-2


@torch.inference_mode()
@pytest.mark.parametrize("preset", [name for name, preset in PRESETS.items() if preset.acts])
def test_edit_control_bears_layers_of_another_kind(preset: str) -> None:
    """The clip's evaluation ends early, and leaves layers of other packs as they are."""
    model = with_layers(host.inflate_model(build_model(UNETS["tiny"]), Inflation()))
    noise, trajectory = pipeline.invert_and_keep(model, LATENT, prompt(3), 3)
    run = pipeline.controlled(model, PRESETS[preset], trajectory, noise, prompt(1))
    edited = pipeline.sample(model, noise, prompt(1), prompt(2), 3, 3.0, control=run)
    assert torch.isfinite(edited).all()
    assert off(pipeline.sample(model, noise, prompt(1), prompt(2), 3, 3.0), edited) > 1e-3


@torch.inference_mode()
def test_layers_act_on_and_under_a_tuned_model() -> None:
    plain = build_model(UNETS["tiny"])
    motion, _ = pipeline.tune(plain, LATENT, prompt(), SETTINGS)
    tuned = host.inflate_model(plain, Inflation(), motion)
    without = sampled(tuned)
    on, under = with_layers(tuned), host.inflate_model(with_layers(plain), Inflation(), motion)
    assert torch.equal(sampled(on), sampled(under))
    assert layers_in(plain) > 0 and off(sampled(on), without) > 1e-2
    assert torch.equal(sampled(tuned), without) and layers_in(plain) == 0


@torch.inference_mode()
def test_tuning_runs_without_the_layers_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    plain = build_model(UNETS["tiny"])
    expected, losses = pipeline.tune(plain, LATENT, prompt(), SETTINGS)
    layered = with_layers(plain)
    inflated = host.inflate_model(layered, Inflation())
    before = sampled(inflated)
    assert layers_in(plain) > 0
    motion, ours = pipeline.tune(layered, LATENT, prompt(), SETTINGS)
    assert ours == losses and motion.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(value, expected.tensors[key]) for key, value in motion.tensors.items())
    assert "other packs' layers in the UNet" in caplog.text
    # They are back in the next sampling.
    assert torch.equal(sampled(inflated), before)
