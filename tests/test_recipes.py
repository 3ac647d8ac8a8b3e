"""Recipes of tuning, compared over the number of steps: what a recipe changes, what is kept, what is tested."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# Scripts import what lies beside them by its plain name.
sys.path += [str(ROOT / "demo"), str(ROOT / "bench")]

import recipes  # noqa: E402
import study  # noqa: E402
from clips import CLIPS  # noqa: E402
from recipes import RECIPES, RELEASED, Recipe, Study  # noqa: E402
from tune_a_video.tav_core import pipeline  # noqa: E402
from tune_a_video.tav_core.tiny_sd import model as tiny_sd  # noqa: E402
from tune_a_video.tav_core.tuning.trainer import TuneSettings  # noqa: E402

CLIP = CLIPS[0].thinned(3)
SETTINGS = study.Settings(ddim_steps=2)
BY_NAME = {recipe.name: recipe for recipe in RECIPES}


@pytest.fixture(scope="module")
def parts() -> Any:
    with torch.inference_mode():
        return tiny_sd.load()


def motions(parts: Any, recipe: Recipe, *steps: int) -> dict[int, Any]:
    model, text, vae = parts
    with torch.inference_mode():
        latent, source = vae.encode(CLIP.images()), tiny_sd.encode(text, CLIP.prompt)
        return recipes._motions(SETTINGS, recipe, model, latent, source, steps)


def test_the_released_recipe_is_the_products_tuning_to_the_bit_and_is_caught_on_the_way(parts: Any) -> None:
    found = motions(parts, RELEASED, 0, 1, 3)
    model, text, vae = parts
    with torch.inference_mode():
        latent, source = vae.encode(CLIP.images()), tiny_sd.encode(text, CLIP.prompt)
        for steps in (1, 3):
            tuning = TuneSettings(steps=steps, learning_rate=SETTINGS.learning_rate)
            product, _ = pipeline.tune(model, latent, source, tuning)
            assert product.tensors.keys() == found[steps][0].tensors.keys()
            assert all(torch.equal(value, found[steps][0].tensors[key]) for key, value in product.tensors.items())
    assert all(not delta.any() for delta in found[0][0].query_deltas().values())
    assert len({error for _, error in found.values()}) == 3


def test_every_lever_learns_something_else(parts: Any) -> None:
    released = motions(parts, RELEASED, 2)[2][0]
    for name in ("debiased term", "frame differences", "centred norm", "rank 8"):
        ours = motions(parts, BY_NAME[name], 2)[2][0]
        same = [key in released.tensors and torch.equal(value, released.tensors[key]) for key, value in
                ours.tensors.items()]  # fmt: skip
        assert not all(same), name


def test_timesteps_come_from_the_recipes_part_alone() -> None:
    trainer = object.__new__(recipes.RecipeTrainer)
    trainer._alpha_bars = [0.5] * 1000
    generator = torch.Generator().manual_seed(0)
    for name, low, high in (("noisy half", 500, 999), ("clean half", 0, 499), ("released", 0, 999)):
        trainer.recipe = BY_NAME[name]
        drawn = [trainer.draw_timestep(generator) for _ in range(3000)]
        assert low <= min(drawn) < low + 20 and high - 20 < max(drawn) <= high


@pytest.mark.comfyui
def test_a_centred_norm_acts_in_tuning_and_in_edits_and_is_gone_afterwards(parts: Any) -> None:
    model, text, vae = parts
    recipe = Recipe("both", rate=100.0)
    (motion, _) = motions(parts, recipe, 3)[3]
    edits = study.clips.edits(CLIP)[:1]

    def edited(recipe: Recipe) -> torch.Tensor:
        with torch.inference_mode():
            latent, source = vae.encode(CLIP.images()), tiny_sd.encode(text, CLIP.prompt)
            return recipes._edited(SETTINGS, recipe, parts, latent, source, motion, edits)[0]

    plain = edited(recipe)
    assert not torch.equal(edited(recipe._replace(centred=True)), plain)
    assert torch.equal(edited(recipe), plain)


@pytest.mark.comfyui
def test_a_study_is_resumed_without_tuning_again_and_writes_table_and_curve(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {"clips": 1, "on": "first", "recipes": ["released", "rank 8"], "steps": [0, 1, 2],
                             "most": 1, "kinds": ["object, patterned"], "frames": 3, "learning_rate": 3e-4,
                             "ddim_steps": 2, "weights": tiny_sd.WEIGHTS, "output": tmp_path}  # fmt: skip
    first = recipes.run(**asked)
    assert capsys.readouterr().out.count("tuned") == 2
    # Recipes but the released one end at `most`.
    assert [(row["recipe"], row["steps"]) for row in first["means"]] == [
        ("released", 0), ("released", 1), ("released", 2), ("rank 8", 0), ("rank 8", 1),
    ]  # fmt: skip
    assert recipes.run(**asked) == first
    assert "tuned" not in capsys.readouterr().out
    assert (tmp_path / "recipes.png").read_bytes().startswith(b"\x89PNG")
    assert "| released | 2 | 1 |" in (tmp_path / "recipes.md").read_text()
    # Lost rows are made again.
    plan = Study((CLIP,), (RELEASED,), (0, 1, 2), 1, ("object, patterned",), SETTINGS, tiny_sd.WEIGHTS, tmp_path)
    rows = plan.kept(CLIP)
    plan.keep(CLIP, {key: row for key, row in rows.items() if not key.startswith("2 ")})
    assert len(plan.rows()) == 2
    assert recipes.run(**asked) == first
    # A file of other code or weights says nothing.
    (tmp_path / f"{CLIP.name}-3.json").write_text('{"fingerprint": "another", "rows": {"a": {}}}')
    assert plan.kept(CLIP) == {}


def row(clip: str, recipe: str, steps: int, score: float, warp: float) -> dict[str, Any]:
    measured = dict.fromkeys(recipes.MEASURES)
    return {"clip": clip, "recipe": recipe, "steps": steps, "edit": "a", **measured, "score": score, "warp error": warp}


def test_a_recipe_is_held_against_as_many_released_steps_and_the_most() -> None:
    plan = Study((), (), (20, 100), 20, (), SETTINGS, tiny_sd.WEIGHTS, Path())
    rows = []
    for number, clip in enumerate("abcdef"):
        rows += [
            row(clip, "released", 20, 0.5 + number / 10, 0.3),
            row(clip, "released", 100, 0.7 + number / 10, 0.1 + number / 1000),
            row(clip, "rank 8", 20, 0.6 + number / 10 + (number % 2) / 100, 0.2),
        ]
    found = {(one["recipe"], one["than"], one["measure"]): one for one in recipes.figures(plan, rows)["differences"]}
    better = found["rank 8", "released, 20 steps", "score"]
    assert better["by"] == pytest.approx(0.105) and better["p_corrected"] < 0.001 and better["n"] == 6
    assert found["rank 8", "released, 100 steps", "score"]["by"] == pytest.approx(-0.095)
    # A smaller warp error is better.
    assert found["rank 8", "released, 20 steps", "warp error"]["by"] == pytest.approx(0.1)
    assert found["rank 8", "released, 100 steps", "warp error"]["by"] < 0
    assert found["released", "released, 100 steps", "score"]["by"] == pytest.approx(-0.2)
    assert len(found) == 6
    assert recipes.figures(replace(plan), rows[:3])["differences"][0]["p"] is None
