"""Edit all clips of a data set, score the edits, and show them side by side.

PATH is a folder or a list of edits: LOVEU-TGVE 2023, Tune-A-Video, FateZero, Video-P2P or V2VBench yaml, EditBoard csv,
FiVE or DAVIS-Edit json, or a csv with the columns video, source, edit and optionally split, name, kind, mask, words.
The same command continues a study that was cut off.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from tune_a_video.tav_core import host
from tune_a_video.tav_core.errors import Refusal
from tune_a_video.tav_core.tiny_sd import model as tiny_sd

from . import drawn, jobs, layouts, local, page, ray_cluster, results, scoring, servers, sources

OUTPUT = Path(__file__).resolve().parents[2] / "study-output"
# The demo's model, and Stable Diffusion as the paper has it.
_DEMO = {"frames": 8, "size": 64, "tune_steps": 120, "learning_rate": 3e-4, "ddim_steps": 20, "guidance": 5.0}
_PAPER = {"frames": 24, "size": 512, "tune_steps": 500, "learning_rate": 3e-5, "ddim_steps": 50, "guidance": 12.5}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the data set, the settings and where to run."""
    parser.add_argument("path", type=Path, metavar="PATH", help="folder or file with the list of edits")
    parser.add_argument("--draw", action="store_true", help="first draw the demo's clips and edits into PATH")
    parser.add_argument("--videos", type=Path, nargs="+", default=[], metavar="FOLDER", help="where clips may lie, too")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the study")
    parser.add_argument("--list", action="store_true", help="read and report the rows, and edit nothing")
    parser.add_argument("--clips", type=int, default=0, help="take only the first clips")
    parser.add_argument("--methods", nargs="+", choices=jobs.METHODS, default=[jobs.TUNED, jobs.FRAME_BY_FRAME])
    parser.add_argument(
        "--also", nargs="+", default=[], metavar="NAME=FOLDER", help="score edits of other systems in the same layout"
    )
    parser.add_argument(
        "--checkpoint",
        default="",
        help="a checkpoint: a file, or with --on servers its name there; default: the demo's model",
    )
    parser.add_argument("--clip-vision", type=Path, help="a CLIP Vision file, for the figures that need CLIP")
    parser.add_argument("--clip", type=Path, help="the text half of the same CLIP, with its projection")
    parser.add_argument(
        "--frames", type=int, help="frames a clip at most; default: as the list says, else 24 (demo: 8)"
    )
    parser.add_argument("--labels", type=Path, help="csv of people's labels: method, video, edit, label")
    parser.add_argument("--size", type=int, help="side of the frames in pixels")
    parser.add_argument("--steps", type=int, dest="tune_steps", help="tuning steps")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--ddim-steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--on",
        nargs="+",
        default=["local"],
        metavar="WHERE",
        help="local: processes here; servers HOST:PORT ...: running ComfyUIs; ray [ADDRESS]: a Ray cluster",
    )
    parser.add_argument("--workers", type=int, help="processes or actors; default: one a GPU, else one")
    parser.add_argument(
        "--patience", type=float, default=servers.RETURN, help="seconds after which a silent server is left out"
    )


def run(path: Path, videos: Sequence[Path], output: Path, **options: Any) -> dict[str, Any]:
    """Run the study and return its report. Exits with a message where it cannot, or where edits are missing."""
    try:
        return _run(path, videos, output, options)
    except KeyboardInterrupt:
        raise SystemExit("Interrupted; the same command continues.") from None


def _run(path: Path, videos: Sequence[Path], output: Path, options: dict[str, Any]) -> dict[str, Any]:
    if options["draw"]:
        drawn.write(path)
    try:
        reading = layouts.read_dataset(path, videos)
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from error
    for line in reading.broken:
        print(f"left out: {line}", file=sys.stderr)
    rows = _first_clips(reading.rows, options["clips"])
    clips = len({results.clip_id(row) for row in rows})
    print(f"{len(rows)} edits of {clips} clips; {len(reading.broken)} rows left out", flush=True)
    report: dict[str, Any] = {"rows": len(rows), "clips": clips, "left_out": reading.broken}
    if options["list"]:
        for row in rows:
            print(f"{row.split}/{row.video}/{row.name} [{row.kind}] {row.source} -> {row.edit}")
        return report
    if not rows:
        raise SystemExit("There is nothing to edit.")
    settings = _settings(options)
    _check_files(options)
    with _only_one(output):
        _check_same_study(output, settings)
        results.remove_unfinished(output)
        return _study(output, rows, settings, options, report)


