"""Measures that compare the optical flows of a clip and of its edit, [frames - 1, 2, h, w] in pixels a frame.

The published scores take their flow from trained networks (GMFlow, RAFT, CoTracker). Figures from the classical flow
of ``optical_flow`` rank edits of one clip; they cannot be put beside those tables.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

# Flow below this length, in pixels, is rounding error: nothing moves.
_STILL = 0.01
# Tracks start on a grid of at most this many points a side.
_GRID = 32
# A track shorter than this, in pixels over the whole clip, belongs to what stands.
_SHORTEST_TRACK = 1.0


def motion_alignment(flow: Tensor, edited_flow: Tensor) -> float:
    """Return the cosine similarity of two videos' optical flows, -1..1.

    It is taken over all pixels and frames at once, so that large motion weighs more. 0 if either video is still.
    """
    if min(float(each.square().mean()) for each in (flow, edited_flow)) < _STILL**2:
        return 0.0
    return float((flow * edited_flow).sum() / (flow.norm() * edited_flow.norm()))


def end_point_error(flow: Tensor, edited_flow: Tensor) -> float:
    """Return minus the mean distance of the flows' end points, in pixels a frame; 0 for equal motion, else below.

    V2VBench (2024) calls it motion alignment. It sees wrong speed, which a cosine hides.
    """
    return -float((flow - edited_flow).norm(dim=1).mean())


def ff_beta(flow: Tensor, edited_flow: Tensor) -> float:
    """Return EditBoard's FF-beta: 1 - the cosine of the flows, mean over pixels and frames; 0 best, 2 opposite.

    A pixel that stands in both videos counts 0, one that stands in one of them 1. EditBoard (AAAI 2025) counts 1 for
    both, so that a clip that stands in part never reaches 0.
    """
    lengths = torch.stack([flow.norm(dim=1), edited_flow.norm(dim=1)])
    moves = lengths > _STILL
    cosine = (flow * edited_flow).sum(1) / lengths.prod(0).clamp(min=_STILL**2)
    agreement = torch.where(moves.all(0), cosine, (~moves.any(0)).to(cosine))
    return float(1 - agreement.double().mean())


def motion_fidelity(flow: Tensor, edited_flow: Tensor) -> float:
    """Return how well the tracks of each video are found in the other, -1..1; 1 for equal motion.

    The similarity of two tracks is the mean cosine of their steps. Each track takes its most similar one in the other
    video; the result is the mean over the tracks of both (motion fidelity of Yatim et al., CVPR 2024). Tracks that
    do not move are left out, since those of any two backgrounds agree. 0 if either video is still.
    """
    first, second = (_moving(tracks(each)) for each in (flow, edited_flow))
    if not len(first) or not len(second):
        return 0.0
    (first_steps, first_still), (second_steps, second_still) = _directions(first), _directions(second)
    similarity = torch.einsum("ntc,mtc->nm", first_steps, second_steps) + first_still @ second_still.T
    similarity = similarity / first_steps.shape[1]
    return float((similarity.amax(1).mean() + similarity.amax(0).mean()) / 2)


def tracks(flow: Tensor) -> Tensor:
    """Follow a grid of points through a flow; return their positions (x, y) in pixels, [points, frames, 2].

    The points start in the first frame, at most 32 x 32 of them. Beyond the frame they follow its border's flow.
    """
    height, width = flow.shape[-2:]
    y, x = (torch.linspace(0, side - 1, min(side, _GRID), device=flow.device) for side in (height, width))
    positions = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=0)[None].to(flow)
    path = [positions]
    for step in flow:
        grid = 2 * rearrange(positions, "n c h w -> n h w c") + 1
        grid = grid / torch.tensor([width, height]).to(flow) - 1
        positions = positions + F.grid_sample(step[None], grid, padding_mode="border", align_corners=False)
        path.append(positions)
    return rearrange(torch.cat(path), "t c h w -> (h w) t c")


def _moving(paths: Tensor) -> Tensor:
    return paths[paths.diff(dim=1).norm(dim=-1).sum(1) >= _SHORTEST_TRACK]


def _directions(paths: Tensor) -> tuple[Tensor, Tensor]:
    """Return the unit steps of tracks, zero where they stand, and where they stand as 0 or 1."""
    steps = paths.double().diff(dim=1)
    lengths = steps.norm(dim=-1, keepdim=True)
    still = lengths < _STILL
    return torch.where(still, 0, steps / lengths.clamp(min=_STILL)), still[..., 0].double()
