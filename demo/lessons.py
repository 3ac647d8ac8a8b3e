"""What the demo's UNet is taught beside the noise: which words speak of a cell, and what the cell shows.

The error in the noise hardly tells "a red star and a blue circle" from "a blue star and a red circle". So, in pictures
of two kinds, cross-attention is told which kind's words a sprite's cells should look at (TokenCompose, arXiv
2312.03626); and the features of two transformers are told what is drawn in a cell (compare REPA, arXiv 2410.06940).
Sprites of a kind share their look. To make it worth while to look at the others, some of them may be less noisy.
All of this serves training only: the trained model has the parts and the inputs of any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import world
from torch import Tensor

# Cells of latents along a side, and sprites that a scene has at most.
CELLS, SPRITES = 16, 4
# Share of the pictures in which some sprites of a kind are less noisy.
_UNEVEN_SHARE = 0.3
# Transformers whose features are told what they show: the last at 8x8 cells, and the last but one at 16x16.
_TOLD = ("output_blocks.3.1", "output_blocks.4.1")
# What is told of a sprite. The last value of a pattern and of a second colour is that of plain sprites.
_VALUES: tuple[tuple[str, ...], ...] = (
    world.SHAPES,
    tuple(world.COLOURS),
    ("", *world.ACCESSORIES),
    world.NUMBERS,
    tuple(world.SHADES),
    (*world.PATTERNS, ""),
    (*world.SECONDS, ""),
)


class Drawn(NamedTuple):
    """What is where in pictures.

    ``cover``: share of each cell that shows a sprite, uint8 [n, SPRITES, CELLS, CELLS] in 0..255. ``kind``: which of
    the caption's kinds the sprite is, from 1, [n, SPRITES]; 0 for no sprite. ``facts``: indices into the values that
    are told, [n, SPRITES, 7].
    """

    cover: Tensor
    kind: Tensor
    facts: Tensor

    def rows(self, rows: Tensor, device: torch.device) -> Drawn:
        """Return some of the pictures, with cover as float in 0..1."""
        return Drawn(self.cover[rows].to(device).float() / 255, self.kind[rows].to(device), self.facts[rows].to(device))


def drawn(scenes: Sequence[world.Scene]) -> Drawn:
    """Return what is where in the pictures of scenes."""
    cover = np.zeros((len(scenes), SPRITES, CELLS, CELLS), np.uint8)
    kind = np.zeros((len(scenes), SPRITES), np.int64)
    facts = np.zeros((len(scenes), SPRITES, len(_VALUES)), np.int64)
    for row, scene in enumerate(scenes):
        groups = world.groups(scene)
        kinds = list(groups)
        for index, sprite in enumerate(scene.sprites):
            key = (sprite.shape, sprite.colour, sprite.accessory)
            kind[row, index] = kinds.index(key) + 1
            number = world.NUMBERS[groups[key] - 1]
            told = (*key, number, *sprite.look)
            facts[row, index] = [values.index(value) for values, value in zip(_VALUES, told, strict=True)]
        cover[row, : len(scene.sprites)] = np.rint(255 * _visible(scene))
    return Drawn(*map(torch.from_numpy, (cover, kind, facts)))


def _visible(scene: world.Scene) -> world.Picture:
    """Return the share of each cell that shows a sprite, [sprites, CELLS, CELLS] in 0..1."""
    # Four samples a cell are enough, and much faster than the drawing's.
    side = 2 * CELLS
    found = np.zeros((len(scene.sprites), side, side), np.float32)
    for index in sorted(range(len(scene.sprites)), key=lambda index: -scene.sprites[index].depth):
        sprite = world.as_seen(scene.sprites[index], scene.camera)
        cover = world.coverage(world.placed(sprite, world.outline(sprite.shape), 1.0) * side / world.SIZE, side)
        found *= 1 - cover
        found[index] = cover
    return np.asarray(found.reshape(-1, CELLS, 2, CELLS, 2).mean((2, 4)), np.float32)


def uneven(kept: Tensor, shown: Drawn, t: Tensor, alpha_bars: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Let some sprites be less noisy than the rest, in some pictures where others of their kind remain.

    ``kept``: alpha-bar of each picture, [n, 1, 1, 1]; ``t``: its timestep. Return alpha-bar of each cell
    [n, 1, CELLS, CELLS], and 1 where the noise is as ``t`` says, 0 elsewhere.
    """
    chances = torch.rand(len(t), 2, generator=random).tolist()
    kept = kept.expand(-1, 1, CELLS, CELLS).clone()
    usual = torch.ones_like(kept)
    for row, (chance, share) in enumerate(chances):
        kinds = shown.kind[row].tolist()
        several = [index for index, kind in enumerate(kinds) if kind and kinds.count(kind) > 1]
        if chance >= _UNEVEN_SHARE or not several:
            continue
        # The first of a kind stays noisy; sprites are in no order.
        clear = [index for index in several if index > kinds.index(kinds[index])]
        area = F.max_pool2d(shown.cover[row, clear].amax(0)[None, None], 3, 1, 1)[0, 0] > 0
        others = [index for index in range(len(kinds)) if kinds[index] and index not in clear]
        area &= shown.cover[row, others].amax(0) < 0.5
        kept[row, 0][area] = alpha_bars[int(share * int(t[row]))]
        usual[row, 0][area] = 0
    return kept, usual


