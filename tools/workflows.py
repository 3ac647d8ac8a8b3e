"""The workflows that come with the pack: described here in short, written as the front end saves them.

    python tools/workflows.py [--comfyui PATH]

boots a ComfyUI, asks it for its node definitions and writes workflows/*.json, which ComfyUI lists as templates.
`to_api` turns such a file into the graph that the front end would queue.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Definitions = dict[str, dict[str, Any]]
Json = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "workflows"
PACK = "Tune-A-Video"
# The oldest ComfyUI that the pack runs on: what the files say of themselves, whatever host wrote them.
CORE_VERSION = "0.3.64"
# Nodes that only the front end knows.
NOTES = ("MarkdownNote", "Note")
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
# How the front end lays a node out, in pixels.
TITLE = 30
SLOT = 20
WIDGET = 24
NODE_WIDTH = 320
NOTE_WIDTH = 400
COLUMN_GAP = 60
ROW_GAP = 20
GROUP_PADDING = 10
GROUP_TITLE = 44
BLUE, GREEN, PURPLE, CYAN, YELLOW = "#3f789e", "#8A8", "#a1309b", "#8AA", "#b58b2a"

CHECKPOINT = "v1-5-pruned-emaonly.safetensors"
LORA = "style-lora.safetensors"
CONTROLNET = "control_v11p_sd15_canny_fp16.safetensors"
CLIP = "man-skiing.mp4"
SOURCE_PROMPT = "a man is skiing"
EDIT_PROMPTS = ("spider man is skiing on the beach, cartoon style", "wonder woman, wearing a cowboy hat, is skiing")


def widget_inputs(definition: Json) -> list[tuple[str, str]]:
    """(name, type) of a node's widgets, in the order in which a workflow stores their values.

    Two widgets are the front end's own: the control that follows a seed, and the button of an upload; both are
    stored, neither is sent.
    """
    widgets = []
    for section in ("required", "optional"):
        inputs = definition["input"].get(section, {})
        for name, kind, options in _inputs(inputs):
            if kind not in WIDGET_TYPES:
                continue
            widgets.append((name, kind))
            if kind == "INT" and options.get("control_after_generate", name in ("seed", "noise_seed")):
                widgets.append((f"{name}:control", "CONTROL"))
        if section == "required" and any(_uploads(options) for _, _, options in _inputs(inputs)):
            widgets.append(("upload", "IMAGEUPLOAD"))
    return widgets


def socket_inputs(definition: Json) -> list[tuple[str, str, bool]]:
    """(name, type, optional) of a node's inputs that are no widgets, in the order of their dots."""
    return [
        (name, kind, section == "optional")
        for section in ("required", "optional")
        for name, kind, _ in _inputs(definition["input"].get(section, {}))
        if kind not in WIDGET_TYPES
    ]


def widget_options(definition: Json, name: str) -> Json:
    """What a definition says of a widget: default, min, max, options, ..."""
    inputs = {**definition["input"].get("required", {}), **definition["input"].get("optional", {})}
    return next(options for each, _, options in _inputs(inputs) if each == name)


def _inputs(inputs: Json) -> Iterator[tuple[str, str, Json]]:
    for name, (kind, *rest) in inputs.items():
        options = rest[0] if rest else {}
        if isinstance(kind, (list, tuple)):  # a list of choices in the place of the type
            yield name, "COMBO", {**options, "options": list(kind)}
        else:
            yield name, kind, options


def _uploads(options: Json) -> bool:
    return any(options.get(f"{kind}_upload") for kind in ("image", "video", "animated_image"))


@dataclasses.dataclass(frozen=True)
class Output:
    """One output of a node on the canvas."""

    node: int
    slot: int
    type: str


@dataclasses.dataclass(frozen=True)
class Placed:
    """A node on the canvas: `placed["name"]` is its output of that name."""

    id: int
    outputs: dict[str, Output]

    def __getitem__(self, name: str) -> Output:
        return self.outputs[name]


