"""Figures of edits in submission layout, whoever made them, and their tables."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tune_a_video.tav_core.errors import Refusal
from tune_a_video.tav_core.evaluation import clip_scores, metrics
from tune_a_video.tav_core.media.clip import load_clip

from . import results
from .layouts import Row, read_table

# Raise it when a figure changes its meaning, so that kept scores are computed again.
_VERSION = 1

Embed = Callable[[Tensor], Tensor]
EmbedText = Callable[[str], Tensor]


@dataclass(frozen=True)
class Clip:
    """A CLIP: ``name`` tells kept scores of different ones apart."""

    name: str
    images: Embed
    text: EmbedText


@dataclass(frozen=True)
class Scored:
    """The figures of one edit. ``clip`` tells independent clips apart for spread."""

    method: str
    clip: str
    row: Row
    figures: Mapping[str, float]


def temporal_consistency(images: Tensor) -> float:
    """Return Tem-Con: the mean cosine of CLIP embeddings of neighbouring frames, -1..1 (FateZero, ICCV 2023)."""
    return float(clip_scores.similarity_to_previous(images).mean()) if len(images) > 1 else 1.0


def frame_accuracy(images: Tensor, source: Tensor, edit: Tensor) -> float:
    """Return Fram-Acc: the share of frames that CLIP finds nearer to the edit's sentence than to the source's.

    0..1 (FateZero, ICCV 2023).
    """
    unit = F.normalize(images.double(), dim=-1)
    to_source, to_edit = (unit @ F.normalize(text.double().flatten(), dim=-1) for text in (source, edit))
    return float((to_edit > to_source).double().mean())


def score(
    source: Tensor, edited: Tensor, row: Row, mask: Tensor | None, flows: Any, clip: Clip | None
) -> dict[str, float]:
    """Compute all figures of an edit. Frames are [n, h, w, 3] in 0..1; ``flows``: the source's."""
    images = None if clip is None else clip.images(edited)
    text = None if clip is None else clip.text(row.edit)
    figures, _ = metrics.evaluate(source, edited, images, text, mask, flows)
    if clip is not None and images is not None and text is not None:
        figures["Tem-Con"] = temporal_consistency(images)
        figures["Fram-Acc"] = frame_accuracy(images, clip.text(row.source), text)
    return figures


def score_all(
    output: Path,
    systems: Mapping[str, Path],
    rows: Sequence[Row],
    clip: Clip | None,
    say: Callable[[str], None] = print,
) -> tuple[list[Scored], list[str]]:
    """Score the edits of all systems; return their figures and a line for each that is missing or does not fit.

    ``systems``: folder in submission layout by name. Kept scores are used while the edit's bytes are the same.
    """
    scored, missing = [], []
    by_clip: dict[str, list[Row]] = {}
    for row in rows:
        by_clip.setdefault(results.clip_id(row), []).append(row)
    for name, clip_rows in by_clip.items():
        lazy = _Source(output, name)
        for system, folder in systems.items():
            for row in clip_rows:
                place = results.find_edit(folder, row)
                if place is None:
                    missing.append(f"{system}: {row.split}/{row.video}/{row.name} is not there")
                    continue
                try:
                    figures = _kept_or_new(output, system, row, place, lazy, clip)
                except (Refusal, OSError, ValueError) as error:
                    missing.append(f"{system}: {row.split}/{row.video}/{row.name}: {error}")
                    continue
                scored.append(Scored(system, str(row.frames), row, figures))
        say(f"scored {name}")
    return scored, missing


class _Source:
    """A clip's frames and flows, loaded when the first edit without a kept score needs them."""

    def __init__(self, output: Path, name: str) -> None:
        self.folder = output / "source" / name
        self._loaded: tuple[Tensor, Any] | None = None

    def load(self) -> tuple[Tensor, Any]:
        if self._loaded is None:
            frames = torch.from_numpy(results.read_frames(self.folder)).float() / 255
            self._loaded = frames, metrics.source_flows(frames) if len(frames) > 1 else None
        return self._loaded


