"""Beside the packs themselves: what docs/neighbours.md says of them, on graphs as people build them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import real_packs
import tiny_checkpoint
import torch
from graphs import (
    EDIT_PROMPT,
    FRAMES,
    HEIGHT,
    PACK,
    SOURCE_PROMPT,
    WIDTH,
    Edit,
    Graph,
    Link,
    Node,
    PerFrame,
    assert_refused,
    checkpoint,
    context_windows,
    inflate,
    invert,
    random_hints,
    random_latent,
    relative_error,
    sample,
    text,
    tune,
)
from safetensors.torch import save_file

pytestmark = [pytest.mark.host, pytest.mark.packs, pytest.mark.shared]

CLIP, LONG = "man-skiing.mp4", 7


def test_every_pack_registers_its_nodes(server):
    info = server.get("/object_info")
    modules = [node["python_module"] for node in info.values()]
    for name in (PACK, *real_packs.NAMES):
        assert f"custom_nodes.{name}" in modules
    assert "IMPORT FAILED" not in server.log()
    ours = {name for name, node in info.items() if node["python_module"] == f"custom_nodes.{PACK}"}
    assert all(name.startswith("TAV_") for name in ours)


def vhs_load(graph: Graph, frames: int = FRAMES, **more: Any) -> Node:
    inputs = {
        "video": CLIP,
        "force_rate": 0,
        "custom_width": WIDTH,
        "custom_height": HEIGHT,
        "frame_load_cap": frames,
        "skip_first_frames": 0,
        "select_every_nth": 2,
        "format": "None",
    }
    return graph.add("VHS_LoadVideo", **(inputs | more))


def vhs_combine(graph: Graph, images: Link, **more: Any) -> Node:
    inputs = {
        "images": images,
        "frame_rate": 8,
        "loop_count": 0,
        "filename_prefix": "beside",
        "format": "video/h264-mp4",
        "pix_fmt": "yuv420p",
        "crf": 19,
        "save_metadata": True,
        "trim_to_audio": False,
        "pingpong": False,
        "save_output": True,
    }
    return graph.add("VHS_VideoCombine", **(inputs | more))


def save(graph: Graph, images: Link, audio: Link) -> Node:
    inputs = {"fps": 8.0, "filename_prefix": "beside", "format": "mp4", "quality": 80}
    return graph.add("TAV_SaveVideo", images=images, audio=audio, **inputs)


def frames_and_sound(path: Path) -> tuple[int, int]:
    """Return the number of frames, and of sound tracks that are not empty."""
    with av.open(str(path)) as file:
        frames = sum(1 for _ in file.decode(video=0))
    with av.open(str(path)) as file:
        return frames, sum(next(file.decode(track), None) is not None for track in file.streams.audio)


ANIMATED = {"extra": {"VHS_latentpreview": True, "VHS_latentpreviewrate": 60}, "nodes": [], "links": []}


def test_a_clip_of_videohelpersuite_goes_through_the_chain_and_back(server):
    """With its animated previews, which announce how many frames they show."""
    graph = Graph()
    loaded = checkpoint(graph)
    clip = vhs_load(graph, LONG)
    latent = graph.add("VAEEncode", pixels=clip[0], vae=loaded.vae)[0]
    source, edit, nothing = (text(graph, loaded.clip, each) for each in (SOURCE_PROMPT, EDIT_PROMPT, ""))
    tuned = tune(graph, loaded.model, latent, source, preview_every=1)
    noise = invert(graph, tuned[0], latent, source)
    edited = sample(graph, tuned[0], edit, nothing, noise)
    images = graph.add("VAEDecode", samples=edited, vae=loaded.vae)[0]
    combined = vhs_combine(graph, images, audio=clip[2])
    saved = save(graph, images, clip[2])
    result = server.run(graph.nodes, workflow=ANIMATED).raise_for_error()
    announced = [(data["id"], data["length"]) for kind, data in result.announced if kind == "VHS_latentpreview"]
    # One-Shot Tune shows its own pictures.
    assert announced == [(noise[0], LONG), (edited[0], LONG)]
    # Its pictures bear their frame's number and their node's name behind the host's eight bytes.
    shown = {int.from_bytes(each[12:16], "big") for each in result.previews if edited[0].encode() in each[16:33]}
    assert shown == set(range(LONG))
    for node, kind in ((combined, "gifs"), (saved, "images")):
        assert frames_and_sound(server.saved_file(result, node, kind)) == (LONG, 1)


def test_sound_that_a_silent_clip_of_videohelpersuite_has_not(server, new_log, comfyui):
    """Its audio is read when Save Video asks, and raises then. ComfyUI 0.33 looks before, and ends the graph."""
    graph = Graph()
    clip = vhs_load(graph, 2, video="car-turn.mp4")
    saved = save(graph, clip[0], clip[2])
    result = server.run(graph.nodes)
    if "output_link_callback" in (comfyui / "comfy_execution" / "graph.py").read_text():
        assert list(result.errors) == [clip.id] and "VHS failed to extract audio" in result.errors[clip.id]
        return
    result.raise_for_error()
    assert frames_and_sound(server.saved_file(result, saved, "images")) == (2, 0)
    assert "its sound cannot be read and is left out (VHS failed to extract audio" in new_log()


def test_meta_batches_run_a_motion_over_a_clip_in_parts(server, motion_file):
    """Each part queues the graph again; the parts become one file."""
    edit = Edit(motion_file)
    graph = edit.graph
    batch = graph.add("VHS_BatchManager", frames_per_batch=2)[0]
    latent = graph.add("VAEEncode", pixels=vhs_load(graph, 5, meta_batch=batch)[0], vae=edit.loaded.vae)[0]
    noise = invert(graph, edit.model, latent, text(graph, edit.loaded.clip, SOURCE_PROMPT))
    video = sample(graph, edit.model, edit.positive, edit.negative, noise)
    images = graph.add("VAEDecode", samples=video, vae=edit.loaded.vae)[0]
    combined = vhs_combine(graph, images, meta_batch=batch, filename_prefix="parts")
    before = set(server.get("/history"))
    server.run(graph.nodes).raise_for_error()
    deadline = time.monotonic() + 120
    while any(server.get("/queue").values()) and time.monotonic() < deadline:
        time.sleep(0.5)
    runs = [run for key, run in server.get("/history").items() if key not in before]
    assert [run["status"]["status_str"] for run in runs] == ["success"] * 3
    (file,) = {entry["filename"] for run in runs for entry in run["outputs"].get(combined.id, {}).get("gifs", ())}
    assert frames_and_sound(server.output_folder / file) == (5, 0)


def advanced(scene: PerFrame, count: int = PerFrame.frames, seed: int = 3, conds: Any = None, **more: Any):
    positive, negative = conds or (scene.positive, scene.negative)
    node = scene.graph.add(
        "ACN_AdvancedControlNetApply_v2",
        positive=positive,
        negative=negative,
        control_net=scene.graph.add("ControlNetLoaderAdvanced", control_net_name="control.safetensors")[0],
        image=random_hints(scene.graph, count, seed=seed),
        strength=1.0,
        start_percent=0.0,
        end_percent=1.0,
        **more,
    )
    return node[0], node[1]


def ade_windows(graph: Graph, model: Link, looped: bool = False) -> Link:
    kind = "LoopedUniform" if looped else "StandardStatic"
    looped_inputs = {"context_stride": 1, "closed_loop": False} if looped else {}
    options = graph.add(
        f"ADE_{kind}ContextOptions",
        context_length=2,
        context_overlap=1,
        fuse_method="pyramid",
        use_on_equal_length=False,
        start_percent=0.0,
        guarantee_steps=1,
        **looped_inputs,
    )[0]
    return graph.add("ADE_UseEvolvedSampling", model=model, beta_schedule="use existing", context_options=options)[0]


def test_advanced_controlnet_gives_each_frame_its_hint_in_every_window(server, exercised):
    """In the host's windows and in AnimateDiff-Evolved's; alone, and on top of a stock ControlNet."""
    scene = PerFrame()
    graph = scene.graph
    theirs, own = scene.hinted("control.safetensors"), advanced(scene)
    # Where hints are fewer than frames, it repeats the last one.
    both = advanced(scene, 2, seed=5, conds=theirs)
    models = [
        scene.model,
        context_windows(graph, graph.add("ProbeSeparateConds", model=scene.model)[0]),
        ade_windows(graph, scene.model),
        ade_windows(graph, scene.model, looped=True),
    ]
    plain, whole, *others = server.latents(
        graph,
        sample(graph, scene.model, scene.positive, scene.negative, scene.latent, 2),
        sample(graph, scene.model, *theirs, scene.latent, 2),
        *(sample(graph, each, *conds, scene.latent, 2) for conds in (own, both) for each in models),
    )
    assert relative_error(plain, whole) > 1e-3 and relative_error(others[4], whole) > 1e-3
    errors = [relative_error(each, whole) for each in others[:4]]
    errors += [relative_error(each, others[4]) for each in others[5:]]
    exercised.append(
        f"Advanced-ControlNet in windows: relative difference {max(errors):.0e} from the clip in one piece"
    )
    assert max(errors) < 1e-4


def test_context_options_of_animatediff_evolved_see_the_first_frame(server, motion_file):
    """As the host's own windows do, which put no frame ahead here; on and under the tuned model."""
    edit = Edit(motion_file)
    graph = edit.graph
    edit.latent = random_latent(graph, LONG)
    on, under, expected, whole = server.latents(
        graph,
        edit.video(ade_windows(graph, edit.model)),
        edit.video(inflate(graph, ade_windows(graph, edit.loaded.model), motion=edit.motion)),
        edit.video(context_windows(graph, edit.model, frame_ahead=False)),
        edit.video(edit.model),
    )
    assert relative_error(on, expected) < 1e-4 and relative_error(under, expected) < 1e-4
    assert relative_error(whole, expected) > 1e-3


