"""Lay out the pack's workflows on the canvas and complete their graphs for scripts.

    python tools/workflows.py [--comfyui PATH]

A workflow is described by three things: its graph in workflows/api/NAME.json (ComfyUI's API format, node ids in the
order of the canvas), its note in workflows/notes/NAME.md, and its groups in `WORKFLOWS` below. The tool asks a ComfyUI
for its node definitions, adds inputs that a graph leaves out with their defaults, and writes workflows/NAME.json, which
ComfyUI lists as a template. It also writes the subgraphs of tools/subgraphs.py, subgraphs/NAME.json, and both files of
the workflows in `FOLDED`, in which one of them takes the place of its nodes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from canvas import Definitions, Json, canvas, completed

import subgraphs

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "workflows"
# ComfyUI lists every .json at the top level as a template, so the graphs for scripts lie deeper.
API_FOLDER = FOLDER / "api"
NOTE_FOLDER = FOLDER / "notes"
SUBGRAPH_FOLDER = ROOT / "subgraphs"
PACK = "Tune-A-Video"
# Model files that the graphs name; users choose their own.
CHECKPOINT = "v1-5-pruned-emaonly.safetensors"
DREAMBOOTH = "mo-di-diffusion.safetensors"
OTHER_CHECKPOINT = "dreamshaper_8.safetensors"
LORA = "style-lora.safetensors"
CHARACTER_LORA = "character-lora.safetensors"
CONTROLNET = "control_v11p_sd15_canny_fp16.safetensors"
T2I_ADAPTER = "t2iadapter_canny_sd15v2.safetensors"
MOTION = "man-skiing_00001_.safetensors"
CLIP_VISION = "clip-vit-large-patch14.safetensors"
CLIP_TEXT = "clip_l.safetensors"
# Those names by the models folder that a user has such files in.
MODEL_FILES = {
    "checkpoints": (CHECKPOINT, DREAMBOOTH, OTHER_CHECKPOINT),
    "loras": (LORA, CHARACTER_LORA),
    "controlnet": (CONTROLNET, T2I_ADAPTER),
    "clip_vision": (CLIP_VISION,),
    "text_encoders": (CLIP_TEXT,),
    "tav": (MOTION,),
}


class Clip(NamedTuple):
    """A clip and the sentence that says what it shows."""

    file: str
    prompt: str


# One of demo/clips.py, as `make demo` writes it to demo-output/source.mp4.
DRAWN = Clip("bounce.mp4", "a blue heart on the sand, painting style")

# Groups of every workflow, in the order of the README: id of a group's first node -> the group's title.
_START = {2: "1. Clip and model", 6: "2. Tune, once per clip", 9: "3. Invert"}
_TWO_EDITS = {**_START, 11: "4. Edit 1", 15: "5. Edit 2", 19: "6. Side by side"}
_HINTS = "4. One hint per frame"


def _under_control() -> dict[str, dict[int, str]]:
    """Return the groups of the workflows that show what edit control is for."""
    start = {2: "1. Clip and model", 6: "2. Tune, once per clip", 7: "3. Invert", 8: "4. What changes"}
    one = {**start, 10: "5. Edit", 14: "6. Side by side, and where"}
    return {
        "tune-a-video-keep-background": {**one, 17: "7. In words"},
        "tune-a-video-change-colour": one,
        "tune-a-video-one-of-two": one,
        "tune-a-video-add-what-moves-along": one,
        "tune-a-video-moving-mask": {
            **start,
            **{9: "5. Where", 12: "6. Edit", 17: "7. Side by side, and where"},
        },
        "tune-a-video-many-prompts-one-control": {
            **start,
            **{8: "4. Control", 9: "5. Edit 1", 14: "6. Edit 2", 19: "7. Edit 3", 24: "8. Side by side"},
        },
    }


WORKFLOWS: dict[str, dict[int, str]] = {
    "tune-a-video-quick-start": {2: "1. Checkpoint", 15: "2. Clip and sentences"},
    "tune-a-video-step-by-step": {**_START, 11: "4. Edit"},
    "tune-a-video-edit-control": {
        **{2: "1. Clip and model", 6: "2. Tune, once per clip", 7: "3. Invert", 8: "4. What changes", 10: "5. Edit"},
        **{14: "6. Side by side, and where"},
    },
    **_under_control(),
    "tune-a-video-object-edit": {**_START, 11: "4. Edit", 16: "5. Side by side"},
    "tune-a-video-background-change": _TWO_EDITS,
    "tune-a-video-style-transfer": _TWO_EDITS,
    "tune-a-video-add-remove-object": {**_START, 11: "4. Add", 15: "5. Remove"},
    "tune-a-video-many-prompts": {
        **_START,
        **{11: "4. Edit 1", 15: "5. Edit 2", 19: "6. Edit 3", 23: "7. Edit 4", 27: "8. Side by side"},
    },
    "tune-a-video-dreambooth-lora": {**_START, 11: "4. Character", 13: "5. Edit"},
    "tune-a-video-controlnet-lora": {
        **{2: "1. Clip, model and LoRA", 7: "2. Tune, once per clip", 10: "3. Invert", 12: _HINTS, 17: "5. Edit"},
    },
    "tune-a-video-t2i-adapter": {**_START, 11: _HINTS, 16: "5. Edit"},
    "tune-a-video-saved-motion": {2: "1. Clip and model", 5: "2. The saved motion", 7: "3. Invert", 9: "4. Edit"},
    "tune-a-video-masked-edit": {**_START, 11: "4. Mask", 19: "5. Edit"},
    "tune-a-video-long-clip": {
        **{2: "1. Clip and model", 7: "2. Tune, once per clip", 10: "3. Windows, invert", 13: "4. Edit"},
    },
    "tune-a-video-compare": {
        **_START,
        **{11: "4. Guidance 7.5", 15: "5. Guidance 12.5", 19: "6. Measure", 25: "7. Side by side"},
    },
    "tune-a-video-demo-model": {**_START, 11: "4. Edit", 14: "5. Result, enlarged"},
}
# Workflows whose graph is the template of a subgraph, folded.
FOLDED = {"tune-a-video-quick-start": "Edit a Video (Tune-A-Video)"}


def build(name: str, definitions: Definitions) -> tuple[Json, Json]:
    """Return the canvas workflow and the completed API graph of this name.

    definitions: a host's answer to /object_info.
    """
    note = (NOTE_FOLDER / f"{name}.md").read_text(encoding="utf-8")
    if name not in FOLDED:
        graph = _completed(name, definitions)
        return canvas(name, graph, note, WORKFLOWS[name], definitions), graph
    held, graph, groups = _template(FOLDED[name], definitions)
    known = {**definitions, **subgraphs.definition(held, graph, definitions)}
    workflow = canvas(name, subgraphs.folded(graph, held), note, WORKFLOWS[name], known)
    return subgraphs.with_subgraph(workflow, held, graph, groups, definitions), subgraphs.flattened(graph, held)


def build_subgraph(name: str, definitions: Definitions) -> Json:
    """Return the file of the subgraph of this name."""
    return subgraphs.blueprint(*_template(name, definitions), definitions)


def _completed(name: str, definitions: Definitions) -> Json:
    return completed(json.loads((API_FOLDER / f"{name}.json").read_text(encoding="utf-8")), definitions)


def _template(subgraph: str, definitions: Definitions) -> tuple[str, Json, dict[int, str]]:
    """Return a subgraph's name, and the part of its template's graph and groups that it takes and holds."""
    described = subgraphs.SUBGRAPHS[subgraph]
    graph = _completed(described.template, definitions)
    taken = {key: node for key, node in graph.items() if int(key) <= described.nodes[-1]}
    groups = {first: title for first, title in WORKFLOWS[described.template].items() if first <= described.nodes[-1]}
    return subgraph, taken, groups


def write_stand_ins(base: Path) -> None:
    """Write the files that the workflows name below a host's base directory: empty models, and the demo's clip.

    Without them a newer front end marks the nodes that name them.
    """
    graphs = [json.loads(path.read_text(encoding="utf-8")) for path in API_FOLDER.glob("*.json")]
    nodes = [node["inputs"] for graph in graphs for node in graph.values() if node["class_type"] == "TAV_LoadVideo"]
    (base / "input").mkdir(parents=True, exist_ok=True)
    for name in {DRAWN.file, *(inputs["file"] for inputs in nodes)}:
        shutil.copy(ROOT / "demo" / DRAWN.file, base / "input" / name)
    for folder, names in MODEL_FILES.items():
        (base / "models" / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            (base / "models" / folder / name).touch()


def main() -> None:
    """Write workflows/*.json and subgraphs/*.json, and complete workflows/api/*.json."""
    import engine
    from host_server import HostServer

    parser = argparse.ArgumentParser(description="Write the pack's workflows from the definitions of a running host.")
    parser.add_argument("--comfyui", metavar="PATH", help="default: $COMFYUI_PATH, else ~/comfy/ComfyUI")
    comfyui = engine.find_comfyui(parser.parse_args().comfyui)
    if comfyui is None:
        parser.error("no ComfyUI at $COMFYUI_PATH or ~/comfy/ComfyUI; give one with --comfyui")
    with tempfile.TemporaryDirectory() as base, HostServer(comfyui, Path(base), {PACK: ROOT}) as server:
        definitions = server.get("/object_info")
    for name in WORKFLOWS:
        for folder, content in zip((FOLDER, API_FOLDER), build(name, definitions), strict=True):
            _write(folder / f"{name}.json", content)
    for name in subgraphs.SUBGRAPHS:
        _write(SUBGRAPH_FOLDER / f"{name}.json", build_subgraph(name, definitions))


def _write(path: Path, content: Json) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
