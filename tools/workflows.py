"""The workflows that come with the pack: described here in short, written as the front end saves them.

    python tools/workflows.py [--comfyui PATH]

boots a ComfyUI, asks it for its node definitions and writes workflows/*.json, which ComfyUI lists as templates, and
workflows/api/*.json, the same graphs in the format that a script queues (see run_workflow.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Definitions = dict[str, dict[str, Any]]
Json = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "workflows"
# ComfyUI takes every .json at the top level for a template, so the graphs for scripts lie deeper.
API_FOLDER = FOLDER / "api"
PACK = "Tune-A-Video"
# The oldest ComfyUI that the pack runs on: what the files say of themselves, whatever host wrote them.
CORE_VERSION = "0.3.64"
# Inputs that newer hosts have added to core nodes and want to be given; older ones ignore them. Workflows leave them
# out, and the front end fills in these, its defaults.
ADDED_INPUTS: dict[str, Json] = {
    "ContextWindowsManual": {
        "freenoise": False,
        "cond_retain_index_list": "",
        "split_conds_to_windows": False,
        "latent_retain_index_list": "",
        "causal_window_fix": True,
    }
}
# Nodes that only the front end knows.
NOTES = ("MarkdownNote", "Note")
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
# How the front end lays a node out, in pixels.
TITLE = 30
SLOT = 20
WIDGET = 24
# Widgets that the pack's scripts (web/js) add below a node's own; they are neither stored nor sent.
BUTTONS = {"TAV_OneShotTune": 1}
NODE_WIDTH = 320
NOTE_WIDTH = 420
NOTE_LINE = 21
NOTE_CHARACTERS = 50
COLUMN_GAP = 60
ROW_GAP = 20
GROUP_PADDING = 10
GROUP_TITLE = 44
BLUE, GREEN, PURPLE, CYAN, YELLOW = "#3f789e", "#8A8", "#a1309b", "#8AA", "#b58b2a"


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
        self.definitions = {name: without_added(name, definition) for name, definition in definitions.items()}
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
        rows = len(widgets) + BUTTONS.get(type, 0)
        height = sockets * SLOT + (rows * WIDGET + 14 if rows else 6) + room
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

    def note(self, text: str) -> None:
        """Add a note in Markdown, in a column of its own without a frame. Notes come before the first group."""
        self._begin_column(NOTE_WIDTH)
        height = NOTE_LINE * sum(max(1, math.ceil(len(line) / NOTE_CHARACTERS)) for line in text.splitlines()) + 40
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


def without_added(type: str, definition: Json) -> Json:
    """The definition as an old host gives it."""
    added = ADDED_INPUTS.get(type, {})
    inputs = {
        section: {name: spec for name, spec in entries.items() if name not in added}
        for section, entries in definition["input"].items()
        if section in ("required", "optional")
    }
    return {**definition, "input": inputs}


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
        widgets = widget_inputs(without_added(node["type"], definitions[node["type"]]))
        inputs = {
            name: value
            for (name, kind), value in zip(widgets, node["widgets_values"], strict=True)
            if kind in WIDGET_TYPES
        }
        inputs |= {entry["name"]: sources[entry["link"]] for entry in node["inputs"] if entry["link"] is not None}
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return graph


def script_graph(workflow: Json, definitions: Definitions) -> dict[str, Json]:
    """The API-format graph for scripts: with the nodes' titles, and with what newer hosts want to be given."""
    titles = {str(node["id"]): node.get("title", node["type"]) for node in workflow["nodes"]}
    return {
        node_id: {
            "class_type": node["class_type"],
            "inputs": {**ADDED_INPUTS.get(node["class_type"], {}), **node["inputs"]},
            "_meta": {"title": titles[node_id]},
        }
        for node_id, node in to_api(workflow, definitions).items()
    }


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


@dataclasses.dataclass(frozen=True)
class Source:
    """A clip, the sentence that says what it shows, and the settings to load it with."""

    file: str
    prompt: str
    values: Json


SKIING = Source("man-skiing.mp4", "a man is skiing", {"frame_step": 2})
SURFING = Source("man-surfing.mp4", "a man is surfing", {})
CAR = Source("car-turn.mp4", "a jeep car is moving on the road", {"frame_step": 2})
# One of demo/clips.py, drawn: as `make demo` leaves it in demo-output/source.mp4.
DRAWN = Source("bounce.mp4", "a blue heart on the sand, painting style", {"width": 64, "height": 64})