def test_edit_control_in_context_options_of_animatediff_evolved(server, motion_file):
    scene = PerFrame()
    graph = scene.graph
    control = graph.add("TAV_EditControl", preset="free", strength=1.0, self_share=0.8, layers="all")[0]
    own = advanced(scene)
    for conds in ((scene.positive, scene.negative), own):
        noise = invert(graph, scene.model, scene.latent, conds[0], 2)
        models = [scene.model, ade_windows(graph, scene.model), ade_windows(graph, scene.model, looped=True)]
        whole, *others = server.latents(
            graph, *(sample(graph, each, *conds, noise, 2, control=control) for each in models)
        )
        assert max(relative_error(each, whole) for each in others) < 1e-4


def tiled(graph: Graph, model: Link, method: str, batch: int) -> Link:
    return graph.add(
        "TiledDiffusion",
        model=model,
        method=method,
        tile_width=64,
        tile_height=64,
        tile_overlap=32,
        tile_batch_size=batch,
    )[0]


@pytest.mark.parametrize("method", ["MultiDiffusion", "Mixture of Diffusers", "SpotDiffusion"])
def test_tiles_of_tiled_diffusion_stay_videos(server, motion_file, method):
    """Stacked tiles are the same as tiles one by one; on and under the tuned model."""
    edit = Edit(motion_file)
    graph = edit.graph
    edit.latent = random_latent(graph)
    hints = graph.add(
        "ControlNetApplyAdvanced",
        positive=edit.positive,
        negative=edit.negative,
        control_net=graph.add("ControlNetLoader", control_net_name="control.safetensors")[0],
        image=random_hints(graph),
        strength=1.0,
        start_percent=0.0,
        end_percent=1.0,
    )
    one, stacked = tiled(graph, edit.model, method, 1), tiled(graph, edit.model, method, 4)
    under = inflate(graph, tiled(graph, edit.loaded.model, method, 4), motion=edit.motion)
    expected, found, found_under, whole, hinted, expected_hinted = server.latents(
        graph,
        *(edit.video(model) for model in (one, stacked, under, edit.model)),
        *(edit.video(model, hints[0], hints[1]) for model in (stacked, one)),
    )
    assert relative_error(found, expected) < 1e-4 and relative_error(found_under, expected) < 1e-4
    assert relative_error(hinted, expected_hinted) < 1e-4
    assert relative_error(whole, expected) > 1e-3 and relative_error(hinted, found) > 1e-3
    refused = sample(graph, context_windows(graph, stacked), edit.positive, edit.negative, edit.latent)
    assert_refused(server, graph, Node(refused[0]), "tiles and context windows")


