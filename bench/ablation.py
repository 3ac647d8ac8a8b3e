"""Run the paper's ablations on drawn clips with the demo's model: what each part of the method is worth."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import study
import torch
from clips import CLIPS, Clip
from clips import edits as edits_of
from PIL import Image
from torch import Tensor
from tune_a_video.tav_core.media import pictures
from tune_a_video.tav_core.tiny_sd import model as tiny_sd

# Measure -> whether a larger or a smaller value is better.
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
# (ablation, method, measures in which the ablation must be worse), from the paper's section 5.3 and figure 8.
CLAIMS = (
    ("without ST-Attn", FULL, ("frame consistency", "flicker", "warp error")),
    ("neither inversion nor ST-Attn", "without inversion", ("frame consistency", "flicker")),
    ("without inversion", FULL, ("trajectory", "motion alignment")),
    ("without tuning", FULL, ("trajectory", "attributes", "motion alignment", "warp error")),
    ("frame by frame", FULL, ("frame consistency", "warp error", "flicker")),
)
OUTPUT = Path(__file__).resolve().parent.parent / "ablation-output"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the size of the study."""
    parser.add_argument("--quick", action="store_true", help="one clip, one edit, one seed")
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--edits", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="processes that share the clips; Linux and macOS")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for results as they come")


def run(quick: bool, clips: int, edits: int, seeds: int, workers: int, output: Path) -> dict[str, Any]:
    """Run the study, write its table and pictures, and return its figures.

    Each clip's results are kept in ``output`` as they come, and a later run with the same settings takes them.
    """
    if quick:
        clips = edits = seeds = 1
    settings = study.Settings()
    output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    pairs = [(clip, seed) for seed in range(seeds) for clip in CLIPS[:clips]]
    weights = hashlib.sha256(tiny_sd.WEIGHTS.read_bytes()).hexdigest()
    threads = torch.get_num_threads()

    def known(clip: Clip, seed: int) -> tuple[Path, dict[str, Any], list[dict[str, Any]] | None]:
        """Return a result's file, its key (all that decides it), and its rows if the file has that key."""
        prompts = [clip.prompt, *(edit.prompt for edit in edits_of(clip)[:edits])]
        key = {"settings": vars(settings), "weights": weights, "prompts": prompts}
        file = output / f"{clip.name}-{seed}.json"
        content = json.loads(file.read_text()) if file.exists() else {}
        return file, key, content["rows"] if content.get("key") == key else None

    def work(mine: Sequence[tuple[Clip, int]]) -> None:
        torch.set_num_threads(max(threads // workers, 1))
        with torch.inference_mode():
            parts, embed = tiny_sd.load(), tiny_sd.embedder()
            for clip, seed in mine:
                file, key, _ = known(clip, seed)
                pictured = output / f"{clip.name}.png" if seed == 0 else None
                rows = _one(parts, clip, settings, seed, edits, embed, pictured)
                temporary = file.with_suffix(".tmp")
                temporary.write_text(json.dumps({"key": key, "rows": rows}))
                os.replace(temporary, file)
                print(f"{clip.name}, seed {seed}: {time.monotonic() - started:.0f} s", flush=True)

    _share(work, [pair for pair in pairs if known(*pair)[2] is None], workers)
    rows = [row for pair in pairs for row in known(*pair)[2] or ()]
    fixed = {method.name for method in study.METHODS if not method.seeded}
    same = [row for row in rows if row["method"] in fixed]
    rows += [{**row, "seed": seed} for seed in range(1, seeds) for row in same]
    report = {
        "clips": [clip.name for clip in CLIPS[:clips]],
        "edits": edits,
        "seeds": seeds,
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
    (output / "ablation.md").write_text(table(report))
    print(f"\n{table(report)}\nTable and pictures: {output}")
    return report


def _share(work: Callable[[Sequence[Any]], None], jobs: Sequence[Any], workers: int) -> None:
    """Share the jobs among processes: a small model gains more from processes than from threads."""
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
    asked = edits_of(clip)[:count]
    # Methods without a random draw give the same result for every seed.
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
    """Return, by method and measure, the mean over all and the standard deviation of the seeds' means."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        found[method] = {}
        for measure in MEASURES:
            by_seed = [
                statistics.fmean([r[measure] for r in mine if r["seed"] == s])
                for s in sorted({r["seed"] for r in mine})
            ]
            found[method][measure] = {"mean": statistics.fmean(by_seed), "spread": _deviation(by_seed)}
    return found


def claims(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Test the paper's claims: return by how much each ablation is worse than the method it is held against.

    Results are compared pair by pair (same clip, edit and seed). The standard error is over clips, which are
    independent; a clip's edits and seeds are not. A difference is significant from two standard errors on.
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
            means = [statistics.fmean(values) for values in by_clip.values()]
            error = _deviation(means) / math.sqrt(len(means)) if len(means) > 1 else 0.0
            found.append(
                {
                    "ablation": method,
                    "than": other,
                    "worse in": measure,
                    "by": statistics.fmean(means),
                    "standard_error": error,
                    "significant": statistics.fmean(means) > 2 * error and statistics.fmean(means) > 0,
                }
            )
    return found


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def table(report: dict[str, Any]) -> str:
    """Return the summary and the claims as Markdown."""
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
