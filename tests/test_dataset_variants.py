"""Lists, clips and masks as people have them: other programs, systems and habits than the layouts' authors."""

from __future__ import annotations

import json
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tune_a_video.tav_core.errors import Refusal
from tune_a_video.tav_core.media.encode import save_clip

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "bench"), str(ROOT / "demo")]

from dataset import layouts, results, scoring, sources  # noqa: E402


def frames(folder: Path, names: list[str] | None = None) -> Path:
    """Write pictures whose level is ten times their place."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names or ["00000.jpg", "00001.jpg", "00002.jpg"]):
        Image.fromarray(np.full((16, 16, 3), 10 * number, np.uint8)).save(folder / name)
    return folder


def rows(path: Path) -> list[tuple[str, str, str]]:
    reading = layouts.read_dataset(path)
    assert reading.broken == []
    return [(row.source, row.edit, row.kind) for row in reading.rows]


@pytest.mark.parametrize(
    "content",
    [
        b"video,source,edit,kind\ndog,a dog,a cat,object\ndog,a dog,a fox,object\n",
        b"kind,edit,source,video\nobject,a cat,a dog,dog\nobject,a fox,a dog,dog\n",
        b"\xef\xbb\xbfVideo, Source ,EDIT,Kind\r\ndog,a dog,a cat,object\r\n\r\ndog,a dog,a fox,object\r\n",
        b"video;source;edit;kind\ndog;a dog;a cat;object\ndog;a dog;a fox;object\n",
        b"video\tsource\tedit\tkind\ndog\ta dog\ta cat\tobject\ndog\ta dog\ta fox\tobject\n",
        b'"video","source","edit","kind"\r"dog","a dog","a\ncat","object"\r"dog","a dog","a fox","object"\r',
        b"video,source,edit,kind,,\ndog,a dog,a cat,object,,\n,,,,,\ndog,a dog,a fox,object\t,,,\n",
    ],
    ids=["plain", "another order", "BOM, CRLF, capitals", "semicolons", "tabs", "CR and quotes", "empty cells"],
)
def test_a_csv_of_any_program(tmp_path: Path, content: bytes) -> None:
    frames(tmp_path / "dog")
    (tmp_path / "Edits.CSV").write_bytes(content)
    assert rows(tmp_path) == [("a dog", "a cat", "object"), ("a dog", "a fox", "object")]
    # Edits of one kind are told apart.
    assert [row.name for row in layouts.read_dataset(tmp_path).rows] == ["object", "object-2"]


def test_lines_of_a_csv_are_those_at_which_rows_begin(tmp_path: Path) -> None:
    frames(tmp_path / "dog")
    (tmp_path / "edits.csv").write_text(
        'video,source,edit\ndog,"a dog,\nquoted",a cat\n\nnowhere,a dog,"a\nfox"\ndog,a dog\n'
        'dog,a dog,"a cat, \'black\' and ""white"""\n'
    )
    reading = layouts.read_dataset(tmp_path)
    assert [row.edit for row in reading.rows] == ["a cat", "a cat, 'black' and \"white\""]
    assert [row.place.rsplit(":", 1)[1] for row in reading.rows] == ["2", "8"]
    assert [line.split(": ")[0].rsplit(":", 1)[1] for line in reading.broken] == ["5", "7"]


def test_a_csv_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "edits.csv").write_bytes("video,source,edit\ndog,a dog,a café\n".encode("cp1252"))
    (tmp_path / "edits.txt").write_text("video,source,edit\n")
    assert "edits.csv:2: it cannot be read: it is not UTF-8" in layouts.read_dataset(tmp_path).broken[0]
    assert "edits.txt:1: a list of edits is .yaml" in layouts.read_dataset(tmp_path / "edits.txt").broken[0]


