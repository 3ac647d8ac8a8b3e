"""Run the workflows on a real ComfyUI with the demo's model and clip in place of a checkpoint and a film.

    python tools/workflow_runs.py [--comfyui PATH] [--to FOLDER] [--thumbnails FOLDER] [NAME ...]

Prints the seconds of each and writes its videos, frame by frame, to FOLDER/NAME.jpg for docs/workflows.md, and the clip
and its first edit to workflows/NAME.jpg for ComfyUI's template browser. Workflows with a LoRA, a ControlNet or a
T2I-Adapter are left out: there are none for this model (tests/host runs them).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import engine
from host_server import HostServer

import workflows

SOURCE = workflows.DRAWN.prompt
SIDE, FILMED = 64, 512
# The inputs whose values in the demo workflow suit the demo's model.
DEMO, ITS_OWN = "tune-a-video-demo-model", ("steps", "learning_rate")
# Guidance 5 has the effect on this model's pictures that 12.5 has on Stable Diffusion's.
GUIDANCE = 0.4
THUMBNAIL = (1200, 675)
WINDOW = {"length": 4, "context_length": 4, "context_overlap": 1}
# Sentences that the demo's model knows, in place of a workflow's own.
SENTENCES = {
    "tune-a-video-quick-start": {"edit prompt": "a blue star on the sand, painting style"},
    "tune-a-video-step-by-step": {"edit prompt": "a blue star on the sand, painting style"},
    "tune-a-video-edit-control": {"edit prompt": "a blue star on the sand, painting style"},
    "tune-a-video-object-edit": {"edit prompt": "a blue circle on the sand, painting style"},
    "tune-a-video-background-change": {
        "edit prompt 1": "a blue heart on the grass, painting style",
        "edit prompt 2": "a blue heart on the snow, painting style",
    },
    "tune-a-video-style-transfer": {
        "edit prompt 1": "a blue heart on the sand, pencil style",
        "edit prompt 2": "a purple heart on the sand, pencil style",
    },
    "tune-a-video-add-remove-object": {
        "edit prompt, add": "a blue heart and a red circle on the sand, painting style",
        "edit prompt, remove": "the sand, painting style",
        "negative prompt, remove": "a blue heart",
    },
    "tune-a-video-many-prompts": {
        "edit prompt 1": "a blue star on the sand, painting style",
        "edit prompt 2": "a purple heart on the sand, painting style",
        "edit prompt 3": "a blue heart on the night sky, painting style",
        "edit prompt 4": "a blue heart on the sand, pencil style",
    },
    "tune-a-video-keep-background": {"edit prompt": "a green star on the sand, painting style"},
    "tune-a-video-change-colour": {"edit prompt": "a yellow heart on the sand, painting style"},
    "tune-a-video-add-what-moves-along": {"edit prompt": "a blue heart with a hat on the sand, painting style"},
    "tune-a-video-many-prompts-one-control": {
        "edit 1": "a green star on the sand, painting style",
        "edit 2": "a red circle on the sand, painting style",
        "edit 3": "a purple cross on the sand, painting style",
    },
    "tune-a-video-saved-motion": {"edit prompt": "a blue cross on the sand, painting style"},
    "tune-a-video-masked-edit": {"edit prompt": "a purple heart on the snow, painting style"},
    "tune-a-video-long-clip": {"edit prompt": "a blue heart on the grass, painting style"},
    "tune-a-video-compare": {
        "edit prompt, guidance 7.5": "a blue star on the sand, painting style",
        "edit prompt, guidance 12.5": "a blue star on the sand, painting style",
    },
    DEMO: {"edit prompt": "a blue star on the sand, painting style"},
}
Graph = dict[str, dict[str, Any]]


def read(name: str) -> Graph:
    """Read a workflow's graph for scripts."""
    graph: Graph = json.loads((workflows.API_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return graph


def fitted(name: str, motion: str | None) -> Graph:
    """Return a workflow's graph for the demo's model. ``motion``: the file that Load Motion takes."""
    graph = read(name)
    demo = {node["class_type"]: node["inputs"] for node in read(DEMO).values()}
    # There is no such CLIP for this model; Evaluate Video goes without.
    gone = [key for key, node in graph.items() if node["class_type"] in ("CLIPVisionLoader", "CLIPLoader")]
    for key in gone:
        del graph[key]
    for node in graph.values():
        node["inputs"] = {
            key: value for key, value in node["inputs"].items() if not (isinstance(value, list) and value[0] in gone)
        }
        _fit(node, {"source prompt": SOURCE, **SENTENCES[name]}, motion)
        node["inputs"].update({key: demo[node["class_type"]][key] for key in ITS_OWN if key in node["inputs"]})
    return graph


def _fit(node: dict[str, Any], sentences: dict[str, str], motion: str | None) -> None:
    kind, inputs = node["class_type"], node["inputs"]
    if kind == "CheckpointLoaderSimple":
        node.update(class_type="TAV_LoadDemoModel", inputs={})
    elif kind == "CLIPTextEncode":
        inputs["text"] = sentences.get(node["_meta"]["title"], inputs["text"])
    elif kind == "TAV_EditPrompt":
        edit = sentences.get(node["_meta"]["title"]) or sentences["edit prompt"]
        inputs.update(source=sentences["source prompt"], edit=edit)
    elif kind == "TAV_LoadMotion":
        inputs["file"] = motion
    elif kind == "TAV_LoadVideo":
        inputs.update(file=workflows.DRAWN.file, frame_count=0, frame_step=1, width=SIDE, height=SIDE)
    elif kind in ("SolidMask", "MaskComposite"):
        for key in inputs.keys() & {"width", "height", "x", "y"}:
            inputs[key] = inputs[key] * SIDE // FILMED
    elif kind == "ImageBlur":
        inputs.update(blur_radius=2, sigma=1.0)
    inputs.update({key: value for key, value in WINDOW.items() if key in inputs})
    if inputs.get("guidance", 0) > 5:
        inputs["guidance"] *= GUIDANCE


def videos(server: HostServer, name: str, graph: Graph, outputs: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return the source and every saved video: caption and frames."""
    from tune_a_video.tav_core.media.clip import load_clip

    def frames(path: Path) -> Any:
        return load_clip(path, frame_count=0, resize="keep").images

    captions = (text for title, text in SENTENCES[name].items() if title.startswith("edit"))
    rows = [(SOURCE, frames(server.input_folder / workflows.DRAWN.file))]
    for key, node in graph.items():
        if node["class_type"] != "TAV_SaveVideo" or _joined(graph, node):
            continue
        (saved,) = outputs[key]["images"]
        path = server.output_folder / saved["subfolder"] / saved["filename"]
        rows.append((next(captions, path.stem), frames(path)))
    return rows


def sheet(rows: list[tuple[str, Any]], side: int) -> Any:
    """Draw videos frame by frame, a row each."""
    from PIL import Image
    from tune_a_video.tav_core.media import pictures

    return Image.fromarray(pictures.contact_sheet(rows, side)[0].mul(255).round().byte().numpy())


def thumbnail(rows: list[tuple[str, Any]]) -> Any:
    """Draw four frames of the source and of the first edit, for the template browser."""
    from PIL import Image

    source, edit = rows[0][1], rows[1][1]
    if edit.shape[2] > edit.shape[1]:  # the demo's video has the source on its left
        edit = edit[:, :, edit.shape[2] // 2 :]
    at = [round(place * (len(source) - 1) / 3) for place in range(4)]
    drawn = sheet([(rows[0][0], source[at]), (rows[1][0], edit[at])], THUMBNAIL[0] // 4 - 10)
    picture = Image.new("RGB", THUMBNAIL, "white")
    picture.paste(drawn, ((THUMBNAIL[0] - drawn.width) // 2, max((THUMBNAIL[1] - drawn.height) // 2, 0)))
    return picture


def _joined(graph: Graph, node: dict[str, Any]) -> bool:
    """Tell whether a video shows others side by side, which the sheet has already."""
    source = graph[node["inputs"]["images"][0]]
    return node["_meta"]["title"] == "side by side" and source["class_type"] == "TAV_CompareVideos"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(SENTENCES), metavar="NAME")
    parser.add_argument("--comfyui")
    parser.add_argument("--to", type=Path, default=engine.PACK_ROOT / "docs" / "workflows")
    parser.add_argument("--thumbnails", type=Path, default=workflows.FOLDER)
    options = parser.parse_args()
    comfyui = engine.find_comfyui(options.comfyui)
    if comfyui is None:
        parser.error("a ComfyUI is needed: --comfyui PATH")
    engine.load_engine(comfyui)
    engine.load_pack()
    options.to.mkdir(parents=True, exist_ok=True)
    motion = None
    with tempfile.TemporaryDirectory() as folder, HostServer(comfyui, Path(folder), {"t": engine.PACK_ROOT}) as server:
        shutil.copy(engine.PACK_ROOT / "demo" / workflows.DRAWN.file, server.input_folder)
        for name in options.names:
            graph = fitted(name, motion)
            result = server.run(graph).raise_for_error()
            rows = videos(server, name, graph, result.outputs)
            sheet(rows, side=96).save(options.to / f"{name}.jpg", quality=85)
            thumbnail(rows).save(options.thumbnails / f"{name}.jpg", quality=85, optimize=True)
            print(f"{name}: {result.seconds:.0f} s", flush=True)
            saved = sorted(path.name for path in server.models_folder("tav").glob("*.safetensors"))
            motion = motion or next(iter(saved), None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
