"""A motion as products of thin matrices: a file of a few megabytes in place of 150, at a stated loss.

What tuning changed is approximated, not the weights themselves: query projections by their difference from the
model's, temporal projections by their difference from the random weights that they began with, which a seed
makes again. Truncated singular value decompositions, as LoRA extraction does it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

from ..cancel import raise_if_cancelled
from ..errors import Refusal
from ..out_of_memory import is_out_of_memory
from ..temporal import draw_temporal
from .file import DAMAGED, Motion

RANK_KEY, SEED_KEY, KEPT_KEY = "rank", "temporal_seed", "kept"
UP, DOWN = ".up", ".down"
# Numbers in a whole motion, with the weights that it began with: twice what SDXL's has.
_MOST_NUMBERS = 2**31
_QUERY = ".attn_temp.to_q.weight"
# Singular vectors beyond those asked for, and passes over the matrix: what makes the random method exact enough.
_OVERSAMPLING, _PASSES = 8, 4


def compress(motion: Motion, rank: int) -> Motion:
    """The motion with every matrix [n, m] as ``up`` [n, rank] and ``down`` [rank, m], float16.

    Metadata says how much is kept: 1 minus the squared relative error of all that tuning changed. A motion of that rank
    or a lower one is returned as it is. Raises Refusal for a motion that does not know the seed of its temporal
    weights (an older file).
    """
    if RANK_KEY in motion.metadata and all(
        len(down) <= rank for key, down in motion.tensors.items() if key.endswith(DOWN)
    ):
        return motion
    motion = expand(motion)
    seed = temporal_seed(motion)
    if seed is None:
        raise Refusal(
            "rank",
            "this motion does not say which random weights it began with, so it cannot be saved at a rank",
            "Save it with rank 0, or tune again.",
        )
    initial = draw_temporal(_blocks(motion.tensors), seed)
    tensors: dict[str, Tensor] = {}
    whole = lost = 0.0
    for key, value in motion.tensors.items():
        raise_if_cancelled()
        if value.ndim < 2:
            tensors[key] = value.to(torch.float16)
            continue
        change = value.float() - initial.get(key, torch.zeros(()))
        up, down = _factors(change, min(rank, *value.shape))
        tensors[key + UP], tensors[key + DOWN] = up.to(torch.float16), down.to(torch.float16)
        whole += float(change.square().sum())
        lost += float((change - up @ down).square().sum())
    metadata = {
        **motion.metadata,
        RANK_KEY: str(rank),
        KEPT_KEY: f"{1 - lost / whole if whole else 1:.4f}",
    }
    return Motion(tensors, metadata)


def temporal_seed(motion: Motion) -> int | None:
    """Return the seed that a motion's temporal weights were drawn from, None where it is not known."""
    try:
        return int(motion.metadata[SEED_KEY])
    except (KeyError, ValueError):
        return None


def outline(motion: Motion) -> Motion:
    """Return what ``expand`` would give with tensors that have shapes and no values; a whole motion as it is.

    Raises Refusal for a file that lacks one of the factors or says nothing sensible about its blocks.
    """
    if RANK_KEY not in motion.metadata:
        return motion
    _check_size(motion.tensors)
    with _incomplete():
        tensors = {key: value for key, value in motion.tensors.items() if not key.endswith((UP, DOWN))}
        for key, up in motion.tensors.items():
            if key.endswith(DOWN) and key.removesuffix(DOWN) + UP not in motion.tensors:
                raise KeyError(key.removesuffix(DOWN) + UP)
            if key.endswith(UP):
                name = key.removesuffix(UP)
                tensors[name] = up.to("meta") @ motion.tensors[name + DOWN].to("meta", up.dtype)
        if _blocks(tensors):
            int(motion.metadata[SEED_KEY])
    return Motion(tensors, {key: value for key, value in motion.metadata.items() if key != RANK_KEY})


def expand(motion: Motion) -> Motion:
    """The motion that a compressed one stands for, float16; any other one as it is.

    Raises Refusal for a file that lacks one of the factors or says nothing sensible about its blocks.
    """
    if RANK_KEY not in motion.metadata:
        return motion
    whole, given = outline(motion), motion.tensors
    blocks, tensors = _blocks(whole.tensors), {}

    @lru_cache(maxsize=1)  # a block at a time: the weights that SDXL's began with take 1.6 GB
    def initial(block: str) -> dict[str, Tensor]:
        return draw_temporal({block: blocks[block]}, int(motion.metadata[SEED_KEY]))

    with _incomplete():
        for key in sorted(whole.tensors):
            up = given.get(key + UP)
            value = given[key].float() if up is None else up.float() @ given[key + DOWN].float()
            block = key.partition(".attn_temp.")[0]
            if block in blocks and value.ndim == 2 and key in initial(block):
                value = value + initial(block)[key]
            tensors[key] = value.to("cpu", torch.float16).contiguous()
    return Motion(tensors, whole.metadata)


def for_rank(motion: Motion, rank: int) -> Motion:
    """Return a motion as a run of a rank starts from it, whole for rank 0. Raises Refusal for one of another rank."""
    if not rank:
        return expand(motion)
    own = motion.metadata.get(RANK_KEY)
    if own == str(rank):
        return motion
    kind, remedy = ("a whole motion", "0") if own is None else (f"a motion of rank {own[:20]}", own[:20])
    raise Refusal(
        "rank", f"a run of rank {rank} cannot go on from {kind}", f"Set it to {remedy}, or start without a motion."
    )


@contextmanager
def _incomplete() -> Iterator[None]:
    """Say of a file whose factors do not fit together that it is incomplete."""
    try:
        yield
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise Refusal(
            "file", f"its low-rank weights are incomplete ({error})", "Copy it again, or tune again."
        ) from error


def _check_size(tensors: Mapping[str, Tensor]) -> None:
    """Refuse factors that multiply to more than a motion can have: a file of some bytes can stand for terabytes."""
    numbers = 0
    for key, up in tensors.items():
        down = tensors.get(key.removesuffix(UP) + DOWN)
        if not key.endswith(UP) or down is None:
            continue
        if up.ndim != 2 or down.ndim != 2:
            raise Refusal("file", f"{key[:200]} is no matrix", DAMAGED)
        # With a temporal layer's queries come the four matrices that it began with.
        numbers += len(up) * down.shape[1] * (5 if key.endswith(_QUERY + UP) else 1)
    if numbers > _MOST_NUMBERS:
        raise Refusal(
            "file",
            f"its low-rank weights stand for {numbers:.1e} numbers, and no motion has more than {_MOST_NUMBERS:.1e}",
            DAMAGED,
        )


def _blocks(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Inner width and channels of each temporal layer."""
    return {
        key.removesuffix(_QUERY): (value.shape[0], value.shape[1])
        for key, value in tensors.items()
        if key.endswith(_QUERY)
    }


def _factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """up [n, rank] and down [rank, m] whose product is nearest to the matrix."""
    if rank + _OVERSAMPLING >= min(matrix.shape):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        u, s, vh = _randomised_svd(matrix, rank + _OVERSAMPLING)
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).contiguous(), (root[:, None] * vh[:rank]).contiguous()


def _randomised_svd(matrix: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return u, s, vh of the largest ``size`` singular values (Halko et al., arXiv 0909.4061, algorithms 4.4, 5.1).

    ``torch.svd_lowrank`` does the same from the global generators, and seeding them seeds every CUDA device.
    """
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(matrix @ torch.randn(matrix.shape[1], size, generator=generator)).Q
    for _ in range(_PASSES):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    return basis @ u, s, vh
