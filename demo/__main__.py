"""python demo: one clip, one tuning, four edits, plain and controlled; videos and measured table in demo-output/.

python demo train: trains the demo's model from nothing. python demo check: has it draw 300 prompts and judges them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS_FOLDER = ROOT / "tav_core" / "tiny_sd" / "weights"
sys.path.append(str(ROOT / "tools"))

import engine  # noqa: E402


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python demo", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    top.add_argument("--engine", choices=["auto", "pypi"], default="auto", help="pypi: ignore any ComfyUI")
    top.add_argument("--output", type=Path, default=ROOT / "demo-output", help="folder for the results")
    top.add_argument("--again", action="store_true", help="even if the results are there already")
    commands = top.add_subparsers(dest="command")
    train = commands.add_parser("train", help="train the demo's model")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--scenes", type=int, default=60_000)
    train.add_argument("--batch", type=int, default=32)
    train.add_argument("--minutes", type=float, help="end each cycle after this time")
    train.add_argument("--autoencoder-steps", type=int, help="default: 2500, and none with --start")
    train.add_argument("--vision-steps", type=int, help="of the CLIP image encoder")
    train.add_argument(
        "--steps",
        type=int,
        nargs="+",
        default=[4500, 5000],
        help="of the UNet and the text model, one number for each cycle of the learning rate",
    )
    train.add_argument("--start", type=Path, help="finished weights to go on from; --seed then counts the cycle")
    train.add_argument("--device", default="cuda" if _has_cuda() else "cpu")
    train.add_argument("--threads", type=int, default=os.cpu_count())
    train.add_argument("--to", type=Path, default=WEIGHTS_FOLDER, help="folder for the weights")
    train.add_argument("--scratch", type=Path, default=ROOT / "demo-training", help="folder for checkpoints")
    check = commands.add_parser("check", help="judge what the demo's model draws")
    check.add_argument("--count", type=int, default=300)
    check.add_argument("--seed", type=int, default=0)
    check.add_argument("--to", type=Path, default=ROOT / "docs" / "demo-model", help="folder for report and picture")
    return top


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def main() -> None:
    """Run what was asked for."""
    arguments = parser().parse_args()
    comfyui = engine.find_comfyui() if arguments.engine == "auto" else None
    engine.load_pack()
    if arguments.command == "train":
        train(arguments, comfyui)
    elif arguments.command == "check":
        check(arguments, comfyui)
    else:
        edit(arguments, comfyui)


def train(arguments: argparse.Namespace, comfyui: Path | None) -> None:
    """Train the demo's model; see train.py."""
    print(f"Training on {engine.load_engine(comfyui)}.", flush=True)
    from comfy.cli_args import args

    # The attention that can be differentiated.
    args.use_pytorch_cross_attention = True
    import torch
    import train as training

    torch.set_num_threads(arguments.threads)
    plan = training.Plan(
        arguments.steps,
        arguments.scenes,
        arguments.batch,
        arguments.minutes,
        arguments.autoencoder_steps,
        arguments.vision_steps,
    )
    device = torch.device(arguments.device)
    training.train(arguments.to, arguments.seed, plan, device, arguments.scratch, arguments.start)


def check(arguments: argparse.Namespace, comfyui: Path | None) -> None:
    """Judge what the demo's model draws; see stills.py."""
    print(f"Drawing on {engine.load_engine(comfyui)}.", flush=True)
    import stills
    from tune_a_video.tav_core.tiny_sd import model as tiny_sd

    for name, share in stills.check(tiny_sd.WEIGHTS, arguments.count, arguments.seed, arguments.to).items():
        print(f"{name:>12}  {share:.1%} right")
    print(f"  {arguments.to / 'stills.png'}\n  {arguments.to / 'stills.json'}")