QUICK_START_NOTE = """\
# Tune-A-Video: quick start

One clip and one sentence about it tune the model; another sentence then changes what is in the clip and keeps its \
motion.

1. **Clip and model.** Choose an SD 1.x or 2.x checkpoint and your clip (the button uploads one), and say in *source \
prompt* what the clip shows.
2. **Tune**, once per clip: 500 steps. *loss curve* shows how it went, *Save Motion* keeps the weights in `models/tav`.
3. **Invert** with the empty prompt, as the released code does.
4. **Edit.** Change *edit prompt* and queue again: only the edit is computed, the tuning is reused.

Not enough memory: fewer frames, a smaller size, or train_scope *middle and up*.

Edits that look too much like the clip: fewer tuning steps. Edits that lose its motion: more steps, or guidance 7.5.
"""

OBJECT_NOTE = """\
# Another object, the same motion

Keep the sentence of the clip and exchange the noun: *a **jeep** car is moving on the road* becomes *a **sports** car \
is moving on the road*. What both sentences share is what the edit keeps.

- An object of about the same outline works best. For one of another shape tune for fewer steps (200 to 300).
- The old object shines through: raise *guidance*, or name the old one in *negative prompt*.
- The last group lays source and edit side by side.
"""

BACKGROUND_NOTE = """\
# Another background

Say in *source prompt* where the clip plays, and exchange the place in the edit prompts: *on the road* becomes *on the \
beach*, *on the snow*.

- A source prompt that does not name the place ties the place to the whole sentence: then it is hard to change.
- What stands in front has to stay: name it in the edit prompt in the same words as in the source prompt.
- The foreground changes too: lower *guidance* to 7.5, or hold it with a mask (template *masked-edit*).
"""

STYLE_NOTE = """\
# Another style

Add the style at the end of the clip's sentence: *..., cartoon style*, *..., van gogh style*, *..., watercolor \
painting*. Words that the checkpoint has seen often work best.

- The style is weak: more *guidance* (15), or fewer tuning steps. A style LoRA after *One-Shot Tune* is stronger \
still (template *dreambooth-lora*).
- Colours are burnt: less *guidance*.
- Outlines are lost: a ControlNet holds them (template *controlnet-lora*).
"""

ADD_REMOVE_NOTE = """\
# Add or remove an object

- **Add**: put the new thing right behind what it belongs to: *a man, wearing a red cowboy hat, is skiing*.
- **Remove**: name the thing in the *source prompt*, leave it out of the edit prompt, and put it in the *negative \
prompt* of that edit. The tuning ties the thing to its words, and only then they can take it away.

Things that take up little of the picture need a clip in which they are seen from near, or a mask \
(template *masked-edit*).
"""

MANY_PROMPTS_NOTE = """\
# Many prompts from one tuning

Tuning and inversion run once; each edit takes only sampling. Change a prompt and queue again: ComfyUI computes that \
edit alone.

To try prompts in a row without a node for each: one edit, and *Queue* after every change of its prompt.

The last group lays the clip and all edits next to each other, with captions: a line for each, the clip's first. *Save \
Motion* keeps the tuning for another day (template *saved-motion*).
"""

DREAMBOOTH_NOTE = """\
# A DreamBooth-style checkpoint and a character LoRA

- **The checkpoint** has learnt a style or a subject with words of its own (here *modern disney style*). Tune on it, \
with a source prompt in plain words, and use its words in the edit prompt.
- **The LoRA** comes after the tuning: the clip is learnt without it and the character is put in by the edit. Its own \
words belong in the edit prompt. *strength_model* 0.6 to 1.
- A LoRA before *One-Shot Tune* is tuned on (template *controlnet-lora*): good for styles, not for a character that \
the clip does not show.

One of them alone: bypass the LoRA, or choose a plain checkpoint. LoRA and checkpoint have to be of one family.
"""

CONTROLNET_NOTE = """\
# Tune-A-Video with a LoRA and a ControlNet

As the quick start, and:

- **The LoRA** comes before the tuning here: the model learns the clip with the style on. Moved behind *One-Shot Tune* \
it is only in the edit.
- **The ControlNet** gets one hint per frame, the clip's edges, and holds the edit to the clip's outlines. Lower \
*strength* or *end_percent* where the new subject needs another shape. It steers the edit only; the inversion runs \
without it.

Choose a ControlNet of the checkpoint's family: an SD 1.5 one for SD 1.x. Depth maps (from a depth node of your \
choice) take the place of *Canny*, with a depth ControlNet.
"""

