"""Lists in yaml: LOVEU-TGVE 2023, Tune-A-Video, FateZero, Video-P2P and V2VBench."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from .clips import BadRow
from .lined_yaml import Lined, LinedList, load
from .rows import Draft, Entries, Place


def read(file: Path, text: str) -> Entries:
    """Read a document by the layout that its keys tell. Raises BadRow, or yaml.YAMLError for no yaml."""
    document = load(text)
    if isinstance(document, LinedList):
        yield from _v2vbench(file, document)
    elif not isinstance(document, Lined):
        raise BadRow("no known layout")
    elif "train_data" in document:
        yield from _tune_a_video(file, document)
    elif "dataset_config" in document:
        yield from _fatezero(file, document)
    elif "image_path" in document:
        yield from _video_p2p(file, document)
    elif isinstance(document.get("data"), LinedList):
        yield from _v2vbench(file, document["data"])
    else:
        raise BadRow("no known layout")


class _Prompt(NamedTuple):
    name: str
    kind: str
    text: Any
    line: int


def _prompts(holder: Lined, key: str) -> list[_Prompt]:
    """Return the prompts of a mapping, which have names, of a list, or the only one."""
    prompts = holder.get(key)
    if isinstance(prompts, Lined):
        found = []
        for name, value in prompts.items():
            texts = _listed(value, prompts.lines[name])
            for number, (text, line) in enumerate(texts, 1):
                found.append(_Prompt(str(name) if number == 1 else f"{name}-{number}", str(name), text, line))
        return found
    if isinstance(prompts, (LinedList, str)):
        return [_Prompt(str(i), "edit", *each) for i, each in enumerate(_listed(prompts, holder.lines[key]))]
    raise BadRow(f"{key} is neither a mapping nor a list of sentences")


def _listed(value: Any, line: int) -> list[tuple[Any, int]]:
    """Return the elements of a list with their lines; anything else is the only element."""
    return list(zip(value, value.lines, strict=True)) if isinstance(value, LinedList) else [(value, line)]


def _tune_a_video(file: Path, document: Lined) -> Entries:
    """Tune-A-Video (prompts in a list), and LOVEU-TGVE 2023, whose prompts have names and whose folder is a split."""
    train, validation = document.part("train_data"), document.part("validation_data")
    split = file.parent.name if isinstance(validation.get("prompts"), Lined) else ""
    numbers = {
        "count": train.get("n_sample_frames", train.get("num_frames")),
        "first": train.get("sample_start_idx"),
        "step": train.get("sample_frame_rate", train.get("frame_rate")),
    }
    clip, source = train.get("video_path"), train.get("prompt")
    for name, kind, text, line in _prompts(validation, "prompts"):
        yield (
            Place(file, line),
            Draft(file, file.stem, name, kind, clip, source, text, split=split, numbers=numbers),
        )


def _fatezero(file: Path, document: Lined) -> Entries:
    data, editing = document.part("dataset_config"), document.part("editing_config")
    numbers = {
        "count": data.get("n_sample_frame"),
        "first": data.get("start_sample_frame"),
        "step": data.get("sampling_rate"),
    }
    clip, source, split = data.get("path"), data.get("prompt"), file.parent.name
    for name, kind, text, line in _edits_only(_prompts(editing, "editing_prompts"), source):
        yield (
            Place(file, line),
            Draft(file, file.stem, name, kind, clip, source, text, split=split, numbers=numbers),
        )


def _video_p2p(file: Path, document: Lined) -> Entries:
    clip, source = document.get("image_path"), document.get("prompt")
    for name, kind, text, line in _edits_only(_prompts(document, "prompts"), source):
        yield Place(file, line), Draft(file, file.stem, name, kind, clip, source, text)


def _edits_only(prompts: list[_Prompt], source: Any) -> list[_Prompt]:
    """Leave out the source sentence, which FateZero and Video-P2P list first."""

    def plain(text: Any) -> str:
        return " ".join(re.findall(r"\w+", text.lower())) if isinstance(text, str) else ""

    return [prompt for prompt in prompts if not plain(prompt.text) or plain(prompt.text) != plain(source)]


def _v2vbench(file: Path, entries: LinedList) -> Entries:
    if not any(isinstance(entry, Lined) and "edit" in entry for entry in entries):
        raise BadRow("no known layout")
    for entry, line in zip(entries, entries.lines, strict=True):
        if not isinstance(entry, Lined) or "edit" not in entry:
            yield Place(file, line), BadRow("the entry has no video_id and list of edits")
            continue
        clip, source = entry.get("video_id"), entry.get("prompt", entry.get("source_prompt"))
        for number, (edit, edit_line) in enumerate(_listed(entry["edit"], entry.lines["edit"])):
            given = edit if isinstance(edit, Lined) else {"prompt": edit}
            kind = given.get("type", given.get("kind", "edit"))
            yield Place(file, edit_line), Draft(file, clip, number, kind, clip, source, given.get("prompt"))
