"""Tell good ways of editing from bad ones: edits of clips with known motion, measured and compared over the clips."""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import clips
import numpy as np
import study
import torch
import verdicts
from clips import CLIPS, KINDS, Clip, Edit
from PIL import Image
from study import COMPARISONS, FULL, MEASURES, METHODS, Method, Settings
from torch import Tensor
from tune_a_video.tav_core.media import pictures
from tune_a_video.tav_core.tiny_sd import model as tiny_sd

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "ablation-output"
# The code that decides what is measured; a change of it makes kept results void.
_DECIDES = (
    *(f"demo/{name}.py" for name in ("world", "checker", "clips", "study")),
    *(f"tav_core/{name}.py" for name in ("attention", "inflate", "invert", "norm", "pipeline", "sample", "schedule")),
    *(f"tav_core/{name}.py" for name in ("temporal", "unet")),
    *(f"tav_core/{folder}/*.py" for folder in ("control", "evaluation", "host", "motion", "tiny_sd", "tuning")),
)
# Edits of each clip that its contact sheet shows.
_SHOWN = 3

# The settings that --choose tries.
TUNE_STEPS, LEARNING_RATES, GUIDANCES = (60, 120), (1e-4, 3e-4, 1e-3), (3.0, 5.0, 7.5)

# The shortened study: other clips than those of the table, one kind of edit, fewer steps.
QUICK_CLIPS = ("line", "arc", "long bounce", "scale", "zoom", "squash", "circle", "pair")
QUICK_SETTINGS = Settings(tune_steps=40, ddim_steps=10)
QUICK_KINDS = ("object, patterned",)
QUICK_FRAMES = 6
# From noise that is half each frame's own, only attention between frames can make looks agree: that shows what ST-Attn
# is worth on few clips.
_HALF_FRESH, _HALF_FRESH_PER_FRAME = study.HALF_FRESH
QUICK_METHODS = (FULL, *study.HALF_FRESH, *(each for each in METHODS if each.name == "without inversion"))
QUICK_CLAIMS: tuple[verdicts.Claim, ...] = (
    (_HALF_FRESH_PER_FRAME.name, _HALF_FRESH.name, ("look distance",)),
    ("without inversion", FULL.name, ("path, px off",)),
)


