"""Tunings of low rank: their gradients, their motion, what they go on from, what they take."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from tune_a_video.tav_core import host
from tune_a_video.tav_core.errors import Refusal
from tune_a_video.tav_core.inflate import Inflation
from tune_a_video.tav_core.motion.file import Motion, load_motion, save_motion
from tune_a_video.tav_core.motion.low_rank import DOWN, KEPT_KEY, RANK_KEY, SEED_KEY, UP, compress, expand, for_rank
from tune_a_video.tav_core.pipeline import tune
from tune_a_video.tav_core.temporal import initial_temporal
from tune_a_video.tav_core.tuning.factors import fresh_factors, rescaled, start_scale
from tune_a_video.tav_core.tuning.memory_plan import LEVELS, Level, Plan
from tune_a_video.tav_core.tuning.trainer import TuneSettings
from tuning_runs import Result, assert_same, result_of, run, steps_of, trainer_of
from unets import UNETS, build_model

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))

from allocations import Allocations  # noqa: E402

RANK = 4


@pytest.fixture(autouse=True)
def on_the_server() -> Any:
    """Nodes run in inference mode."""
    with torch.inference_mode():
        yield


def latents(frames: int = 2, side: int = 8) -> Tensor:
    return torch.randn(frames, 4, side, side, generator=torch.Generator().manual_seed(0))


def conditioning(model: Any) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    embedding = torch.randn(1, 7, host.context_width(model), generator=generator)
    return [[embedding, {"pooled_output": torch.randn(1, 1280, generator=generator)}]]


def tuned(model: Any, steps: int = 3, start: Motion | None = None, **settings: Any) -> Motion:
    given = {"learning_rate": 1e-2, "rank": RANK, **settings}
    return tune(model, latents(), conditioning(model), TuneSettings(steps, **given), start=start)[0]


def whole_float32(motion: Motion, model: Any) -> Motion:
    """Return a low-rank motion as whole matrices in float32; ``expand`` would round them."""
    initial = initial_temporal(host.unet_of(model), lambda path: True, int(motion.metadata[SEED_KEY]))
    tensors = {key: value for key, value in motion.tensors.items() if not key.endswith((UP, DOWN))}
    for key, up in motion.tensors.items():
        if key.endswith(UP):
            name = key.removesuffix(UP)
            tensors[name] = up @ motion.tensors[name + DOWN] + initial.get(name, torch.zeros(()))
    return Motion(tensors, motion.metadata)


@pytest.mark.parametrize("size", ["tiny", "tiny-sdxl"])
def test_gradients_are_those_of_the_whole_matrices_seen_through_the_factors(size: str) -> None:
    """d up = dW down^T and d down = up^T dW, with dW by autograd in a run of full rank at the same weights."""
    model = build_model(UNETS[size])
    motion = tuned(model, steps=2)
    with trainer_of(model, latents(), conditioning(model), TuneSettings(rank=RANK), start=motion) as trainer:
        loss = trainer.backward(*trainer.draw())
        small = {key: (value.detach(), value.grad) for key, value in trainer.trained.items()}
    start = whole_float32(motion, model)
    with trainer_of(model, latents(), conditioning(model), TuneSettings(), start=Motion(start.tensors)) as trainer:
        torch.testing.assert_close(trainer.backward(*trainer.draw()), loss)
        whole = {key: value.grad for key, value in trainer.trained.items()}
    assert {key.removesuffix(UP).removesuffix(DOWN) for key in small} == set(whole)
    for key, gradient in whole.items():
        assert gradient is not None
        if gradient.ndim < 2:
            expected = {key: gradient}
        else:
            (up, _), (down, _) = small[key + UP], small[key + DOWN]
            expected = {key + UP: gradient @ down.mT, key + DOWN: up.mT @ gradient}
        for name, value in expected.items():
            # The gradient of some biases is zero but for rounding: a norm follows.
            error = (small[name][1] - value).norm()
            assert error < 1e-3 * value.norm() + 2e-8, name


def test_a_fresh_run_predicts_what_one_of_full_rank_does_and_changes_up_first() -> None:
    """In the first step nothing flows to ``down``: AdamW's weight decay alone changes it."""
    model = build_model(UNETS["tiny"])
    losses = []
    for rank in (0, RANK):
        settings = TuneSettings(steps=1, rank=rank)
        with trainer_of(model, latents(), conditioning(model), settings) as trainer:
            losses.append(run(trainer)[1])
            trained = {key: value.detach() for key, value in trainer.trained.items()}
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for key, down in ((key, value) for key, value in trained.items() if key.endswith(".diff" + DOWN)):
        name = key.removesuffix(DOWN)
        up = trained[name + UP]
        assert up.any()
        drawn = fresh_factors(name, (len(up), down.shape[1]), RANK, settings.seed)[1]
        torch.testing.assert_close(down, drawn * (1 - settings.learning_rate * settings.weight_decay))


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_half_precision_learns_at_a_rank(precision: torch.dtype) -> None:
    model = build_model(UNETS["tiny"])
    settings = TuneSettings(25, learning_rate=3e-3, rank=RANK)
    with trainer_of(model, latents(), conditioning(model), settings, precision) as trainer:
        drawn = trainer.draw()
        losses = [float(trainer.train_step(*drawn).loss) for _ in range(25)]
        assert all(value.dtype == torch.float32 for value in trainer.trained.values())
    assert losses[-1] < 0.8 * losses[0], losses


