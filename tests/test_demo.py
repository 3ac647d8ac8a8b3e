"""The demo's world, its checker, its tokenizer, and what is measured of edits."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# Scripts import what lies beside them by its plain name.
sys.path += [str(ROOT / "demo"), str(ROOT / "bench")]

import ablation  # noqa: E402
import checker  # noqa: E402
import clips  # noqa: E402
import sprites  # noqa: E402
import study  # noqa: E402
import tokens  # noqa: E402
from tune_a_video.tav_core.tiny_sd import model as tiny_sd  # noqa: E402


def test_the_checker_knows_what_was_drawn() -> None:
    """In 200 random scenes; what it may miss are the smallest shapes, never a colour, a background or a style."""
    random = np.random.default_rng(7)
    shapes = 0
    total = 0
    for _ in range(200):
        scene = sprites.random_scene(random)
        verdict = checker.look(sprites.draw(scene))
        assert (verdict.style, verdict.background) == (scene.style, scene.background)
        assert sorted(s.colour for s in verdict.sprites) == sorted(s.colour for s in scene.sprites)
        total += len(scene.sprites)
        for sprite in scene.sprites:
            seen = next(s for s in verdict.sprites if s.colour == sprite.colour)
            assert math.dist((seen.x, seen.y), (sprite.x, sprite.y)) < 4
            shapes += seen.shape == sprite.shape
    assert shapes >= 0.99 * total


@pytest.mark.parametrize("style", sprites.STYLES)
@pytest.mark.parametrize("shape", sprites.SHAPES)
def test_the_checker_is_not_fooled_by_rotation_or_size(shape: str, style: str) -> None:
    for angle, radius in ((0, 15), (20, 12), (-40, 10)):
        sprite = sprites.Sprite(shape, "purple", 30, 34, radius, angle)
        (seen,) = checker.look(sprites.draw(sprites.Scene((sprite,), "sand", style, 3))).sprites
        assert seen.shape == shape


def test_an_empty_scene_has_no_sprites() -> None:
    for background in sprites.BACKGROUNDS:
        for style in sprites.STYLES:
            verdict = checker.look(sprites.draw(sprites.Scene((), background, style, 1)))
            assert verdict == checker.Verdict(style, background, ())


@pytest.mark.parametrize("clip", clips.CLIPS, ids=lambda clip: clip.name)
def test_clips_and_edits_show_what_their_prompts_say(clip: clips.Clip) -> None:
    """Drawn as asked, every edit is all right and on its path: the measures' zero point."""
    source = clip.images()
    assert source.shape == (clips.FRAMES, sprites.SIZE, sprites.SIZE, 3)
    for edit in clips.edits(clip):
        assert edit.prompt != clip.prompt
        drawn = torch.from_numpy(np.stack([sprites.draw(scene) for scene in edit.scenes])).float() / 255
        measured = study.measure(source, drawn, edit, lambda frames: torch.ones(len(frames), 4))
        assert measured["attributes"] == measured["edit right"] == 1
        assert measured["trajectory"] < 1.5
        assert measured["motion alignment"] > 0.4


def test_an_edit_that_did_nothing_is_seen() -> None:
    clip = clips.CLIPS[0]
    source = clip.images()
    for edit in clips.edits(clip):
        measured = study.measure(source, source, edit, lambda frames: torch.ones(len(frames), 4))
        assert measured["edit right"] == 0 and measured["attributes"] == 0.75


def test_a_sprite_that_stays_behind_or_is_gone_is_off_its_path() -> None:
    clip = clips.CLIPS[0]
    edit = clips.Edit("colour", clip.scenes)
    source = clip.images()

    def trajectory(frames: torch.Tensor) -> float:
        return study.measure(source, frames, edit, lambda frames: torch.ones(len(frames), 4))["trajectory"]

    still = source[:1].expand_as(source)
    empty = sprites.draw(sprites.Scene((), "grass", "painting", 1))
    gone = torch.from_numpy(empty).float().div(255).expand_as(source)
    assert trajectory(source) < 1 < trajectory(still) < trajectory(gone) == sprites.SIZE / 2


def test_the_training_pictures_know_no_motion_and_hold_every_word() -> None:
    random = np.random.default_rng(0)
    scenes = [sprites.random_scene(random) for _ in range(600)]
    words = {word for scene in scenes for word in sprites.caption(scene, True).replace(",", "").split()}
    assert words <= set(sprites.words())
    assert {*sprites.SHAPES, *sprites.COLOURS, *sprites.STYLES} <= words


def test_the_tokenizers_files_are_what_the_code_writes(tmp_path: Path) -> None:
    tokens.write(tmp_path)
    committed = tiny_sd.FOLDER / "tokenizer"
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(file.name for file in committed.iterdir())
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (committed / file.name).read_bytes(), file.name


def test_the_longest_caption_fits_and_unknown_words_do_too() -> None:
    tokenizer = tiny_sd.Tokenizer(tiny_sd.FOLDER / "tokenizer")
    prompt = "a big red star and a small blue circle on the night sky, pencil style"
    ((*ids,),) = tokenizer.tokenize_with_weights(prompt)["l"]
    numbers = [token for token, _ in ids]
    assert len(numbers) == tiny_sd.TOKENS
    # The end's token comes before the padding: nothing was cut off.
    assert numbers[0] == 0 and numbers.index(1) < tiny_sd.TOKENS - 1
    assert tokenizer.clip_l.tokenizer.decode(numbers[1 : numbers.index(1)]).replace(" ,", ",") == prompt
    for text in ("", "a zebra", "ein grünes Dreieck", "星"):
        assert all(len(section) == tiny_sd.TOKENS for section in tokenizer.tokenize_with_weights(text)["l"])


def test_the_weights_are_small_enough_for_git_and_say_where_they_come_from() -> None:
    record = json.loads((tiny_sd.FOLDER / "training.json").read_text())
    assert sum(file.stat().st_size for file in tiny_sd.FOLDER.rglob("*") if file.is_file()) <= 16 * 2**20
    assert all(run["command"].startswith("python demo train --seed ") for run in record["runs"])
    assert all(sum(run["minutes"].values()) > 0 for run in record["runs"])


def rows(full: list[float], ablated: list[float]) -> list[dict[str, Any]]:
    """Study rows of one measure and one ablation over clips."""
    found = []
    for method, values in (("full method", full), ("without inversion", ablated)):
        for index, value in enumerate(values):
            row = dict.fromkeys(ablation.MEASURES, 0.0)
            found.append(
                {"clip": str(index), "seed": 0, "edit": "object", "method": method, **row, "trajectory": value}
            )
    return found


def verdict(full: list[float], ablated: list[float]) -> dict[str, Any]:
    return next(c for c in ablation.claims(rows(full, ablated)) if c["worse in"] == "trajectory")


def test_a_claim_needs_a_difference_that_the_clips_agree_on() -> None:
    clear = verdict([2, 3, 2, 3], [20, 25, 19, 22])
    assert clear["significant"] and clear["by"] == pytest.approx(19)
    assert not verdict([2, 3, 2, 3], [1, 2, 1, 2])["significant"]
    assert not verdict([2, 3, 2, 3], [30, 1, 2, 4])["significant"]
