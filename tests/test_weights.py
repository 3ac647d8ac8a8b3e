"""The motion file: round trip, atomic writing, everything that is not one."""

from __future__ import annotations

import errno
import json
import os
import stat
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tune_a_video.tav_core.motion import file as weights
from tune_a_video.tav_core.motion.file import Motion, check_fits, load_motion, save_motion

BLOCK = "middle_block.1.transformer_blocks.0"
INNER, CHANNELS = 8, 6
SHAPES = {f"{BLOCK}.{name}.to_q.weight": torch.Size((INNER, CHANNELS)) for name in ("attn1", "attn2")}


def motion() -> Motion:
    tensors = {f"{BLOCK}.{name}.to_q.diff": torch.randn(INNER, CHANNELS) for name in ("attn1", "attn2")}
    for name in ("to_q", "to_k", "to_v"):
        tensors[f"{BLOCK}.attn_temp.{name}.weight"] = torch.randn(INNER, CHANNELS)
    tensors[f"{BLOCK}.attn_temp.to_out.0.weight"] = torch.randn(CHANNELS, INNER)
    for name in ("attn_temp.to_out.0.bias", "norm_temp.weight", "norm_temp.bias"):
        tensors[f"{BLOCK}.{name}"] = torch.randn(CHANNELS)
    return Motion(tensors, {"base_family": "SD1", "prompt": "사람이 스키를 탄다", "frame_count": "24"})


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "deeper" / "motion.safetensors"
    written = motion()
    save_motion(written, path)
    read = load_motion(path)
    assert read.metadata == written.metadata
    assert read.tensors.keys() == written.tensors.keys()
    assert all(torch.equal(read.tensors[key], value) for key, value in written.tensors.items())
    assert [p.name for p in path.parent.iterdir()] == ["motion.safetensors"]
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_what_files_say_of_themselves_does_not_change(tmp_path: Path) -> None:
    """Others' files, and older packs, depend on these very words."""
    for metadata, version in (({}, "1"), ({"rank": "4"}, "2")):
        save_motion(Motion(motion().tensors, metadata), tmp_path / "motion.safetensors")
        with safetensors.safe_open(tmp_path / "motion.safetensors", framework="pt") as file:
            assert file.metadata() == {"format": "tune-a-video motion", "format_version": version, **metadata}
        assert load_motion(tmp_path / "motion.safetensors").metadata == metadata


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_another_dtype_and_back(tmp_path: Path, dtype: torch.dtype) -> None:
    key = f"{BLOCK}.attn1.to_q.diff"
    turned = {**motion().tensors, key: torch.randn(CHANNELS, INNER).T}
    changed = Motion(turned, {"prompt": "x"}).to(dtype)
    assert changed.metadata == {"prompt": "x"} and changed.tensors.keys() == turned.keys()
    assert all(value.dtype == dtype and value.is_contiguous() for value in changed.tensors.values())
    assert torch.equal(changed.tensors[key], turned[key].to(dtype))
    save_motion(changed, tmp_path / "motion.safetensors")
    again = load_motion(tmp_path / "motion.safetensors")
    assert all(torch.equal(value, changed.tensors[name]) for name, value in again.tensors.items())


def test_file_then_name_then_folder_reach_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut there is the old file or the new one."""
    done: list[str] = []
    fsync, replace, close = os.fsync, os.replace, os.close
    folders: set[int] = set()

    def spy_fsync(handle: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        folders.update({handle} if is_folder else ())
        done.append("folder" if is_folder else "file")
        fsync(handle)

    def spy_replace(source: Path, target: Path) -> None:
        done.append("name")
        replace(source, target)

    def spy_close(handle: int) -> None:
        folders.discard(handle)
        close(handle)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    monkeypatch.setattr(os, "close", spy_close)
    save_motion(motion(), tmp_path / "motion.safetensors")
    assert done == ["file", "name", "folder"]
    assert not folders, "left open"


def test_query_deltas_and_temporal_part_the_keys() -> None:
    both = {**motion().query_deltas(), **motion().temporal()}
    assert len(both) == len(motion().tensors)
    assert set(motion().query_deltas()) == set(SHAPES)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "motion.safetensors"
    save_motion(motion(), path)
    before = path.read_bytes()

    def disk_full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", disk_full)
    with pytest.raises(OSError, match="No space"):
        save_motion(motion(), path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_bytes() == before


def test_what_a_killed_writer_leaves_is_in_one_hidden_folder_and_no_model_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors itself writes under a temporary name first, beside the name that it was given."""
    seen: list[Path] = []
    save_file = safetensors.torch.save_file

    def spy(tensors: object, path: Path, **options: object) -> None:
        Path(path).with_name(".tmpAbCdEf").touch()
        save_file(tensors, path, **options)
        seen.extend(tmp_path.rglob("*"))

    monkeypatch.setattr(safetensors.torch, "save_file", spy)
    save_motion(motion(), tmp_path / "motion.safetensors")
    (folder,) = (path for path in seen if path.parent == tmp_path)
    assert folder.match(".motion*.part") and [path.parent for path in seen].count(folder) == 2
    assert not [path for path in seen if path.suffix == ".safetensors"], "the host would list it"
    assert [path.name for path in tmp_path.iterdir()] == ["motion.safetensors"]


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "header"])
def test_a_damaged_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "motion.safetensors"
    save_motion(motion(), path)
    data = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "text": b"not a motion", "truncated": data[:-9], "header": b"\xff" * 8 + data[8:]}[damage]
    )
    with pytest.raises(ValueError, match="^file: motion.safetensors cannot be read as a motion file.*copy it again"):
        load_motion(path)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied.*account that runs ComfyUI"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error.*its disk or network folder"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), "No such file.*its disk or network folder"),
    ],
)
def test_a_file_that_cannot_be_opened_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, remedy: str
) -> None:
    save_motion(motion(), tmp_path / "motion.safetensors")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("builtins.open", fail)
    with pytest.raises(ValueError, match=f"^file: motion.safetensors cannot be opened .{remedy}"):
        load_motion(tmp_path / "motion.safetensors")