def _study(
    output: Path, rows: list[layouts.Row], settings: jobs.Settings, options: dict[str, Any], report: dict[str, Any]
) -> dict[str, Any]:
    rows, unreadable = _with_sources(output, rows, settings)
    # A clip's tuning comes first, and all its edits by one method in turn: a server keeps its last inversion only.
    methods = sorted(dict.fromkeys(options["methods"]), key=jobs.METHODS.index)
    _remove_changed(output, methods, rows)
    todo = [
        job
        for clip in dict.fromkeys(results.clip_id(row) for row in rows)
        for method in methods
        for row in rows
        if results.clip_id(row) == clip and not (job := _job(output, method, row)).result.is_dir()
    ]
    started = time.monotonic()
    outcome = jobs.Outcome()
    if todo:
        print(f"{len(todo)} edits to make, {len(rows) * len(methods) - len(todo)} are there", flush=True)
        workers, shared = _workers(output, settings, options)
        outcome = jobs.share(todo, workers, shared, _say(output, started))
    failed = [f"{_shown(output, job)}: {reason}" for job, reason in outcome.failed]
    systems = {method: output / "results" / method for method in methods}
    systems |= dict(named_folder(text) for text in options["also"])
    for method in methods:
        results.write_editboard(output, method, rows)
    clip = _clip(settings, options["clip_vision"], options["clip"])
    scored, missing = scoring.score_all(output, systems, rows, clip, lambda line: print(line, flush=True))
    if options["labels"]:
        report["rank_correlation"] = scoring.rank_correlation(scored, _labels(options["labels"]))
        for figure, value in sorted(report["rank_correlation"].items(), key=lambda pair: -abs(pair[1])):
            print(f"rank correlation with people: {figure} {value:+.3f}")
    report |= {
        "settings": settings.to_json(),
        "edits_made": outcome.made,
        "seconds": round(time.monotonic() - started, 1),
        "workers_died": outcome.deaths,
        "workers_lost": outcome.lost,
        "failed": failed,
        "missing": missing,
        "unreadable": unreadable,
        "results_sha256": results.digest(
            [results.edit_folder(output, method, row) for method in methods for row in rows]
        ),
    }
    print(f"\n{scoring.write_tables(output, scored, report)}")
    print(f"Edits: SHA-256 {report['results_sha256']}\nTable and page: {page.write(output, systems, rows, scored)}")
    for line in (*unreadable, *failed, *missing):
        print(f"missing: {line}", file=sys.stderr)
    if outcome.left:
        lost = "; ".join(f"{worker}: {reason}" for worker, reason in outcome.lost.items())
        raise SystemExit(f"No worker was left for {outcome.left} edits ({lost}). The same command makes them.")
    if failed:
        raise SystemExit(f"{len(failed)} edits could not be made, and are named above. The same command tries again.")
    return report


def _check_files(options: dict[str, Any]) -> None:
    """Exit, before hours of work, for files and folders that are needed after it and are not there."""
    if bool(options["clip_vision"]) != bool(options["clip"]):
        raise SystemExit("--clip-vision and --clip belong together")
    files = {name: options[name] for name in ("clip_vision", "clip", "labels") if options[name]}
    if options["checkpoint"] and options["on"][0] != "servers":
        files["checkpoint"] = Path(options["checkpoint"])
    for name, file in files.items():
        if not file.is_file():
            raise SystemExit(f"--{name.replace('_', '-')}: {file}: no such file")
    for text in options["also"]:
        named_folder(text)
    if options["labels"]:
        _labels(options["labels"])


def _labels(file: Path) -> dict[tuple[str, str, str], float]:
    try:
        return scoring.read_labels(file)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--labels: {error}") from error


def _first_clips(rows: list[layouts.Row], most: int) -> list[layouts.Row]:
    kept = list(dict.fromkeys(results.clip_id(row) for row in rows))[: most or None]
    return [row for row in rows if results.clip_id(row) in kept]


def _settings(options: dict[str, Any]) -> jobs.Settings:
    defaults = _PAPER if options["checkpoint"] else _DEMO
    chosen = {name: value if options[name] is None else options[name] for name, value in defaults.items()}
    size = chosen.pop("size")
    if size < 16 or size % 8:
        raise SystemExit(f"--size: {size} is not a multiple of 8 of at least 16")
    if options["frames"] is None and options["checkpoint"]:
        chosen["frames"] = 0
    return jobs.Settings(options["checkpoint"], width=size, height=size, seed=options["seed"], **chosen)


def _with_sources(
    output: Path, rows: Sequence[layouts.Row], settings: jobs.Settings
) -> tuple[list[layouts.Row], list[str]]:
    """Lay down frames and masks; return the rows whose clips could be read, and a line for each other one."""
    kept, unreadable = [], []
    for row in rows:
        frames = settings.frames or (0 if row.count else int(_PAPER["frames"]))
        try:
            sources.keep(output, row, frames, (settings.width, settings.height))
            kept.append(row)
        except (Refusal, OSError, ValueError) as error:
            unreadable.append(f"{row.place}: {error}")
    return kept, unreadable


def _job(output: Path, method: str, row: layouts.Row) -> jobs.Job:
    clip = results.clip_id(row)
    folders = (output / "source" / clip, output / "work" / clip, results.edit_folder(output, method, row))
    places = [folder.resolve() for folder in folders]
    return jobs.Job(clip, method, row.source, row.edit, *places, jobs.preset_of(row.kind))