@dataclass(frozen=True)
class Plan:
    """The edits that are made and measured, and the folder in which the results are kept.

    ``edits``: at most this many ``kinds`` of each clip, in their order.
    """

    clips: tuple[Clip, ...]
    methods: tuple[Method, ...]
    settings: Settings
    weights: Path
    output: Path
    kinds: tuple[str, ...] = KINDS
    edits: int = len(KINDS)
    seeds: int = 1

    @cached_property
    def fingerprint(self) -> str:
        """Hash the weights, and the code that decides; not its comments."""
        digest = hashlib.sha256(self.weights.read_bytes())
        for path in sorted(path for pattern in _DECIDES for path in ROOT.glob(pattern)):
            digest.update(ast.dump(ast.parse(path.read_text(encoding="utf-8"))).encode())
        return digest.hexdigest()

    @property
    def jobs(self) -> list[tuple[Clip, int]]:
        """Return all pairs of a clip and a seed, the first seed of every clip first."""
        return [(clip, seed) for seed in range(self.seeds) for clip in self.clips]

    def edits_of(self, clip: Clip) -> list[Edit]:
        """Return the edits that are made of a clip."""
        return [edit for edit in clips.edits(clip) if edit.kind in self.kinds][: self.edits]

    def asked(self, clip: Clip, seed: int) -> list[tuple[Method, Edit]]:
        """Return all edits of a clip and a seed. A method that draws nothing is the same for every seed."""
        return [
            (method, edit)
            for method in self.methods
            if method.seeded or seed == 0
            for edit in self.edits_of(clip)
            if not method.kinds or edit.kind in method.kinds
        ]

    def key(self, clip: Clip, method: Method, edit: Edit) -> str:
        """Hash what decides a row beside the fingerprint, the clip's name and the seed."""
        decides = [asdict(self.settings), method.recipe, clip.prompt, edit.kind, edit.prompt, len(clip.scenes)]
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:20]

    def kept(self, clip: Clip, seed: int) -> dict[str, dict[str, Any]]:
        """Return the rows that are kept of a clip and a seed, by their keys."""
        file = self._file(clip, seed)
        content = json.loads(file.read_text()) if file.exists() else {}
        return content["rows"] if content.get("fingerprint") == self.fingerprint else {}

    def keep(self, clip: Clip, seed: int, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """Write the rows of a clip and a seed, whole or not at all."""
        file = self._file(clip, seed)
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps({"fingerprint": self.fingerprint, "rows": rows}))
        os.replace(temporary, file)

    def missing(self, clip: Clip, seed: int) -> list[tuple[Method, list[Edit]]]:
        """Return the edits by method that no row is kept of."""
        kept = self.kept(clip, seed)
        found: dict[Method, list[Edit]] = {}
        for method, edit in self.asked(clip, seed):
            if self.key(clip, method, edit) not in kept:
                found.setdefault(method, []).append(edit)
        return list(found.items())

    def rows(self) -> list[dict[str, Any]]:
        """Return all rows that are kept of this plan, with the names of clip, seed, edit and method."""
        found = []
        for clip, seed in self.jobs:
            kept = self.kept(clip, seed)
            for method, edit in self.asked(clip, seed):
                row = kept.get(self.key(clip, method, edit))
                if row is not None:
                    names = {"clip": clip.name, "seed": seed, "edit": edit.kind, "method": method.name}
                    found.append({**names, **row})
        return found

    def strip(self, clip: Clip, method: Method, edit: Edit) -> Path:
        """Return the picture of an edit's frames, side by side."""
        return self.output / "frames" / f"{clip.name}-{self.key(clip, method, edit)}.png"

    def _file(self, clip: Clip, seed: int) -> Path:
        return self.output / f"{clip.name}-{seed}.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the size of the study, and what is compared."""
    parser.add_argument("--quick", action="store_true", help="a small study of its own; fails if a claim does not hold")
    parser.add_argument(
        "--break",
        dest="broken",
        choices=[ablation for ablation, *_ in QUICK_CLAIMS],
        metavar="ABLATION",
        help="put this ablation in the place of what it is held against, to see that --quick fails: "
        + "; ".join(ablation for ablation, *_ in QUICK_CLAIMS),
    )
    parser.add_argument("--weights", type=Path, default=tiny_sd.WEIGHTS, help="file of the demo's model")
    parser.add_argument("--compare", choices=list(COMPARISONS), default="ablations")
    parser.add_argument("--choose", action="store_true", help="choose settings on clips that are not held out")
    parser.add_argument("--on", choices=["held out", "first", "all"], help="clips; default: held out, of a length all")
    parser.add_argument("--clips", type=int, default=len(CLIPS), help="at most this many")
    parser.add_argument("--edits", type=int, default=len(KINDS), help="kinds of edits of each clip, at most this many")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, metavar="KIND", help="; ".join(KINDS))
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=verdicts.LOOKED_AT, metavar="MEASURE",
                        help="measures that methods are compared in where nothing is claimed")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--frames", type=int, default=64, help="clips are thinned to at most this many")
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--workers", type=int, default=1, help="processes that share the clips; Linux and macOS")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for results as they come")


