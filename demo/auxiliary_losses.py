"""Auxiliary losses of the demo's UNet training: token grounding, attribute probes, group attention, mixed noise levels.

The noise prediction loss hardly tells "a red star and a blue circle" from "a blue star and a red circle". Token
grounding therefore supervises cross-attention with the sprites' masks (TokenCompose, arXiv 2312.03626). Probes predict
the sprites' attributes from the features of two transformers (compare REPA, arXiv 2410.06940). Sprites of one group
share their look. Group attention supervises self-attention between them, and mixed noise levels make it useful. The
trained UNet has no extra parameters and no extra inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import world
from torch import Tensor
from tune_a_video.tav_core.tiny_sd import model as tiny_sd

# Latents are CELLS x CELLS; a scene has at most SPRITES sprites.
CELLS, SPRITES = world.SIZE // tiny_sd.PIXELS_PER_LATENT, 4
# The share of pictures with several sprites in a group that get mixed noise levels, the largest of the lower timesteps
# as a share of the picture's own, and the weight of the noise prediction loss where a look must be copied.
_MIXED_SHARE, _LOWER_TIMESTEPS, _COPY_WEIGHT = 0.6, 0.5, 3.0
# The weight of the looks that are copied, beside the other auxiliary losses.
_COPIED_LOOK_WEIGHT = 4.0
# Probes read the outputs of these transformers: the last at 8x8 cells and the last but one at 16x16.
_PROBED = ("output_blocks.3.1", "output_blocks.4.1")
# The values of each attribute that probes predict. Plain sprites have an empty pattern and second colour.
_ATTRIBUTES: tuple[tuple[str, ...], ...] = (
    world.SHAPES,
    tuple(world.COLOURS),
    ("", *world.ACCESSORIES),
    world.NUMBERS,
    tuple(world.SHADES),
    (*world.PATTERNS, ""),
    (*world.SECONDS, ""),
)
# Numbers of the attributes: all, those of a look, and the pattern.
_ALL, _LOOK, _PATTERN = range(7), range(4, 7), 5


class SpriteLabels(NamedTuple):
    """Masks and attributes of the sprites in n pictures.

    ``mask``: the share of each cell that shows the sprite, [n, SPRITES, CELLS, CELLS]; uint8 in 0..255 when stored and
    float in 0..1 in a batch. ``group``: the number of the sprite's group in the caption, from 1, and 0 where the
    picture has fewer sprites, [n, SPRITES]. ``attributes``: indices into the values of each attribute, [n, SPRITES, 7].
    """

    mask: Tensor
    group: Tensor
    attributes: Tensor

    def batch(self, rows: Tensor, device: torch.device) -> SpriteLabels:
        """Select pictures, move them to the device and convert their masks to float."""
        mask, group, attributes = (part[rows].to(device) for part in self)
        return SpriteLabels(mask.float() / 255, group, attributes)


def label(scenes: Sequence[world.Scene]) -> SpriteLabels:
    """Compute the labels of scenes."""
    mask = np.zeros((len(scenes), SPRITES, CELLS, CELLS), np.uint8)
    group = np.zeros((len(scenes), SPRITES), np.int64)
    attributes = np.zeros((len(scenes), SPRITES, len(_ATTRIBUTES)), np.int64)
    for row, scene in enumerate(scenes):
        counts = world.groups(scene)
        for index, sprite in enumerate(scene.sprites):
            key = (sprite.shape, sprite.colour, sprite.accessory)
            group[row, index] = list(counts).index(key) + 1
            values = (*key, world.NUMBERS[counts[key] - 1], *sprite.look)
            attributes[row, index] = [known.index(value) for known, value in zip(_ATTRIBUTES, values, strict=True)]
        mask[row, : len(scene.sprites)] = np.rint(255 * _visible_masks(scene))
    return SpriteLabels(*map(torch.from_numpy, (mask, group, attributes)))


def shares_pattern(labels: SpriteLabels) -> Tensor:
    """Return in which pictures several sprites share a pattern, [n] of bool."""
    patterned = labels.attributes[..., _PATTERN] != _ATTRIBUTES[_PATTERN].index("")
    groups = labels.group * patterned
    return ((groups[:, :, None] == groups[:, None]) & (groups[:, :, None] > 0)).sum((1, 2)) > (groups > 0).sum(1)


def _visible_masks(scene: world.Scene) -> world.Picture:
    """Return the share of each cell that shows each sprite, [sprites, CELLS, CELLS] in 0..1."""
    # Two by two pixels a cell are precise enough and faster than the drawing's four by four.
    side = 2 * CELLS
    masks = np.zeros((len(scene.sprites), side, side), np.float32)
    for index in sorted(range(len(scene.sprites)), key=lambda index: -scene.sprites[index].depth):
        sprite = world.as_seen(scene.sprites[index], scene.camera)
        cover = world.coverage(world.placed(sprite, world.outline(sprite.shape), 1.0) * side / world.SIZE, side)
        masks *= 1 - cover
        masks[index] = cover
    return np.asarray(masks.reshape(-1, CELLS, 2, CELLS, 2).mean((2, 4)), np.float32)


class NoiseLevels(NamedTuple):
    """Noise levels of a batch.

    ``alpha_bar``: of each cell; ``loss_weight``: 0 where the timestep is lower than the picture's. Both are
    [n, 1, CELLS, CELLS]. ``copies``: the sprites whose look only clearer sprites of their group tell, [n, SPRITES].
    """

    alpha_bar: Tensor
    loss_weight: Tensor
    copies: Tensor


def mixed_noise_levels(t: Tensor, labels: SpriteLabels, alpha_bars: Tensor, random: torch.Generator) -> NoiseLevels:
    """Lower the noise of all sprites but one of a group, in a share of the pictures.

    ``t``: timesteps, [n]; ``labels``: a batch of n; ``alpha_bars``: of all timesteps.
    """
    draws = torch.rand(len(t), 2, generator=random).tolist()
    alpha_bar = alpha_bars[t].to(labels.mask.device)[:, None, None, None].expand(-1, 1, CELLS, CELLS).clone()
    loss_weight = torch.ones_like(alpha_bar)
    copies = torch.zeros_like(labels.group, dtype=torch.bool)
    for row, (chance, share) in enumerate(draws):
        groups = labels.group[row].tolist()
        # The first of a group keeps its noise. The order of sprites is random.
        cleared = [index for index, group in enumerate(groups) if group and groups.index(group) < index]
        if chance >= _MIXED_SHARE or not cleared:
            continue
        others = [index for index, group in enumerate(groups) if group and index not in cleared]
        copying = [index for index in others if groups.count(groups[index]) > 1]
        copies[row, copying] = True
        loss_weight[row, 0][labels.mask[row, copying].amax(0) > 0] = _COPY_WEIGHT
        area = F.max_pool2d(labels.mask[row, cleared].amax(0)[None, None], 3, 1, 1)[0, 0] > 0
        area &= labels.mask[row, others].amax(0) < 0.5
        alpha_bar[row, 0][area] = alpha_bars[int(share * _LOWER_TIMESTEPS * int(t[row]))]
        loss_weight[row, 0][area] = 0
    return NoiseLevels(alpha_bar, loss_weight, copies)


class AuxiliaryLosses(torch.nn.Module):
    """Record queries, keys and features of a UNet's forward pass, and compute losses from them.

    The probes are its only parameters. They train with the UNet and are thrown away afterwards.
    """

    nouns: Tensor

    def __init__(self, unet: Any, nouns: Sequence[int], conjunction: int, preposition: int) -> None:
        """Hook the UNet. ``nouns``: tokens of shapes; ``conjunction``, ``preposition``: tokens of "and" and "on"."""
        super().__init__()
        self.conjunction, self.preposition = conjunction, preposition
        self.register_buffer("nouns", torch.tensor(nouns), persistent=False)
        self._outputs: dict[str, Tensor] = {}
        modules = dict(unet.named_modules())
        self._heads = {name: module.heads for name, module in modules.items() if name.endswith(("attn1", "attn2"))}
        for name in (*_PROBED, *(f"{name}.{part}" for name in self._heads for part in ("to_q", "to_k"))):
            self._record(name, modules[name])
        self.probes = torch.nn.ModuleList(
            torch.nn.Conv2d(modules[name].in_channels, sum(map(len, _ATTRIBUTES)), kernel_size=1) for name in _PROBED
        )

    def _record(self, name: str, module: torch.nn.Module) -> None:
        module.register_forward_hook(lambda _module, _inputs, output: self._outputs.__setitem__(name, output))

    def forward(self, captions: Tensor, labels: SpriteLabels, copies: Tensor) -> Tensor:
        """Return the sum of the losses for the last forward pass of the UNet.

        ``captions``: tokens, [n, tokens]; ``copies``: sprites that count more in their look, [n, SPRITES].
        """
        loss = self._grounding_loss(captions, labels) + self._group_loss(labels)
        loss = loss + self._probe_loss(labels, _ALL)
        copied = labels._replace(mask=labels.mask * copies[..., None, None])
        return loss + _COPIED_LOOK_WEIGHT * self._probe_loss(copied, _LOOK)

    def _grounding_loss(self, captions: Tensor, labels: SpriteLabels) -> Tensor:
        """Return the cross-entropy of a sprite's group, given the attention of its cells to each group's tokens.

        It counts captions of two groups, and takes the mean over all tokens of a group and over its noun alone.
        """
        groups = self.groups_of_tokens(captions)
        two = (groups == 2).any(1)
        groups, is_noun = groups[two], torch.isin(captions[two], self.nouns)
        masks = torch.stack(
            [(labels.mask[two] * (labels.group[two] == group)[..., None, None]).sum(1) for group in (1, 2)], 1
        )
        losses = []
        for name in self._layers("attn2"):
            attention = self._attention(name, two)
            target = F.adaptive_avg_pool2d(masks, int(attention.shape[1] ** 0.5)).flatten(2)
            for tokens in (groups, groups * is_noun):
                mass = torch.stack([(attention * (tokens == group)[:, None]).sum(-1) for group in (1, 2)], 1) + 1e-5
                share = mass / mass.sum(1, keepdim=True)
                losses.append(-(target * share.log()).sum() / target.sum().clamp_min(1))
        return torch.stack(losses).mean()

    def _layers(self, kind: str) -> list[str]:
        """Return the names of the UNet's attention layers of a kind: attn1 (self) or attn2 (cross)."""
        return [name for name in self._heads if name.endswith(kind)]

    def _attention(self, name: str, rows: Tensor, share: float = 1.0) -> Tensor:
        """Return the attention probabilities of pictures, mean over a share of the heads, [n, queries, keys]."""
        q, k = (
            self._outputs[f"{name}.{part}"][rows].float().unflatten(-1, (self._heads[name], -1)).transpose(1, 2)
            for part in ("to_q", "to_k")
        )
        heads = int(share * self._heads[name])
        return torch.softmax(q[:, :heads] @ k[:, :heads].transpose(-1, -2) * q.shape[-1] ** -0.5, -1).mean(1)

    def groups_of_tokens(self, captions: Tensor) -> Tensor:
        """Return the group of sprites that each token describes, from 1, or 0 for none; both are [n, tokens]."""
        place = (captions == self.preposition).cumsum(1) > 0
        groups = 1 + (captions == self.conjunction).cumsum(1)
        describes = ~place & (captions != self.conjunction) & place.any(1, keepdim=True)
        describes[:, 0] = False
        return groups * describes

    def _group_loss(self, labels: SpriteLabels) -> Tensor:
        """Return minus the log of a sprite's self-attention to others of its group, over all that is not to itself.

        It counts sprites that are not alone in their group, and the mean attention of half of the heads.
        """
        same = (labels.group[:, :, None] == labels.group[:, None]) & (labels.group[:, :, None] > 0)
        same &= ~torch.eye(SPRITES, dtype=torch.bool, device=same.device)
        several = same.any(2).any(1)
        same, alone = same[several].float(), ~same[several].any(2)
        losses = []
        for name in self._layers("attn1"):
            attention = self._attention(name, several, share=0.5)
            mask = F.adaptive_avg_pool2d(labels.mask[several], int(attention.shape[1] ** 0.5)).flatten(2)
            # Attention of each cell to each sprite, [n, sprites, cells].
            mass = torch.einsum("nqk,nsk->nsq", attention, mask)
            # The constant keeps attention to itself alone from counting as right.
            share = (same @ mass / (1 - mass + 0.05)).clamp(1e-3, 1)
            target = mask.masked_fill(alone[..., None], 0)
            losses.append(-(target * share.log()).sum() / target.sum().clamp_min(1))
        return torch.stack(losses).mean()

    def _probe_loss(self, labels: SpriteLabels, attributes: Sequence[int]) -> Tensor:
        """Return the cross-entropy of attributes, given by number, in the cells of sprites; mean over attributes."""
        losses = []
        for name, probe in zip(_PROBED, self.probes, strict=True):
            logits = probe(self._outputs[name].float())
            mask = F.adaptive_avg_pool2d(labels.mask, tuple(logits.shape[2:]))
            parts = logits.split([len(values) for values in _ATTRIBUTES], 1)
            for index in attributes:
                # One prediction a cell, and one target for each sprite in it.
                predicted = parts[index].log_softmax(1)[:, None].expand(-1, SPRITES, -1, -1, -1)
                target = labels.attributes[:, :, index, None, None, None].expand(-1, -1, 1, *mask.shape[2:])
                losses.append(-(mask * predicted.gather(2, target)[:, :, 0]).sum() / mask.sum().clamp_min(1))
        return torch.stack(losses).mean()