def _remove_changed(output: Path, methods: Sequence[str], rows: Sequence[layouts.Row]) -> None:
    """Remove edits that were made from another sentence or other frames than their rows have now."""
    file = output / "edits.json"
    known = json.loads(file.read_text()) if file.is_file() else {}
    for method in methods:
        for row in rows:
            folder = results.edit_folder(output, method, row)
            name = folder.relative_to(output / "results").as_posix()
            made_from = [row.source, row.edit, row.first, row.step, row.count]
            made_from += [jobs.preset_of(row.kind)] if method == jobs.CONTROLLED else []
            if known.get(name, made_from) != made_from and folder.is_dir():
                print(f"{name} was made from {known[name][1]!r}; it is made again", flush=True)
                shutil.rmtree(folder)
            known[name] = made_from
    results.write_whole(file, json.dumps(known, indent=0) + "\n")


def _workers(output: Path, settings: jobs.Settings, options: dict[str, Any]) -> tuple[Sequence[jobs.Worker], bool]:
    """Return the workers that --on names, and whether they see each other's tunings."""
    where, *rest = options["on"]
    threads = torch.get_num_threads()
    if where == "servers":
        if not rest:
            raise SystemExit("--on servers needs addresses: --on servers HOST:PORT ...")
        try:
            addresses = {servers.url_of(address): address for address in rest}.values()
            return [servers.ServerWorker(each, settings, options["patience"]) for each in addresses], False
        except ValueError as error:
            raise SystemExit(f"--on servers: {error}") from error
    if where == "ray" and len(rest) < 2:
        ray = ray_cluster.connect(rest[0] if rest else "")
        return ray_cluster.start_actors(
            ray,
            options["workers"],
            settings,
            _comfyui(),
            threads,
            lambda line: print(line, file=sys.stderr, flush=True),
        ), True
    if where != "local" or rest:
        raise SystemExit("--on is local, servers HOST:PORT ... or ray [ADDRESS]")
    devices = [str(i) for i in range(torch.cuda.device_count())]
    count = options["workers"] or len(devices) or 1
    return [
        local.LocalWorker(
            f"worker-{i}",
            settings,
            output / "logs",
            max(threads // count, 1),
            _comfyui(),
            devices[i % len(devices)] if devices else None,
        )
        for i in range(count)
    ], True


def _comfyui() -> Path | None:
    """Return the root of the ComfyUI in this process, None for the engine from PyPI."""
    import comfy.model_management

    root = Path(comfy.model_management.__file__).resolve().parent.parent
    return root if (root / "main.py").is_file() else None


def _clip(settings: jobs.Settings, vision: Path | None, text: Path | None) -> scoring.Clip | None:
    """Return the CLIP to score with: the given files, else the demo's own for the demo's model."""
    if vision and text:
        import comfy.clip_vision
        import comfy.sd

        images = comfy.clip_vision.load(str(vision))
        sentences = comfy.sd.load_clip([str(text)], clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION)
        name = f"{vision.name} {text.name}"
    elif settings.checkpoint:
        return None
    else:
        images, (_, sentences, _), name = tiny_sd.load_vision(), tiny_sd.load(), "demo"
    return scoring.Clip(
        name, lambda frames: host.image_embeddings(images, frames), lambda line: host.text_embedding(sentences, line)
    )


def named_folder(text: str) -> tuple[str, Path]:
    """Split NAME=FOLDER. Exits for a folder that is not there and for a name that the study uses itself."""
    name, equals, folder = text.partition("=")
    if not equals or not name or not Path(folder).is_dir() or name in jobs.METHODS:
        raise SystemExit(f"--also: {text!r} is not NAME=FOLDER with a folder that is there and a name of its own")
    return name, Path(folder)


def _say(output: Path, started: float) -> Any:
    def say(worker: str, job: jobs.Job, event: str) -> None:
        print(f"{time.monotonic() - started:7.1f} s  {worker}: {_shown(output, job)}: {event}", flush=True)

    return say


def _shown(output: Path, job: jobs.Job) -> str:
    return job.result.relative_to((output / "results").resolve()).as_posix()


def _check_same_study(output: Path, settings: jobs.Settings) -> None:
    """Write the settings into a new study's folder. Exits if the folder has edits of others."""
    file, wanted = output / layouts.STUDY, settings.to_json()
    if file.exists() and json.loads(file.read_text()) != wanted:
        raise SystemExit(f"--output: {output} holds a study with other settings ({file.name}). Choose another folder.")
    results.write_whole(file, json.dumps(wanted, indent=1) + "\n")


@contextmanager
def _only_one(output: Path) -> Iterator[None]:
    """Hold the study's lock. Exits if another command works in the folder."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / ".lock").open("w") as lock:
        with suppress(ImportError):  # Windows has no such lock
            import fcntl

            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise SystemExit(f"--output: another command works in {output}.") from None
        yield
