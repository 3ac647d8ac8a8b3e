"""Bad input gets an error in its node that names the input and the remedy, before any long work."""

from __future__ import annotations

import shutil
import subprocess

import imageio_ffmpeg
import pytest
import torch
from graphs import (
    CLIP_FILE,
    FRAMES,
    HEIGHT,
    WIDTH,
    Graph,
    Node,
    assert_refused,
    checkpoint,
    inflate,
    invert,
    load_video,
    random_latent,
    sample,
    text,
    text_to_image,
    tune,
)
from safetensors.torch import load_file, safe_open, save_file

pytestmark = [pytest.mark.host, pytest.mark.shared]


@pytest.fixture(scope="module", autouse=True)
def host_stays_usable(server):
    """After everything that failed here, the stock graph gives what it gave before."""

    def stock_latent():
        graph = Graph()
        latent, _ = text_to_image(graph, checkpoint(graph))
        return server.saved_latent(server.run(graph.nodes).raise_for_error(), latent)

    before = stock_latent()
    yield
    server.post("/free", {"free_memory": True})
    assert torch.equal(stock_latent(), before)


def node_of(link):
    return Node(link[0])


# --- clips -----------------------------------------------------------------------------------------


def make_sound_only(source, target):
    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    subprocess.run([ffmpeg, "-loglevel", "error", "-y", "-i", source, "-vn", "-c", "copy", target], check=True)


def make_cut_at_the_index(source, target):
    """The index of an mp4 usually lies at its end: without it nothing can be decoded."""
    target.write_bytes(source.read_bytes()[: source.stat().st_size // 2])


def make_cut_in_the_frames(source, target):
    """With the index in front, the file opens and its frames are missing."""
    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    whole = target.with_suffix(".whole.mp4")
    subprocess.run(
        [ffmpeg, "-loglevel", "error", "-y", "-i", source, "-c", "copy", "-movflags", "faststart", whole], check=True
    )
    make_cut_at_the_index(whole, target)
    whole.unlink()


BAD_FILES = {
    "empty.mp4": lambda source, target: target.write_bytes(b""),
    "sound-only.mp4": make_sound_only,
    "no-index.mp4": make_cut_at_the_index,
    "no-frames.mp4": make_cut_in_the_frames,
    "text.mp4": lambda source, target: target.write_text("This is not a video.\n" * 100),
    "picture.mp4": lambda source, target: target.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100)),
    "playlist.mp4": lambda source, target: target.write_text(f"ffconcat version 1.0\nfile {source.name}\n"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_unreadable_file(server, name):
    BAD_FILES[name](server.input_folder / CLIP_FILE, server.input_folder / name)
    graph = Graph()
    assert_refused(server, graph, load_video(graph, file=name), rf"file: .*{name}.*\. ")


def test_missing_file(server):
    graph = Graph()
    assert_refused(server, graph, load_video(graph, file="nowhere.mp4"), "file - .*nowhere.mp4.*(upload|choose)")


def test_file_that_goes_missing(server):
    """It was there when the host listed it."""
    shutil.copy(server.input_folder / CLIP_FILE, server.input_folder / "gone.mp4")
    graph = Graph()
    load_video(graph, file="gone.mp4")
    node = load_video(graph, file="gone.mp4", width=72)
    graph.add("PreviewImage", images=node[0])
    server.run(graph.nodes).raise_for_error()
    (server.input_folder / "gone.mp4").unlink()
    graph = Graph()
    assert_refused(server, graph, load_video(graph, file="gone.mp4", width=80), "file - .*gone.mp4.*[Uu]pload")


@pytest.mark.parametrize("where", ["../outside.mp4", "{base}/outside.mp4", "sub/../../outside.mp4", "../models"])
def test_path_outside_the_input_folder(server, where):
    outside = server.base / "outside.mp4"
    shutil.copy(server.input_folder / CLIP_FILE, outside)
    graph = Graph()
    node = load_video(graph, file=where.format(base=server.base))
    assert_refused(server, graph, node, "file - .*outside the input folder.*(copy|upload)")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": 100.0}, "start: .*earlier"),
        ({"start": 91.0, "start_unit": "frames"}, "start: .*earlier"),
        ({"width": 100}, "width: .*multiple of 8"),
        ({"height": 12}, "height: .*multiple of 8"),
        ({"width": 0}, "width"),
        ({"height": 1_000_000}, "height"),
        ({"frame_step": 0}, "frame_step"),
        ({"frame_count": -1}, "frame_count"),
    ],
)
def test_part_or_size_that_cannot_be(server, changes, message):
    graph = Graph()
    assert_refused(server, graph, load_video(graph, **changes), message)


# --- models, latents and prompts ---------------------------------------------------------------------