def edit(arguments: argparse.Namespace, comfyui: Path | None) -> None:
    """The main job."""
    started = time.monotonic()
    host = engine.load_engine(comfyui)
    import job
    import torch
    from PIL import Image
    from tune_a_video.tav_core.media import pictures
    from tune_a_video.tav_core.media.clip import load_clip
    from tune_a_video.tav_core.tiny_sd import model as tiny_sd

    output: Path = arguments.output
    made_from = job.fingerprint(tiny_sd.WEIGHTS)
    # All is made in here and moved out at the end, so that an interrupted run leaves no half of a result.
    folder = output / f".unfinished-{made_from}"
    if arguments.again:
        shutil.rmtree(folder, ignore_errors=True)
    elif not folder.exists() and _done(output, job.files(), made_from):
        print(f"Done already; --again makes everything again. The results are in {output}:")
        _show(json.loads((output / job.REPORT).read_text()), output)
        return
    for other in output.glob(".unfinished-*"):
        if other != folder:
            shutil.rmtree(other)
    if folder.exists():
        print("Going on with a run that was cut off.", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    job.save_source(folder)
    if comfyui:
        import on_host as way

        seconds = way.run(comfyui, folder)
    else:
        print(f"No ComfyUI: running on {host}.", flush=True)
        import on_engine as way

        seconds = way.run(folder)
    with torch.inference_mode():
        table = job.results(folder, tiny_sd.load()[2])
    rows = [(f"source: {job.CLIP.prompt}", job.CLIP.images())]
    for take in job.takes():
        frames = load_clip(folder / take.file, frame_count=0, resize="keep").images
        rows.append((f"{take.name}: {take.edit.prompt}", job.reduced(frames)))
    sheet = (pictures.contact_sheet(rows)[0] * 255).round().byte().numpy()
    Image.fromarray(sheet).save(folder / job.CONTACT_SHEET)
    report: dict[str, Any] = {
        "made_from": made_from,
        "host": host,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "source_prompt": job.CLIP.prompt,
        "settings": vars(job.SETTINGS),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "total_seconds": round(time.monotonic() - started, 1),
        "edits": table,
    }
    (folder / job.REPORT).write_text(json.dumps(report, indent=2) + "\n")
    for name in job.files():
        os.replace(folder / name, output / name)
    shutil.rmtree(folder)
    print(f"\nDone in {report['total_seconds']:.0f} s:")
    _show(report, output)
    print(way.EXERCISED)


def _done(output: Path, files: list[str], made_from: str) -> bool:
    if not all((output / name).is_file() for name in files):
        return False
    return bool(json.loads((output / files[-1]).read_text()).get("made_from") == made_from)


def _show(report: dict[str, Any], output: Path) -> None:
    """The table, the paths, and what to do next."""
    print(f"\nsource: {report['source_prompt']}")
    shown = {"edit right": ".0%", "look agreement": ".0%", "path, px off": ".1f"}
    shown |= {"background loss, dB": ".1f", "warp error": ".3f"}
    print(f"{'edit':<31}" + "".join(f"{name:>21}" for name in shown) + "  prompt")
    for row in report["edits"]:
        cells = ("-" if row[name] is None else format(row[name], form) for name, form in shown.items())
        print(f"{row['edit']:<31}" + "".join(f"{cell:>21}" for cell in cells) + f"  {row['prompt']}")
    print(
        "(shares of frames, judged from their pixels; path: distance of the sprite from where it should be;\n"
        "look agreement: frames with the commonest pattern, second colour and shade; background loss: how much lower\n"
        "its PSNR is than the autoencoder's round trip; warp error: flicker; controlled: by Edit Control's preset)\n"
    )
    for file in sorted(output.iterdir()):
        if not file.name.startswith("."):
            print(f"  {file}")
    print(
        "\nThe demo's model knows drawings of 64x64 pixels only. For your own clips: copy this folder into ComfyUI's\n"
        "custom_nodes, put a Stable Diffusion 1.5 checkpoint into models/checkpoints, and open the template\n"
        '"tune-a-video-quick-start" (Workflow > Browse Templates).'
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nInterrupted; the same command goes on from here.")