T2I_ADAPTER_NOTE = """\
# T2I-Adapter

Holds the edit to the clip's edges as a ControlNet does, at next to no cost: it looks at the hints once, not at every \
step.

- T2I-Adapters lie in `models/controlnet` and are loaded as ControlNets are. Choose one of the checkpoint's family.
- One hint per frame. *strength* 0.5 to 0.8 leaves the new subject room; *end_percent* 0.5 steers the outlines only.
- It steers the edit only; the inversion runs without it.
"""

SAVED_MOTION_NOTE = """\
# A saved motion on another checkpoint

No tuning here: *Load Motion* takes what *Save Motion* has written to `models/tav`, *Inflate UNet* puts it on a \
checkpoint.

- The checkpoint may be another one than was tuned on, of the same family: an SD 1.x motion fits all of SD 1.x.
- Invert with this checkpoint, from the clip that was tuned on: load it with the same frames and the same size.
- The motion is too stiff: *temporal_strength* or *query_strength* 0.8. It is lost: the checkpoint is too far from the \
one that was tuned; tune some 100 steps on it, with the motion connected to *One-Shot Tune*.
"""

MASKED_NOTE = """\
# A local edit with a mask

Only what is white in the mask changes; outside it the clip stays as it is.

- Here the mask is a soft rectangle: *width* and *height* of *rectangle*, its corner in *MaskComposite*.
- To paint it: put one frame into *Load Image*, open the mask editor there, and connect its mask instead.
- One mask holds for all frames; a batch of as many masks as frames (from a segmentation node) follows a thing that \
moves.
- *Set Latent Noise Mask* may stand before or after *DDIM Invert*.

A mask much larger than the thing blends best. Nothing changes: the mask misses it, see *mask*.
"""

LONG_NOTE = """\
# A long clip by context windows

The model is tuned on the clip's first 24 frames and then inverts and samples all of them, 24 at a time.

- *Context Windows (Manual)*: *dim* 0, since frames lie on the batch axis. A larger *context_overlap* makes smoother \
transitions and takes longer.
- Every window attends to the clip's first frame, so the subject stays the same from window to window; temporal \
attention sees one window at a time. A ControlNet takes one hint for all frames here, not one for each.
- The clip's motion changes later on: tune on those frames, with *batch_index* of *tuned frames*.
- Memory for tuning grows with the tuned frames, for sampling with *context_length*, and for the VAE with the clip.
"""

COMPARE_NOTE = """\
# Measure and compare

Two guidances of one edit, in figures and side by side.

- **Evaluate Video** compares an edit with its source: motion and background, both from the pictures alone.
- With *Load CLIP Vision* it also says how consistent the frames are, and with *Load CLIP* how well they fit the \
prompt. The paper's figures are of OpenAI's CLIP ViT-L/14: its vision half goes into `models/clip_vision`, its text \
half (`clip_l.safetensors`, with the text projection) into `models/text_encoders`. Without them, unplug both.
- *plot* shows the figures frame by frame: a dip is a flicker.
- **Compare Videos** makes one video and one contact sheet.

A good edit has a high fit to its prompt *and* the source's motion. The higher the guidance, the more of the first and \
the less of the second.
"""

DEMO_NOTE = """\
# The demo model: nothing to download

A tiny Stable Diffusion that comes with this pack knows drawings of 64x64 pixels. All of this takes minutes on a CPU.

1. **Upload the clip**: press *choose file to upload* and take `bounce.mp4` from the folder `demo` of this pack \
(`ComfyUI/custom_nodes/.../demo`). Queue.
2. **Play with the edit prompt.** It knows *circle, square, triangle, star, heart, cross*; *red, yellow, green, blue, \
purple, pink*; *the night sky, the grass, the sand, the snow, the bricks, the sea*; *painting* and *pencil style*. \
Always: *a COLOUR SHAPE on the PLACE, ... style*.

It is small and learns faster than Stable Diffusion: 120 steps with a learning rate of 3e-4, and 20 steps to invert \
and sample. Its results are enlarged, with their pixels to be seen.
"""