class Inputs:
    """Good inputs for each node, made without a clip, to be replaced one at a time."""

    def __init__(self):
        self.graph = Graph()
        self.loaded = checkpoint(self.graph)
        self.model = self.loaded.model
        self.prompt = text(self.graph, self.loaded.clip, "a prompt")
        self.latent = self.random_latent()

    def random_latent(self, frames=FRAMES, channels=4, broken=0):
        return random_latent(self.graph, frames, seed=1, channels=channels, broken=broken)

    def conditioning(self, entries=1, batch=1, width=768):
        return self.graph.add("ProbeConditioning", entries=entries, batch=batch, width=width, pooled=0)[0]

    def unet(self, name):
        return self.graph.add("UNETLoader", unet_name=f"{name}.safetensors", weight_dtype="default")[0]

    def node(self, kind, **changes):
        """One of the nodes that take a model and latents, by its short name."""
        given = {"model": self.model, "latent": self.latent, "conditioning": self.prompt} | changes
        if kind == "tune":
            return tune(self.graph, given.pop("model"), given.pop("latent"), given.pop("conditioning"), **given)
        if kind == "invert":
            link = invert(self.graph, given["model"], given["latent"], given["conditioning"])
        else:
            positive = given.pop("positive", given["conditioning"])
            negative = given.pop("negative", self.prompt if kind == "sample" else given["conditioning"])
            link = sample(self.graph, given["model"], positive, negative, given["latent"])
        return node_of(link)


MODEL_NODES = ["tune", "invert", "sample"]


@pytest.mark.parametrize("kind", MODEL_NODES)
def test_latent_that_is_not_a_number(server, kind):
    inputs = Inputs()
    node = inputs.node(kind, latent=inputs.random_latent(broken=3))
    assert_refused(server, inputs.graph, node, r"latent: .*NaN")


@pytest.mark.parametrize("kind", MODEL_NODES)
def test_latent_of_another_family(server, kind):
    inputs = Inputs()
    node = inputs.node(kind, latent=inputs.random_latent(channels=16))
    assert_refused(server, inputs.graph, node, r"latent: .*16 channels.*4.*VAE")


@pytest.mark.parametrize("kind", MODEL_NODES)
def test_latent_of_a_video_model(server, kind):
    inputs = Inputs()
    latent = inputs.graph.add("EmptyHunyuanLatentVideo", width=WIDTH, height=HEIGHT, length=5, batch_size=1)[0]
    assert_refused(server, inputs.graph, inputs.node(kind, latent=latent), r"latent: .*VAE")


@pytest.mark.parametrize("kind", MODEL_NODES)
def test_prompt_of_another_family(server, kind):
    inputs = Inputs()
    node = inputs.node(kind, conditioning=inputs.conditioning(width=1024))
    name = "positive" if kind == "sample" else "conditioning"
    assert_refused(server, inputs.graph, node, rf"{name}: .*1024.*768.*CLIP")


def test_negative_prompt_of_another_family(server):
    inputs = Inputs()
    node = inputs.node("sample", negative=inputs.conditioning(width=1024))
    assert_refused(server, inputs.graph, node, r"negative: .*1024.*768.*CLIP")


@pytest.mark.parametrize("kind", MODEL_NODES)
def test_empty_conditioning_list(server, kind):
    inputs = Inputs()
    node = inputs.node(kind, conditioning=inputs.conditioning(entries=0))
    name = "positive" if kind == "sample" else "conditioning"
    assert_refused(server, inputs.graph, node, rf"{name}: .*(empty|0 prompts).*CLIP Text Encode")


@pytest.mark.parametrize("kind", MODEL_NODES)
def test_conditioning_for_another_number_of_frames(server, kind):
    inputs = Inputs()
    node = inputs.node(kind, conditioning=inputs.conditioning(batch=FRAMES - 1))
    name = "positive" if kind == "sample" else "conditioning"
    assert_refused(server, inputs.graph, node, rf"{name}: .*{FRAMES - 1}.*{FRAMES} frames.*one per frame")


def test_tuning_on_two_prompts(server):
    inputs = Inputs()
    second = inputs.conditioning()
    both = inputs.graph.add("ConditioningCombine", conditioning_1=inputs.prompt, conditioning_2=second)[0]
    assert_refused(server, inputs.graph, inputs.node("tune", conditioning=both), r"conditioning: .*2 prompts.*one")


@pytest.mark.parametrize("kind", [*MODEL_NODES, "inflate"])
def test_model_without_a_unet(server, kind):
    """With latents that would suit the diffusion transformer, and with those of an SD 1.x clip."""
    for channels in (16, 4):
        inputs = Inputs()
        model = inputs.unet("sd3")
        if kind == "inflate":
            node = node_of(inflate(inputs.graph, model))
        else:
            node = inputs.node(kind, model=model, latent=inputs.random_latent(channels=channels))
        assert_refused(server, inputs.graph, node, r"model: .*Stable Diffusion")


