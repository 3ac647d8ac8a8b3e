"""A page of a study that opens from the disk: the table, and each edit beside its source and the other methods."""

from __future__ import annotations

import glob
import hashlib
import html
import json
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tune_a_video.tav_core.media import pictures
from tune_a_video.tav_core.media.encode import save_clip

from . import results, scoring
from .layouts import Row

# Frames smaller than this are enlarged by a whole factor: videos of a few pixels do not play everywhere.
_LEAST_SIDE = 192
_FPS = 8.0

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { margin: 0 auto; max-width: 75rem; padding: 1rem; }
details { margin-bottom: 1rem; }
section { border-top: 1px solid #8884; padding: .5rem 0 1rem; }
video { max-width: 100%; display: block; }
h2 { font-size: 1.1rem; } h3 { font-size: 1rem; margin: .5rem 0; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
td, th { border: 1px solid #8886; padding: .2rem .5rem; text-align: right; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; }
p.source { opacity: .8; margin: 0; }
"""
# Controls of a video that does not play cover a third of it: videos in sight play, and have controls when pointed at.
_SCRIPT = """
const inSight = new IntersectionObserver((entries) => {
  for (const {target, isIntersecting} of entries) {
    if (isIntersecting) target.play().catch(() => { target.controls = true; });
    else target.pause();
  }
});
if (!matchMedia("(prefers-reduced-motion: reduce)").matches)
  for (const video of document.querySelectorAll("video")) {
    video.controls = false;
    video.tabIndex = 0;
    for (const event of ["pointerenter", "focus"]) video.addEventListener(event, () => { video.controls = true; });
    for (const event of ["pointerleave", "blur"]) video.addEventListener(event, () => { video.controls = false; });
    inSight.observe(video);
  }
"""


def write(output: Path, systems: Mapping[str, Path], rows: Sequence[Row], scored: Sequence[scoring.Scored]) -> Path:
    """Write index.html and its videos; return its path. Videos that are newer than their edits are kept."""
    sections = []
    for row in rows:
        shown = {name: place for name, folder in systems.items() if (place := results.find_edit(folder, row))}
        if shown:
            file = _video(output, row, shown)
            sections.append(_section(row, file.relative_to(output).as_posix()))
    lines = scoring.summary(scored)
    whole = [line for line in lines if line["kind"] == "all"]
    by_kind = [line for line in lines if line["kind"] != "all"]
    details = ["<details><summary>By kind of edit</summary>", *_tables(by_kind), "</details>"] if by_kind else []
    body = "\n".join([*_tables(whole), *details, *sections])
    page = (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Edits of a study</title><style>{_STYLE}</style>\n"
        f"<body><h1>Edits of a study</h1>\n{body}\n<script>{_SCRIPT}</script></body></html>\n"
    )
    results.write_whole(output / "index.html", page)
    return output / "index.html"


def _section(row: Row, video: str) -> str:
    title, source, edit = (html.escape(text) for text in (f"{row.video}, {row.kind}", row.source, row.edit))
    return (
        f'<section><h3>{title}: {edit}</h3><p class="source">source: {source}</p>'
        f'<video src="{urllib.parse.quote(video)}" controls loop muted playsinline preload="metadata"></video>'
        "</section>"
    )


def _tables(lines: Sequence[Mapping[str, object]]) -> list[str]:
    """Turn the Markdown tables of a summary into HTML."""
    parts, table = [], False
    for line in scoring.markdown(lines).splitlines():
        if line.startswith("|"):
            cells = [html.escape(cell.strip()) for cell in line.strip("|").split("|")]
            if not table:
                parts.append('<div class="scroll"><table>')
                parts.append(f"<tr><th>{'</th><th>'.join(cells)}</th></tr>")
                table = True
            elif not all(cell == "---" for cell in cells):
                parts.append(f"<tr><td>{'</td><td>'.join(cells)}</td></tr>")
            continue
        if table:
            parts.append("</table></div>")
            table = False
        if line.startswith("## "):
            parts.append(f"<h2>{html.escape(line[3:])}</h2>")
        elif line:
            parts.append(f"<p>{html.escape(line)}</p>")
    return parts


def _video(output: Path, row: Row, shown: Mapping[str, Path]) -> Path:
    systems = json.dumps([(name, str(place)) for name, place in shown.items()])
    folder, made_of = output / "pages" / row.split / row.video, hashlib.sha256(systems.encode()).hexdigest()[:8]
    file = folder / f"{row.name}-{made_of}.mp4"
    for other in folder.glob(f"{glob.escape(row.name)}-{'[0-9a-f]' * 8}.mp4"):
        if other != file:  # of other systems
            other.unlink()
    newest = max(place.stat().st_mtime for place in shown.values())
    if file.is_file() and file.stat().st_mtime >= newest:
        return file
    source = torch.from_numpy(results.read_frames(output / "source" / results.clip_id(row))).float() / 255
    size = (source.shape[2], source.shape[1])
    clips = [("source", source)]
    for name, place in shown.items():
        try:
            clips.append((name, scoring.load_edit(place, len(source), size)))
        except (OSError, ValueError):
            continue
    factor = -(-_LEAST_SIDE // min(size))
    enlarged = [(name, each.repeat_interleave(factor, 1).repeat_interleave(factor, 2)) for name, each in clips]
    file.parent.mkdir(parents=True, exist_ok=True)
    save_clip(pictures.side_by_side(enlarged), _FPS, file, quality=80)
    return file
