"""The demo's world: its captions, its checker, its clips and edits, and its tokenizer."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
# Scripts import what lies beside them by its plain name.
sys.path.append(str(ROOT / "demo"))

import checker  # noqa: E402
import clips  # noqa: E402
import tokens  # noqa: E402
import world  # noqa: E402
from tune_a_video.tav_core.tiny_sd import model as tiny_sd  # noqa: E402
from world import Look, Scene, Sprite  # noqa: E402

SCENES = 60


def test_the_checker_knows_what_was_drawn() -> None:
    """Test a share of the pictures that the limits in the checker's docstring were measured on."""
    random = np.random.default_rng(7)
    right: dict[str, list[bool]] = {}
    for _ in range(SCENES):
        scene = world.random_scene(random)
        verdict = checker.look(world.draw(scene))
        assert (verdict.style, verdict.background) == (scene.style, scene.background)
        right.setdefault("count", []).append(len(verdict.sprites) == len(scene.sprites))
        for sprite in scene.sprites:
            seen = min(
                (one for one in verdict.sprites if one.colour == sprite.colour),
                key=lambda one: math.dist((one.x, one.y), (sprite.x, sprite.y)),  # noqa: B023
            )
            for name in ("shape", "accessory", "look"):
                right.setdefault(name, []).append(getattr(seen, name) == getattr(sprite, name))
    shares = {name: float(np.mean(values)) for name, values in right.items()}
    assert min(shares.values()) >= 0.95, shares


def test_one_kind_has_one_look_and_two_kinds_have_two() -> None:
    random = np.random.default_rng(1)
    for _ in range(300):
        scene = world.random_scene(random)
        looks: dict[str, set[Look]] = {}
        for sprite in scene.sprites:
            looks.setdefault(sprite.shape, set()).add(sprite.look)
            assert bool(sprite.look.pattern) == (sprite.shape in world.PATTERNED)
        assert all(len(found) == 1 for found in looks.values())
        assert len(scene.sprites) <= 4 and len(world.groups(scene)) <= 2


def test_no_caption_says_a_look_or_who_is_in_front() -> None:
    star = Sprite("star", "red", Look("dark", "core", "cyan"), 20, 20, 9)
    other = star._replace(x=44, y=44, look=Look("light", "halves", "white"), depth=1)
    scenes = [Scene((one, one._replace(x=40)), "snow", "pencil") for one in (star, other)]
    assert world.caption(scenes[0]) == world.caption(scenes[1]) == "two red stars on the snow, pencil style"


@pytest.mark.parametrize(
    ("accessories", "sentence"),
    [
        ((), "the sea, painting style"),
        (("hat",), "a red cross with a hat on the sea, painting style"),
        (("boots",) * 3, "three red crosses with boots on the sea, painting style"),
    ],
)
def test_captions_are_plain_sentences(accessories: tuple[str, ...], sentence: str) -> None:
    cross = Sprite("cross", "red", Look("light", "bar", "white"), 32, 32, 9)
    scene = Scene(tuple(cross._replace(accessory=name) for name in accessories), "sea", "painting")
    assert world.caption(scene) == sentence


def test_the_nearer_sprite_hides_the_farther_one() -> None:
    red = Sprite("circle", "red", Look("light"), 28, 32, 12, depth=0.0)
    blue = Sprite("circle", "blue", Look("light"), 36, 32, 12, depth=1.0)
    front = world.draw(Scene((red, blue), "snow", "painting"))[32, 32]
    back = world.draw(Scene((red._replace(depth=2.0), blue), "snow", "painting"))[32, 32]
    assert front[0] > 150 > front[2] and back[2] > 150 > back[0]


def test_every_caption_is_one_token_a_word_and_fits(tmp_path: Path) -> None:
    tokens.write(tmp_path)
    tokenizer = tiny_sd.Tokenizer(tmp_path)
    encode = tokenizer.clip_l.tokenizer
    assert all(len(encode(word)["input_ids"]) == 3 for word in world.words())
    random = np.random.default_rng(0)
    for _ in range(300):
        sentence = world.caption(world.random_scene(random))
        assert set(sentence.replace(",", "").split()) <= set(world.words())
        assert len(encode(sentence)["input_ids"]) <= tiny_sd.TOKENS


def test_there_are_enough_clips_and_some_are_held_out() -> None:
    held = [clip for clip in clips.CLIPS if clip.held_out]
    assert len(clips.CLIPS) - len(held) >= 16 and len(held) >= 8
    assert len({clip.name for clip in clips.CLIPS}) == len(clips.CLIPS)
    assert {len(clip.scenes) for clip in clips.CLIPS} >= {8, 16, 64}
    kinds = {edit.kind for clip in clips.CLIPS for edit in clips.edits(clip)}
    assert kinds == set(clips.KINDS)


@pytest.mark.parametrize("clip", clips.CLIPS, ids=lambda clip: clip.name)
def test_an_edit_that_is_drawn_is_right_and_one_that_did_nothing_is_not(clip: clips.Clip) -> None:
    for edit in clips.edits(clip):
        assert edit.prompt != clip.prompt
        drawn = clips.frame_right(edit.scenes[1], world.draw(edit.scenes[1]))
        unchanged = clips.frame_right(edit.scenes[1], world.draw(clip.scenes[1]))
        assert drawn.everything and drawn.off < 4, (edit.kind, drawn)
        assert not unchanged.everything, edit.kind


def test_a_clip_is_thinned_at_equal_distances() -> None:
    clip = next(clip for clip in clips.CLIPS if len(clip.scenes) == 64)
    thin = clip.thinned(8)
    assert [clip.scenes.index(scene) for scene in thin.scenes] == [0, 9, 18, 27, 36, 45, 54, 63]
    assert thin.thinned(8) is thin and thin.name == clip.name
