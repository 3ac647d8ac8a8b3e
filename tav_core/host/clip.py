"""Embed pictures and sentences with the host's CLIP models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..control.words import WORDS_KEY, EditWords, Word, aligned, occurrences, phrases, positions
from ..errors import Refusal
from .lend import lent

# The image encoder takes this many pictures at a time.
_IMAGES_AT_ONCE = 16
# Rows of a trained projection differ little in length; this many times the median is far beyond.
_MOST_UNEVEN = 20
# Separators of a list of words; each is a token of its own.
_MARKS = ", ; . \u3001 \uff0c \u3002"


def image_embeddings(clip_vision: Any, images: Tensor) -> Tensor:
    """Return embeddings [n, width], float32, of IMAGEs [n, h, w, 3 or 4] by a CLIP_VISION."""
    parts = [clip_vision.encode_image(part)["image_embeds"] for part in images.split(_IMAGES_AT_ONCE)]
    return torch.cat([part.float().cpu() for part in parts])


def text_embedding(clip: Any, text: str) -> Tensor:
    """Return a sentence's embedding [width], float32, in the space of the images' embeddings of the same CLIP.

    Raises ValueError for a CLIP without a text projection: checkpoints of SD 1.x don't have one.
    """
    _, pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
    models = [module for module in clip.cond_stage_model.children() if hasattr(module, "return_projected_pooled")]
    if pooled is None or not models:
        raise Refusal("clip", "it is not a CLIP text model", "Connect Load CLIP with the text half of the clip_vision.")
    pooled = pooled[0].float().cpu()
    if len(models) == 1 and not models[0].return_projected_pooled:
        with lent(models[0].transformer.text_projection, pooled) as (weight, _):
            projection = weight.detach().clone()
        if not _is_projection(projection):
            raise Refusal(
                "clip",
                "it has no text projection, so its sentences cannot be compared with images",
                "Connect Load CLIP with a file that has it (clip_l.safetensors), not the CLIP of a checkpoint.",
            )
        pooled = projection @ pooled
    return pooled


def _is_projection(weight: Tensor) -> bool:
    """Say whether a text projection came from a file. One that no file filled is zeros, or whatever lay in memory."""
    if not torch.isfinite(weight).all() or weight.abs().max() in (0, 1) or weight.norm() > 1e3:
        return False
    rows = weight.norm(dim=1)
    return bool(rows.max() < _MOST_UNEVEN * rows.median())


def encode_text(clip: Any, text: str) -> list[Any]:
    """Return a sentence as CONDITIONING, as CLIP Text Encode does."""
    tokens = clip.tokenize(text)
    if hasattr(clip, "encode_from_tokens_scheduled"):
        return list(clip.encode_from_tokens_scheduled(tokens))
    cond, pooled = clip.encode_from_tokens(tokens, return_pooled=True)
    return [[cond, {"pooled_output": pooled}]]


def encode_edit(
    clip: Any, source: str, edit: str, goes: str = "", new: str = "", negative: str = ""
) -> tuple[list[Any], list[Any], list[Any]]:
    """Return the clip's sentence, the edit's and a negative one as CONDITIONING; the first two know their words.

    ``goes``, ``new``: words of the clip's and of the edit's sentence that change, or phrases with commas between them;
    "" for the words that only one of them has. Raises Refusal for named words that are not in their sentence, and for a
    checkpoint without a CLIP.
    """
    if clip is None:
        raise Refusal("clip", "the checkpoint has none", "Connect Load CLIP with the text model of the model's family.")
    words = [_words(clip, text) for text in (source, edit)]
    gone, added, pairs = aligned(*words)
    for name, text, sentence, found in (("words_that_go", goes, words[0], gone), ("new_words", new, words[1], added)):
        if text.strip():
            found.clear()
            for phrase in phrases(_words(clip, text), _words(clip, _MARKS)):
                named = occurrences(phrase, sentence)
                if not named:
                    raise Refusal(
                        name,
                        f"{text.strip()!r} names words that are not in the sentence",
                        "Write words as the sentence has them, with commas between them.",
                    )
                found.update(named)
    encoded = [encode_text(clip, text) for text in (source, edit, negative)]
    lengths = int(encoded[0][0][0].shape[1]), int(encoded[1][0][0].shape[1])
    stays = [
        pair
        for a, b in pairs
        if a not in gone and b not in added
        for pair in zip(words[0][a][1], words[1][b][1], strict=True)
    ]
    ends = [1 + max((p for word in sentence for p in word[1]), default=0) for sentence in words]
    stays += [(0, 0), *zip(range(ends[0], lengths[0]), range(ends[1], lengths[1]), strict=False)]
    known = EditWords(encoded[0], positions(words[0], gone), positions(words[1], added), tuple(stays), lengths)
    for each in encoded[:2]:
        for entry in each:
            entry[1] = {**entry[1], WORDS_KEY: known}
    return encoded[0], encoded[1], encoded[2]


def _words(clip: Any, text: str) -> list[Word]:
    """Return the words of a sentence as its CLIP sees them."""
    tokens = clip.tokenize(text, return_word_ids=True)
    rows = tokens["l"] if "l" in tokens else next(iter(tokens.values()))
    entries = [(row * len(rows[0]) + at, token) for row, each in enumerate(rows) for at, token in enumerate(each)]
    found: list[Word] = []
    ids, at = [], []
    for position, (token, *_, group) in entries:
        if group == 0:  # start, end and padding
            continue
        piece = clip.tokenizer.untokenize([(token, 1.0)])[0][1] if isinstance(token, int) else "</w>"
        ids.append(token if isinstance(token, int) else tuple(token.flatten()[:8].tolist()))
        at.append(position)
        if piece.endswith("</w>"):
            found.append((tuple(ids), tuple(at)))
            ids, at = [], []
    return [*found, (tuple(ids), tuple(at))] if ids else found