def quick_start(canvas: Canvas) -> None:
    """One clip, one edit: the method as released."""
    canvas.note(QUICK_START_NOTE)
    base, video, clip, source = _clip_and_model(canvas, SKIING)
    tuned = _tune(canvas, base["MODEL"], clip, source, "man-skiing")
    empty, noise = _invert(canvas, base["CLIP"], tuned, clip)
    canvas.column("4. Edit", YELLOW)
    edit = _prompt(canvas, base["CLIP"], "edit prompt", "spider man is skiing on the beach, cartoon style")
    _sample_and_save(canvas, tuned["model"], edit, empty, noise, base["VAE"], video, "edit")


def object_edit(canvas: Canvas) -> None:
    """The noun is exchanged."""
    canvas.note(OBJECT_NOTE)
    base, video, clip, source = _clip_and_model(canvas, CAR)
    tuned = _tune(canvas, base["MODEL"], clip, source, "car-turn")
    _, noise = _invert(canvas, base["CLIP"], tuned, clip)
    canvas.column("4. Edit", YELLOW)
    edit = _prompt(canvas, base["CLIP"], "edit prompt", "a sports car is moving on the road")
    negative = _prompt(canvas, base["CLIP"], "negative prompt", "")
    frames = _sample_and_save(canvas, tuned["model"], edit, negative, noise, base["VAE"], video, "object")
    _compare(canvas, "5. Side by side", video, [frames], "a jeep car\na sports car", "object-compared")


def background_change(canvas: Canvas) -> None:
    """The place is exchanged."""
    canvas.note(BACKGROUND_NOTE)
    _several_edits(
        canvas,
        CAR,
        "car-turn",
        {
            "beach": "a jeep car is moving on the beach",
            "snow": "a jeep car is moving on the snow",
        },
    )


def style_transfer(canvas: Canvas) -> None:
    """A style is added."""
    canvas.note(STYLE_NOTE)
    _several_edits(
        canvas,
        CAR,
        "car-turn",
        {
            "cartoon": "a jeep car is moving on the road, cartoon style",
            "van-gogh": "a jeep car is moving on the road, van gogh style",
        },
    )


def add_remove_object(canvas: Canvas) -> None:
    """Something is put on, something is taken away."""
    canvas.note(ADD_REMOVE_NOTE)
    source_clip = dataclasses.replace(SKIING, prompt="a man with ski poles is skiing")
    base, video, clip, source = _clip_and_model(canvas, source_clip)
    tuned = _tune(canvas, base["MODEL"], clip, source, "man-skiing-poles")
    empty, noise = _invert(canvas, base["CLIP"], tuned, clip)
    canvas.column("4. Add", YELLOW)
    added = _prompt(
        canvas, base["CLIP"], "edit prompt, add", "a man with ski poles, wearing a red cowboy hat, is skiing"
    )
    _sample_and_save(canvas, tuned["model"], added, empty, noise, base["VAE"], video, "object-added")
    canvas.column("5. Remove", YELLOW)
    left = _prompt(canvas, base["CLIP"], "edit prompt, remove", "a man is skiing")
    negative = _prompt(canvas, base["CLIP"], "negative prompt, remove", "ski poles")
    _sample_and_save(canvas, tuned["model"], left, negative, noise, base["VAE"], video, "object-removed")


def many_prompts(canvas: Canvas) -> None:
    """Four edits and one tuning."""
    canvas.note(MANY_PROMPTS_NOTE)
    _several_edits(
        canvas,
        SKIING,
        "man-skiing",
        {
            "mickey-mouse": "mickey mouse is skiing on the snow",
            "spider-man": "spider man is skiing on the beach, cartoon style",
            "wonder-woman": "wonder woman, wearing a cowboy hat, is skiing",
            "pink-clothes": "a man, wearing pink clothes, is skiing at sunset",
        },
    )