class Canvas:
    """A workflow that is built up node by node, in columns from left to right, each from top to bottom."""

    def __init__(self, definitions: Definitions) -> None:
        self.definitions = definitions
        self.nodes: list[Json] = []
        self.links: list[list[Any]] = []
        self.groups: list[Json] = []
        self._left = 0
        self._top = 0
        self._width = 0

    def column(self, title: str, color: str) -> None:
        """Begin the next column, framed as a group."""
        self._begin_column(NODE_WIDTH)
        bounding = [self._left - GROUP_PADDING, self._top - GROUP_TITLE, self._width + 2 * GROUP_PADDING, 0]
        self.groups.append(
            {
                "id": len(self.groups) + 1,
                "title": title,
                "bounding": bounding,
                "color": color,
                "flags": {},
            }
        )

    def add(self, type: str, /, title: str | None = None, room: int = 0, **values: Any) -> Placed:
        """Add a node below the column's last one.

        values: per input, an `Output` to link it with or a widget's value; the default where there is none.
        room: pixels below the widgets, for a preview or for text.
        """
        definition = self.definitions[type]
        node_id = len(self.nodes) + 1
        inputs = [
            {"localized_name": name, "name": name, **({"shape": 7} if optional else {}), "type": kind, "link": None}
            for name, kind, optional in socket_inputs(definition)
        ] + [
            {"localized_name": name, "name": name, "type": kind, "widget": {"name": name}, "link": None}
            for name, kind in widget_inputs(definition)
            if kind != "CONTROL"
        ]
        outputs = [
            {"localized_name": name, "name": name, "type": kind, "links": None}
            for name, kind in zip(definition["output_name"], definition["output"], strict=True)
        ]
        for slot, entry in enumerate(inputs):
            source = values.get(entry["name"])
            if isinstance(source, Output):
                entry["link"] = self._link(source, node_id, slot, entry["type"])
                del values[entry["name"]]
        widgets = widget_inputs(definition)
        unknown = values.keys() - {name for name, _ in widgets}
        if unknown:
            raise ValueError(f"{type} has no input {', '.join(sorted(unknown))}")
        sockets = max(len(socket_inputs(definition)), len(outputs))
        height = sockets * SLOT + (len(widgets) * WIDGET + 14 if widgets else 6) + room
        core = {} if type.startswith("TAV_") else {"cnr_id": "comfy-core", "ver": CORE_VERSION}
        node = {
            **self._place(node_id, type, height, title),
            "inputs": inputs,
            "outputs": outputs,
            "properties": {**core, "Node name for S&R": type},
            "widgets_values": [_widget_value(definition, name, kind, values) for name, kind in widgets],
        }
        self.nodes.append(node)
        return Placed(node_id, {o["name"]: Output(node_id, slot, o["type"]) for slot, o in enumerate(outputs)})

    def note(self, text: str, height: int) -> None:
        """Add a note in Markdown, in a column of its own without a frame. Notes come before the first group."""
        self._begin_column(NOTE_WIDTH)
        node = {
            **self._place(len(self.nodes) + 1, "MarkdownNote", height, None),
            "inputs": [],
            "outputs": [],
            "properties": {},
            "widgets_values": [text],
            "color": "#432",
            "bgcolor": "#653",
        }
        self.nodes.append(node)

    def json(self, name: str) -> Json:
        """The workflow as the front end saves it under this name."""
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_DNS, name)),
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": self.nodes,
            "links": self.links,
            "groups": self.groups,
            "config": {},
            "extra": {"ds": {"scale": 0.6, "offset": [80, 120]}},
            "version": 0.4,
        }

    def _begin_column(self, width: int) -> None:
        if self._width:
            self._left += self._width + COLUMN_GAP
        self._top, self._width = 0, width

    def _place(self, node_id: int, type: str, height: int, title: str | None) -> Json:
        self._top += TITLE
        position = [self._left, self._top]
        self._top += height
        if self.groups:
            bounding = self.groups[-1]["bounding"]
            bounding[3] = self._top + GROUP_PADDING - bounding[1]
        self._top += ROW_GAP
        return {
            "id": node_id,
            "type": type,
            "pos": position,
            "size": [self._width, height],
            "flags": {},
            # A node is added after those that it is linked from, so this order is one to run them in.
            "order": node_id - 1,
            "mode": 0,
            **({"title": title} if title else {}),
        }

    def _link(self, source: Output, node_id: int, slot: int, kind: str) -> int:
        if source.type != kind:
            raise ValueError(f"{self.nodes[source.node - 1]['type']} gives {source.type}, {kind} is wanted")
        link_id = len(self.links) + 1
        self.links.append([link_id, source.node, source.slot, node_id, slot, kind])
        output = self.nodes[source.node - 1]["outputs"][source.slot]
        output["links"] = [*(output["links"] or []), link_id]
        return link_id


