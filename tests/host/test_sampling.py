"""Inversion and sampling against the stock samplers, and there and back again."""

from __future__ import annotations

import pytest
import torch
from graphs import (
    EDIT_PROMPT,
    SOURCE_PROMPT,
    STEPS,
    Graph,
    checkpoint,
    clip_latent,
    inflate,
    invert,
    ksampler,
    relative_error,
    sample,
    text,
)

pytestmark = [pytest.mark.host, pytest.mark.shared]

# The host's model takes alphas_cumprod[0] = 0.99915 for the noise level at which the released DDIM ends.
LAST_SIGMA = ((1 - 0.99915) / 0.99915) ** 0.5


class Tuned:
    """A tuned model with prompts, the clip's latents and their inversion."""

    def __init__(self, motion_file, steps=STEPS):
        graph = self.graph = Graph()
        loaded = checkpoint(graph)
        motion = graph.add("TAV_LoadMotion", file=motion_file)[0]
        self.model = inflate(graph, loaded.model, motion=motion)
        self.latent = clip_latent(graph, loaded.vae)
        self.source = text(graph, loaded.clip, SOURCE_PROMPT)
        self.positive = text(graph, loaded.clip, EDIT_PROMPT)
        self.negative = text(graph, loaded.clip, "")
        self.inverted = invert(graph, self.model, self.latent, self.source, steps)

    def custom(self, sigmas, sampler="euler", cfg=7.5):
        """SamplerCustomAdvanced on the inverted latents; its first output."""
        graph = self.graph
        return graph.add(
            "SamplerCustomAdvanced",
            noise=graph.add("DisableNoise")[0],
            guider=graph.add("CFGGuider", model=self.model, positive=self.positive, negative=self.negative, cfg=cfg)[0],
            sampler=graph.add("KSamplerSelect", sampler_name=sampler)[0],
            sigmas=sigmas,
            latent_image=self.inverted,
        )[0]

    def ddim_sigmas(self):
        return self.graph.add("BasicScheduler", model=self.model, scheduler="ddim_uniform", steps=STEPS, denoise=1.0)[0]


def test_stock_samplers_at_the_same_sigmas(server, motion_file, exercised):
    tuned = Tuned(motion_file)
    graph, conds = tuned.graph, (tuned.positive, tuned.negative, tuned.inverted)
    ours, euler, ddim, custom, start = server.latents(
        graph,
        sample(graph, tuned.model, *conds, last_step="zero"),
        ksampler(graph, tuned.model, *conds),
        ksampler(graph, tuned.model, *conds, sampler_name="ddim"),
        tuned.custom(tuned.ddim_sigmas()),
        tuned.inverted,
    )
    assert relative_error(ours, start) > 0.1, "sampling changed nothing"
    errors = [relative_error(stock, ours) for stock in (euler, ddim, custom)]
    assert max(errors) < 1e-5
    exercised.append(f"TAV_Sample and the stock samplers at the same sigmas: relative difference {max(errors):.0e}")


def test_custom_sigmas_that_end_at_the_released_noise_level(server, motion_file):
    """The default, which ends at alphas_cumprod[0], is what SamplerCustomAdvanced gives for those sigmas."""
    tuned = Tuned(motion_file)
    graph = tuned.graph
    flipped = graph.add("FlipSigmas", sigmas=tuned.ddim_sigmas())[0]
    lifted = graph.add("SetFirstSigma", sigmas=flipped, sigma=LAST_SIGMA)[0]
    sigmas = graph.add("FlipSigmas", sigmas=lifted)[0]
    ours, custom, to_zero = server.latents(
        graph,
        sample(graph, tuned.model, tuned.positive, tuned.negative, tuned.inverted),
        tuned.custom(sigmas),
        tuned.custom(tuned.ddim_sigmas()),
    )
    # The stock node leaves the last level in the sampler's scale, x / sqrt(alpha_bar); ours is the released one.
    released = custom / (1 + LAST_SIGMA**2) ** 0.5
    assert relative_error(released, ours) < 1e-5
    assert relative_error(to_zero, ours) > 1e-4


def test_guidance_1_and_eta(server, motion_file):
    """Guidance 1 leaves the negative prompt out, as in the stock sampler; eta adds noise that the seed decides."""
    tuned = Tuned(motion_file)
    graph, conds = tuned.graph, (tuned.positive, tuned.negative, tuned.inverted)
    plain, stock, noisy, same_seed, other_seed = server.latents(
        graph,
        sample(graph, tuned.model, *conds, guidance=1.0, last_step="zero"),
        ksampler(graph, tuned.model, *conds, cfg=1.0),
        sample(graph, tuned.model, *conds, guidance=1.0, eta=1.0, seed=5),
        sample(graph, tuned.model, *conds, guidance=1.0, eta=1.0, seed=5, last_step="clip noise level"),
        sample(graph, tuned.model, *conds, guidance=1.0, eta=1.0, seed=6),
    )
    assert relative_error(stock, plain) < 1e-5
    assert torch.equal(noisy, same_seed)
    assert relative_error(noisy, other_seed) > 1e-2


def test_inverting_and_sampling_returns_the_clip(server, motion_file, exercised):
    """At guidance 1 with the same prompt; the error shrinks as the steps do."""
    errors = {}
    for steps in (5, 10, 25, 50):
        tuned = Tuned(motion_file, steps)
        returned = sample(
            tuned.graph, tuned.model, tuned.source, tuned.negative, tuned.inverted, steps=steps, guidance=1.0
        )
        clip, inverted, back = server.latents(tuned.graph, tuned.latent, tuned.inverted, returned)
        assert relative_error(inverted, clip) > 0.2, "inversion changed nothing"
        errors[steps] = relative_error(back, clip)
    report = ", ".join(f"{steps} steps {error:.2%}" for steps, error in errors.items())
    exercised.append(f"inverted and sampled at guidance 1, relative error: {report}")
    assert list(errors.values()) == sorted(errors.values(), reverse=True)
    assert errors[50] < 0.05