@pytest.mark.parametrize(
    ("document", "edits"),
    [
        ("train_data: {video_path: dog, prompt: a dog}\nvalidation_data: {prompts: a cat}", ["a cat"]),
        ("train_data: {video_path: dog, prompt: [a dog]}\nvalidation_data: {prompts: [a cat, a fox]}", 2 * [""]),
        (
            "train_data: {video_path: dog, prompt: a dog, n_sample_frames: '8', sample_frame_rate: 1.0}\n"
            "validation_data:\n  prompts:\n    style: [a cat, a fox]\n    object: an elk",
            ["a cat", "a fox", "an elk"],
        ),
        ("dataset_config: {path: dog, prompt: a dog}\nediting_config: {editing_prompts: a cat}", ["a cat"]),
        ("image_path: dog\nprompt: a dog\nprompts: a cat", ["a cat"]),
        ("- video_id: dog\n  prompt: a dog\n  edit: a cat", ["a cat"]),
        ("data:\n- video_id: dog\n  prompt: a dog\n  edit: {prompt: a cat, type: object}", ["a cat"]),
        ('---\n"video_id": x\n"image_path": "./data/dog/"\nprompt: >\n  a\n  dog\nprompts: [A dog., a cat]', ["a cat"]),
    ],
)
def test_yaml_has_one_sentence_or_many(tmp_path: Path, document: str, edits: list[str]) -> None:
    frames(tmp_path / "dog")
    (tmp_path / "list.YML").write_bytes(b"\xef\xbb\xbf" + document.replace("\n", "\r\n").encode())
    found = rows(tmp_path)
    assert len(found) == len(edits) and all(source == "a dog" for source, _, _ in found)
    if edits[0]:
        assert [edit for _, edit, _ in found] == edits


@pytest.mark.parametrize("indent", [None, 0, 1, 4, "\t"])
def test_json_of_any_indentation(tmp_path: Path, indent: int | str | None) -> None:
    frames(tmp_path / "bear")
    frames(tmp_path / "wolf.MP4.frames")
    (tmp_path / "five").mkdir()
    five = [{"target_prompt": "a [red] bear", "source_prompt": "a bear", "video_name": "bear"}]
    (tmp_path / "five" / "edit1.JSON").write_text(json.dumps(five, indent=indent), encoding="utf-8-sig")
    davis = {"bear": {"changing": "a rabbit", "similar": "a panda", "original": "a bear"}}
    (tmp_path / "davis.json").write_text(json.dumps(davis, indent=indent).replace("\n", "\r\n") + "\n\n")
    # Another program's file is named once, not once an entry.
    (tmp_path / "other.json").write_text(json.dumps({str(i): {"id": i} for i in range(50)}))
    (tmp_path / "rows.json").write_text(json.dumps([{"id": i} for i in range(50)]))
    reading = layouts.read_dataset(tmp_path)
    assert [row.edit for row in reading.rows] == ["a panda", "a rabbit", "a red bear"]
    assert [line.split(": ", 1)[1] for line in reading.broken] == 2 * ["no known layout"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", '[{"video_name": "\\ud800", "source_prompt": "a dog", "target_prompt": "a cat"}]'),
        ("a.json", '[{"video_name": "dog", "source_prompt": "a dog", "target_prompt": "a \\ud800"}]'),
        ("a.json", '[{"video_name": "dog", "source_prompt": ["a", "b"], "target_prompt": {"a": 1}}]'),
        ("a.json", '[{"video_name": 3, "source_prompt": "a dog", "target_prompt": "a cat"}]'),
        ("a.json", '[{"video_name": "dog", "source_prompt": "a dog", "n": ' + "1" * 5000 + "}]"),
        ("a.csv", "video,source,edit\n/,a dog,a cat\n"),
        ("a.csv", "video,source,edit\n.,a dog,a cat\n"),
        ("a.csv", "video,source,edit\n..,a dog,a cat\n"),
        ("a.csv", "video,source,edit\n" + "x" * 9000 + ",a dog,a cat\n"),
        ("a.csv", "video,source,edit,split\ndog,a dog,a cat,../up\n"),
        ("a.csv", "video,source,edit,name\ndog,a dog,a cat,.hidden\n"),
        (
            "a.yaml",
            "train_data: {video_path: dog, prompt: a dog, n_sample_frames: 1e9}\nvalidation_data: {prompts: [x]}",
        ),
        ("a.yaml", "train_data: {video_path: dog, prompt: a dog}\nvalidation_data: {prompts: 2020-99-99}"),
        (
            "a.yaml",
            "a: &a [x,x,x,x,x,x,x,x,x]\n"
            + "".join(
                f"{b}: &{b} [*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a}]\n"
                for a, b in zip("abcdefgh", "bcdefghi", strict=True)
            )
            + "image_path: dog\nprompt: *i\nprompts: [*i, *h]\n",
        ),
    ],
)
def test_a_hostile_list_costs_itself_only(tmp_path: Path, name: str, content: str) -> None:
    frames(tmp_path / "dog")
    (tmp_path / name).write_text(content)
    (tmp_path / "good.csv").write_text("video,source,edit\ndog,a dog,a cat\n")
    reading = layouts.read_dataset(tmp_path)
    assert [row.edit for row in reading.rows] == ["a cat"]
    assert reading.broken and all(line.startswith(f"{tmp_path / name}:") for line in reading.broken)
    "\n".join(reading.broken).encode()  # it can be printed