def box(node: Json) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of a node on the canvas, its title included."""
    (left, top), (width, height) = node["pos"], node["size"]
    return left, top - TITLE, left + width, top + height


def _widget_value(definition: Json, name: str, kind: str, values: Json) -> Any:
    if kind == "IMAGEUPLOAD":
        return "image"  # what the button stores, for videos too
    if kind == "CONTROL":
        return "fixed"
    if name in values:
        return values[name]
    return widget_options(definition, name)["default"]


def to_api(workflow: Json, definitions: Definitions) -> dict[str, Json]:
    """The API-format graph that the front end makes of a workflow when it is queued.

    The front end also sends an empty `video-preview` where a clip is shown, which the host ignores: left out here.
    Raises ValueError for nodes that are muted or bypassed: none of ours is.
    """
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    graph = {}
    for node in sorted(workflow["nodes"], key=lambda node: node["order"]):
        if node["type"] in NOTES:
            continue
        if node["mode"] != 0:
            raise ValueError(f"node {node['id']} ({node['type']}) is muted or bypassed")
        widgets = widget_inputs(definitions[node["type"]])
        inputs = {
            name: value
            for (name, kind), value in zip(widgets, node["widgets_values"], strict=True)
            if kind in WIDGET_TYPES
        }
        inputs |= {entry["name"]: sources[entry["link"]] for entry in node["inputs"] if entry["link"] is not None}
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return graph


QUICK_START_NOTE = """\
# Tune-A-Video: quick start

One clip and one sentence about it tune the model; other sentences then change what is in the clip and keep its motion.

1. **Clip and model.** Choose an SD 1.x or 2.x checkpoint and your clip (the button uploads one), and say in *source \
prompt* what the clip shows.
2. **Tune**, once per clip: 500 steps. *loss curve* shows how it went, *Save Motion* keeps the weights in `models/tav`.
3. **Invert** with the empty prompt, as the released code does.
4. **Edit.** Change the prompts and queue again: only the edit is computed, the tuning is reused.

Not enough memory: fewer frames, a smaller size, or train_scope *middle and up*.

Edits that look too much like the clip: fewer tuning steps. Edits that lose its motion: more steps, or guidance 7.5.
"""

CONTROLNET_NOTE = """\
# Tune-A-Video with a LoRA and a ControlNet

As the quick start, and:

- **The LoRA** comes before the tuning here: the model learns the clip with the style on. Moved behind *One-Shot Tune* \
it is only in the edit.
- **The ControlNet** gets one hint per frame, the clip's edges, and holds the edit to the clip's outlines. Lower \
*strength* or *end_percent* where the new subject needs another shape. It steers the edit only; the inversion runs \
without it.

