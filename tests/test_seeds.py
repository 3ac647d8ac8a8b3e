"""Seeds and random states: what tuning and saving record, resume from, and leave alone."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pack_nodes
import pytest
import torch
from tune_a_video.tav_core import host
from tune_a_video.tav_core.host.inputs import left_out_of_tuning
from tune_a_video.tav_core.motion.file import Motion, save_motion
from tune_a_video.tav_core.motion.low_rank import SEED_KEY, compress
from tune_a_video.tav_core.temporal import initial_temporal
from tune_a_video.tav_core.tuning import trainer as trainer_module
from tune_a_video.tav_core.tuning.trainer import TuneSettings
from tuning_runs import Result, assert_same, result_of, steps_of, trainer_of
from unets import UNETS, build_model

SETTINGS = TuneSettings(steps=2, learning_rate=1e-3, warmup_steps=3, seed=5)
LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
CONDITIONING: list[Any] = [[torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1)), {}]]


@pytest.fixture(autouse=True)
def on_the_server() -> Any:
    """Nodes run in inference mode."""
    with torch.inference_mode():
        yield


def tune(**inputs: Any) -> Motion:
    """The motion that the node gives."""

    class Hidden:
        prompt, unique_id = None, "1"

    node = type("OneShotTune", (pack_nodes.OneShotTune,), {"hidden": Hidden()})
    given = {"model": build_model(UNETS["tiny"]), "latent": {"samples": LATENTS}, "conditioning": CONDITIONING}
    settings = {"steps": 1, "learning_rate": 1e-4, "seed": 5, "train_scope": "all", "precision": "fp32"}
    out = node.execute(**given, **{**settings, "warmup_steps": 0, "gradient_clip": 1.0, "preview_every": 0, **inputs})
    return (out.args if hasattr(out, "args") else out.result)[1]


@pytest.mark.comfyui
def test_a_seed_that_is_not_known_is_not_invented() -> None:
    first = tune()
    assert first.metadata[SEED_KEY] == "5"
    assert tune(motion=first, seed=6).metadata[SEED_KEY] == "5"
    forgotten = Motion(first.tensors, {key: value for key, value in first.metadata.items() if key != SEED_KEY})
    resumed = tune(motion=forgotten, seed=6)
    assert SEED_KEY not in resumed.metadata
    with pytest.raises(ValueError, match="rank"):
        compress(resumed, 4)


@pytest.mark.comfyui
def test_blocks_that_a_motion_lacks_are_drawn_from_its_seed() -> None:
    part = tune(train_scope="middle and up")
    whole = tune(motion=part, seed=6, learning_rate=1e-8)
    initial = initial_temporal(host.unet_of(build_model(UNETS["tiny"])), lambda path: True, 5)
    key = next(key for key in initial if key.startswith("input_blocks") and key.endswith("to_q.weight"))
    torch.testing.assert_close(whole.tensors[key].float(), initial[key], rtol=1e-3, atol=1e-4)
    assert whole.metadata[SEED_KEY] == "5"


@pytest.mark.comfyui
def test_saving_at_a_rank_leaves_all_generators_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    motion, state = tune(), torch.get_rng_state()
    one, other = compress(motion, 4), compress(motion, 4)
    assert not seeded and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, other.tensors[key]) for key, value in one.tensors.items())


def tuned(folder: Path | None, settings: TuneSettings) -> tuple[Result, list[int]]:
    """A run's result and the numbers of the steps it took."""
    with trainer_of(build_model(UNETS["tiny"]), LATENTS, CONDITIONING, settings) as trainer:
        with steps_of(trainer, folder) as steps:
            taken = [step.number for step in steps]
        return result_of(trainer), taken


def test_more_steps_continue_a_finished_run(tmp_path: Path) -> None:
    longer = replace(SETTINGS, steps=5)
    undisturbed, _ = tuned(None, longer)
    tuned(tmp_path, SETTINGS)
    for _ in range(2):  # a finished run that is queued again keeps what further steps need
        tuned(tmp_path, SETTINGS)
    result, taken = tuned(tmp_path, longer)
    assert taken == [3, 4, 5]
    assert_same(result, undisturbed)
    # Fewer steps than there are cannot be had from the state, and come out as if there were none.
    (short, _), (alone, _) = tuned(tmp_path, SETTINGS), tuned(None, SETTINGS)
    assert_same(short, alone)
    assert len(short[1]) == 2


def test_auto_precision_follows_the_compute_dtype_on_the_model() -> None:
    model = build_model(UNETS["tiny"]).clone()
    model.add_object_patch("manual_cast_dtype", torch.bfloat16)
    with trainer_of(model, LATENTS, CONDITIONING, SETTINGS) as trainer:
        assert trainer.unet.dtype == torch.bfloat16


def test_the_first_allocation_is_repeated_with_less(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, failures = trainer_module.trainable_weights, [True]
    monkeypatch.setattr(host, "offload_weights", lambda model, size: 1.0)

    def short_once(*given: Any) -> Any:
        if failures.pop() if failures else False:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return weights(*given)

    monkeypatch.setattr(trainer_module, "trainable_weights", short_once)
    with trainer_of(build_model(UNETS["tiny"]), LATENTS, CONDITIONING, SETTINGS) as trainer:
        assert trainer.trained and not failures


def test_the_process_keeps_its_umask_while_a_motion_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(mask: int) -> int:
        raise AssertionError("umask is changed for the whole process")

    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(os, "umask", changed)
            save_motion(Motion({"x": torch.zeros(1)}), tmp_path / "motion.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "motion.safetensors").stat().st_mode & 0o777 == 0o640


def test_tuning_names_what_it_leaves_out(caplog: pytest.LogCaptureFixture) -> None:
    model = build_model(UNETS["tiny"]).clone()
    assert left_out_of_tuning(model, CONDITIONING) == []
    model.set_model_attn1_patch(lambda q, k, v, extra: (q, k, v))
    guided = [[CONDITIONING[0][0], {"control": object(), "hooks": object()}]]
    assert left_out_of_tuning(model, guided) == ["ControlNet", "hooks", "patches of attention and blocks"]
    with trainer_of(model, LATENTS, CONDITIONING, SETTINGS):
        pass
    assert "tuning runs without patches of attention and blocks; sampling uses them" in caplog.text