def test_names_of_any_script_in_either_form_of_accents(tmp_path: Path) -> None:
    names = ["éléphant", "हिन्दी", "ภาษาไทย", "犬", "it's a dog & co", "dog.v2", "dog.v3"]
    for name in names:
        frames(tmp_path / unicodedata.normalize("NFD", name))
    lines = "".join(f'"{unicodedata.normalize("NFC", name)}",a dog,a cat\n' for name in names)
    (tmp_path / "edits.csv").write_text(f"video,source,edit\n{lines}", encoding="utf-8")
    reading = layouts.read_dataset(tmp_path)
    assert reading.broken == []
    assert [row.video for row in reading.rows] == names


@pytest.mark.parametrize("given", ["clips/dog.mp4", "clips\\dog.mp4", "dog", "./data/clips/dog.mp4", "clips/dog.MP4"])
def test_extensions_in_capitals(tmp_path: Path, given: str) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "dog.MP4").write_bytes(b"a video")
    (tmp_path / "dog.MP4").symlink_to(tmp_path / "clips" / "dog.MP4")
    (tmp_path / "edits.csv").write_text(f"video,source,edit\n{given},a dog,a cat\n")
    (row,) = layouts.read_dataset(tmp_path).rows
    assert (row.frames, row.video) == (tmp_path / "clips" / "dog.MP4", "dog")


@pytest.mark.parametrize(
    "names",
    [
        ["0.png", "1.png", "10.png"],
        ["00001.JPG", "00002.JPG", "00003.JPG"],
        ["frame_3.jpeg", "frame_7.jpeg", "frame_120.jpeg"],
        ["é 1.webp", "é 2.webp", "é 10.webp"],
        ["clip2_f9.bmp", "clip2_f10.bmp", "clip2_f11.bmp"],
    ],
)
def test_frames_numbered_from_anywhere_with_gaps(tmp_path: Path, names: list[str]) -> None:
    folder = frames(tmp_path / "dog", names)
    (folder / "._0.png").write_bytes(b"macOS")
    (folder / ".DS_Store").write_bytes(b"macOS")
    (folder / "Thumbs.db").write_bytes(b"Windows")
    found = sources.load(folder, 0, 1, 0, (16, 16))
    assert [round(int(level), -1) for level in found[:, 0, 0, 0]] == [0, 10, 20]
    assert len(sources.load(folder, 1, 2, 0, (16, 16))) == 1


def test_a_frame_in_two_formats_is_named(tmp_path: Path) -> None:
    frames(tmp_path / "dog", ["0.jpg", "1.jpg", "0.png"])
    (tmp_path / "edits.csv").write_text("video,source,edit\ndog,a dog,a cat\n")
    reading = layouts.read_dataset(tmp_path)
    assert reading.rows == [] and "dog has 0." in reading.broken[0] and "one of them is no frame" in reading.broken[0]


def row(frames: Path, mask: Path, **numbers: int) -> layouts.Row:
    return layouts.Row("s", "v", "n", "k", frames, "a dog", "a cat", mask, **numbers)


def masks(folder: Path, levels: dict[str, int]) -> Path:
    folder.mkdir(parents=True)
    for name, level in levels.items():
        Image.fromarray(np.full((16, 16), level, np.uint8)).save(folder / name)
    return folder