# --- tuned weights -------------------------------------------------------------------------------------


def load_motion(inputs, name):
    return inputs.graph.add("TAV_LoadMotion", file=name)


def test_sd1_motion_on_sd2(server, motion_file):
    inputs = Inputs()
    motion = load_motion(inputs, motion_file)[0]
    node = node_of(inflate(inputs.graph, inputs.unet("sd2"), motion=motion))
    assert_refused(server, inputs.graph, node, r"motion: .*SD1.*SD2")


@pytest.mark.parametrize("kind", ["inflate", "tune"])
def test_sdxl_motion_on_sd1(server, kind):
    inputs = Inputs()
    graph = inputs.graph
    prompt = graph.add("ProbeConditioning", entries=1, batch=1, width=2048, pooled=1280)[0]
    motion = tune(graph, graph.add("ProbeSDXL", seed=1)[0], inputs.latent, prompt, steps=1)[1]
    if kind == "tune":
        node = inputs.node("tune", motion=motion)
    else:
        node = node_of(inflate(graph, inputs.model, motion=motion))
    assert_refused(server, graph, node, r"motion: .*SDXL.*SD1")


def test_motion_of_a_smaller_unet_and_the_other_way_round(server, motion_file):
    inputs = Inputs()
    shallow = inputs.unet("sd1-shallow")
    node = node_of(inflate(inputs.graph, shallow, motion=load_motion(inputs, motion_file)[0]))
    assert_refused(server, inputs.graph, node, r"motion: .*transformer_blocks")

    inputs = Inputs()
    motion = inputs.node("tune", model=inputs.unet("sd1-shallow"), steps=1)[1]
    node = node_of(inflate(inputs.graph, inputs.model, motion=motion))
    assert_refused(server, inputs.graph, node, r"motion: .*transformer_blocks")


def rewritten(server, motion_file, name, change):
    """A copy of the motion file with changed tensors or metadata; its name."""
    folder = server.models_folder("tav")
    tensors = load_file(folder / motion_file)
    with safe_open(folder / motion_file, "pt") as file:
        metadata = file.metadata()
    change(tensors, metadata)
    save_file(tensors, folder / name, metadata)
    return name


def test_motion_of_another_shape(server, motion_file):
    def change(tensors, metadata):
        key = sorted(tensors)[0]
        tensors[key] = torch.zeros(64, 64, dtype=tensors[key].dtype)

    name = rewritten(server, motion_file, "other-shape.safetensors", change)
    inputs = Inputs()
    node = node_of(inflate(inputs.graph, inputs.model, motion=load_motion(inputs, name)[0]))
    assert_refused(server, inputs.graph, node, r"motion: .*transformer_blocks.*\[64, 64\].*\[320, 320\]")


def test_motion_that_lacks_a_layer(server, motion_file):
    def change(tensors, metadata):
        del tensors[next(key for key in sorted(tensors) if "attn_temp.to_q" in key)]

    name = rewritten(server, motion_file, "incomplete.safetensors", change)
    inputs = Inputs()
    node = node_of(inflate(inputs.graph, inputs.model, motion=load_motion(inputs, name)[0]))
    assert_refused(server, inputs.graph, node, r"motion: .*attn_temp.to_q")


def test_motion_of_a_newer_format(server, motion_file):
    def change(tensors, metadata):
        metadata["format_version"] = "99"

    inputs = Inputs()
    node = load_motion(inputs, rewritten(server, motion_file, "newer.safetensors", change))
    assert_refused(server, inputs.graph, node, r"file: .*newer.safetensors.*version 99.*[Uu]pdate")


def test_motion_that_is_not_a_number(server, motion_file):
    def change(tensors, metadata):
        tensors[sorted(tensors)[0]].view(-1)[0] = float("nan")

    inputs = Inputs()
    node = load_motion(inputs, rewritten(server, motion_file, "broken.safetensors", change))
    assert_refused(server, inputs.graph, node, r"file: .*broken.safetensors.*not finite")


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "lora"])
def test_file_that_is_no_motion(server, motion_file, damage):
    folder = server.models_folder("tav")
    path = folder / f"damaged-{damage}.safetensors"
    if damage == "lora":
        shutil.copy(server.models_folder("loras") / "style.safetensors", path)
    else:
        whole = (folder / motion_file).read_bytes()
        path.write_bytes({"cut": whole[: len(whole) // 2], "garbage": b"\xff" * 5000, "empty": b""}[damage])
    inputs = Inputs()
    assert_refused(server, inputs.graph, load_motion(inputs, path.name), rf"file: .*{path.name}")


def test_motion_file_that_is_missing_or_elsewhere(server, motion_file):
    for name in ("nowhere.safetensors", "../checkpoints/tiny-sd1.safetensors"):
        inputs = Inputs()
        assert_refused(server, inputs.graph, load_motion(inputs, name), "file")