def dreambooth_lora(canvas: Canvas) -> None:
    """A personalised checkpoint to tune on, and a character's LoRA in the edit."""
    canvas.note(DREAMBOOTH_NOTE)
    base, video, clip, source = _clip_and_model(canvas, SURFING, checkpoint=DREAMBOOTH)
    tuned = _tune(canvas, base["MODEL"], clip, source, "man-surfing-dreambooth")
    empty, noise = _invert(canvas, base["CLIP"], tuned, clip)
    canvas.column("4. Character", CYAN)
    character = canvas.add(
        "LoraLoader", "character", model=tuned["model"], clip=base["CLIP"], lora_name=CHARACTER_LORA,
        strength_model=0.8, strength_clip=0.8,
    )  # fmt: skip
    edit = _prompt(canvas, character["CLIP"], "edit prompt", "a princess is surfing, modern disney style")
    canvas.column("5. Edit", YELLOW)
    _sample_and_save(canvas, character["MODEL"], edit, empty, noise, base["VAE"], video, "edit-dreambooth-lora")


def controlnet_lora(canvas: Canvas) -> None:
    """A LoRA's style, and an edit that is held to the clip's edges."""
    canvas.note(CONTROLNET_NOTE)

    canvas.column("1. Clip, model and LoRA", BLUE)
    base = canvas.add("CheckpointLoaderSimple", ckpt_name=CHECKPOINT)
    model = canvas.add("LoraLoader", model=base["MODEL"], clip=base["CLIP"], lora_name=LORA)
    video, clip = _clip(canvas, SKIING, base)
    source = _prompt(canvas, model["CLIP"], "source prompt", SKIING.prompt)

    tuned = _tune(canvas, model["MODEL"], clip, source, "man-skiing-style")
    empty, noise = _invert(canvas, model["CLIP"], tuned, clip)
    edit = "spider man is skiing on the beach, cartoon style"
    _held_edit(canvas, CONTROLNET, model["CLIP"], edit, tuned, empty, noise, base, video, "edit-controlnet-lora")


def t2i_adapter(canvas: Canvas) -> None:
    """An edit that is held to the clip's edges, by an adapter."""
    canvas.note(T2I_ADAPTER_NOTE)
    base, video, clip, source = _clip_and_model(canvas, CAR)
    tuned = _tune(canvas, base["MODEL"], clip, source, "car-turn")
    empty, noise = _invert(canvas, base["CLIP"], tuned, clip)
    edit = "a jeep car is moving on the snow"
    _held_edit(canvas, T2I_ADAPTER, base["CLIP"], edit, tuned, empty, noise, base, video, "edit-t2i-adapter", 0.7)


def saved_motion(canvas: Canvas) -> None:
    """A tuning from disk on another checkpoint."""
    canvas.note(SAVED_MOTION_NOTE)
    canvas.column("1. Clip and model", BLUE)
    base = canvas.add("CheckpointLoaderSimple", ckpt_name=OTHER_CHECKPOINT)
    video, clip = _clip(canvas, SKIING, base)
    canvas.column("2. The saved motion", GREEN)
    motion = canvas.add("TAV_LoadMotion", file=MOTION)
    tuned = canvas.add("TAV_InflateUNet", model=base["MODEL"], motion=motion["motion"])
    empty, noise = _invert(canvas, base["CLIP"], tuned, clip)
    canvas.column("4. Edit", YELLOW)
    edit = _prompt(canvas, base["CLIP"], "edit prompt", "wonder woman, wearing a cowboy hat, is skiing")
    _sample_and_save(canvas, tuned["model"], edit, empty, noise, base["VAE"], video, "edit-saved-motion")


def masked_edit(canvas: Canvas) -> None:
    """Only a part of the picture changes."""
    canvas.note(MASKED_NOTE)
    base, video, clip, source = _clip_and_model(canvas, SURFING)
    tuned = _tune(canvas, base["MODEL"], clip, source, "man-surfing")
    empty, noise = _invert(canvas, base["CLIP"], tuned, clip)
    canvas.column("4. Mask", CYAN)
    black = canvas.add("SolidMask", "whole picture", value=0.0, width=512, height=512)
    white = canvas.add("SolidMask", "rectangle", value=1.0, width=256, height=320)
    hard = canvas.add(
        "MaskComposite", "where the rectangle lies",
        destination=black["MASK"], source=white["MASK"], x=128, y=96, operation="add",
    )  # fmt: skip
    # FeatherMask softens the edges of the picture, not those of what is white in it: so the corners are soft by a blur.
    picture = canvas.add("MaskToImage", mask=hard["MASK"])
    blurred = canvas.add("ImageBlur", "soft edges", image=picture["IMAGE"], blur_radius=16, sigma=8.0)
    canvas.add("PreviewImage", "mask", room=240, images=blurred["IMAGE"])
    soft = canvas.add("ImageToMask", image=blurred["IMAGE"], channel="red")
    masked = canvas.add("SetLatentNoiseMask", samples=noise["latent"], mask=soft["MASK"])
    canvas.column("5. Edit", YELLOW)
    edit = _prompt(canvas, base["CLIP"], "edit prompt", "a panda is surfing")
    _sample_and_save(canvas, tuned["model"], edit, empty, masked, base["VAE"], video, "edit-masked")


