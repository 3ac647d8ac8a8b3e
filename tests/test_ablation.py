"""The instrument that tells a good way of editing from a bad one: its statistics, its measures, what it keeps."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# Scripts import what lies beside them by its plain name.
sys.path += [str(ROOT / "demo"), str(ROOT / "bench")]

import ablation  # noqa: E402
import clips  # noqa: E402
import paired  # noqa: E402
import study  # noqa: E402
import verdicts  # noqa: E402
from clips import Clip, Edit  # noqa: E402
from study import FULL, METHODS, Edited, Measured, Method, Settings, Source  # noqa: E402
from tune_a_video.tav_core.evaluation import metrics  # noqa: E402
from tune_a_video.tav_core.tiny_sd import model as tiny_sd  # noqa: E402
from world import Look, Scene, Sprite  # noqa: E402

CLIPS = {clip.name: clip for clip in clips.CLIPS}


# Statistics.


def test_without_a_difference_one_in_twenty_is_significant() -> None:
    random = np.random.default_rng(0)
    found = [paired.difference(random.standard_normal(8).tolist()).p or 0.0 for _ in range(3000)]
    assert 0.04 < np.mean(np.array(found) <= paired.LEVEL) < 0.06


def test_of_a_whole_table_without_differences_one_in_twenty_has_a_significant_one() -> None:
    random = np.random.default_rng(1)
    tables = [
        paired.holm([paired.difference(random.standard_normal(8).tolist(), "two-sided").p for _ in range(11)])
        for _ in range(400)
    ]
    wrong = np.mean([min(p for p in table if p is not None) <= paired.LEVEL for table in tables])
    assert 0.02 < wrong < 0.08


@pytest.mark.parametrize(("clips", "effect", "power"), [(8, 1.5, 0.95), (6, 2.0, 0.95), (4, 3.0, 0.9)])
def test_a_difference_that_is_there_is_found(clips: int, effect: float, power: float) -> None:
    random = np.random.default_rng(2)
    found = [paired.difference((effect + random.standard_normal(clips)).tolist()).p or 0.0 for _ in range(500)]
    assert np.mean(np.array(found) <= paired.LEVEL) >= power


def test_a_difference_in_the_wrong_direction_is_none() -> None:
    found = paired.difference([-5.0, -6.0, -5.5, -6.5])
    assert found.p is not None and found.p > 0.99


def test_fewer_than_four_clips_say_nothing_of_significance() -> None:
    assert paired.difference([5.0, 5.1, 4.9]).p is None
    one = paired.difference([5.0])
    assert one == (5.0, None, 1, None)
    assert paired.difference([5.0, 5.1, 4.9, 5.0]).p is not None


def test_equal_differences_are_as_certain_as_their_signs() -> None:
    assert paired.difference([1.0] * 4).p == pytest.approx(2**-4)
    assert paired.difference([1.0] * 8).p == pytest.approx(2**-8)
    assert paired.difference([0.0] * 8).p == 1


def test_holms_correction_is_that_of_the_book_and_leaves_out_what_was_not_tested() -> None:
    assert paired.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert paired.holm([None, 0.02, None, 0.01]) == [None, 0.02, None, 0.02]


def test_an_order_that_clips_agree_on_repeats_and_noise_does_not() -> None:
    random = np.random.default_rng(3)

    def scores(step: float, clips: int) -> dict[str, dict[str, float]]:
        return {
            str(method): {str(clip): step * method + random.standard_normal() for clip in range(clips)}
            for method in range(6)
        }

    certain, noise = paired.repeats(scores(5.0, 8)), paired.repeats(scores(0.0, 8))
    assert certain is not None and certain.mean > 0.999 and certain.halvings == 35
    assert noise is not None and abs(noise.mean) < 0.5
    many = paired.repeats(scores(5.0, 16))
    assert many is not None and many.halvings == 200
    assert paired.repeats(scores(5.0, 3)) is None
    equal = paired.repeats({str(method): dict.fromkeys("abcd", 1.0) for method in range(6)})
    assert equal is not None and equal.mean == 0


# Measures, on drawn videos.


def source_of(clip: Clip) -> Source:
    frames = clip.images()
    noise = torch.randn(frames.shape, generator=torch.Generator().manual_seed(0))
    return Source(frames, metrics.source_flows(frames), (frames + 0.02 * noise).clamp(0, 1))


def edit_of(clip: Clip, kind: str) -> Edit:
    return next(edit for edit in clips.edits(clip) if edit.kind == kind)


def measured(clip: Clip, edit: Edit, change: Callable[[int, Scene], Scene] = lambda number, scene: scene) -> Measured:
    """Measure the drawing of what an edit should show, changed frame by frame."""
    drawn = replace(clip, scenes=tuple(change(number, scene) for number, scene in enumerate(edit.scenes)))
    return study.measure(source_of(clip), drawn.images(), clip, edit)


def marks(found: Measured) -> dict[str, bool]:
    """Say of each measure that does not depend on flow whether it is as in a drawing of the right thing."""
    right = {
        "edit right": lambda value: value == 1,
        "all right": lambda value: value == 1,
        "look agreement": lambda value: value == 1,
        "look distance": lambda value: value < 16,
        "path, px off": lambda value: value < 4,
        "count errors": lambda value: value == 0,
        "background loss, dB": lambda value: value < 0,
        "opposite hue": lambda value: value == 1,
        "only one of two": lambda value: value == 1,
        "occlusion kept": lambda value: value == 1,
    }
    return {name: test(found[name]) for name, test in right.items() if found[name] is not None}


@pytest.mark.parametrize("name", ["line", "crossing", "pan", "pair", "hat on the way"])
def test_a_drawing_of_the_edit_has_full_marks(name: str) -> None:
    clip = CLIPS[name].thinned(5)
    for edit in clips.edits(clip):
        found = measured(clip, edit)
        assert set(found) == set(study.MEASURES)
        assert all(marks(found).values()), (edit.kind, found)


def first_sprite(change: Callable[[int, Sprite], Sprite]) -> Callable[[int, Scene], Scene]:
    return lambda number, scene: replace(scene, sprites=(change(number, scene.sprites[0]), *scene.sprites[1:]))


OTHER_LOOKS = [Look("light", "halves", "cyan"), Look("dark", "core", "orange"), Look("light", "bar", "white")]


@pytest.mark.parametrize(
    ("clip", "kind", "change", "lost"),
    [
        (
            "line",
            "object, patterned",
            first_sprite(lambda number, one: one._replace(look=OTHER_LOOKS[number % 3])),
            {"look agreement", "look distance"},
        ),
        (
            "line",
            "object, plain",
            first_sprite(lambda number, one: one._replace(y=one.y - 9)),
            # Where the sprite should not be, the background is hidden.
            {"path, px off", "background loss, dB"},
        ),
        (
            "line",
            "colour, neighbour",
            first_sprite(lambda number, one: one._replace(colour="red")),
            {"edit right", "all right", "look agreement"},
        ),
        (
            "line",
            "colour, opposite",
            first_sprite(lambda number, one: one._replace(colour="pink" if number > 3 else one.colour)),
            {"edit right", "all right", "look agreement", "opposite hue"},
        ),
        (
            "line",
            "object, plain",
            lambda number, scene: replace(
                scene, sprites=(*scene.sprites, scene.sprites[0]._replace(x=54 if number < 4 else 10, y=10, radius=7))
            ),
            {"all right", "count errors", "background loss, dB"},
        ),
        (
            "line",
            "object, plain",
            lambda number, scene: replace(scene, background="sea"),
            {"all right", "background loss, dB"},
        ),
        (
            "line",
            "accessory",
            first_sprite(lambda number, one: one._replace(accessory="")),
            {"edit right", "all right"},
        ),
        (
            "line",
            "remove",
            lambda number, scene: replace(scene, sprites=CLIPS["line"].scenes[number].sprites),
            {"edit right", "all right", "count errors"},
        ),
        (
            "crossing",
            "colour, neighbour",
            lambda number, scene: replace(
                scene, sprites=tuple(one._replace(depth=1 - one.depth) for one in scene.sprites)
            ),
            {"occlusion kept"},
        ),
        (
            "pair",
            "one of two",
            lambda number, scene: replace(
                scene, sprites=tuple(one._replace(colour=scene.sprites[-1].colour) for one in scene.sprites)
            ),
            {"all right", "only one of two"},
        ),
    ],
    ids=lambda value: ", ".join(sorted(value)) if isinstance(value, set) else "" if callable(value) else value,
)
def test_what_is_wrong_loses_its_own_marks_and_no_others(
    clip: str, kind: str, change: Callable[[int, Scene], Scene], lost: set[str]
) -> None:
    whole = CLIPS[clip] if clip == "crossing" else CLIPS[clip].thinned(8)
    found = measured(whole, edit_of(whole, kind), change)
    assert {name for name, right in marks(found).items() if not right} == lost, found


def test_a_clip_that_stands_still_has_lost_its_motion() -> None:
    clip = CLIPS["line"]
    edit = edit_of(clip, "object, plain")
    moves, stands = measured(clip, edit), measured(clip, edit, lambda number, scene: edit.scenes[0])
    assert (stands["path, px off"] or 0) > 10 > 4 > (moves["path, px off"] or 0)
    for name in ("minus end-point error, px", "warp error", "FF-beta"):
        one, other = moves[name], stands[name]
        assert one is not None and other is not None
        assert one > other if study.MEASURES[name] == "larger" else one < other, name


def test_what_does_not_apply_is_not_measured() -> None:
    clip = CLIPS["line"]
    removed = measured(clip, edit_of(clip, "remove"))
    assert [name for name, value in removed.items() if value is not None] == [
        "edit right",
        "all right",
        "count errors",
        "background loss, dB",
    ]
    assert measured(clip, edit_of(clip, "background"))["background loss, dB"] is None
    assert measured(clip, edit_of(clip, "style"))["opposite hue"] is None


# Kept results, and the verdict on a broken method.

# Method -> look distance, distance from the path, warp error, as a working instrument finds them.
WORKS = {
    FULL.name: (20.0, 3.0, 0.10),
    "half fresh": (25.0, 5.0, 0.11),
    "half fresh, per frame": (50.0, 5.5, 0.11),
    "without inversion": (25.0, 20.0, 0.17),
    "frame by frame": (50.0, 4.0, 0.12),
}


@pytest.fixture
def quick(tmp_path: Path) -> ablation.Plan:
    """The shortened study with files of its own."""
    weights = tmp_path / "weights"
    weights.write_bytes(b"weights")
    (tmp_path / "frames").mkdir()
    return ablation.quick_plan(weights, tmp_path)


def keep_made_rows(quick: ablation.Plan) -> None:
    random = np.random.default_rng(4)
    for clip, seed in quick.jobs:
        hard, rows = random.normal(0, 2), {}
        for method, edit in quick.asked(clip, seed):
            look, path, motion = WORKS[method.name]
            row = dict.fromkeys(study.MEASURES, 0.5)
            row["look distance"] = look + hard + random.normal(0, 4)
            row["path, px off"] = path + 0.2 * hard + random.normal(0, 0.5)
            row["warp error"] = motion + random.normal(0, 0.004)
            rows[quick.key(clip, method, edit)] = row
        quick.keep(clip, seed, rows)


def options(quick: ablation.Plan, *more: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    ablation.add_arguments(parser)
    return vars(parser.parse_args([*more, "--weights", str(quick.weights), "--output", str(quick.output)]))


def test_the_shortened_study_holds_on_a_method_that_works(quick: ablation.Plan) -> None:
    keep_made_rows(quick)
    report = ablation.run(**options(quick, "--quick"))
    assert verdicts.failed(report["differences"], ablation.QUICK_CLAIMS) == []
    assert "| without inversion | full method | path, px off |" in (quick.output / "quick.md").read_text()


@pytest.mark.parametrize(("part", "than"), [claim[:2] for claim in ablation.QUICK_CLAIMS])
def test_the_shortened_study_fails_where_a_part_of_the_method_is_missing(
    quick: ablation.Plan, part: str, than: str
) -> None:
    keep_made_rows(quick)
    # Nothing is made again: the broken method is the ablation.
    with pytest.raises(SystemExit, match=f"{part} is not worse than {than}"):
        ablation.run(**options(quick, "--quick", "--break", part))


def test_the_shortened_study_fails_where_nothing_was_measured() -> None:
    assert len(verdicts.failed([], ablation.QUICK_CLAIMS)) == len(ablation.QUICK_CLAIMS)


def test_results_are_taken_again_only_where_nothing_that_decides_them_changed(quick: ablation.Plan) -> None:
    clip = quick.clips[0]

    def missing(changed: ablation.Plan) -> list[str]:
        return [method.name for method, _ in changed.missing(clip, 0)]

    every = [method.name for method in quick.methods]
    assert missing(quick) == every
    keep_made_rows(quick)
    assert missing(quick) == []
    assert missing(replace(quick, settings=replace(quick.settings, guidance=9.0))) == every
    assert missing(replace(quick, kinds=("style",))) == every
    another = Method("another", fresh=0.3)
    assert missing(replace(quick, methods=(*quick.methods, another))) == ["another"]
    renamed = replace(quick, methods=tuple(each._replace(name="x" + each.name) for each in quick.methods))
    assert missing(renamed) == []
    quick.weights.write_bytes(b"other weights")
    assert missing(replace(quick)) == every


def test_every_result_is_kept_as_it_comes(quick: ablation.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def drawn(
        parts: Any, clip: Clip, wanted: Sequence[tuple[Method, Sequence[Edit]]], settings: Settings, seed: int
    ) -> Iterator[Edited]:
        for method, edits in wanted:
            if method.name == "without inversion" and len(made) < 4:
                raise KeyboardInterrupt
            for edit in edits:
                made.append(method.name)
                yield Edited(method, edit, Clip("", edit.scenes).images(), 1.0)

    monkeypatch.setattr(study, "edited_videos", drawn)
    monkeypatch.setattr(study, "source_of", lambda clip, vae: source_of(clip))
    clip = quick.clips[0]
    with pytest.raises(KeyboardInterrupt):
        ablation.finish(quick, (None, None, None), clip, 0, lambda text: None)
    assert [row["method"] for row in quick.rows()] == every_before("without inversion")
    made += [""] * 4
    ablation.finish(quick, (None, None, None), clip, 0, lambda text: None)
    assert made[7:] == ["without inversion"]
    assert [row["method"] for row in quick.rows()] == [method.name for method in quick.methods]
    assert all(quick.strip(clip, method, edit).exists() for method, edit in quick.asked(clip, 0))


def every_before(name: str) -> list[str]:
    names = [method.name for method in ablation.QUICK_METHODS]
    return names[: names.index(name)]


def test_a_method_that_draws_nothing_is_run_once_and_counts_for_every_seed(quick: ablation.Plan) -> None:
    seeds = replace(quick, seeds=3, methods=(*quick.methods, METHODS[-1]))
    keep_made_rows(seeds)
    names = [row["method"] for row in seeds.rows()]
    assert names.count("frame by frame") == len(quick.clips) and names.count(FULL.name) == 3 * len(quick.clips)
    rows = ablation.figures(seeds, ablation.QUICK_CLAIMS, ())["rows"]
    assert len([row for row in rows if row["method"] == "frame by frame"]) == 3 * len(quick.clips)


def test_no_difference_is_significant_on_three_clips(quick: ablation.Plan) -> None:
    keep_made_rows(quick)
    few = replace(quick, clips=quick.clips[:3])
    report = ablation.figures(few, ablation.QUICK_CLAIMS, ())
    assert not any(one["significant"] for one in report["differences"])
    assert "too few clips" in verdicts.table(report)


def test_every_comparison_has_one_name_for_each_way_of_editing() -> None:
    for methods in study.COMPARISONS.values():
        assert methods[0] == FULL
        # A preset may be what a lever is alone, for the edits that it is for.
        recipes = {(method.recipe, method.kinds) for method in methods}
        assert len({method.name for method in methods}) == len(methods) == len(recipes)
    assert {claim[0] for claim in verdicts.CLAIMS} == {method.name for method in METHODS[1:]}
    assert {name for kinds in study.PRESET_KINDS.values() for name in kinds} < set(clips.KINDS)


def test_the_comparison_of_lengths_is_of_long_clips() -> None:
    chosen = ablation._clips("all", 99, 64, study.LEAST_LONG)
    assert len(chosen) >= 4 and min(len(clip.scenes) for clip in chosen) >= study.LEAST_LONG


@pytest.mark.comfyui
def test_every_way_of_editing_runs_on_the_demos_model() -> None:
    """With as few steps as possible: the weights decide whether the edits are good, not whether they are made.

    Of four frames a window or a choice of two is another clip.
    """
    clip = CLIPS["line"].thinned(4)
    methods = {each.recipe: each for methods in study.COMPARISONS.values() for each in methods}.values()
    by_kind = {edit.kind: edit for edit in clips.edits(clip)}
    wanted = [(method, [by_kind[(*method.kinds, "object, plain")[0]]]) for method in methods]
    with torch.inference_mode():
        parts = tiny_sd.load()
        made = list(study.edited_videos(parts, clip, wanted, Settings(tune_steps=1, ddim_steps=3), 0))
        source = study.source_of(clip, parts[2])
        again = list(study.edited_videos(parts, clip, wanted[:1], Settings(tune_steps=1, ddim_steps=3), 0))
    assert [one.method for one in made] == list(methods)
    first = made[0].frames
    assert first.shape == source.frames.shape and torch.equal(first, again[0].frames)
    assert not [one.method.name for one in made[1:] if torch.equal(first, one.frames)]
    assert study.measure(source, first, clip, made[0].edit)["edit right"] is not None


def test_the_command_writes_a_table_and_a_sheet_and_takes_its_results_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parser = argparse.ArgumentParser()
    ablation.add_arguments(parser)
    size = "--clips 1 --edits 1 --seeds 1 --frames 2 --tune-steps 1 --ddim-steps 2".split()
    given = vars(parser.parse_args([*size, "--output", str(tmp_path)]))
    report = ablation.run(**given)
    assert "| full method |" in (tmp_path / "ablations.md").read_text()
    assert (tmp_path / "ablations-held line.png").exists()
    monkeypatch.setattr(tiny_sd, "load", lambda path: pytest.fail("nothing is missing"))
    assert ablation.run(**given)["rows"] == report["rows"]


def test_settings_are_chosen_on_clips_that_are_not_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "TUNE_STEPS", (1, 2))
    monkeypatch.setattr(ablation, "LEARNING_RATES", (1e-3,))
    parser = argparse.ArgumentParser()
    ablation.add_arguments(parser)
    size = "--choose --clips 1 --edits 1 --seeds 1 --frames 2 --ddim-steps 2".split()
    report = ablation.run(**vars(parser.parse_args([*size, "--output", str(tmp_path)])))
    assert not any(CLIPS[name].held_out for name in report["clips"])
    tried = [(one["tune_steps"], one["guidance"]) for one in report["scores"]]
    assert sorted(tried) == [(steps, guidance) for steps in (1, 2) for guidance in ablation.GUIDANCES]
    scores = [one["score"] for one in report["scores"]]
    assert scores == sorted(scores, reverse=True) and all(0 <= score <= 1 for score in scores)
