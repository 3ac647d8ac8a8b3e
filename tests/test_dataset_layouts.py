"""Readers of public data sets, on small folders made from the layouts' descriptions."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))

from dataset import layouts  # noqa: E402


def frames(folder: Path, count: int = 3, ending: str = ".jpg") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.fromarray(np.full((16, 16, 3), number, np.uint8)).save(folder / f"{number:05d}{ending}")
    return folder


def read(path: Path, *folders: Path) -> list[layouts.Row]:
    """Read rows, none of which may be broken."""
    reading = layouts.read_dataset(path, folders)
    assert reading.broken == []
    return reading.rows


def test_loveu_tgve(tmp_path: Path) -> None:
    clip = frames(tmp_path / "data" / "loveu-tgve-2023" / "DAVIS_480p" / "480p_frames" / "gold-fish")
    file = tmp_path / "configs" / "loveu-tgve-2023" / "DAVIS_480p" / "gold-fish.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("""\
pretrained_model_path: ./checkpoints/stable-diffusion-v1-4
train_data:
  video_path: ./data/loveu-tgve-2023/DAVIS_480p/480p_frames/gold-fish
  prompt: Several goldfish swim in a tank.
  num_frames: 32
  frame_rate: 2
validation_data:
  prompts:
    style: Several goldfish swim in a tank, impressionist style.
    object: Several sharks swim in a tank.
learning_rate: 3.0e-05
""")
    style, shark = read(tmp_path / "configs", tmp_path)
    assert (style.split, style.video, style.name, style.kind) == ("DAVIS_480p", "gold-fish", "style", "style")
    assert (shark.source, shark.edit) == ("Several goldfish swim in a tank.", "Several sharks swim in a tank.")
    assert shark.frames == clip and shark.words == ("sharks",)
    assert (shark.count, shark.step, shark.first) == (32, 2, 0)
    assert shark.place == f"{file}:10"


def test_tune_a_video(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "man-skiing.mp4").write_bytes(b"a video")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "man-skiing.yaml").write_text("""\
train_data:
  video_path: "data/man-skiing.mp4"
  prompt: "a man is skiing"
  n_sample_frames: 24
  sample_start_idx: 5
  sample_frame_rate: 2
validation_data:
  prompts:
    - "mickey mouse is skiing on the snow"
    - "a man, wearing pink clothes, is skiing at sunset"
""")
    first, second = read(tmp_path)
    assert (first.split, first.video, first.name, second.name) == ("videos", "man-skiing", "0", "1")
    assert first.frames == tmp_path / "data" / "man-skiing.mp4" and (first.first, first.count) == (5, 24)
    assert second.place.endswith("man-skiing.yaml:10")


def test_fatezero_lists_the_source_among_the_edits(tmp_path: Path) -> None:
    frames(tmp_path / "data" / "swan", ending=".png")
    (tmp_path / "config" / "tune").mkdir(parents=True)
    (tmp_path / "config" / "tune" / "swan.yaml").write_text("""\
dataset_config:
    path: "data/swan"
    prompt: "a black swan swimming,"
    n_sample_frame: 8
    sampling_rate: 1
editing_config:
    editing_prompts: [
        a black swan swimming,

        # species
        a white duck swimming,
        a pink flamingo swimming
    ]
    clip_length: "${..dataset_config.n_sample_frame}"
train_steps: 1000
""")
    duck, flamingo = read(tmp_path / "config", tmp_path)
    assert (duck.split, duck.video, duck.name) == ("tune", "swan", "1")
    assert (duck.edit, flamingo.words, duck.count) == ("a white duck swimming", ("pink", "flamingo"), 8)


def test_video_p2p(tmp_path: Path) -> None:
    frames(tmp_path / "data" / "rabbit")
    (tmp_path / "rabbit-jump-p2p.yaml").write_text("""\
image_path: "./data/rabbit"
prompt: "a rabbit is jumping on the grass"
prompts:
  - "a rabbit is jumping on the grass"
  - "a origami rabbit is jumping on the grass"
is_word_swap: False
""")
    (row,) = read(tmp_path)
    assert (row.video, row.name, row.edit) == ("rabbit-jump-p2p", "1", "a origami rabbit is jumping on the grass")


def test_v2vbench(tmp_path: Path) -> None:
    frames(tmp_path / "videos" / "hike")
    (tmp_path / "config.yaml").write_text("""\