def test_masks_belong_to_the_frames_of_their_number(tmp_path: Path) -> None:
    clip = frames(tmp_path / "clip", [f"{i:05d}.jpg" for i in range(10)])

    def firsts(mask: Path, count: int = 2, **numbers: int) -> list[int]:
        found = sources.load_mask(row(clip, mask, **numbers), count, (16, 16))
        assert found.shape == (count, 16, 16)
        return [int(value) for value in found[:, 0, 0]]

    # A mask for every fifth frame.
    sparse = masks(tmp_path / "sparse", {"00000.png": 0, "00005.png": 255})
    assert firsts(sparse, step=5) == [0, 255]
    with pytest.raises(Refusal, match="has none for 00001.jpg"):
        firsts(sparse)
    # As many masks as frames, counted from 1.
    from_one = masks(tmp_path / "one", {f"{i + 1}.png": 255 * (i % 2) for i in range(10)})
    assert firsts(from_one) == [0, 255] and firsts(from_one, first=1) == [255, 0]
    assert firsts(masks(tmp_path / "single", {"mask.png": 255})) == [255, 255]
    # Objects that are numbered without a palette.
    assert firsts(masks(tmp_path / "numbered", {"0.png": 1})) == [255, 255]
    # A compressed video whose black is 16 or so.
    levels = torch.tensor([0.05, 1.0]).view(2, 1, 1, 1).expand(2, 16, 16, 3)
    save_clip(levels.contiguous(), 8, tmp_path / "mask.mp4", quality=30)
    assert firsts(tmp_path / "mask.mp4") == [0, 255]
    with pytest.raises(Refusal, match="has 2 frames, the clip 3"):
        firsts(tmp_path / "mask.mp4", 3)


def test_the_frames_beside_a_list_are_not_taken_for_their_masks(tmp_path: Path) -> None:
    frames(tmp_path / "bear")
    (tmp_path / "davis.json").write_text(json.dumps({"bear": {"original": "a bear", "similar": "a panda"}}))
    assert layouts.read_dataset(tmp_path).rows[0].mask is None
    mask = frames(tmp_path / "Annotations" / "bear", ["0.png"])
    assert layouts.read_dataset(tmp_path).rows[0].mask == mask


def test_a_study_inside_its_data_set_is_not_read_as_one(tmp_path: Path) -> None:
    frames(tmp_path / "dog")
    (tmp_path / "edits.csv").write_text("video,source,edit\ndog,a dog,a cat\n")
    before = layouts.read_dataset(tmp_path)
    for output in (tmp_path, tmp_path / "out"):
        (edit,) = before.rows
        sources.keep(output, edit, 3, (16, 16))
        results.write_frames(results.edit_folder(output, "m", edit), np.zeros((3, 16, 16, 3), np.uint8))
        results.write_whole(output / layouts.STUDY, "{}")
        results.write_editboard(output, "m", [edit])
        scoring.write_tables(output, [scoring.Scored("m", "c", edit, {"x": 1.0})], {})
        results.write_whole(output / "scores" / "m" / "x.json", "{}")
    assert layouts.read_dataset(tmp_path) == before


def test_edits_of_other_systems_are_found_in_capitals_and_not_through_links(tmp_path: Path) -> None:
    edit = row(tmp_path, tmp_path)
    folder = tmp_path / "other" / "s" / "v"
    folder.mkdir(parents=True)
    assert results.find_edit(tmp_path / "other", edit) is None
    (folder / "n.MP4").write_bytes(b"a video")
    assert results.find_edit(tmp_path / "other", edit) == folder / "n.MP4"
    (folder / "n.MP4").unlink()
    secret = frames(tmp_path / "secret")
    (folder / "n").symlink_to(secret)
    assert results.find_edit(tmp_path / "other", edit) is None
    (folder / "n").unlink()
    frames(folder / "n", ["0.jpg"])
    (folder / "n" / "1.jpg").symlink_to(secret / "00001.jpg")
    assert results.find_edit(tmp_path / "other", edit) is None


def test_labels_as_a_spreadsheet_writes_them(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes("Label;Edit;Video;Method\r\n4,5;a  café;dog;m\r\n".encode("utf-8-sig"))
    assert scoring.read_labels(tmp_path / "labels.csv") == {("m", "dog", "a café"): 4.5}
    (tmp_path / "labels.csv").write_text("method,video,edit,label\nm,dog,a cat,nan\n")
    with pytest.raises(ValueError, match="labels.csv:2: it needs"):
        scoring.read_labels(tmp_path / "labels.csv")