def test_an_inversion_in_tiles_gives_the_clip_back(server, motion_file):
    edit = Edit(motion_file)
    graph = edit.graph
    source = text(graph, edit.loaded.clip, SOURCE_PROMPT)
    model = tiled(graph, edit.model, "MultiDiffusion", 4)
    noise = invert(graph, model, edit.latent, source)
    back, clip = server.latents(graph, sample(graph, model, source, edit.negative, noise, guidance=1.0), edit.latent)
    assert relative_error(back, clip) < 0.1
    control = graph.add("TAV_EditControl", preset="style", strength=0.5)[0]
    refused = sample(graph, model, edit.positive, edit.negative, noise, control=control)
    assert_refused(server, graph, Node(refused[0]), "Take the tiles off")


QUANTS = {".ff.": "Q4_0", ".attn2.": "BF16", ".attn1.": "Q8_0"}


def write_gguf(weights: dict[str, torch.Tensor], path: Any) -> dict[str, torch.Tensor]:
    """Write a GGUF file of several types; return what it stands for."""
    import gguf

    writer, meant = gguf.GGUFWriter(path, "sd1"), {}
    for name, value in weights.items():
        kind = next((q for part, q in QUANTS.items() if part in name), "F16") if value.ndim == 2 else "F16"
        kind = gguf.GGMLQuantizationType["F32" if value.ndim < 2 else kind]
        data = gguf.quants.quantize(value.float().numpy(), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
        meant[name] = torch.from_numpy(np.array(gguf.quants.dequantize(data, kind))).float().reshape(value.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


@pytest.mark.parametrize("loader", ["UnetLoaderGGUF", "UnetLoaderGGUFAdvanced"])
def test_a_gguf_file_is_tuned_as_the_weights_that_it_stands_for(server, loader):
    """With and without a LoRA, which that pack applies in a patcher of its own."""
    stored, meant, lora = "beside.gguf", "beside-meant.safetensors", "beside-lora.safetensors"
    models, layout = server.base / "models", tiny_checkpoint.SD1_SHALLOW
    folder = models / "diffusion_models"
    save_file(write_gguf(tiny_checkpoint.unet_weights(layout, seed=6), folder / stored), folder / meant)
    tiny_checkpoint.save(tiny_checkpoint.lora_weights(layout, seed=1), models / "loras" / lora)
    graph = Graph()
    clip, latent = checkpoint(graph).clip, random_latent(graph)
    source, edit, nothing = (text(graph, clip, prompt) for prompt in (SOURCE_PROMPT, EDIT_PROMPT, ""))
    more = {"dequant_dtype": "float32", "patch_dtype": "float32", "patch_on_device": False}
    plain = (
        graph.add(loader, unet_name=stored, **(more if loader.endswith("Advanced") else {}))[0],
        graph.add("UNETLoader", unet_name=meant, weight_dtype="default")[0],
    )
    with_lora = [
        graph.add("LoraLoaderModelOnly", model=model, lora_name=lora, strength_model=1.0)[0] for model in plain
    ]
    for pair in (plain, with_lora):
        jobs = []
        for model in pair:
            tuned = tune(graph, model, latent, source)[0]
            noise = invert(graph, tuned, latent, source)
            untuned = inflate(graph, model)
            jobs += [noise, sample(graph, tuned, edit, nothing, noise), sample(graph, untuned, edit, nothing, noise)]
        noise, edited, untuned, *expected = server.latents(graph, *jobs)
        assert relative_error(noise, expected[0]) < 2e-3
        assert relative_error(edited, expected[1]) < 2e-3
        difference = relative_error(edited, untuned)
        assert difference > 1e-2
        assert relative_error(edited - untuned, expected[1] - expected[2]) < max(0.1 / difference, 2e-3)
