"""One controlled sampling: which levers are on at a noise level, and the mask so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import Refusal
from .blend import MASK_LEVELS, difference_mask, resized_mask
from .injection import Step
from .noise import added_noise, freed_noise
from .settings import Control
from .trajectory import Trajectory
from .words import WORDS_KEY, EditWords


class ControlledRun:
    """A control, the clip's trajectory and the words of an edit, for the steps of one sampling.

    ``scale``: the factor from LATENT scale to the model's own. A mask that is to be found depends on the clip and the
    sentences alone: it is found once and serves every sampling. Raises Refusal for a mask that does not fit the clip.
    """

    def __init__(self, control: Control, trajectory: Trajectory, words: EditWords | None, scale: float) -> None:
        frames, _, height, width = trajectory.clip.shape
        self.trajectory, self.words, self._scale = trajectory, words, scale
        self._given = None if control.mask is None else resized_mask(control.mask, frames, height, width)
        self._finds = self._given is None and (control.blend_start is not None or control.free_inside)
        self.control = control
        self._found: Tensor | None = None
        self._now: tuple[float, Step] | None = None

    def end(self) -> None:
        """Let go of what was kept of the clip in the last step; the mask stays known."""
        self._now = None

    def cost(self, steps: int) -> str:
        """Describe the memory and the evaluations that the control adds to a sampling of ``steps`` steps.

        The memory of the clip's attention is known while a step runs.
        """
        control, stored = self.control, self.trajectory.megabytes
        kept = 0 if self._now is None else sum(each.nbytes for each in self._now[1].kept.values()) / 1e6
        share = max(control.self_share, control.cross_share, control.feature_share)
        both = sum(number / steps < share for number in range(steps))
        said = f"edit control keeps {stored:.1f} MB of the clip's trajectory in RAM"
        if not both:
            return said
        return f"{said}, and {kept:.1f} MB of its attention in each of {both} steps, in which the clip is evaluated too"

    @property
    def source(self) -> Any:
        """Return the CONDITIONING that the clip is evaluated with.

        It is that of Edit Prompt, unless the inversion's own has the same text and may have a ControlNet as well.
        """
        inverted_with = self.trajectory.conditioning
        if self.words is None:
            return inverted_with
        alike = inverted_with and torch.equal(inverted_with[0][0], self.words.source[0][0])
        return inverted_with if alike else self.words.source

    @property
    def mask(self) -> Tensor | None:
        """Return where the clip may change, [frames, 1, h, w], as far as it is known."""
        return self._given if self._found is None else self._found

    @property
    def finds_mask(self) -> bool:
        """Say whether the mask is still to be found."""
        return self._finds and self._found is None

    def clip_at_levels(self, like: Tensor) -> list[tuple[float, Tensor]]:
        """Return the noise levels that a mask is found at, and the clip at each; ``like``: for device and dtype."""
        last = len(self.trajectory.sigmas) - 1
        sigmas = [float(self.trajectory.sigmas[max(1, round(share * last))]) for share in MASK_LEVELS]
        return [(sigma, (self.trajectory.at(sigma) * self._scale).to(like)) for sigma in sigmas]

    def find_mask(self, differences: Sequence[Tensor]) -> None:
        """Find the mask from the differences of the two sentences' predictions at ``clip_at_levels``."""
        self._found = difference_mask(differences, self.control.threshold)

    def start(self, noise: Tensor, latent: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Return noise and latent of a sampling in which a share of the noise is new.

        ``noise``: of unit variance, or zeros for a ``latent`` that is noise already, in LATENT scale.
        """
        share = self.control.fresh_noise
        if share == 0:
            return noise, latent
        if noise.any():
            return freed_noise(noise, share, seed, self._given), latent
        # The standard deviation of fully noised latents in this scale: sigma is large against the clip.
        spread = float(1 + self.trajectory.sigmas[-1] ** 2) ** 0.5 / self._scale
        return noise, freed_noise(latent / spread, share, seed, self._given) * spread

    def split(self, latent: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """Return the noise of an inverted ``latent`` at ``sigma``, see ``added_noise``, and the clip."""
        clip = self.trajectory.clip.to(latent)
        return added_noise(latent, clip, sigma, self._scale), clip

    def step(self, sigma: float, number: int, steps: int, like: Tensor) -> Step:
        """Return the levers at a noise level. ``number`` of ``steps``, from 0; ``like``: for device and dtype."""
        if self._now is not None and self._now[0] == sigma:
            return self._now[1]
        progress, control = number / steps, self.control
        step = Step(
            control=control,
            words=self.words,
            latent=(self.trajectory.at(sigma) * self._scale).to(like),
            mask=self.mask if control.free_inside and progress >= control.inside_share else None,
            injects_self=progress < control.self_share,
            injects_cross=progress < control.cross_share and self.words is not None,
            injects_feature=progress < control.feature_share,
        )
        self._now = sigma, step
        return step

    def outside(self, number: int, steps: int) -> Tensor | None:
        """Return the mask outside of which a step's latent is the clip's; None for nowhere."""
        start = self.control.blend_start
        return None if start is None or number < start * steps else self.mask

    def clip(self, like: Tensor) -> Tensor:
        """Return the clean clip in the model's scale."""
        return (self.trajectory.clip * self._scale).to(like)

    def pasted(self, edited: Tensor) -> Tensor:
        """Return the edit with the clip, bit for bit, outside the mask; both in LATENT scale."""
        mask = self.mask if self.control.blend_start is not None else None
        if mask is None:
            return edited
        return torch.lerp(self.trajectory.clip.to(edited), edited, mask.to(edited))

    def exact_outside(self, edited: Tensor) -> Tensor:
        """Return the edit with the clip, bit for bit, where the mask is 0; both in LATENT scale."""
        mask = self.mask if self.control.blend_start is not None else None
        if mask is None:
            return edited
        return torch.where(mask.to(edited) == 0, self.trajectory.clip.to(edited), edited)


def check_words(words: EditWords | None, positive: Any) -> EditWords | None:
    """Return an edit's words. Raises Refusal where a CONDITIONING was changed after Edit Prompt made it."""
    made = [embedding.shape[1] for embedding, options in positive if options.get(WORDS_KEY) is words]
    if words is not None and any(length != words.lengths[1] for length in made):
        found = ", ".join(map(str, made))
        raise Refusal(
            "positive",
            f"its words cannot be aligned: Edit Prompt made {words.lengths[1]} tokens, and it has {found}",
            "Connect Edit Prompt as it is, or CLIP Text Encode with a mask.",
        )
    return words


def check_trajectory(trajectory: Trajectory | None, samples: Tensor) -> Trajectory:
    """Return an inverted LATENT's trajectory. Raises Refusal where it has none, or another clip's."""
    if trajectory is None:
        raise Refusal(
            "latent",
            "it has no trajectory, which edit control needs",
            "Connect DDIM Invert directly, with its trajectory on.",
        )
    if trajectory.clip.shape != samples.shape:
        raise Refusal(
            "latent",
            f"its trajectory is of shape {list(trajectory.clip.shape)}, the latent of {list(samples.shape)}",
            "Cut or resize the clip before DDIM Invert, not after it.",
        )
    return trajectory
