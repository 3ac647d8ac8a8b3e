"""Which samplings of a MODEL count as epsilon- or v-prediction, and which are refused with the node to remove."""

from __future__ import annotations

from typing import Any

import comfy.model_sampling
import pytest
import torch
from tune_a_video.tav_core import host
from tune_a_video.tav_core.errors import Refusal
from unets import UNETS, build_model

known = comfy.model_sampling


def sampled_by(*bases: type, **options: Any) -> Any:
    """A MODEL with a sampling like the one that ModelSamplingDiscrete makes."""
    model = build_model(UNETS["tiny"])
    kind = type("ModelSamplingAdvanced", bases, {})
    model.add_object_patch("model_sampling", kind(model.model.model_config, **options))
    return model


class Renamed(known.V_PREDICTION):
    """Another pack's class, which computes the same in its own words."""

    def calculate_denoised(self, sigma: Any, model_output: Any, model_input: Any) -> Any:
        sigma = sigma.view(-1, 1, 1, 1)
        return (model_input / (sigma**2 + 1).sqrt() - model_output * sigma) / (sigma**2 + 1).sqrt()


@pytest.mark.parametrize("zsnr", [False, True])
@pytest.mark.parametrize(("base", "name"), [(known.EPS, "epsilon"), (known.V_PREDICTION, "v"), (Renamed, "v")])
def test_epsilon_and_v_pass(base: type, name: str, zsnr: bool) -> None:
    model = sampled_by(known.ModelSamplingDiscrete, base, zsnr=zsnr)
    assert host.prediction_type(model) == name
    assert len(host.sigma_table(model)) == 1000


class Distilled(known.ModelSamplingDiscrete):
    """Fifty of the thousand timesteps, as LCM's and other distilled models' samplings."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.set_sigmas(self.sigmas[19::20].clone())

    def timestep(self, sigma: Any) -> Any:
        return super().timestep(sigma) * 20 + 19


class Shifted(known.ModelSamplingDiscrete):
    """All timesteps, each one off."""

    def timestep(self, sigma: Any) -> Any:
        return super().timestep(sigma) + 1


class Boundary(known.EPS):
    """A consistency model's output, which is the input at the lowest noise level."""

    def calculate_denoised(self, sigma: Any, model_output: Any, model_input: Any) -> Any:
        t = 10.0 * self.timestep(sigma).view(-1, 1, 1, 1)
        skip = 0.25 / (t**2 + 0.25)
        return (1 - skip).sqrt() * super().calculate_denoised(sigma, model_output, model_input) + skip * model_input


class Unscaled(known.EPS):
    """Epsilon, but of an input that is not scaled."""

    def calculate_input(self, sigma: Any, noise: Any) -> Any:
        return noise


REFUSED = {
    "distilled": (Distilled, known.EPS),
    "shifted": (Shifted, known.EPS),
    "consistency": (known.ModelSamplingDiscrete, Boundary),
    "lcm": (Distilled, Boundary),
    "unscaled": (known.ModelSamplingDiscrete, Unscaled),
    "edm": (known.ModelSamplingDiscrete, known.EDM),
    "edm's timesteps": (known.ModelSamplingDiscreteEDM, known.EPS),
    "x0": (known.ModelSamplingDiscrete, getattr(known, "X0", known.EDM)),
    "flow": (known.ModelSamplingDiscreteFlow, known.CONST),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_every_other_sampling_is_refused_with_the_node_to_remove(kind: str) -> None:
    model = sampled_by(*REFUSED[kind])
    for check in (host.prediction_type, host.check_model, host.sigma_table):
        with pytest.raises(Refusal, match="^model: its sampling .*Remove the node.*ModelSamplingDiscrete"):
            check(model)


@pytest.mark.comfyui
@pytest.mark.parametrize(
    ("sampling", "zsnr", "expected"),
    [("eps", False, "epsilon"), ("v_prediction", True, "v"), ("lcm", False, None), ("x0", False, None)],
)
def test_the_hosts_own_node(sampling: str, zsnr: bool, expected: str | None) -> None:
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    with torch.inference_mode():
        (model,) = ModelSamplingDiscrete().patch(build_model(UNETS["tiny"]), sampling, zsnr)
        if expected:
            assert host.prediction_type(model) == expected
        else:
            with pytest.raises(Refusal, match="Remove the node"):
                host.check_model(model)