Choose a ControlNet of the checkpoint's family: an SD 1.5 one for SD 1.x.
"""


def quick_start(canvas: Canvas) -> None:
    """Clip to two edits: the method as released."""
    canvas.note(QUICK_START_NOTE, 340)

    canvas.column("1. Clip and model", BLUE)
    model = canvas.add("CheckpointLoaderSimple", ckpt_name=CHECKPOINT)
    video = canvas.add("TAV_LoadVideo", room=340, file=CLIP)
    clip = canvas.add("VAEEncode", pixels=video["images"], vae=model["VAE"])
    source = _prompt(canvas, model["CLIP"], "source prompt", SOURCE_PROMPT)

    tuned = _tune(canvas, model["MODEL"], clip, source, "man-skiing")
    empty, noise = _invert(canvas, model["CLIP"], tuned, clip)

    for number, prompt in enumerate(EDIT_PROMPTS, 1):
        canvas.column(f"4. Edit {number}", YELLOW)
        edit = _prompt(canvas, model["CLIP"], f"edit prompt {number}", prompt)
        _sample_and_save(
            canvas, tuned, edit["CONDITIONING"], empty["CONDITIONING"], noise, model["VAE"], video, f"edit-{number}"
        )


def controlnet_lora(canvas: Canvas) -> None:
    """A LoRA's style, and an edit that is held to the clip's edges."""
    canvas.note(CONTROLNET_NOTE, 280)

    canvas.column("1. Clip, model and LoRA", BLUE)
    base = canvas.add("CheckpointLoaderSimple", ckpt_name=CHECKPOINT)
    model = canvas.add("LoraLoader", model=base["MODEL"], clip=base["CLIP"], lora_name=LORA)
    video = canvas.add("TAV_LoadVideo", room=340, file=CLIP)
    clip = canvas.add("VAEEncode", pixels=video["images"], vae=base["VAE"])
    source = _prompt(canvas, model["CLIP"], "source prompt", SOURCE_PROMPT)

    tuned = _tune(canvas, model["MODEL"], clip, source, "man-skiing-style")
    empty, noise = _invert(canvas, model["CLIP"], tuned, clip)

    canvas.column("4. One hint per frame", CYAN)
    control = canvas.add("ControlNetLoader", control_net_name=CONTROLNET)
    edges = canvas.add("Canny", image=video["images"])
    canvas.add("PreviewImage", "hints", room=240, images=edges["IMAGE"])
    edit = _prompt(canvas, model["CLIP"], "edit prompt", EDIT_PROMPTS[0])
    held = canvas.add(
        "ControlNetApplyAdvanced",
        positive=edit["CONDITIONING"],
        negative=empty["CONDITIONING"],
        control_net=control["CONTROL_NET"],
        image=edges["IMAGE"],
    )

    canvas.column("5. Edit", YELLOW)
    _sample_and_save(
        canvas, tuned, held["positive"], held["negative"], noise, base["VAE"], video, "edit-controlnet-lora"
    )


def _prompt(canvas: Canvas, clip: Output, title: str, text: str) -> Placed:
    return canvas.add("CLIPTextEncode", title, room=80, clip=clip, text=text)


def _tune(canvas: Canvas, model: Output, clip: Placed, source: Placed, name: str) -> Placed:
    canvas.column("2. Tune, once per clip", GREEN)
    tuned = canvas.add("TAV_OneShotTune", model=model, latent=clip["LATENT"], conditioning=source["CONDITIONING"])
    canvas.add("PreviewImage", "loss curve", room=240, images=tuned["loss_curve"])
    canvas.add("TAV_SaveMotion", motion=tuned["motion"], filename_prefix=name)
    return tuned


def _invert(canvas: Canvas, clip_model: Output, tuned: Placed, clip: Placed) -> tuple[Placed, Placed]:
    """The empty prompt, which is the negative one of the edits too, and the inverted clip."""
    canvas.column("3. Invert", PURPLE)
    empty = _prompt(canvas, clip_model, "empty prompt", "")
    noise = canvas.add(
        "TAV_DDIMInvert", model=tuned["model"], latent=clip["LATENT"], conditioning=empty["CONDITIONING"]
    )
    return empty, noise


def _sample_and_save(
    canvas: Canvas,
    tuned: Placed,
    positive: Output,
    negative: Output,
    noise: Placed,
    vae: Output,
    video: Placed,
    name: str,
) -> None:
    sampled = canvas.add(
        "TAV_Sample", model=tuned["model"], positive=positive, negative=negative, latent=noise["latent"]
    )
    frames = canvas.add("VAEDecode", samples=sampled["latent"], vae=vae)
    canvas.add(
        "TAV_SaveVideo",
        room=340,
        images=frames["IMAGE"],
        audio=video["audio"],
        fps=video["fps"],
        filename_prefix=f"TuneAVideo/{name}",
    )


WORKFLOWS = {
    "tune-a-video-quick-start": quick_start,
    "tune-a-video-controlnet-lora": controlnet_lora,
}


def build(name: str, definitions: Definitions) -> Json:
    """The workflow of this name, from a host's node definitions (what it answers to /object_info)."""
    canvas = Canvas(definitions)
    WORKFLOWS[name](canvas)
    return canvas.json(name)


def main() -> None:
    """Write workflows/*.json."""
    import engine
    from host_server import HostServer

    parser = argparse.ArgumentParser(description="Write the pack's workflows from the definitions of a running host.")
    parser.add_argument("--comfyui", metavar="PATH", help="default: $COMFYUI_PATH, else ~/comfy/ComfyUI")
    comfyui = engine.find_comfyui(parser.parse_args().comfyui)
    if comfyui is None:
        parser.error("no ComfyUI at $COMFYUI_PATH or ~/comfy/ComfyUI; give one with --comfyui")
    with tempfile.TemporaryDirectory() as base, HostServer(comfyui, Path(base), {PACK: ROOT}) as server:
        definitions = server.get("/object_info")
    FOLDER.mkdir(exist_ok=True)
    for name in WORKFLOWS:
        text = json.dumps(build(name, definitions), indent=1, ensure_ascii=False)
        (FOLDER / f"{name}.json").write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