def long_clip(canvas: Canvas) -> None:
    """More frames than are tuned on, in windows."""
    canvas.note(LONG_NOTE)
    long = dataclasses.replace(CAR, values={"frame_count": 64})
    base, video, clip, source = _clip_and_model(canvas, long)
    first = canvas.add("LatentFromBatch", "tuned frames", samples=clip["LATENT"], batch_index=0, length=24)
    tuned = _tune(canvas, base["MODEL"], first, source, "car-turn-long")
    canvas.column("3. Windows, invert", PURPLE)
    windows = canvas.add(
        "ContextWindowsManual", model=tuned["model"], context_length=24, context_overlap=8,
        context_schedule="standard_static", dim=0,
    )  # fmt: skip
    empty = _prompt(canvas, base["CLIP"], "empty prompt", "")
    noise = canvas.add(
        "TAV_DDIMInvert", room=300, model=windows["MODEL"], latent=clip["LATENT"], conditioning=empty["CONDITIONING"]
    )
    canvas.column("4. Edit", YELLOW)
    edit = _prompt(canvas, base["CLIP"], "edit prompt", "a jeep car is moving on the snow")
    _sample_and_save(canvas, windows["MODEL"], edit, empty, noise, base["VAE"], video, "edit-long")


def compare(canvas: Canvas) -> None:
    """One edit with two guidances, measured and side by side."""
    canvas.note(COMPARE_NOTE)
    base, video, clip, source = _clip_and_model(canvas, SKIING)
    tuned = _tune(canvas, base["MODEL"], clip, source, "man-skiing")
    empty, noise = _invert(canvas, base["CLIP"], tuned, clip)
    prompt = "spider man is skiing on the beach, cartoon style"
    edits = []
    for number, guidance in enumerate((7.5, 12.5), 4):
        canvas.column(f"{number}. Guidance {guidance:g}", YELLOW)
        edit = _prompt(canvas, base["CLIP"], f"edit prompt, guidance {guidance:g}", prompt)
        edits.append(
            _sample_and_save(
                canvas, tuned["model"], edit, empty, noise, base["VAE"], video, f"guidance-{guidance:g}",
                guidance=guidance,
            )
        )  # fmt: skip
    canvas.column("6. Measure", CYAN)
    vision = canvas.add("CLIPVisionLoader", clip_name=CLIP_VISION)
    words = canvas.add("CLIPLoader", clip_name=CLIP_TEXT, type="stable_diffusion", device="default")
    for number, frames in enumerate(edits, 1):
        measured = canvas.add(
            "TAV_EvaluateVideo", f"edit {number}", room=240,
            source=video["images"], edited=frames["IMAGE"], prompt=prompt,
            clip_vision=vision["CLIP_VISION"], clip=words["CLIP"],
        )  # fmt: skip
        canvas.add("PreviewImage", f"plot, edit {number}", room=240, images=measured["plot"])
    _compare(canvas, "7. Side by side", video, edits, "source\nguidance 7.5\nguidance 12.5", "compared")


