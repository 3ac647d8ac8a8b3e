"""UNets that take more than a clip and a sentence: inpainting, editing and upscaling models are tuned, or named."""

from __future__ import annotations

from typing import Any

import comfy.model_base
import comfy.model_patcher
import comfy.supported_models_base
import pytest
import torch
from tune_a_video.tav_core import pipeline
from tune_a_video.tav_core.errors import Refusal
from tune_a_video.tav_core.tuning.trainer import TuneSettings
from unets import UNETS, build_model, randomize

PROMPT: list[Any] = [[torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1)), {}]]
kinds = comfy.model_base


def model_of(kind: Any, **config: Any) -> Any:
    """A MODEL of one of the host's classes around a tiny UNet."""
    with torch.inference_mode():
        plain = build_model({**UNETS["tiny"], **config}) if kind is kinds.BaseModel else None
        if plain is not None:
            return plain
        known: Any = build_model(UNETS["tiny"]).model.model_config
        made = type(known)({**UNETS["tiny"], **config, "dtype": torch.float32})
        made.manual_cast_dtype = made.custom_operations = None
        model = kind(made, device="cpu")
        randomize(model.diffusion_model, 0)
        return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def whole_job(model: Any, height: int, width: int) -> None:
    latents = torch.randn(2, 4, height, width, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        motion, losses = pipeline.tune(model, latents, PROMPT, TuneSettings(steps=2))
        assert len(losses) == 2 and motion.tensors
        assert torch.isfinite(pipeline.invert(model, latents, PROMPT, 2)).all()


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 15), (24, 8), (16, 24)])
def test_an_inpainting_model_is_tuned_on_a_clip_of_any_size(height: int, width: int) -> None:
    model = model_of(kinds.BaseModel, in_channels=9)
    model.model.set_inpaint()
    whole_job(model, height, width)


def test_instruct_pix2pix_and_the_upscaler_are_tuned() -> None:
    whole_job(model_of(kinds.SD15_instructpix2pix, in_channels=8), 8, 8)
    # Its noise level is the number of an embedding.
    whole_job(model_of(kinds.SD_X4Upscaler, in_channels=7, num_classes=1000), 8, 8)


def test_a_unet_that_is_given_too_few_channels_is_refused_before_any_step() -> None:
    """As the depth model of Stable Diffusion 2, whose depth no node gives."""
    with pytest.raises(Refusal, match="^model: its UNet takes 5 channels, and latent and conditioning give 4"):
        whole_job(model_of(kinds.BaseModel, in_channels=5), 8, 8)
