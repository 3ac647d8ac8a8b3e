"""The paper's ablations on drawn clips, with the demo's model: what each part of the method is worth."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import study
import torch
from clips import CLIPS, Clip, edits
from PIL import Image
from torch import Tensor
from tune_a_video.tav_core.media import pictures
from tune_a_video.tav_core.tiny_sd import model as tiny_sd

# Better when larger, or when smaller; what decides is marked with what the paper says of it.
MEASURES = {
    "edit right": "larger",
    "attributes": "larger",
    "trajectory": "smaller",
    "frame consistency": "larger",
    "motion alignment": "larger",
    "warp error": "smaller",
    "flicker": "smaller",
}
FULL = study.METHODS[0].name
# In what an ablation must be worse than another method, as the paper says (section 5.3 and figure 8).
CLAIMS = (
    ("without ST-Attn", FULL, ("frame consistency", "flicker", "warp error")),
    ("neither inversion nor ST-Attn", "without inversion", ("frame consistency", "flicker")),
    ("without inversion", FULL, ("trajectory", "motion alignment")),
    ("without tuning", FULL, ("trajectory", "attributes", "motion alignment", "warp error")),
    ("frame by frame", FULL, ("frame consistency", "warp error", "flicker")),
)
PICTURED = "bounce"


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All clips, edits, methods and seeds that were asked for; results are kept as they come, in a folder."""
    settings = study.Settings()
    clips = CLIPS[: arguments.clips]
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    pairs = [(clip, seed) for seed in range(arguments.seeds) for clip in clips]
    weights = hashlib.sha256(tiny_sd.WEIGHTS.read_bytes()).hexdigest()

    def known(clip: Clip, seed: int) -> tuple[Path, dict[str, Any], list[dict[str, Any]] | None]:
        """A result's file, what it must have been made from, and its rows if it was."""
        prompts = [clip.prompt, *(edit.prompt for edit in edits(clip)[: arguments.edits])]
        key = {"settings": vars(settings), "weights": weights, "prompts": prompts}
        file = output / f"{clip.name}-{seed}.json"
        content = json.loads(file.read_text()) if file.exists() else {}
        return file, key, content["rows"] if content.get("key") == key else None

    def work(mine: Sequence[tuple[Clip, int]]) -> None:
        torch.set_num_threads(max(arguments.threads // arguments.workers, 1))
        with torch.inference_mode():
            parts, embed = tiny_sd.load(), tiny_sd.embedder()
            for clip, seed in mine:
                file, key, _ = known(clip, seed)
                pictured = output / f"{clip.name}.png" if seed == 0 else None
                rows = _one(parts, clip, settings, seed, arguments.edits, embed, pictured)
                temporary = file.with_suffix(".tmp")
                temporary.write_text(json.dumps({"key": key, "rows": rows}))
                os.replace(temporary, file)
                print(f"{clip.name}, seed {seed}: {time.monotonic() - started:.0f} s", flush=True)

    missing = [pair for pair in pairs if known(*pair)[2] is None]
    _share(work, missing, arguments.workers)
    rows = [row for pair in pairs for row in known(*pair)[2] or ()]
    fixed = {method.name for method in study.METHODS if not method.seeded}
    same = [row for row in rows if row["method"] in fixed]
    rows += [{**row, "seed": seed} for seed in range(1, arguments.seeds) for row in same]
    return {
        "clips": [clip.name for clip in clips],
        "edits": arguments.edits,
        "seeds": arguments.seeds,
        "settings": vars(settings),
        "minutes": round((time.monotonic() - started) / 60, 1),
        "summary": summary(rows),
        "by_edit": {
            kind: summary([row for row in rows if row["edit"] == kind])
            for kind in dict.fromkeys(row["edit"] for row in rows)
        },
        "claims": claims(rows),
        "rows": rows,
    }


def _share(work: Callable[[Sequence[Any]], None], jobs: Sequence[Any], workers: int) -> None:
    """Have ``workers`` processes do the jobs: a small model gains more from them than from threads."""
    if workers == 1 or len(jobs) < 2:
        return work(jobs)
    # Forked before PyTorch has started any thread of its own.
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(jobs[index::workers],)) for index in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("A worker failed; its error is above. What is finished is kept: run the same command again.")


def _one(
    parts: study.Parts,
    clip: Clip,
    settings: study.Settings,
    seed: int,
    count: int,
    embed: Callable[[Tensor], Tensor],
    pictured: Path | None,
) -> list[dict[str, Any]]:
    asked = edits(clip)[:count]
    # What draws nothing is the same for every seed.
    methods = [method for method in study.METHODS if method.seeded or seed == 0]
    videos = study.edited_videos(
        parts, clip, asked, methods, settings, seed, lambda name: print(f"  {clip.name}: {name}", flush=True)
    )
    source = clip.images()
    if pictured is not None:
        shown = asked[0]
        rows = [(f"source: {clip.prompt}", source)]
        rows += [(f"{method}: {shown.prompt}", made[shown.kind]) for method, made in videos.items()]
        sheet = (pictures.contact_sheet(rows)[0] * 255).round().byte().numpy()
        Image.fromarray(sheet).save(pictured)
    return [
        {
            "clip": clip.name,
            "seed": seed,
            "edit": edit.kind,
            "method": method,
            **study.measure(source, made[edit.kind], edit, embed),
        }
        for method, made in videos.items()
        for edit in asked
    ]


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """By method and measure: the mean over all, and how much the seeds' means differ (standard deviation)."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        found[method] = {}
        for measure in MEASURES:
            by_seed = [_mean([r[measure] for r in mine if r["seed"] == s]) for s in sorted({r["seed"] for r in mine})]
            found[method][measure] = {"mean": _mean(by_seed), "spread": _deviation(by_seed)}
    return found


def claims(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whether each ablation is worse than what it takes something away from, in what the paper says.

    Compared pair by pair (the same clip, edit and seed): the mean difference, its standard error over the clips
    (which are independent, where a clip's edits and seeds are not), and whether it is at least two of those.
    """
    by_method: dict[str, dict[Any, dict[str, Any]]] = {}
    for row in rows:
        by_method.setdefault(row["method"], {})[row["clip"], row["seed"], row["edit"]] = row
    found = []
    for method, other, measure in ((*pair, measure) for *pair, measures in CLAIMS for measure in measures):
        if method in by_method and other in by_method:
            sign = 1.0 if MEASURES[measure] == "larger" else -1.0
            by_clip: dict[str, list[float]] = {}
            for place, row in by_method[method].items():
                better = by_method[other][place][measure] - row[measure]
                by_clip.setdefault(row["clip"], []).append(sign * better)
            means = [_mean(values) for values in by_clip.values()]
            error = _deviation(means) / math.sqrt(len(means)) if len(means) > 1 else 0.0
            found.append(
                {
                    "ablation": method,
                    "than": other,
                    "worse in": measure,
                    "by": _mean(means),
                    "standard_error": error,
                    "significant": _mean(means) > 2 * error and _mean(means) > 0,
                }
            )
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _deviation(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    mean = _mean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def table(report: dict[str, Any]) -> str:
    """The summary and the claims as Markdown."""
    names = list(MEASURES)
    lines = [
        f"{len(report['clips'])} clips x {report['edits']} edits x {report['seeds']} seeds; mean (deviation of seeds).",
        "",
        "| method | " + " | ".join(names) + " |",
        "| --- |" + " --- |" * len(names),
    ]
    for method, values in report["summary"].items():
        cells = [f"{values[name]['mean']:.3f} ({values[name]['spread']:.3f})" for name in names]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| ablation | than | is worse in | by (standard error over clips) | significant |",
        "| --- | --- | --- | --- | --- |",
    ]
    for claim in report["claims"]:
        verdict = "yes" if claim["significant"] else "no"
        by = f"{claim['by']:.3f} ({claim['standard_error']:.3f})"
        lines.append(f"| {claim['ablation']} | {claim['than']} | {claim['worse in']} | {by} | {verdict} |")
    return "\n".join(lines) + "\n"