data:
- video_id: hike
  prompt: a man hikes
  edit:
  - prompt: a superman hikes
  - prompt: a man hikes, pixel art
- video_id: swim
  prompt: a man swims
  edit:
  - prompt: a dog swims
""")
    reading = layouts.read_dataset(tmp_path)
    assert [(row.video, row.name, row.edit) for row in reading.rows] == [
        ("hike", "0", "a superman hikes"),
        ("hike", "1", "a man hikes, pixel art"),
    ]
    assert reading.broken == [f"{tmp_path / 'config.yaml'}:10: the video swim is not there"]


def test_editboard(tmp_path: Path) -> None:
    for name in ("bear", "bear_mask"):
        frames(tmp_path / "sample" / name, ending=".png")
    (tmp_path / "sample" / "script.csv").write_text(
        "original_video_path,edited_video_path,semantic_mask_path,source_prompt,target_prompt\n"
        './sample/bear,./sample/bear_autumn,./sample/bear_mask,"a bear, walking",a bear in autumn\n'
        "./sample/bear,./sample/bear_white,,a bear walks\n"
    )
    reading = layouts.read_dataset(tmp_path / "sample" / "script.csv", [tmp_path])
    (row,) = reading.rows
    assert (row.video, row.name, row.source) == ("bear", "bear_autumn", "a bear, walking")
    assert row.mask == tmp_path / "sample" / "bear_mask"
    assert reading.broken == [
        f"{tmp_path / 'sample' / 'script.csv'}:3: it has more or fewer cells than the head of the table"
    ]


def test_five_names_the_words_in_brackets(tmp_path: Path) -> None:
    for folder in ("images", "bmasks"):
        frames(tmp_path / folder / "0001_bus")
    (tmp_path / "edit_prompt").mkdir()
    entries = [
        {"video_name": "0001_bus", "editing_type_id": 1, "source_prompt": "a [bus]", "target_prompt": "a [red tram]"},
        {"video_name": "0002_cat", "editing_type_id": 2, "source_prompt": "a cat", "target_prompt": "a dog"},
        ["no entry"],
    ]
    file = tmp_path / "edit_prompt" / "edit1_FiVE.json"
    file.write_text(json.dumps(entries, indent=2))
    reading = layouts.read_dataset(tmp_path)
    (row,) = reading.rows
    assert (row.source, row.edit, row.words, row.kind, row.name) == ("a bus", "a red tram", ("red tram",), "1", "1-0")
    assert row.mask == tmp_path / "bmasks" / "0001_bus"
    assert reading.broken == [
        f"{file}:8: the video 0002_cat is not there",
        f"{file}:14: the entry has no video_name",
    ]


def test_davis_edit(tmp_path: Path) -> None:
    frames(tmp_path / "JPEGImages" / "bear")
    mask = frames(tmp_path / "Annotations" / "bear", ending=".png")
    (tmp_path / "edited_video_caption_dict_text.json").write_text(
        json.dumps(
            {"bear": {"original": "a bear", "similar": "A panda", "changing": "A rabbit"}, "elk": {"similar": 1}}
        )
    )
    reading = layouts.read_dataset(tmp_path)
    assert [(row.name, row.edit, row.mask) for row in reading.rows] == [
        ("similar", "A panda", mask),
        ("changing", "A rabbit", mask),
    ]
    assert len(reading.broken) == 1 and ":1: the entry is not original" in reading.broken[0]


def test_ones_own_csv(tmp_path: Path) -> None:
    frames(tmp_path / "clips" / "dog")
    (tmp_path / "edits.csv").write_text(
        "video,source,edit,kind,words\nclips/dog,a dog,a cat,object,cat;tail\nclips/dog,a dog,,object,\n"
        "clips/dog,a dog,a wolf,object,\nclips/dog,a dog,a fox,../../kind,\n"
    )
    reading = layouts.read_dataset(tmp_path / "edits.csv")
    row, second = reading.rows
    assert (row.split, row.video, row.name, row.words) == ("videos", "dog", "object", ("cat", "tail"))
    assert (second.name, second.edit) == ("object-3", "a wolf")
    assert [line.split(": ", 1)[1] for line in reading.broken] == [
        "no sentence for the edit",
        "the edit has no usable name: '../../kind'",
    ]


@pytest.mark.parametrize(
    "name", ["../outside/clip", "{outside}/clip", "link", "inside/../../outside/clip", "linked-frames", "linked-file"]
)
def test_nothing_outside_the_folders_is_read(tmp_path: Path, name: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    outside = frames(tmp_path / "outside" / "clip").parent
    (tmp_path / "outside" / "secret.mp4").write_bytes(b"a secret")
    (home / "link").symlink_to(outside / "clip")
    (home / "linked-file.mp4").symlink_to(outside / "secret.mp4")
    (home / "inside").mkdir()
    frames(home / "linked-frames", 1)
    (home / "linked-frames" / "00001.jpg").symlink_to(outside / "clip" / "00001.jpg")
    given = name.format(outside=outside)
    (home / "edits.csv").write_text(f"video,source,edit\n{given},a dog,a cat\n")
    reading = layouts.read_dataset(home / "edits.csv")
    assert reading.rows == []
    assert "outside the given folders" in reading.broken[0]
    # With the folder given it may be read.
    if name == "link":
        assert len(read(home / "edits.csv", outside)) == 1


def test_a_list_that_links_outside_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "secret.csv").write_text("video,source,edit\nx,a,b\n")
    (tmp_path / "home" / "edits.csv").symlink_to(tmp_path / "secret.csv")
    reading = layouts.read_dataset(tmp_path / "home")
    assert reading.rows == [] and "links to a file outside" in reading.broken[0]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.yaml", "train_data: [1\n", ":2: not yaml"),
        ("a.yaml", "train_data: 3\nvalidation_data: {prompts: [x]}\n", ":1: train_data is not a mapping"),
        ("a.yaml", "train_data: {}\nvalidation_data:\n  prompts: [x, y]\n", ":3: no source sentence"),
        ("a.yaml", "!!python/object/apply:os.system ['true']\n", ":1: not yaml"),
        ("a.yaml", "just text", ":1: no known layout"),
        ("a.yaml", "- &a [*a, x]\n", ":1: not yaml"),
        ("a.yaml", "? [1, 2]\n: 3\ntrain_data: {}\n", ":1: not yaml"),
        ("a.json", '[{"video_name": "x",}]', ":1: not json"),
        ("a.json", '{"x"\n 3}', ":2: not json"),
        ("a.json", "[" * 100_000, ":1: it cannot be read"),
        ("a.json", "3", ":1: no known layout"),
        ("a.csv", "one,two\n1,2\n", ":1: no known layout"),
        ("a.csv", "", ":1: no known layout"),
        ("a.csv", "video,source,edit\nx\0y,a dog,a cat\n", ":2: "),
    ],
)
def test_a_damaged_list_is_named_with_its_line(tmp_path: Path, name: str, content: str, reason: str) -> None:
    (tmp_path / name).write_text(content)
    reading = layouts.read_dataset(tmp_path)
    assert reading.rows == []
    assert reading.broken and all(f"{tmp_path / name}{reason}" in line for line in reading.broken)


def test_a_file_of_other_bytes_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(os.urandom(2000))
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "c.csv").write_bytes(b"video,source,edit\n\xff,a,b\n")
    assert len(layouts.read_dataset(tmp_path).broken) == 3
    with pytest.raises(FileNotFoundError):
        layouts.read_dataset(tmp_path / "nowhere")


def test_one_broken_row_costs_no_other(tmp_path: Path) -> None:
    frames(tmp_path / "bear")
    prompts = {
        "style": "a painted bear",
        "object": None,
        "multiple": "a painted wolf",
        "..": "a fox",
        "x" * 200: "an elk",
    }
    document = {"train_data": {"video_path": "bear", "prompt": "a bear"}, "validation_data": {"prompts": prompts}}
    (tmp_path / "bear.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    reading = layouts.read_dataset(tmp_path)
    assert [row.name for row in reading.rows] == ["style", "multiple"]
    assert len(reading.broken) == 3


def test_pictures_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("frame_10.png", "frame_9.png", "frame_100.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in layouts.pictures_of(tmp_path)] == ["frame_9.png", "frame_10.png", "frame_100.png"]