def test_the_motion_is_that_of_a_compressed_file(tmp_path: Path) -> None:
    """The same names and shapes, and the same model from the file as from the memory."""
    model = build_model(UNETS["tiny"])
    motion = tuned(model).to(torch.float16)
    small = compress(Motion(expand(motion).tensors, {SEED_KEY: "0"}), RANK)
    shapes = {key: value.shape for key, value in motion.tensors.items()}
    assert shapes == {key: value.shape for key, value in small.tensors.items()}
    assert motion.metadata == {RANK_KEY: "4", SEED_KEY: "0"} and KEPT_KEY in small.metadata
    host.check_motion(model, motion)
    save_motion(compress(motion, RANK), tmp_path / "motion.safetensors")
    read = load_motion(tmp_path / "motion.safetensors")
    assert read.metadata == motion.metadata
    x, cond = latents(), conditioning(model)

    def sampled(weights: Motion | None) -> Tensor:
        return host.run_sampler(
            host.inflate_model(model, Inflation(), weights),
            lambda predict, x, sigmas, **_: predict(x, sigmas[:1].expand(len(x)), **_["extra_args"]),
            torch.tensor([1.0, 0.0]),
            (cond, cond),
            1.0,
            x,
        )

    ours = sampled(motion)
    assert torch.equal(sampled(read), ours)
    assert torch.equal(sampled(expand(read)), ours)
    assert not torch.equal(sampled(None), ours)


def test_expanded_it_is_what_was_trained() -> None:
    model = build_model(UNETS["tiny-sdxl"])
    motion = tuned(model, train_scope="middle and up")
    whole, exact = expand(motion), whole_float32(motion, model)
    assert whole.tensors.keys() == exact.tensors.keys()
    for key, value in whole.tensors.items():
        torch.testing.assert_close(value.float(), exact.tensors[key], rtol=1e-3, atol=1e-4)
    assert not any(key.startswith("input_blocks") for key in whole.tensors)


def test_a_smaller_rank_is_cut_out_of_it() -> None:
    motion = tuned(build_model(UNETS["tiny"]), rank=8)
    small = compress(motion, 2)
    assert small.metadata[RANK_KEY] == "2" and 0 < float(small.metadata[KEPT_KEY]) < 1
    assert compress(motion, 8) is motion and compress(motion, 64) is motion


@pytest.mark.parametrize("rank", [RANK, 128])
def test_a_run_that_was_cut_off_ends_with_the_same_bits(tmp_path: Path, rank: int) -> None:
    model = build_model(UNETS["tiny"])
    settings = TuneSettings(steps=4, learning_rate=1e-3, rank=rank)

    def taken(folder: Path | None, steps: int) -> Result:
        with trainer_of(model, latents(), conditioning(model), settings) as trainer:
            with steps_of(trainer, folder) as taking:
                for step in taking:
                    if step.number == steps:
                        break
            return result_of(trainer)

    undisturbed = taken(None, 4)
    taken(tmp_path, 2)
    (state,) = tmp_path.iterdir()
    assert_same(taken(tmp_path, 4), undisturbed)
    assert state.is_file()