def _load_mask(folder: Path | None) -> Tensor | None:
    if folder is None or not folder.is_dir():
        return None
    mask = torch.from_numpy(results.read_frames(folder, "L")).float() / 255
    # Where it is everywhere, nothing lies outside.
    return None if bool((mask >= 0.5).all()) else mask


def _kept_or_new(
    output: Path, system: str, row: Row, place: Path, lazy: _Source, clip: Clip | None
) -> dict[str, float]:
    content = results.digest([place]) if place.is_dir() else str(place.stat().st_mtime_ns)
    mask = results.mask_folder(output, row)
    source_content = results.digest([lazy.folder, *([] if mask is None else [mask])])
    key = [_VERSION, source_content, content, row.source, row.edit, clip.name if clip else ""]
    file = output / "scores" / system / row.split / row.video / f"{row.name}.json"
    if file.is_file():
        kept = json.loads(file.read_text())
        if kept["key"] == key:
            return {name: float(value) for name, value in kept["figures"].items()}
    source, flows = lazy.load()
    edited = load_edit(place, len(source), (source.shape[2], source.shape[1]))
    with torch.inference_mode():
        figures = score(source, edited, row, _load_mask(mask), flows, clip)
    results.write_whole(file, json.dumps({"key": key, "figures": {k: _plain(v) for k, v in figures.items()}}))
    return figures


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def load_edit(place: Path, frames: int, size: tuple[int, int]) -> Tensor:
    """Load an edit's frames [n, h, w, 3] in 0..1, resized to (width, height). Raises ValueError for another length."""
    if place.is_dir():
        pixels = results.read_frames(place)
    else:
        pixels = (load_clip(place, frame_count=0, resize="keep").images * 255).round().byte().numpy()
    if len(pixels) != frames:
        raise ValueError(f"it has {len(pixels)} frames, the source {frames}")
    if pixels.shape[2:0:-1] != size:
        pixels = np.stack([np.asarray(Image.fromarray(each).resize(size, Image.Resampling.LANCZOS)) for each in pixels])
    return torch.from_numpy(pixels).float() / 255


def summary(scored: Sequence[Scored]) -> list[dict[str, Any]]:
    """Return mean and spread of each figure by method and kind; kind "all" is over all edits.

    The mean is over edits; ``spread`` the standard deviation of the clips' means, since edits of one clip are not
    independent. Infinite values, such as the PSNR of equal pictures, are left out.
    """
    found = []
    kinds = ["all", *dict.fromkeys(each.row.kind for each in scored)]
    for method in dict.fromkeys(each.method for each in scored):
        for kind in kinds if len(kinds) > 2 else kinds[:1]:
            mine = [each for each in scored if each.method == method and kind in ("all", each.row.kind)]
            for figure in dict.fromkeys(name for each in mine for name in each.figures):
                clips: dict[str, list[float]] = {}
                for each in mine:
                    value = each.figures.get(figure, math.nan)
                    if math.isfinite(value):
                        clips.setdefault(each.clip, []).append(value)
                if clips:
                    values = [value for numbers in clips.values() for value in numbers]
                    means = [statistics.fmean(numbers) for numbers in clips.values()]
                    spread = statistics.stdev(means) if len(means) > 1 else math.nan
                    head = {"method": method, "kind": kind, "figure": figure}
                    counts = {"edits": len(values), "clips": len(clips)}
                    found.append({**head, "mean": statistics.fmean(values), "spread": spread, **counts})
    return found