def demo_model(canvas: Canvas) -> None:
    """The model that comes with the pack, on a clip that comes with it."""
    canvas.note(DEMO_NOTE)
    canvas.column("1. Clip and model", BLUE)
    base = canvas.add("TAV_LoadDemoModel")
    video = canvas.add("TAV_LoadVideo", room=340, file=DRAWN.file, **DRAWN.values)
    clip = canvas.add("VAEEncode", pixels=video["images"], vae=base["vae"])
    source = _prompt(canvas, base["clip"], "source prompt", DRAWN.prompt)
    tuned = _tune(canvas, base["model"], clip, source, "demo", steps=120, learning_rate=3e-4)
    canvas.column("3. Invert", PURPLE)
    empty = _prompt(canvas, base["clip"], "empty prompt", "")
    noise = canvas.add(
        "TAV_DDIMInvert",
        room=300,
        model=tuned["model"],
        latent=clip["LATENT"],
        conditioning=source["CONDITIONING"],
        steps=20,
    )
    canvas.column("4. Edit", YELLOW)
    edit = _prompt(canvas, base["clip"], "edit prompt", "a blue star on the sand, painting style")
    sampled = canvas.add(
        "TAV_Sample", room=300, model=tuned["model"], positive=edit["CONDITIONING"], negative=empty["CONDITIONING"],
        latent=noise["latent"], steps=20, guidance=5.0,
    )  # fmt: skip
    frames = canvas.add("VAEDecode", samples=sampled["latent"], vae=base["vae"])
    canvas.column("5. Result, enlarged", YELLOW)
    both = canvas.add(
        "TAV_CompareVideos",
        room=230,
        source=video["images"],
        edit_1=frames["IMAGE"],
        captions="heart\nstar",
    )
    large = canvas.add("ImageScaleBy", image=both["video"], upscale_method="nearest-exact", scale_by=4.0)
    canvas.add("TAV_SaveVideo", room=340, images=large["IMAGE"], fps=video["fps"], filename_prefix="TuneAVideo/demo")


def _clip_and_model(
    canvas: Canvas, source: Source, checkpoint: str = CHECKPOINT
) -> tuple[Placed, Placed, Placed, Placed]:
    """The first group: checkpoint, frames, their latent and the source prompt."""
    canvas.column("1. Clip and model", BLUE)
    base = canvas.add("CheckpointLoaderSimple", ckpt_name=checkpoint)
    video, clip = _clip(canvas, source, base)
    return base, video, clip, _prompt(canvas, base["CLIP"], "source prompt", source.prompt)


def _clip(canvas: Canvas, source: Source, base: Placed) -> tuple[Placed, Placed]:
    video = canvas.add("TAV_LoadVideo", room=340, file=source.file, **source.values)
    return video, canvas.add("VAEEncode", pixels=video["images"], vae=base["VAE"])


def _prompt(canvas: Canvas, clip: Output, title: str, text: str) -> Placed:
    return canvas.add("CLIPTextEncode", title, room=80, clip=clip, text=text)


def _tune(canvas: Canvas, model: Output, clip: Placed, source: Placed, name: str, **values: Any) -> Placed:
    canvas.column("2. Tune, once per clip", GREEN)
    tuned = canvas.add(
        "TAV_OneShotTune",
        room=300,
        model=model,
        latent=clip["LATENT"],
        conditioning=source["CONDITIONING"],
        **values,
    )
    canvas.add("PreviewImage", "loss curve", room=240, images=tuned["loss_curve"])
    canvas.add("TAV_SaveMotion", motion=tuned["motion"], filename_prefix=name)
    return tuned


def _invert(canvas: Canvas, clip_model: Output, tuned: Placed, clip: Placed) -> tuple[Placed, Placed]:
    """The empty prompt, which is the negative one of the edits too, and the inverted clip."""
    canvas.column("3. Invert", PURPLE)
    empty = _prompt(canvas, clip_model, "empty prompt", "")
    noise = canvas.add(
        "TAV_DDIMInvert", room=300, model=tuned["model"], latent=clip["LATENT"], conditioning=empty["CONDITIONING"]
    )
    return empty, noise


def _several_edits(canvas: Canvas, source_clip: Source, motion_name: str, prompts: dict[str, str]) -> None:
    """From the clip to one edit for each prompt, by name, and all of them side by side."""
    base, video, clip, source = _clip_and_model(canvas, source_clip)
    tuned = _tune(canvas, base["MODEL"], clip, source, motion_name)
    empty, noise = _invert(canvas, base["CLIP"], tuned, clip)
    edits = []
    for number, (name, text) in enumerate(prompts.items(), 1):
        canvas.column(f"{number + 3}. Edit {number}", YELLOW)
        edit = _prompt(canvas, base["CLIP"], f"edit prompt {number}", text)
        edits.append(_sample_and_save(canvas, tuned["model"], edit, empty, noise, base["VAE"], video, name))
    captions = "\n".join(["source", *prompts])
    _compare(canvas, f"{len(prompts) + 4}. Side by side", video, edits, captions, "compared")