def run(
    quick: bool,
    broken: str | None,
    weights: Path,
    compare: str,
    choose: bool,
    on: str | None,
    clips: int,
    edits: int,
    kinds: Sequence[str],
    measures: Sequence[str],
    seeds: int,
    frames: int,
    workers: int,
    output: Path,
    **settings: Any,
) -> dict[str, Any]:
    """Run the study, write its table and pictures, and return its figures.

    Every result is kept in ``output`` as it comes, and a later run with the same settings, weights and code takes it.
    Raises SystemExit where --quick finds that a claim does not hold.
    """
    if choose:
        chosen_on = _clips("first", clips, frames)
        base = Plan(chosen_on, (), Settings(**settings), weights, output, tuple(kinds), edits, seeds)
        return _choose(base, workers)
    if quick:
        plan = quick_plan(weights, output)
    else:
        methods = COMPARISONS[compare]
        long = compare == "length"
        chosen = _clips(on or ("all" if long else "held out"), clips, frames, study.LEAST_LONG if long else 0)
        plan = Plan(
            chosen, methods, Settings(**settings), weights, output,
            tuple(kinds), edits, seeds,
        )  # fmt: skip
    if broken:
        plan = with_broken_method(plan, broken)
    started = time.monotonic()
    _make([plan], workers)
    name = "quick" if quick else compare
    claimed = QUICK_CLAIMS if quick else verdicts.CLAIMS if compare == "ablations" else ()
    report = {"minutes": round((time.monotonic() - started) / 60, 1), **figures(plan, claimed, measures)}
    markdown = verdicts.table(report)
    (output / f"{name}.md").write_text(markdown)
    (output / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    for clip in plan.clips:
        _contact_sheet(plan, clip, output / f"{name}-{clip.name}.png")
    print(f"\n{markdown}\nTable and pictures: {output}")
    if quick and (wrong := verdicts.failed(report["differences"], QUICK_CLAIMS)):
        raise SystemExit("The method does not do what it should:\n" + "\n".join(wrong))
    return report


def quick_plan(weights: Path, output: Path) -> Plan:
    """Return the plan of the shortened study."""
    clips = tuple(clip.thinned(QUICK_FRAMES) for clip in CLIPS if clip.name in QUICK_CLIPS)
    return Plan(clips, QUICK_METHODS, QUICK_SETTINGS, weights, output, QUICK_KINDS)


def with_broken_method(plan: Plan, ablation: str) -> Plan:
    """Put an ablation in the place of the method that the shortened study holds it against."""
    than = next(than for name, than, _ in QUICK_CLAIMS if name == ablation)
    (broken,) = (method for method in plan.methods if method.name == ablation)
    methods = tuple(broken._replace(name=than) if each.name == than else each for each in plan.methods)
    return replace(plan, methods=methods)


def figures(plan: Plan, claimed: Sequence[verdicts.Claim], measures: Sequence[str]) -> dict[str, Any]:
    """Return what the kept rows say. Without claims every method is held against the full one."""
    unseeded = {method.name for method in plan.methods if not method.seeded}
    rows = verdicts.with_all_seeds(plan.rows(), unseeded, plan.seeds)
    return {
        "clips": [clip.name for clip in plan.clips],
        "kinds": [kind for kind in KINDS if any(row["edit"] == kind for row in rows)],
        "seeds": plan.seeds,
        "settings": asdict(plan.settings),
        "summary": verdicts.summary(rows),
        "by_kind": verdicts.by_kind(rows),
        "side": "one-sided" if claimed else "two-sided",
        "differences": verdicts.claims(rows, claimed) if claimed else verdicts.explore(rows, measures),
        "repeats": verdicts.repeats(rows),
        "headroom": verdicts.headroom(rows),
        "rows": rows,
    }


def _clips(on: str, most: int, frames: int, least: int = 0) -> tuple[Clip, ...]:
    """Choose at most ``most`` clips of at least ``least`` frames, and thin them to at most ``frames``."""
    chosen = [clip for clip in CLIPS if on == "all" or clip.held_out == (on == "held out")]
    chosen = [clip for clip in chosen if len(clip.scenes) >= least]
    return tuple(clip.thinned(frames) for clip in chosen[:most])


def _choose(base: Plan, workers: int) -> dict[str, Any]:
    """Try the settings of a small grid with the full method; return the scores, the best one first."""
    methods = tuple(FULL._replace(name=f"guidance {guidance:g}", guidance=guidance) for guidance in GUIDANCES)
    plans = [
        replace(base, methods=methods, settings=replace(base.settings, tune_steps=steps, learning_rate=rate))
        for steps in TUNE_STEPS
        for rate in LEARNING_RATES
    ]
    _make(plans, workers)
    scores = []
    for plan in plans:
        rows = plan.rows()
        for method in methods:
            mine = [study.score(row) for row in rows if row["method"] == method.name]
            tried = replace(plan.settings, guidance=method.guidance)
            scores.append({**asdict(tried), "score": float(np.nanmean(mine))})
    scores.sort(key=lambda each: -each["score"])
    lines = [", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in each.items()) for each in scores]
    clips = [clip.name for clip in base.clips]
    markdown = f"Settings on {', '.join(clips)}, {base.seeds} seeds, the best first.\n\n" + "".join(
        f"- {line}\n" for line in lines
    )
    (base.output / "choose.md").write_text(markdown)
    print(f"\n{markdown}")
    return {"clips": clips, "seeds": base.seeds, "scores": scores}


def _make(plans: Sequence[Plan], workers: int) -> None:
    """Make the edits that are missing."""
    (plans[0].output / "frames").mkdir(parents=True, exist_ok=True)
    threads, started = torch.get_num_threads(), time.monotonic()

    def work(mine: Sequence[tuple[Plan, Clip, int]]) -> None:
        torch.set_num_threads(max(threads // workers, 1))
        with torch.inference_mode():
            parts = tiny_sd.load(plans[0].weights)
            for plan, clip, seed in mine:
                finish(plan, parts, clip, seed, lambda text: print(text, flush=True))
                print(f"{clip.name}, seed {seed}: {time.monotonic() - started:.0f} s", flush=True)

    # One clip and seed lies in one file, so that one process has all plans of it.
    jobs: dict[tuple[str, int], list[tuple[Plan, Clip, int]]] = {}
    for plan in plans:
        for clip, seed in plan.jobs:
            if plan.missing(clip, seed):
                jobs.setdefault((clip.name, seed), []).append((plan, clip, seed))
    _share(work, list(jobs.values()), workers)


def finish(plan: Plan, parts: tuple[Any, Any, Any], clip: Clip, seed: int, say: Callable[[str], None]) -> None:
    """Make and measure the edits of a clip and a seed that are missing, and keep each as it comes."""
    wanted = plan.missing(clip, seed)
    source = study.source_of(clip, parts[2])
    shown = plan.edits_of(clip)[:_SHOWN]
    rows = plan.kept(clip, seed)
    for made in study.edited_videos(parts, clip, wanted, plan.settings, seed):
        measured = study.measure(source, made.frames, clip, made.edit)
        rows[plan.key(clip, made.method, made.edit)] = {**measured, "cpu_seconds": round(made.seconds, 2)}
        plan.keep(clip, seed, rows)
        if seed == 0 and any(edit.kind == made.edit.kind for edit in shown):
            _save_strip(made.frames, plan.strip(clip, made.method, made.edit))
        say(f"  {clip.name}, seed {seed}, {made.edit.kind}: {made.method.name}, {made.seconds:.0f} s of CPU")


def _save_strip(frames: Tensor, path: Path) -> None:
    pixels = (torch.cat(list(frames), dim=1) * 255).round().byte().numpy()
    Image.fromarray(pixels).save(path)


def _contact_sheet(plan: Plan, clip: Clip, path: Path) -> None:
    """Draw a clip and its first edits by every method, as far as their frames are kept."""
    rows = [(f"source: {clip.prompt}", clip.images())]
    for edit in plan.edits_of(clip)[:_SHOWN]:
        for method in plan.methods:
            strip = plan.strip(clip, method, edit)
            if strip.exists():
                pixels = torch.from_numpy(np.asarray(Image.open(strip), np.float32)) / 255
                frames = torch.stack(pixels.split(pixels.shape[0], dim=1))
                rows.append((f"{method.name}: {edit.prompt}", frames))
    sheet = (pictures.contact_sheet(rows, 64)[0] * 255).round().byte().numpy()
    Image.fromarray(sheet).save(path)


def _share(work: Callable[[list[Any]], None], jobs: Sequence[Iterable[Any]], workers: int) -> None:
    """Share groups of jobs among processes: a small model gains more from processes than from threads."""
    if not jobs:
        return None
    if workers == 1 or len(jobs) < 2:
        return work([job for group in jobs for job in group])
    # Forked before PyTorch has started any thread of its own.
    context = multiprocessing.get_context("fork")
    shares = [[job for group in jobs[index::workers] for job in group] for index in range(workers)]
    processes = [context.Process(target=work, args=(share,)) for share in shares if share]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("A worker failed; its error is above. What is finished is kept: run the same command again.")
