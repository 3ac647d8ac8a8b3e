"""The cost of edit control beside plain sampling, counted on SD 1.5's own shapes: memory, operations, attention maps.

The UNet has no weights (device "meta"), so that its layers run and compute nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import comfy.ldm.modules.attention as host_attention
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from tune_a_video.tav_core import host
from tune_a_video.tav_core.control.injection import Call, Step, feature_layer
from tune_a_video.tav_core.control.settings import LAYERS, PRESETS, Control, at_strength
from tune_a_video.tav_core.control.trajectory import Recorder
from tune_a_video.tav_core.control.words import EditWords
from tune_a_video.tav_core.inflate import Inflation
from unets import UNETS, build_model

pytestmark = pytest.mark.comfyui

SIDE, TOKENS = 64, 77
WORDS = EditWords(None, (2,), (2,), tuple((n, n) for n in range(TOKENS) if n != 2), (TOKENS, TOKENS))
KINDS = [name for name in PRESETS if name != "free"]


class Evaluator:
    """Evaluates SD 1.5, inflated, as the host does: through the wrapper of ``inflate_model``."""

    def __init__(self) -> None:
        import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel

        base = build_model(UNETS["tiny"])
        config = {**UNETS["sd15"], "device": "meta", "dtype": torch.float16}
        self.unet = base.model.diffusion_model = openaimodel.UNetModel(**config)
        model = host.inflate_model(base, Inflation())
        model.model.current_patcher = model
        (self.wrapper,) = model.get_wrappers("apply_model", "tune-a-video")
        self.class_obj, self.original = model.model, model.model._apply_model

    def __call__(self, x: Tensor, sigmas: Tensor, *_: Any, **options: Any) -> Tensor:
        context = torch.empty(len(x), TOKENS, 768, dtype=x.dtype, device="meta")
        return self.unet(x, torch.empty(len(x), device="meta"), context, **options)

    def run(self, frames: int, conds: list[int], call: Call | None = None) -> None:
        options: dict[str, Any] = {"cond_or_uncond": conds, "sigmas": torch.ones(frames)}
        if call is not None:
            options["tune-a-video control"] = call
        x = torch.empty(len(conds) * frames, 4, SIDE, SIDE, dtype=torch.float16, device="meta")
        self.wrapper(self, x, torch.ones(len(x)), transformer_options=options)


def half_of_the_height(frames: int) -> Tensor:
    """A mask that half of every frame is in: more than a thing in a picture covers."""
    mask = torch.zeros(frames, 1, SIDE, SIDE)
    mask[:, :, : SIDE // 2] = 1
    return mask


def step_of(control: Control, frames: int) -> Step:
    """A step in which all levers of a control are on."""
    return Step(
        control,
        WORDS,
        torch.empty(frames, 4, SIDE, SIDE, device="meta"),
        half_of_the_height(frames) if control.free_inside else None,
        injects_self=control.self_share > 0,
        injects_cross=control.cross_share > 0,
        injects_feature=control.feature_share > 0,
    )


@pytest.fixture(scope="module")
def evaluator() -> Iterator[Evaluator]:
    with torch.inference_mode():
        yield Evaluator()


@pytest.fixture(autouse=True)
def on_shapes_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Attend without a fused kernel, so that its operations are counted."""
    monkeypatch.setattr(host_attention, "optimized_attention", host_attention.attention_basic)
    with torch.inference_mode():
        yield


def kept_megabytes(evaluator: Evaluator, control: Control) -> float:
    """Return the megabytes that a step keeps of a clip of 24 frames, 512x512, in fp16."""
    step = step_of(control, 24)
    evaluator.run(24, [0], Call(step, True, tuple(range(24))))
    return sum(kept.numel() * kept.element_size() for kept in step.kept.values()) / 1e6


def test_memory_of_a_step_is_as_stated(evaluator: Evaluator) -> None:
    """In web/docs/TAV_EditControl.md."""
    found = [kept_megabytes(evaluator, Control(self_share=1.0, layers=layers)) for layers in LAYERS]
    assert found == pytest.approx([661, 283, 480, 1109], abs=1)
    assert kept_megabytes(evaluator, Control(cross_share=1.0)) == pytest.approx(280, abs=1)
    assert kept_megabytes(evaluator, Control(feature_share=1.0)) == pytest.approx(16, abs=1)
    assert feature_layer(evaluator.unet) is evaluator.unet.get_submodule("output_blocks.4.0.out_layers.3")


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("preset", KINDS)
def test_every_preset_keeps_at_most_700_mb_of_a_step(evaluator: Evaluator, preset: str, strength: float) -> None:
    assert 200 < kept_megabytes(evaluator, at_strength(PRESETS[preset], strength)) <= 700


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 80), (torch.bfloat16, 40)])
def test_a_trajectory_of_24_frames_takes_at_most_80_mb(dtype: torch.dtype, most: float) -> None:
    latents = Recorder(50, torch.empty(24, 4, SIDE, SIDE, device="meta"), 1.0, dtype).latents
    assert 0.95 * most < latents.numel() * latents.element_size() / 1e6 <= most


class Maps(TorchDispatchMode):
    """Notes attention maps: tensors whose last two sizes are a large layer's tokens and the tokens that they see."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.ndim > 2:
                n, m = tensor.shape[-2:]
                # No layer of SD 1.5 has as many channels.
                if n in (4096, 1024) and m in (TOKENS, n, 2 * n):
                    self.found.add((n, m))
        return out


def test_no_attention_map_is_written(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = Control(self_share=1.0, layers="all", cross_share=1.0, feature_share=1.0, free_inside=True)

    def maps() -> set[tuple[int, ...]]:
        step = step_of(everything, 2)
        with Maps() as found:
            evaluator.run(2, [0], Call(step, True, (0, 1)))
            evaluator.run(2, [0, 1], Call(step, False, (0, 1)))
        return found.found

    # Without a fused kernel there are maps, and they are seen.
    assert maps() > {(4096, 8192), (1024, 2048)}
    monkeypatch.setattr(host_attention, "optimized_attention", lambda q, *_, **__: torch.empty_like(q))
    assert maps() == set()


def flops(evaluator: Evaluator, control: Control | None) -> int:
    """Operations of one step of guided sampling; with a control, the clip's evaluation included."""
    frames = 4
    with FlopCounterMode(display=False) as counter:
        if control is None:
            evaluator.run(frames, [0, 1])
        else:
            step, numbers = step_of(control, frames), tuple(range(frames))
            if step.needs_clip:
                evaluator.run(frames, [0], Call(step, True, numbers))
            evaluator.run(frames, [0, 1], Call(step, False, numbers))
    return counter.get_total_flops()


@pytest.mark.parametrize("preset", KINDS)
def test_a_step_takes_148_percent_under_control_and_100_afterwards(evaluator: Evaluator, preset: str) -> None:
    """The clip's evaluation is half of a plain step, and ends where nothing of it is kept any more."""
    plain = flops(evaluator, None)
    most = 1.36 if "half size" in PRESETS[preset].layers else 1.48
    assert most - 0.05 < flops(evaluator, PRESETS[preset]) / plain <= most
    over = replace(PRESETS[preset], self_share=0.0, cross_share=0.0, feature_share=0.0)
    assert flops(evaluator, over) == plain
