"""Several GPUs: each has its own temporal layers, and long clips keep their first frame on all of them."""

from __future__ import annotations

from typing import Any

import comfy.model_patcher
import pytest
import torch
from torch import Tensor
from tune_a_video.tav_core import host, pipeline
from tune_a_video.tav_core.host.windows import FirstFrameCache
from tune_a_video.tav_core.inflate import Inflation, Layout
from tune_a_video.tav_core.motion.file import Motion
from tune_a_video.tav_core.tuning.trainer import TuneSettings
from unets import UNETS, build_model

KEY = "tune-a-video"
LATENTS = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = [[[torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(seed)), {}]] for seed in (1, 2)]
CLONES = hasattr(comfy.model_patcher.ModelPatcher, "deepclone_multigpu")


@pytest.fixture(scope="module")
def motion() -> Motion:
    with torch.inference_mode():
        settings = TuneSettings(steps=3, learning_rate=1e-2)
        return pipeline.tune(build_model(UNETS["tiny"]), LATENTS, PROMPTS[0], settings)[0]


def sampled(model: Any) -> Tensor:
    with torch.inference_mode():
        return pipeline.sample(model, LATENTS, *PROMPTS, 3, 3.0)


def windowed(model: Any) -> Any:
    """The same MODEL, which sees three frames at a time."""
    from comfy import context_windows

    def halves(count: int, handler: Any, model_options: Any) -> list[list[int]]:
        return [list(range(count // 2)), list(range(count // 2, count))]

    schedule = context_windows.ContextSchedule("halves", halves)
    fuse = context_windows.get_matching_fuse_method("flat")
    clone = model.clone()
    clone.model_options["context_handler"] = context_windows.IndexListContextHandler(schedule, fuse, context_length=3)
    return clone


@pytest.mark.comfyui
def test_the_host_can_make_the_temporal_layers_again(motion: Motion) -> None:
    model = host.inflate_model(build_model(UNETS["tiny"]), Inflation(), motion)
    (ours,) = model.get_additional_models_with_key(KEY)
    make, arguments = ours.cached_patcher_init
    for again in (make(*arguments), make(*arguments, disable_dynamic=True)):
        assert again.model is not ours.model and isinstance(again, comfy.model_patcher.ModelPatcher)
        assert again.model.state_dict().keys() == ours.model.state_dict().keys()
        for name, value in again.model.state_dict().items():
            mine = ours.model.state_dict()[name]
            assert torch.equal(value, mine) and value.data_ptr() != mine.data_ptr()


@pytest.mark.comfyui
def test_what_runs_are_the_layers_beside_the_model_that_runs(motion: Motion) -> None:
    """Not those that were there when the node ran: on another GPU they are a copy."""
    model = host.inflate_model(build_model(UNETS["tiny"]), Inflation(), motion)
    other = model.clone()
    (ours,) = model.get_additional_models_with_key(KEY)
    make, arguments = ours.cached_patcher_init
    copied = make(*arguments)
    with torch.inference_mode():
        for name, value in copied.model.named_parameters():
            if ".to_out.0." in name:
                value.zero_()
    other.set_additional_models(KEY, [copied])
    off = host.inflate_model(build_model(UNETS["tiny"]), Inflation(temporal_strength=0.0), motion)
    assert torch.equal(sampled(other), sampled(off))
    assert not torch.equal(sampled(model), sampled(off))


def options(cache: FirstFrameCache | None, indices: list[int]) -> dict[str, Any]:
    found = {
        "ad_params": {"sub_idxs": indices},
        "sample_sigmas": torch.ones(3),  # a new tensor for each call
        "uuids": ["a"],
        "cond_or_uncond": [0],
    }
    if cache is not None:
        cache.begin(found)
    return found


def call(cache: FirstFrameCache, transformer_options: dict[str, Any], tokens: Tensor) -> Tensor | None:
    first = cache.lookup(Layout(tokens.shape[1], 1), transformer_options)
    assert first is not None
    return first("x", "k", tokens)


def test_the_first_frame_is_known_on_every_device_for_one_run() -> None:
    cache = FirstFrameCache()
    began = options(cache, [0, 1])
    tokens = torch.arange(2.0).view(1, 2, 1, 1, 1) + 5
    call(cache, began, tokens)
    later = {**options(None, [2, 3]), **{k: v for k, v in began.items() if k.startswith(KEY)}}
    found = call(cache, later, tokens + 9)
    assert found is not None and torch.equal(found, tokens[:, :1])
    elsewhere = call(cache, later, torch.empty_like(tokens, device="meta"))
    assert elsewhere is not None and elsewhere.device.type == "meta"
    assert call(cache, options(cache, [2, 3]), tokens) is None, "another run"
    del began, later
    assert len(cache._runs) == 0


@pytest.mark.comfyui
@pytest.mark.parametrize("windows", [False, True])
def test_a_split_over_two_devices_gives_what_one_gives(
    windows: bool, motion: Motion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the host's own multi-GPU code: conditionings on two devices, which are both this machine's CPU."""
    inflated = host.inflate_model(loaded(), Inflation(), motion)
    fitted = windowed(inflated) if windows else inflated
    expected = sampled(fitted)
    if not CLONES:
        # Without multi-GPU code on this host, the one thing that newer hosts' does to every call.
        original = inflated.model.apply_model

        def apply_model(x: Tensor, t: Tensor, transformer_options: Any, **conds: Any) -> Tensor:
            sigmas = transformer_options["sample_sigmas"].clone()
            return original(x, t, transformer_options={**transformer_options, "sample_sigmas": sigmas}, **conds)

        monkeypatch.setattr(inflated.model, "apply_model", apply_model)
        assert torch.equal(sampled(fitted), expected)
        return
    from comfy import model_management, multigpu

    devices = [torch.device("cpu"), torch.device("cpu", 0)]
    monkeypatch.setattr(model_management, "get_all_torch_devices", lambda exclude_current=False: devices)
    with torch.inference_mode():
        split = multigpu.create_multigpu_deepclones(fitted, 2)
    (second,) = split.get_additional_models_with_key("multigpu")
    assert second.model is not split.model
    theirs = second.get_additional_models_with_key(KEY)[0].model
    assert theirs is not split.get_additional_models_with_key(KEY)[0].model
    calls: list[int] = []
    for layer in theirs.modules():
        if hasattr(layer, "norm_temp"):
            layer.norm_temp.register_forward_hook(lambda *_: calls.append(1))
    # Samples of this untrained model reach 300, and rounding grows with the largest values.
    rounding = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(sampled(split), expected, rtol=1e-4, atol=rounding)
    assert calls, "the second device's own temporal layers were not used"
    torch.testing.assert_close(sampled(split), expected, rtol=1e-4, atol=rounding)


def loaded() -> Any:
    model = build_model(UNETS["tiny"])
    model.cached_patcher_init = lambda disable_dynamic=False: build_model(UNETS["tiny"]), ()
    return model
