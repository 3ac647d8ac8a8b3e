"""Inject the clip's queries, keys and features into the UNet's layers while an edit is sampled.

Each step evaluates the clip first, on the latent that its inversion had there, and keeps the queries, keys and features
that controlled layers need of it. Then the edit's own conditionings are evaluated, together or apart, and get them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..inflate import Forward, Layout, Swap, own_forward
from .blend import grid
from .settings import Control, Layers
from .shortcut import shortcut
from .words import EditWords

# (queries, keys, name of the keys) -> the self-attention's output for them.
Attend = Callable[[Tensor, Tensor, str], Tensor]


def in_layers(layers: Layers, path: str, halvings: int) -> bool:
    """Say whether a transformer block is among ``layers``. ``halvings``: of the latent's size in it."""
    return (not layers.startswith("up blocks") or path.startswith("output_blocks")) and (
        not layers.endswith("half size and below") or halvings >= 1
    )


def feature_layer(unet: Any) -> torch.nn.Module:
    """Return the layer whose output PnP injects: the last convolution of SD 1.5's output_blocks.4.0.

    In other UNets it is the residual block as far up, a third of the way.
    """
    blocks = unet.output_blocks
    layer: torch.nn.Module = blocks[len(blocks) // 3][0].out_layers[-1]
    return layer


def _one_text(tokens: Tensor, length: int) -> Tensor | None:
    """Return a text's tokens [rows, length, c]; None where the attention's are not those.

    The host repeats a text that is shorter than another in its batch. Attending to copies is attending to one.
    """
    if tokens.shape[1] == length:
        return tokens
    whole, rest = divmod(tokens.shape[1], length)
    if rest or whole == 0:
        return None
    copies = tokens[:1].unflatten(1, (whole, length))
    return tokens[:, :length] if torch.equal(copies[:, 1:], copies[:, :-1]) else None


class _Mixed:
    """A mask [rows, n, 1] over the tokens of a layer, and the tokens that are inside it or outside, at least in part.

    Rows have as many tokens as the row with the most of them, so that all go into one call.
    """

    def __init__(self, mask: Tensor, device: torch.device) -> None:
        self.mask = mask.to(device)
        self._inside, self._outside = _first(mask[..., 0] > 0, device), _first(mask[..., 0] < 1, device)

    def inside(self, q: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """Return ``attend`` of the queries [rows, n, c] inside; other tokens are 0 or right."""
        return _at(self._inside, q, attend)

    def outside(self, q: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """Return ``attend`` of the queries [rows, n, c] outside; other tokens are 0 or right."""
        return _at(self._outside, q, attend)


def _first(wanted: Tensor, device: torch.device) -> Tensor | None:
    """Return the numbers of the wanted tokens of each row [rows, most], filled up by others; None for all tokens."""
    # At least one: a window of a clip must see the keys of a layer even where it needs nothing of them.
    most = max(1, int(wanted.sum(1).max()))
    if most == wanted.shape[1]:
        return None
    return wanted.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most].to(device)


def _at(tokens: Tensor | None, q: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
    if tokens is None:
        return attend(q)
    places = tokens[:, :, None].expand(-1, -1, q.shape[2])
    return torch.zeros_like(q).scatter(1, places, attend(q.gather(1, places)))


@dataclass
class Step:
    """The levers that are on in one step, and what was kept of the clip in it.

    ``latent``: the clip at the step's noise level, in the model's scale. ``mask``: [frames, 1, h, w], where the edit's
    own attention is free; None for nowhere.
    """

    control: Control
    words: EditWords | None
    latent: Tensor
    mask: Tensor | None
    injects_self: bool
    injects_cross: bool
    injects_feature: bool
    kept: dict[Any, Tensor] = field(default_factory=dict)
    mixed: dict[Any, _Mixed] = field(default_factory=dict)
    kept_frames: tuple[int, ...] | None = None

    @property
    def needs_clip(self) -> bool:
        """Say whether the clip has to be evaluated in this step."""
        return self.injects_self or self.injects_cross or self.injects_feature


@dataclass(frozen=True)
class Call:
    """One evaluation of the UNet in a controlled step: of the clip (``source``), or of the edit.

    ``frames``: the clip's frames that it looks at, all or a window's. ``worded``: the identities of the prompts that
    Edit Prompt made, whose words are known; None for all.
    """

    step: Step
    source: bool
    frames: tuple[int, ...]
    worded: frozenset[Any] | None = None

    def bound(
        self, layout: Layout, x: Tensor, conds: Sequence[int], prompts: Sequence[Any] = (), resized: bool = False
    ) -> BoundCall:
        """Bind the call to a batch. ``conds``: the number of each chunk's conditioning, 0 for the positive one.

        ``prompts``: the identity of each chunk's prompt, where the host tells. ``resized``: another pack may change the
        latent's size midway.
        """
        worded = [True] * len(conds)
        if self.worded is not None and len(prompts) == len(conds):
            worded = [prompt in self.worded for prompt in prompts]
        positive = [cond == 0 and has_words for cond, has_words in zip(conds, worded, strict=True)]
        return BoundCall(self, layout, (int(x.shape[-2]), int(x.shape[-1])), positive, resized)


class BoundCall:
    """The controlled layers of one evaluation, for a batch of known layout and size."""

    def __init__(
        self, call: Call, layout: Layout, size: tuple[int, int], positive: list[bool], resized: bool = False
    ) -> None:
        self._source, self._frames, self._step = call.source, call.frames, call.step
        self._layout, self._size, self._positive, self._resized = layout, size, positive, resized

    def self_attention(self, path: str, q: Tensor, k: Tensor, attend: Attend) -> Tensor:
        """Attend with the clip's queries and keys in controlled layers; q and k are [chunks * frames * tiles, n, c].

        out = M attend(q, k, v) + (1 - M) attend(clip's q, clip's k, v), M the mask: two fused calls, no map is written,
        each for the places that its share is not 0 in.
        """
        if not self._keeps(path, self._halvings(q.shape[1])):
            return attend(q, k, "k")
        if self._source:
            self._keep_self(path, q, k)
            return attend(q, k, "k")
        source_q, source_k = self._kept((path, "q", q.shape[1]), q), self._kept((path, "k", k.shape[1]), k)
        if source_q is None or source_k is None:
            return attend(q, k, "k")
        mixed = self._mixed(q)
        if mixed is None:
            return attend(source_q, source_k, "k")
        own = mixed.inside(q, lambda q: attend(q, k, "k"))
        clips = mixed.outside(source_q, lambda q: attend(q, source_k, "k of the clip"))
        return torch.lerp(clips, own, mixed.mask.to(own))

    def swaps(
        self, unet: Any, blocks: Mapping[str, Any], attend: Callable[..., Tensor], others: Sequence[Swap]
    ) -> list[Swap]:
        """Return forwards for cross-attentions that attend to the words that stay as the clip does, and for features.

        In an evaluation of the clip, also for the layers after the last one that is kept. ``blocks``: the UNet's
        transformer blocks by path. ``others``: the forwards of this evaluation that these come after.
        """
        swaps: list[Swap] = []
        if self._step.injects_cross:
            swaps += [(b.attn2, self._cross_attention(path, b.attn2, attend)) for path, b in blocks.items()]
        feature = feature_layer(unet) if self._step.injects_feature else None
        if feature is not None:
            # Not a hook: a compiled UNet ignores hooks that were added later.
            own = own_forward(feature) or partial(type(feature).forward, feature)
            swaps.append((feature, self._exchanging(dict(others).get(feature, own))))
        if self._source and not self._resized:
            step = self._step
            last, after = shortcut(unet, self._keeps, step.injects_cross, feature)
            swaps += after
            if last is not None:
                swaps.append((blocks[last].attn1, self._queries_and_keys(last, blocks[last].attn1)))
        return swaps

    def _cross_attention(self, path: str, attn: Any, attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(
            x: Tensor, context: Tensor | None = None, value: Tensor | None = None, mask: Any = None, **options: Any
        ) -> Tensor:
            context = x if context is None else context
            q, k, v = attn.to_q(x), attn.to_k(context), attn.to_v(context if value is None else value)
            options = {"attn_precision": attn.attn_precision, **options}

            def out_of(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return attend(q, k, v, attn.heads, **options)

            halvings = self._halvings(q.shape[1])
            if halvings >= 1 and self._source:
                self._keep((path, "cross q", q.shape[1]), q)
                self._keep((path, "cross k", self._size), k)
            elif halvings >= 1:
                return attn.to_out(self._shared_words(path, q, k, v, out_of))
            return attn.to_out(out_of(q, k, v))

        return forward

    def _shared_words(
        self, path: str, q: Tensor, k: Tensor, v: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Attend to words that stay with the clip's queries and keys, and to new words with the edit's.

        Prompt-to-prompt exchanges the columns of the attention map. A column's share of the output is linear in its
        value, so that two fused calls give the same: values of words that stay, at the clip's places, and the others.
        """
        out = attend(q, k, v)
        rows = len(q) // len(self._positive)
        for number, positive in enumerate(self._positive):
            at = slice(number * rows, (number + 1) * rows)
            source_q = self._kept((path, "cross q", q.shape[1]), q[at], chunks=1)
            source_k = self._kept((path, "cross k", self._size), k[at], chunks=1, alike=False)
            if not positive or source_q is None or source_k is None or self._step.words is None:
                continue
            lengths = self._step.words.lengths
            source_k, edit_k = _one_text(source_k, lengths[0]), _one_text(k[at], lengths[1])
            if source_k is None or edit_k is None:
                continue
            edit_v = v[at][:, : lengths[1]]
            stays = self._step.words.kept().to(v)
            moved = torch.einsum("se,rec->rsc", stays, edit_v)
            own = edit_v * (1 - stays.amax(0))[:, None]
            out[at] = attend(source_q, source_k, moved) + attend(q[at], edit_k, own)
        return out

    def _exchanging(self, own: Forward) -> Forward:
        def forward(x: Tensor) -> Tensor:
            output: Tensor = own(x)
            key = ("feature", output.shape[-2:])
            if self._source:
                self._keep(key, output)
                return output
            kept = self._kept(key, output)
            return output if kept is None else kept

        return forward

    def _queries_and_keys(self, path: str, attn: Any) -> Callable[..., Tensor]:
        def forward(x: Tensor, context: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
            self._keep_self(path, attn.to_q(x), attn.to_k(x if context is None else context))
            return x

        return forward

    def _halvings(self, tokens: int) -> int:
        found = grid(tokens, *self._size)
        return 0 if found is None else found[2]

    def _keeps(self, path: str, halvings: int) -> bool:
        return self._step.injects_self and in_layers(self._step.control.layers, path, halvings)

    def _keep_self(self, path: str, q: Tensor, k: Tensor) -> None:
        self._keep((path, "q", q.shape[1]), q)
        self._keep((path, "k", k.shape[1]), k)

    def _keep(self, key: Any, x: Tensor) -> None:
        """Keep the clip's rows; further prompts of the same clip in the batch are left out."""
        self._step.kept[key] = x[: len(x) // self._layout.chunks].clone()

    def _kept(self, key: Any, x: Tensor, chunks: int | None = None, alike: bool = True) -> Tensor | None:
        """Return the clip's rows for each chunk of ``x``; None where nothing of that shape was kept."""
        found = self._step.kept.get(key)
        chunks = self._layout.chunks if chunks is None else chunks
        if found is None or len(found) * chunks != len(x) or (alike and found.shape[1:] != x.shape[1:]):
            return None
        found = found.to(x)
        return found if chunks == 1 else found.repeat(chunks, *(1,) * (found.ndim - 1))

    def _mixed(self, q: Tensor) -> _Mixed | None:
        """Return the mask for queries [rows, n, c]; None for no mask, or cropped or tiled rows."""
        mask, size = self._step.mask, grid(q.shape[1], *self._size)
        rows = self._layout.chunks * len(self._frames)
        if mask is None or size is None or tuple(mask.shape[-2:]) != self._size or len(q) != rows:
            return None
        # With several GPUs, each evaluates its conditionings of the same step.
        key = size, self._frames, self._layout.chunks, q.device
        found = self._step.mixed.get(key)
        if found is None:
            small = F.interpolate(mask[list(self._frames)].float(), size[:2], mode="area").flatten(1)[:, :, None]
            found = self._step.mixed[key] = _Mixed(small.repeat(self._layout.chunks, 1, 1), q.device)
        return found
