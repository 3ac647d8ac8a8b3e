"""The levers of edit control, and presets that set them for kinds of edits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from torch import Tensor

Layers = Literal["up blocks", "up blocks, half size and below", "half size and below", "all"]
LAYERS: tuple[Layers, ...] = get_args(Layers)


@dataclass(frozen=True)
class Control:
    """The levers that keep parts of the clip in an edit. By default all are off, which is plain sampling.

    Shares are shares of the steps, 0 to 1, from the noisy end.

    ``self_share``: self-attentions of ``layers`` use the queries and keys of the clip (PnP, arXiv 2211.12572).
    ``cross_share``: words that both sentences share are attended to as in the clip (prompt-to-prompt, arXiv
    2208.01626), at half of the latent's size and below. ``feature_share``: one residual block's output is the clip's
    (PnP). ``free_inside``: inside the mask self-attentions stay the edit's own (FateZero, arXiv 2303.09535), but for
    the first ``inside_share`` of the steps.

    ``blend_start``: share of the steps after which the latent outside the mask is the clip's; None for never.
    ``mask``: [1 or frames, h, w], 0 to 1, 1 where the clip may change; None to find it where the two sentences predict
    different noise. ``threshold``: share of a frame's largest difference from which on the found mask is 1.

    ``fresh_noise``: share of the variance of the initial noise that is replaced, the same for all frames
    (MotionDirector, arXiv 2310.08465); inside ``mask`` where it is given, else everywhere. ``proximal``: quantile of
    the guidance below which it is dropped (ProxEdit, arXiv 2306.05414).
    """

    self_share: float = 0.0
    layers: Layers = "up blocks"
    cross_share: float = 0.0
    feature_share: float = 0.0
    free_inside: bool = False
    inside_share: float = 0.0
    blend_start: float | None = None
    mask: Tensor | None = None
    threshold: float = 0.2
    fresh_noise: float = 0.0
    proximal: float = 0.0

    @property
    def acts(self) -> bool:
        """Say whether any lever is on."""
        shares = self.self_share, self.cross_share, self.feature_share, self.fresh_noise, self.proximal
        return any(share > 0 for share in shares) or self.blend_start is not None


PRESETS: dict[str, Control] = {
    "style": Control(self_share=0.8, layers="up blocks, half size and below", cross_share=0.8, feature_share=0.8),
    "colour": Control(self_share=0.8, blend_start=0.2, fresh_noise=0.5),
    "object": Control(self_share=0.5, free_inside=True, blend_start=0.2),
    "background": Control(self_share=0.5),
    "add or remove": Control(self_share=0.5, free_inside=True, blend_start=0.2, proximal=0.5),
    "free": Control(),
}


def at_strength(control: Control, strength: float) -> Control:
    """Return a control between none (0), its own settings (0.5) and as much as each of its levers can keep (1).

    A lever that is off stays off. Fresh noise lets go rather than keeps, so that it is most at 0.5. Above 0.5 the
    clip's attention comes inside the mask as well: outside of it the clip is back already.
    """
    if strength <= 0:
        return Control()
    below, above = min(1.0, 2 * strength), max(0.0, 2 * strength - 1)

    def share(value: float) -> float:
        return 0.0 if value == 0 else value * below + (1 - value) * above

    start = control.blend_start
    return replace(
        control,
        self_share=share(control.self_share),
        cross_share=share(control.cross_share),
        feature_share=share(control.feature_share),
        inside_share=above,
        blend_start=None if start is None else (1 - below) + start * (below - above),
        fresh_noise=control.fresh_noise * (below - above),
        proximal=control.proximal * below,
    )