def test_other_safetensors_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    safetensors.torch.save_file({"lora": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="^file: lora.safetensors is .* not a Tune-A-Video motion"):
        load_motion(path)


@pytest.mark.parametrize("version", ["3", "next", "0", "²", "9" * 5000, None])
def test_newer_formats_are_refused(tmp_path: Path, version: str | None) -> None:
    path = tmp_path / "new.safetensors"
    metadata = {"format": weights.FORMAT} | ({} if version is None else {"format_version": version})
    safetensors.torch.save_file({"x": torch.zeros(2)}, path, metadata=metadata)
    with pytest.raises(ValueError, match=f"format version {(version or 'unknown')[:20]}; .*Update the pack"):
        load_motion(path)


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "motion.safetensors"
    tensors = dict(motion().tensors)
    key = min(tensors)
    tensors[key] = tensors[key] * float("inf")
    save_motion(Motion(tensors), path)
    with pytest.raises(ValueError, match=f"not finite \\(first in {key}\\)"):
        load_motion(path)


def header(tensors: dict[str, object]) -> bytes:
    text = json.dumps({"__metadata__": {"format": weights.FORMAT, "format_version": "1"}, **tensors}).encode()
    return struct.pack("<Q", len(text)) + text


def entry(shape: list[int], end: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 2**63 + 2**62) + b"{}",
        header({"x": entry([2**40, 2**40], 2**62)}) + bytes(64),
        header({"x": entry([2**60], 2**62)}) + bytes(64),
        header({"x": entry([2**20], 64)}) + bytes(64),
        header({"x": entry([4, 4], 64), "y": entry([4, 4], 64)}) + bytes(64),
        header({"x": entry([2**40, 0], 0)}),
        header({f"{number}": entry([0], 0) for number in range(weights.MOST_TENSORS + 1)}),
    ],
    ids=["header 2^60", "header > 2^63", "shape overflows", "2^62 bytes", "shape > bytes", "overlap", "empty", "many"],
)
def test_absurd_headers_are_refused_before_anything_is_read(
    tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "motion.safetensors"
    path.write_bytes(data)
    monkeypatch.setattr(torch, "isfinite", None)  # values are looked at only when everything else is right
    with pytest.raises(ValueError, match="^file: motion.safetensors (cannot be read|holds) .*copy it again"):
        load_motion(path)


def test_integers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "motion.safetensors"
    tensors = dict(motion().tensors)
    key = min(tensors)
    tensors[key] = tensors[key].char()
    save_motion(Motion(tensors), path)
    with pytest.raises(ValueError, match=f"^file: motion.safetensors holds int8 values \\(first in {key}\\)"):
        load_motion(path)


def test_fit() -> None:
    check_fits(motion(), SHAPES, "SD1")
    check_fits(Motion(motion().tensors), SHAPES, "SD2")
    check_fits(Motion({f"{BLOCK}.attn1.to_q.diff": torch.zeros(INNER, CHANNELS)}), SHAPES, "SD1")


def test_another_family_is_refused() -> None:
    with pytest.raises(ValueError, match="^motion: it was tuned on SD1, but the model is SDXL"):
        check_fits(motion(), SHAPES, "SDXL")


@pytest.mark.parametrize("key", sorted(motion().tensors))
def test_another_shape_is_refused_by_key_and_both_shapes(key: str) -> None:
    tensors = dict(motion().tensors)
    tensors[key] = torch.zeros([n + 1 for n in tensors[key].shape])
    ours, theirs = list(tensors[key].shape), list(motion().tensors[key].shape)
    with pytest.raises(ValueError) as error:
        check_fits(Motion(tensors), SHAPES, "SD1")
    assert key in str(error.value) and str(ours) in str(error.value) and str(theirs) in str(error.value)


@pytest.mark.parametrize(
    "key",
    [
        "output_blocks.3.1.transformer_blocks.0.attn1.to_q.diff",
        "output_blocks.3.1.transformer_blocks.0.attn_temp.to_q.weight",
        f"{BLOCK}.mystery",
        BLOCK,
        "x",
    ],
)
def test_a_key_without_a_place_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="has no place in this model"):
        check_fits(Motion({key: torch.zeros(INNER, CHANNELS)}), SHAPES, "SD1")


def test_an_empty_motion_is_refused() -> None:
    with pytest.raises(ValueError, match="holds no weights"):
        check_fits(Motion({}), SHAPES, "SD1")


@pytest.mark.parametrize("key", sorted(motion().temporal()))
def test_a_temporal_layer_that_is_not_whole_is_refused(key: str) -> None:
    tensors = {k: v for k, v in motion().tensors.items() if k != key}
    with pytest.raises(ValueError, match=f"^motion: {key} is missing"):
        check_fits(Motion(tensors), SHAPES, "SD1")
