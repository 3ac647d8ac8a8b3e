"""Motions of low rank: what is kept, what a file weighs, that loading gives the motion back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tune_a_video.tav_core import host
from tune_a_video.tav_core.motion.file import Motion, check_fits, load_motion, save_motion
from tune_a_video.tav_core.motion.low_rank import KEPT_KEY, SEED_KEY, _factors, compress, expand
from tune_a_video.tav_core.temporal import draw_temporal, initial_temporal
from unets import UNETS, build_model

SEED = 3


def tuned(rank: int) -> Motion:
    """A motion of the tiny UNet in which every matrix was changed by one of the given rank."""
    model = build_model(UNETS["tiny"])
    generator = torch.Generator().manual_seed(1)

    def change(rows: int, columns: int) -> torch.Tensor:
        return 0.1 * torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)

    tensors = initial_temporal(host.unet_of(model), lambda path: True, SEED)
    tensors = {key: value + change(*value.shape) if value.ndim == 2 else value for key, value in tensors.items()}
    for path, shape in host.query_shapes(model).items():
        tensors[path.removesuffix(".weight") + ".diff"] = change(*shape)
    return Motion(tensors, {SEED_KEY: str(SEED), "base_family": host.family(model)})


def relative_error(one: Motion, other: Motion) -> float:
    difference = sum(
        float((one.tensors[key].float() - other.tensors[key].float()).square().sum()) for key in one.tensors
    )
    return (difference / sum(float(value.float().square().sum()) for value in one.tensors.values())) ** 0.5


@pytest.mark.parametrize("rank", [4, 8])
def test_what_is_of_that_rank_survives_a_file(rank: int, tmp_path: Path) -> None:
    motion = tuned(rank)
    save_motion(compress(motion, rank), tmp_path / "small.safetensors")
    again = expand(load_motion(tmp_path / "small.safetensors"))
    assert again.tensors.keys() == motion.tensors.keys()
    assert again.metadata.items() >= motion.metadata.items()
    assert relative_error(motion, again) < 2e-3
    check_fits(again, host.query_shapes(build_model(UNETS["tiny"])), motion.metadata["base_family"])


def test_a_lower_rank_keeps_less_and_says_how_much() -> None:
    motion = tuned(16)
    kept = [float(compress(motion, rank).metadata[KEPT_KEY]) for rank in (4, 8, 16)]
    assert 0.2 < kept[0] < kept[1] < kept[2]
    assert kept[2] == pytest.approx(1, abs=1e-3)


def test_the_file_gets_smaller(tmp_path: Path) -> None:
    motion = tuned(8).to(torch.float16)
    save_motion(motion, tmp_path / "whole.safetensors")
    save_motion(compress(motion, 4), tmp_path / "small.safetensors")
    whole, small = ((tmp_path / f"{name}.safetensors").stat().st_size for name in ("whole", "small"))
    assert small < 0.5 * whole


def test_sd15_at_rank_32_takes_less_than_10_mb() -> None:
    """Counted from the shapes; every transformer block has two query deltas and four temporal matrices."""
    widths = [320] * 5 + [640] * 5 + [1280] * 6
    numbers = sum(6 * 2 * width * 32 + 3 * width for width in widths)
    assert numbers * 2 < 10e6


def test_a_motion_without_its_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="rank: .*rank 0, or tune again"):
        compress(Motion(tuned(4).tensors), 4)


def test_a_file_without_one_of_the_factors_is_refused() -> None:
    small = compress(tuned(4), 4)
    for factor in (".down", ".up"):
        lost = next(key for key in small.tensors if key.endswith(factor))
        with pytest.raises(ValueError, match="low-rank weights are incomplete"):
            expand(Motion({key: value for key, value in small.tensors.items() if key != lost}, small.metadata))


def test_a_whole_motion_is_left_as_it_is() -> None:
    motion = tuned(4)
    assert expand(motion) is motion


def wide(change: float) -> Motion:
    """A motion of one block whose inner width is not its channels', changed by a matrix of rank 1."""
    tensors = draw_temporal({"a.b": (8, 6)}, SEED)
    for key, value in tensors.items():
        if value.ndim == 2:
            tensors[key] = value + change * torch.linspace(-1, 1, len(value))[:, None]
    return Motion(tensors, {SEED_KEY: str(SEED)})


def test_the_names_in_a_file_do_not_change() -> None:
    """Others' files depend on them."""
    small = compress(wide(0.1), 2)
    assert small.metadata == {"temporal_seed": "3", "rank": "2", "kept": "1.0000"}
    weight, vectors = "a.b.attn_temp.to_{}.weight", ["a.b.attn_temp.to_out.0.bias", "a.b.norm_temp.weight"]
    matrices = [weight.format(name) for name in ("q", "k", "v", "out.0")]
    factors = [f"{key}{half}" for key in matrices for half in (".up", ".down")]
    assert set(small.tensors) == {*factors, *vectors, "a.b.norm_temp.bias"}
    assert small.tensors["a.b.attn_temp.to_q.weight.up"].shape == (8, 2)
    assert small.tensors["a.b.attn_temp.to_q.weight.down"].shape == (2, 6)
    assert all(value.dtype == torch.float16 and value.is_contiguous() for value in small.tensors.values())
    again = expand(small)
    assert "rank" not in again.metadata and relative_error(wide(0.1), again) < 2e-3


def test_of_a_motion_that_learnt_nothing_everything_is_kept() -> None:
    assert compress(wide(0.0), 2).metadata[KEPT_KEY] == "1.0000"


def test_compressing_draws_no_numbers_and_gives_the_same_again() -> None:
    motion = tuned(16)
    torch.manual_seed(5)
    first, drawn = compress(motion, 4), torch.rand(1)
    again = compress(motion, 4)
    assert all(torch.equal(value, again.tensors[key]) for key, value in first.tensors.items())
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)


def test_the_kept_part_is_as_large_as_a_rank_allows() -> None:
    """Against the whole decomposition, whose first vectors are the best that there is."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(64, 48, generator=generator)
    up, down = _factors(matrix, 4)
    kept = 1 - float((matrix - up @ down).square().sum() / matrix.square().sum())
    values = torch.linalg.svdvals(matrix).square()
    assert kept == pytest.approx(float(values[:4].sum() / values.sum()), rel=0.02)


@pytest.mark.parametrize(("rows", "columns"), [(2**20, 2**20), (2**15, 2**17), (2**15, 2**14)])
def test_factors_of_more_than_a_model_are_refused_before_they_are_multiplied(rows: int, columns: int) -> None:
    """Some bytes that stand for terabytes; what is refused last would begin with four more of the same size."""
    key = "a.attn_temp.to_q.weight" if rows * columns < 2**31 else "a.attn1.to_q.diff"
    factors = {f"{key}.up": torch.ones(1, 1).expand(rows, 1), f"{key}.down": torch.ones(1, 1).expand(1, columns)}
    with pytest.raises(ValueError, match="^file: its low-rank weights stand for .* numbers.*copy it again"):
        expand(Motion(factors, {"rank": "1", SEED_KEY: "0"}))


def test_factors_that_are_no_matrices_are_refused() -> None:
    """They would be multiplied with each other in all combinations."""
    factors = {"a.attn1.to_q.diff.up": torch.ones(9, 1, 2, 1), "a.attn1.to_q.diff.down": torch.ones(9, 1, 2)}
    with pytest.raises(ValueError, match="^file: a.attn1.to_q.diff.up is no matrix"):
        expand(Motion(factors, {"rank": "1", SEED_KEY: "0"}))
