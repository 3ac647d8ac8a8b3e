"""python demo: one clip, one tuning, two edits; videos, loss curve and a contact sheet in demo-output/."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tools"))

import engine  # noqa: E402
from contact_sheet import contact_sheet  # noqa: E402
from job import EDIT_PROMPTS, FILES, FPS, SOURCE_PROMPT, draw_clip  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=["auto", "pypi"], default="auto", help="pypi: ignore any ComfyUI")
    parser.add_argument("--output", type=Path, default=ROOT / "demo-output", help="folder for the results")
    args = parser.parse_args()
    comfyui = engine.find_comfyui() if args.engine == "auto" else None

    started = time.monotonic()
    args.output.mkdir(exist_ok=True)
    # All is made in here and moved out at the end, so that an interrupted run leaves no half of a result.
    with tempfile.TemporaryDirectory(dir=args.output, prefix=".unfinished-") as scratch:
        folder = Path(scratch)
        engine.load_pack()
        from tune_a_video.tav_core import video

        clip = draw_clip()
        video.save_clip(clip, FPS, folder / FILES.clip, quality=100)
        if comfyui:
            import on_host as way

            way.run(comfyui, folder)
        else:
            print(f"No ComfyUI: running on {engine.load_engine(None)}.", flush=True)
            import on_engine as way

            way.run(folder)
        rows = [(f"source: {SOURCE_PROMPT}", clip)]
        for name, prompt in zip(FILES.edits, EDIT_PROMPTS, strict=True):
            edit = video.load_clip(folder / name, frame_count=0, resize="keep")
            rows.append((way.CAPTION.format(prompt=prompt), edit.images))
        contact_sheet(rows).save(folder / FILES.contact_sheet)
        for file in sorted(folder.iterdir()):
            os.replace(file, args.output / file.name)

    print(f"\nDone in {time.monotonic() - started:.0f} s:")
    for file in sorted(args.output.iterdir()):
        print(f"  {file}")
    print(way.EXERCISED)
    print(
        "The checkpoint's weights are untrained and its autoencoder keeps the mean colour of 8x8 pixels: the edits\n"
        "show that every step works, not what a trained model makes of the prompts."
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nInterrupted; nothing was kept.")