def markdown(lines: Sequence[Mapping[str, Any]]) -> str:
    """Format a summary as one table a kind: figures below each other, methods side by side."""
    parts = []
    for kind in dict.fromkeys(line["kind"] for line in lines):
        mine = [line for line in lines if line["kind"] == kind]
        methods = list(dict.fromkeys(line["method"] for line in mine))
        cells = {(line["method"], line["figure"]): line for line in mine}
        edits = [max(line["edits"] for line in mine if line["method"] == method) for method in methods]
        parts += [f"## {kind}", "", f"| figure | {' | '.join(methods)} |", "| --- " * (len(methods) + 1) + "|"]
        parts.append(f"| edits | {' | '.join(map(str, edits))} |")
        for figure in dict.fromkeys(line["figure"] for line in mine):
            parts.append(f"| {figure} | {' | '.join(_cell(cells.get((method, figure))) for method in methods)} |")
        parts.append("")
    return "\n".join([*parts, "Mean over edits (standard deviation of the clips' means).", ""])


def _cell(line: Mapping[str, Any] | None) -> str:
    if line is None:
        return ""
    spread = "" if math.isnan(line["spread"]) else f" ({line['spread']:.3g})"
    return f"{line['mean']:.4g}{spread}"


def write_tables(output: Path, scored: Sequence[Scored], report: Mapping[str, Any]) -> str:
    """Write table.md, table.csv (a line an edit), summary.csv and table.json; return the Markdown."""
    lines = summary(scored)
    text = markdown(lines)
    results.write_whole(output / "table.md", text)
    figures = list(dict.fromkeys(name for each in scored for name in each.figures))
    cells = io.StringIO(newline="")
    table = csv.writer(cells)
    table.writerow(["method", "split", "video", "name", "kind", "source", "edit", *figures])
    for each in scored:
        row = each.row
        head = [each.method, row.split, row.video, row.name, row.kind, row.source, row.edit]
        table.writerow([*head, *(each.figures.get(name, "") for name in figures)])
    results.write_whole(output / "table.csv", cells.getvalue())
    means = io.StringIO(newline="")
    table = csv.writer(means)
    columns = ["method", "kind", "figure", "mean", "spread", "edits", "clips"]
    table.writerow(columns)
    table.writerows([line[name] for name in columns] for line in lines)
    results.write_whole(output / "summary.csv", means.getvalue())
    plain = [{key: None if isinstance(v, float) and math.isnan(v) else v for key, v in line.items()} for line in lines]
    results.write_whole(output / "table.json", json.dumps({**report, "summary": plain}, indent=1) + "\n")
    return text


def rank_correlation(scored: Sequence[Scored], labels: Mapping[tuple[str, str, str], float]) -> dict[str, float]:
    """Return Spearman's correlation of each figure with people's labels by (method, video, edit), -1..1.

    Edits without a label or without the figure are left out; a figure needs three.
    """
    from scipy.stats import spearmanr

    found = {}
    for figure in dict.fromkeys(name for each in scored for name in each.figures):
        pairs = [
            (each.figures[figure], labels[key])
            for each in scored
            if figure in each.figures
            and math.isfinite(each.figures[figure])
            and (key := (each.method, each.row.video, each.row.edit)) in labels
        ]
        columns = list(zip(*pairs, strict=True))
        if len(pairs) >= 3 and all(len(set(column)) > 1 for column in columns):
            found[figure] = float(spearmanr(*columns).statistic)
    return found


def read_labels(file: Path) -> dict[tuple[str, str, str], float]:
    """Read people's labels from a csv with the columns method, video, edit and label; several are averaged.

    ``edit`` is the sentence. Raises ValueError with the line of a row that cannot be read.
    """
    table = read_table(file.read_bytes().decode("utf-8-sig"))
    found: dict[tuple[str, str, str], list[float]] = {}
    for line, cells in table.rows:
        try:
            label = float(cells["label"].replace(",", "."))  # type: ignore[index]
            key = (cells["method"], cells["video"], " ".join(cells["edit"].split()))  # type: ignore[index]
            if not math.isfinite(label):
                raise ValueError("no number")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file}:{line}: it needs method, video, edit and label") from error
        found.setdefault(key, []).append(label)
    return {key: statistics.fmean(values) for key, values in found.items()}