def _held_edit(
    canvas: Canvas,
    control_net: str,
    clip_model: Output,
    prompt: str,
    tuned: Placed,
    empty: Placed,
    noise: Placed,
    base: Placed,
    video: Placed,
    name: str,
    strength: float = 1.0,
) -> None:
    """Two groups: an edit prompt with the clip's edges as hints, and its sampling."""
    canvas.column("4. One hint per frame", CYAN)
    control = canvas.add("ControlNetLoader", control_net_name=control_net)
    edges = canvas.add("Canny", image=video["images"])
    canvas.add("PreviewImage", "hints", room=240, images=edges["IMAGE"])
    edit = _prompt(canvas, clip_model, "edit prompt", prompt)
    held = canvas.add(
        "ControlNetApplyAdvanced",
        positive=edit["CONDITIONING"],
        negative=empty["CONDITIONING"],
        control_net=control["CONTROL_NET"],
        image=edges["IMAGE"],
        strength=strength,
    )
    canvas.column("5. Edit", YELLOW)
    _sample_and_save(canvas, tuned["model"], held["positive"], held["negative"], noise, base["VAE"], video, name)


def _sample_and_save(
    canvas: Canvas,
    model: Output,
    positive: Placed | Output,
    negative: Placed | Output,
    noise: Placed,
    vae: Output,
    video: Placed,
    name: str,
    **values: Any,
) -> Placed:
    """Sampling, decoding and saving below what the column has; the decoded frames."""
    sampled = canvas.add(
        "TAV_Sample",
        room=300,
        model=model,
        positive=positive if isinstance(positive, Output) else positive["CONDITIONING"],
        negative=negative if isinstance(negative, Output) else negative["CONDITIONING"],
        latent=next(iter(noise.outputs.values())),
        **values,
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
    return frames


def _compare(canvas: Canvas, title: str, video: Placed, edits: list[Placed], captions: str, name: str) -> None:
    """A group that lays the clip and its edits next to each other."""
    canvas.column(title, CYAN)
    frames = {f"edit_{number}": edit["IMAGE"] for number, edit in enumerate(edits, 1)}
    both = canvas.add("TAV_CompareVideos", room=160, source=video["images"], captions=captions, **frames)
    canvas.add(
        "TAV_SaveVideo", "side by side", room=340,
        images=both["video"], fps=video["fps"], filename_prefix=f"TuneAVideo/{name}",
    )  # fmt: skip
    canvas.add("PreviewImage", "contact sheet", room=240, images=both["contact_sheet"])


WORKFLOWS = {
    f"tune-a-video-{name}": describe
    for name, describe in {
        "quick-start": quick_start,
        "object-edit": object_edit,
        "background-change": background_change,
        "style-transfer": style_transfer,
        "add-remove-object": add_remove_object,
        "many-prompts": many_prompts,
        "dreambooth-lora": dreambooth_lora,
        "controlnet-lora": controlnet_lora,
        "t2i-adapter": t2i_adapter,
        "saved-motion": saved_motion,
        "masked-edit": masked_edit,
        "long-clip": long_clip,
        "compare": compare,
        "demo-model": demo_model,
    }.items()
}


def build(name: str, definitions: Definitions) -> Json:
    """The workflow of this name, from a host's node definitions (what it answers to /object_info)."""
    canvas = Canvas(definitions)
    WORKFLOWS[name](canvas)
    return canvas.json(name)


def main() -> None:
    """Write workflows/*.json and workflows/api/*.json."""
    import engine
    from host_server import HostServer

    parser = argparse.ArgumentParser(description="Write the pack's workflows from the definitions of a running host.")
    parser.add_argument("--comfyui", metavar="PATH", help="default: $COMFYUI_PATH, else ~/comfy/ComfyUI")
    comfyui = engine.find_comfyui(parser.parse_args().comfyui)
    if comfyui is None:
        parser.error("no ComfyUI at $COMFYUI_PATH or ~/comfy/ComfyUI; give one with --comfyui")
    with tempfile.TemporaryDirectory() as base, HostServer(comfyui, Path(base), {PACK: ROOT}) as server:
        definitions = server.get("/object_info")
    API_FOLDER.mkdir(parents=True, exist_ok=True)
    for name in WORKFLOWS:
        workflow = build(name, definitions)
        for folder, graph in ((FOLDER, workflow), (API_FOLDER, script_graph(workflow, definitions))):
            text = json.dumps(graph, indent=1, ensure_ascii=False)
            (folder / f"{name}.json").write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