def test_a_run_goes_on_from_a_motion_of_its_rank() -> None:
    model = build_model(UNETS["tiny"])
    first = tuned(model, steps=2).to(torch.float16)
    with trainer_of(model, latents(), conditioning(model), TuneSettings(rank=RANK), start=first) as trainer:
        at_start = trainer.motion()
    for key, value in expand(first).tensors.items():
        torch.testing.assert_close(expand(at_start).tensors[key], value, rtol=2e-3, atol=1e-4)
    assert any(not torch.equal(value, first.tensors[key]) for key, value in tuned(model, start=first).tensors.items())
    # A compressed motion is one, too, and full rank goes on from any.
    again = compress(Motion(expand(first).tensors, {SEED_KEY: "0"}), RANK)
    assert tuned(model, start=again).metadata[RANK_KEY] == "4"
    assert tuned(model, start=first, rank=0).metadata == {}


def test_motions_of_another_rank_are_refused_before_any_work() -> None:
    model = build_model(UNETS["tiny"])
    first = tuned(model, steps=1)
    with pytest.raises(Refusal, match=r"^rank: a run of rank 8 cannot go on from a motion of rank 4\. Set it to 4, or"):
        tuned(model, start=first, rank=8)
    with pytest.raises(Refusal, match=r"^rank: a run of rank 8 cannot go on from a whole motion\. Set it to 0, or"):
        for_rank(expand(first), 8)
    assert for_rank(first, RANK) is first and RANK_KEY not in for_rank(first, 0).metadata


@pytest.mark.comfyui
def test_a_carried_motion_keeps_its_rank_and_its_strengths() -> None:
    model = build_model(UNETS["tiny"])
    motion = tuned(model).to(torch.float16)
    inflated = host.inflate_model(model, Inflation(temporal_strength=0.5), motion, query_strength=0.25)
    carried, whole = host.carried_motion(inflated, whole=False), host.carried_motion(inflated)
    assert carried is not None and whole is not None
    assert carried.metadata[RANK_KEY] == "4" and RANK_KEY not in whole.metadata
    for key, value in expand(carried).tensors.items():
        torch.testing.assert_close(value, whole.tensors[key], rtol=2e-3, atol=1e-4)
    plain = host.without_inflation(inflated)
    assert not plain.patches


def test_the_key_of_a_run_of_full_rank_does_not_know_of_ranks() -> None:
    model = build_model(UNETS["tiny"])
    keys = []
    for rank in (0, RANK):
        with trainer_of(model, latents(), conditioning(model), TuneSettings(rank=rank)) as trainer:
            keys.append(trainer.decisive["settings"])
    assert "rank" not in keys[0] and keys[1] == {**keys[0], "rank": RANK}


def test_factors_at_another_scale_are_brought_to_that_of_fresh_ones() -> None:
    up, down = torch.ones(6, 2), torch.full((2, 8), 1e-3)
    ours = rescaled(up, down)
    assert ours is not None
    torch.testing.assert_close(ours[0] @ ours[1], up @ down)
    assert float(ours[1].square().mean().sqrt()) == pytest.approx(start_scale(2, 8))
    assert rescaled(torch.zeros(6, 2), torch.zeros(2, 8)) is None


@pytest.mark.parametrize("level", LEVELS)
def test_the_planner_knows_what_a_rank_takes(level: Level) -> None:
    """Within a tenth of what is allocated in a step."""
    model = build_model(UNETS["tiny"])
    settings = TuneSettings(steps=2, rank=RANK)
    with trainer_of(model, latents(4, 16), conditioning(model), settings, memory_budget=math.inf) as trainer:
        trainer.plan = Plan.all_at(trainer.costs, level)
        assert trainer.plan.gradients == sum(value.nbytes for value in trainer.trained.values())
        steps = iter(trainer)
        next(steps)
        with Allocations() as allocations:
            next(steps)
        assert trainer.plan.bytes == pytest.approx(allocations.peak, rel=0.1)
        assert trainer.state_bytes == 3 * trainer.plan.gradients


def test_sdxl_at_rank_32_counted_from_its_shapes() -> None:
    """70 blocks, each with two query deltas and four temporal matrices; float32 learns, the file is float16."""
    widths = [640] * 10 + [1280] * 60
    learning = sum(6 * 2 * width * 32 + width for width in widths)
    file = 2 * (learning + sum(2 * width for width in widths))
    assert round(file / 1e6) == 64
    gradients_and_moments = 3 * 4 * learning
    assert gradients_and_moments < 0.5e9