class Lessons(torch.nn.Module):
    """The lessons of a UNet: it notes what attention and features were in a forward pass, and tells the error in them.

    Its own layers read the features; they are of no use after the training.
    """

    def __init__(self, unet: Any, nouns: Sequence[int], conjunction: int, preposition: int) -> None:
        """``nouns``: tokens of shapes; ``conjunction``, ``preposition``: those of "and" and "on"."""
        super().__init__()
        self.nouns, self.conjunction, self.preposition = torch.tensor(list(nouns)), conjunction, preposition
        self._noted: dict[str, Tensor] = {}
        self._heads: dict[str, int] = {}
        widths = {}
        for name, module in unet.named_modules():
            if name.endswith("attn2"):
                self._heads[name] = module.heads
                self._note(f"{name} q", module.to_q)
                self._note(f"{name} k", module.to_k)
            if name in _TOLD:
                self._note(name, module)
                widths[name] = module.in_channels
        self.readers = torch.nn.ModuleList(
            torch.nn.Conv2d(widths[name], sum(map(len, _VALUES)), kernel_size=1) for name in _TOLD
        )

    def _note(self, name: str, module: torch.nn.Module) -> None:
        module.register_forward_hook(lambda _module, _inputs, output: self._noted.__setitem__(name, output))

    def forward(self, captions: Tensor, shown: Drawn) -> Tensor:
        """Return the error in what was noted last, for captions [n, tokens] of what was drawn."""
        return self._binding(captions, shown) + self._telling(shown)

    def _binding(self, captions: Tensor, shown: Drawn) -> Tensor:
        """Return the mean cross-entropy of which kind's words, and which kind's noun, a sprite's cells look at."""
        kind = self.kind_of_words(captions)
        two = (kind == 2).any(1)
        if not two.any():
            return torch.zeros((), device=captions.device)
        kind, noun = kind[two], torch.isin(captions[two], self.nouns.to(captions.device))
        cells = torch.stack([(shown.cover[two] * (shown.kind[two] == of)[..., None, None]).sum(1) for of in (1, 2)], 1)
        errors = []
        for name, heads in self._heads.items():
            seen = _attention(self._noted[f"{name} q"][two].float(), self._noted[f"{name} k"][two].float(), heads)
            wanted = F.adaptive_avg_pool2d(cells, int(seen.shape[1] ** 0.5)).flatten(2)
            for words in (kind, kind * noun):
                each = torch.stack([(seen * (words == of)[:, None]).sum(-1) for of in (1, 2)], 1) + 1e-5
                share = each / each.sum(1, keepdim=True)
                errors.append(-(wanted * share.log()).sum() / wanted.sum().clamp_min(1))
        return torch.stack(errors).mean()

    def kind_of_words(self, captions: Tensor) -> Tensor:
        """Return which kind of sprites each word of captions [n, tokens] speaks of, from 1; 0 for none."""
        after = (captions == self.preposition).cumsum(1) > 0
        kind = 1 + (captions == self.conjunction).cumsum(1)
        spoken = ~after & (captions != self.conjunction) & after.any(1, keepdim=True)
        spoken[:, 0] = False
        return kind * spoken

    def _telling(self, shown: Drawn) -> Tensor:
        """Return the mean cross-entropy of what features tell of the sprites that their cells show."""
        errors = []
        for name, reader in zip(_TOLD, self.readers, strict=True):
            told = reader(self._noted[name].float())
            cover = F.adaptive_avg_pool2d(shown.cover, tuple(told.shape[2:]))
            area = cover.sum().clamp_min(1)
            for index, part in enumerate(told.split([len(values) for values in _VALUES], 1)):
                logs = part.log_softmax(1)[:, None].expand(-1, SPRITES, -1, -1, -1)
                facts = shown.facts[..., index][:, :, None, None, None].expand(-1, -1, 1, *cover.shape[2:])
                errors.append(-(cover * logs.gather(2, facts)[:, :, 0]).sum() / area)
        return torch.stack(errors).mean()


def _attention(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """Return the attention [n, cells, words], mean over heads, of queries and keys [n, cells or words, channels]."""
    q, k = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k))
    return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1).mean(1)
