"""Nodes that people chain with: hooks, adapters, guidances, prompts over time and space, compilation, offload.

LoRA, ControlNet's hints and the rest of the stock nodes have files of their own; docs/neighbours.md lists all.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import tiny_checkpoint
import torch
from graphs import (
    CLIP_FILE,
    FRAMES,
    HEIGHT,
    PACK,
    WIDTH,
    Edit,
    Graph,
    inflate,
    invert,
    random_hints,
    random_latent,
    relative_error,
    text,
    tune,
)
from host_server import HostServer

pytestmark = [pytest.mark.host, pytest.mark.shared]


def assert_an_effect(changed, plain):
    assert torch.isfinite(changed).all()
    assert relative_error(changed, plain) > 1e-3


# --- LoRA hooks ---------------------------------------------------------------------------------------


def hooked_prompt(edit, strengths):
    """The edit's prompt with a LoRA hook whose strength changes over the steps: {start_percent: strength}."""
    graph = edit.graph
    hooks = graph.add("CreateHookLora", lora_name="style.safetensors", strength_model=1.0, strength_clip=0.0)[0]
    keyframes = {}
    for start, strength in strengths.items():
        keyframes = {
            "prev_hook_kf": graph.add("CreateHookKeyframe", strength_mult=strength, start_percent=start, **keyframes)[0]
        }
    scheduled = graph.add("SetHookKeyframes", hooks=hooks, hook_kf=keyframes["prev_hook_kf"])[0]
    return graph.add("ConditioningSetProperties", cond_NEW=edit.positive, strength=1.0, set_cond_area="default",
                     hooks=scheduled)[0]  # fmt: skip


def test_lora_hooks_with_a_schedule(server, motion_file):
    """The schedule counts, and a hook at full strength on both prompts is the LoRA itself."""
    edit = Edit(motion_file)
    graph = edit.graph
    lora = graph.add(
        "LoraLoader", model=edit.model, clip=edit.loaded.clip, lora_name="style.safetensors", strength_model=1.0,
        strength_clip=0.0,
    )[0]  # fmt: skip
    from_start = hooked_prompt(edit, {0.0: 1.0})
    plain, off, late, whole, loaded = server.latents(
        graph,
        edit.video(edit.model, guidance=1.0),
        edit.video(edit.model, hooked_prompt(edit, {0.0: 0.0}), guidance=1.0),
        edit.video(edit.model, hooked_prompt(edit, {0.0: 0.0, 0.5: 1.0}), guidance=1.0),
        edit.video(edit.model, from_start, guidance=1.0),
        edit.video(lora, guidance=1.0),
    )
    assert relative_error(off, plain) < 1e-5
    assert_an_effect(whole, plain)
    # The hook patches in half precision what the loader patches in one go.
    assert relative_error(whole, loaded) < 1e-2 * relative_error(whole, plain)
    assert 0 < relative_error(late, plain) < relative_error(whole, plain)


# --- ControlNet and T2I-Adapter -----------------------------------------------------------------------


class Held:
    """An edit with hints."""

    def __init__(self, motion_file):
        self.edit = Edit(motion_file)
        self.net = self.edit.graph.add("ControlNetLoader", control_net_name="control.safetensors")[0]

    def hints(self, seed=3):
        return random_hints(self.edit.graph, seed=seed)

    def apply(self, conds=None, net=None, hints=None, strength=1.0, start_percent=0.0, end_percent=1.0):
        positive, negative = conds or (self.edit.positive, self.edit.negative)
        node = self.edit.graph.add(
            "ControlNetApplyAdvanced",
            positive=positive,
            negative=negative,
            control_net=net or self.net,
            image=hints or self.hints(),
            strength=strength,
            start_percent=start_percent,
            end_percent=end_percent,
        )
        return node[0], node[1]

    def video(self, conds=None, model=None):
        return self.edit.video(model or self.edit.model, *(conds or ()))


def test_controlnet_strength_and_range(server, motion_file):
    held = Held(motion_file)
    none, full, weak, off, early, late = server.latents(
        held.edit.graph,
        held.video(),
        held.video(held.apply()),
        held.video(held.apply(strength=0.2)),
        held.video(held.apply(strength=0.0)),
        held.video(held.apply(end_percent=0.4)),
        held.video(held.apply(start_percent=0.4)),
    )
    assert relative_error(off, none) < 1e-5
    assert 0 < relative_error(weak, none) < relative_error(full, none)
    for part in (early, late):
        assert_an_effect(part, none)
        assert relative_error(part, full) > 1e-3
    assert relative_error(early, late) > 1e-3


def test_two_controlnets(server, motion_file):
    """Both count, and their order does not matter, in one batch and apart."""
    held = Held(motion_file)
    first, second = held.hints(3), held.hints(5)
    both = held.apply(held.apply(hints=first, strength=0.5), hints=second, strength=0.4)
    swapped = held.apply(held.apply(hints=second, strength=0.4), hints=first, strength=0.5)
    separate = held.edit.graph.add("ProbeSeparateConds", model=held.edit.model)[0]
    together, other_order, apart, first_only, second_only = server.latents(
        held.edit.graph,
        held.video(both),
        held.video(swapped),
        held.video(both, separate),
        held.video(held.apply(hints=first, strength=0.5)),
        held.video(held.apply(hints=second, strength=0.4)),
    )
    assert relative_error(other_order, together) < 1e-4
    assert relative_error(apart, together) < 1e-4
    for one in (first_only, second_only):
        assert_an_effect(together, one)


@pytest.fixture(scope="module")
def adapter_files(server, motion_file):
    """A T2I-Adapter, and a checkpoint with as many blocks as it needs, by name."""
    names = "two-blocks.safetensors", "adapter.safetensors"
    paths = [
        tiny_checkpoint.save(weights, server.base / "models" / folder / name)
        for weights, folder, name in (
            (tiny_checkpoint.unet_weights(tiny_checkpoint.SD1_TWO_BLOCKS, seed=21), "diffusion_models", names[0]),
            (tiny_checkpoint.t2i_adapter_weights(seed=22), "controlnet", names[1]),
        )
    ]
    yield names
    for path in paths:
        path.unlink()


def test_t2i_adapter(server, motion_file, adapter_files, new_log):
    """A hint for each frame, in one batch and apart; strength counts; nothing is left out for its shape."""
    held = Held(motion_file)
    graph = held.edit.graph
    unet = graph.add("UNETLoader", unet_name=adapter_files[0], weight_dtype="default")[0]
    model = inflate(graph, unet)
    adapter = graph.add("ControlNetLoader", control_net_name=adapter_files[1])[0]
    conds = held.apply(net=adapter)
    one_hint = graph.add("ImageFromBatch", image=held.hints(), batch_index=0, length=1)[0]
    separate = graph.add("ProbeSeparateConds", model=model)[0]
    none, full, apart, weak, single = server.latents(
        graph,
        held.video(model=model),
        held.video(conds, model),
        held.video(conds, separate),
        held.video(held.apply(net=adapter, strength=0.3), model),
        held.video(held.apply(net=adapter, hints=one_hint), model),
    )
    assert_an_effect(full, none)
    assert relative_error(apart, full) < 1e-4
    assert 0 < relative_error(weak, none) < relative_error(full, none)
    assert relative_error(single, full) > 1e-3
    assert "control could not be applied" not in new_log()


# --- patches of the model -----------------------------------------------------------------------------


def test_image_prompt_patches(server, motion_file):
    """Patches of attn2 as IPAdapter sets them: before or after inflation, in one batch and apart."""
    edit = Edit(motion_file)
    graph = edit.graph

    def prompted(model):
        return graph.add("ProbeImagePrompt", model=model, strength=0.8, seed=5)[0]

    after = prompted(edit.model)
    plain, given_after, given_before, apart = server.latents(
        graph,
        edit.video(edit.model),
        edit.video(after),
        edit.video(inflate(graph, prompted(edit.loaded.model), motion=edit.motion)),
        edit.video(graph.add("ProbeSeparateConds", model=after)[0]),
    )
    assert_an_effect(given_after, plain)
    assert relative_error(given_before, given_after) < 1e-5
    assert relative_error(apart, given_after) < 1e-4


@pytest.mark.parametrize(
    ("node", "values"),
    [("PerturbedAttentionGuidance", {"scale": 3.0}), ("SelfAttentionGuidance", {"scale": 0.5, "blur_sigma": 2.0})],
)
def test_attention_guidance(server, motion_file, node, values):
    """PAG and SAG run on the tuned model, before or after inflation, and at strength 0 PAG is not there."""
    edit = Edit(motion_file)
    graph = edit.graph

    def guided(model, **changes):
        return graph.add(node, model=model, **(values | changes))[0]

    plain, after, before, off = server.latents(
        graph,
        edit.video(edit.model),
        edit.video(guided(edit.model)),
        edit.video(inflate(graph, guided(edit.loaded.model), motion=edit.motion)),
        edit.video(guided(edit.model, scale=0.0)),
    )
    assert_an_effect(after, plain)
    assert relative_error(before, after) < 1e-5
    assert relative_error(off, after) > 1e-3
    if node == "PerturbedAttentionGuidance":
        assert relative_error(off, plain) < 1e-5
    else:  # it records the middle block's attention by doing it itself, and so per frame
        assert relative_error(off, plain) < 0.2


def test_torch_compile(server, motion_file):
    """A compiled UNet gives what the plain one gives. With the smallest UNet: compiling takes the time."""
    edit = Edit(motion_file)
    # Frames that have little in common, so that it shows whether they look at each other.
    edit.latent = random_latent(edit.graph)
    unet = edit.graph.add("UNETLoader", unet_name="sd1-shallow.safetensors", weight_dtype="default")[0]
    model = inflate(edit.graph, unet)
    compiled = edit.graph.add("TorchCompileModel", model=model, backend="inductor")[0]
    plain, fast, per_frame = server.latents(
        edit.graph,
        edit.video(model, guidance=1.0),
        edit.video(compiled, guidance=1.0),
        edit.video(unet, guidance=1.0),
    )
    assert relative_error(plain, per_frame) > 1e-4
    assert relative_error(fast, plain) < 0.05 * relative_error(plain, per_frame)


def test_weights_that_stay_offloaded(server, motion_file):
    """As under --lowvram and --novram, which need a GPU: sampling and tuning as with all weights loaded."""
    edit = Edit(motion_file)
    graph = edit.graph
    offloaded = graph.add("ProbeOffloaded", model=edit.loaded.model)[0]
    source = text(graph, edit.loaded.clip, "a man is skiing")
    untuned, *pairs = server.latents(
        graph,
        edit.video(inflate(graph, edit.loaded.model)),
        edit.video(edit.model),
        edit.video(inflate(graph, offloaded, motion=edit.motion)),
        edit.video(tune(graph, edit.loaded.model, edit.latent, source)[0]),
        edit.video(tune(graph, offloaded, edit.latent, source)[0]),
    )
    for loaded, fetched in (pairs[:2], pairs[2:]):
        assert_an_effect(fetched, untuned)
        assert relative_error(fetched, loaded) < 0.05 * relative_error(loaded, untuned)


# --- prompts ------------------------------------------------------------------------------------------


def test_textual_inversion(server, motion_file):
    """Its words stand for the embedding, and the log misses none."""
    folder = server.base / "models" / "embeddings"
    path = tiny_checkpoint.save(tiny_checkpoint.embedding_weights(tokens=2, seed=30), folder / "my-style.safetensors")
    before = len(server.log())
    edit = Edit(motion_file)
    with_it = text(edit.graph, edit.loaded.clip, "a man is skiing, embedding:my-style")
    without = text(edit.graph, edit.loaded.clip, "a man is skiing, ")
    given, plain = server.latents(edit.graph, edit.video(edit.model, with_it), edit.video(edit.model, without))
    path.unlink()
    assert_an_effect(given, plain)
    assert "does not exist" not in server.log()[before:]


def combined(graph, *conds):
    first, *rest = conds
    for other in rest:
        first = graph.add("ConditioningCombine", conditioning_1=first, conditioning_2=other)[0]
    return first


def test_prompt_scheduling(server, motion_file):
    """One prompt for the first steps and another one for the rest, in one batch and apart."""
    edit = Edit(motion_file)
    graph = edit.graph
    other = text(graph, edit.loaded.clip, "a panda on the moon")

    def during(prompt, start, end):
        return graph.add("ConditioningSetTimestepRange", conditioning=prompt, start=start, end=end)[0]

    scheduled = combined(graph, during(edit.positive, 0.0, 0.5), during(other, 0.5, 1.0))
    separate = graph.add("ProbeSeparateConds", model=edit.model)[0]
    first_only, second_only, both, apart, always = server.latents(
        graph,
        edit.video(edit.model),
        edit.video(edit.model, other),
        edit.video(edit.model, scheduled),
        edit.video(separate, scheduled),
        edit.video(edit.model, during(edit.positive, 0.0, 1.0)),
    )
    for one in (first_only, second_only):
        assert_an_effect(both, one)
    assert relative_error(apart, both) < 1e-4
    assert relative_error(always, first_only) < 1e-5


def half_mask(graph):
    """The left half of the picture."""
    black = graph.add("SolidMask", value=0.0, width=WIDTH, height=HEIGHT)[0]
    white = graph.add("SolidMask", value=1.0, width=WIDTH // 2, height=HEIGHT)[0]
    return graph.add("MaskComposite", destination=black, source=white, x=0, y=0, operation="add")[0]


def test_area_and_mask_conditioning(server, motion_file):
    """A prompt for a half of every frame; a mask over everything changes nothing."""
    edit = Edit(motion_file)
    graph = edit.graph
    other = text(graph, edit.loaded.clip, "a panda on the moon")

    def masked(mask):
        return graph.add("ConditioningSetMask", conditioning=other, mask=mask, strength=1.0, set_cond_area="default")[0]

    # 64 pixels and more: smaller areas there are not: half of a wider picture.
    wide = graph.add("EmptyLatentImage", width=2 * WIDTH, height=HEIGHT, batch_size=FRAMES)[0]
    noise = random_latent(graph, seed=3)
    wide = graph.add("LatentComposite", samples_to=wide, samples_from=noise, x=0, y=0, feather=0)[0]
    area = graph.add(
        "ConditioningSetArea", conditioning=other, width=WIDTH, height=HEIGHT, x=WIDTH, y=0, strength=1.0
    )[0]  # fmt: skip
    everything = graph.add("SolidMask", value=1.0, width=WIDTH, height=HEIGHT)[0]

    plain, alone, half, whole = server.latents(
        graph,
        edit.video(edit.model),
        edit.video(edit.model, other),
        edit.video(edit.model, combined(graph, edit.positive, masked(half_mask(graph)))),
        edit.video(edit.model, masked(everything)),
    )
    for one in (plain, alone):
        assert_an_effect(half, one)
    assert relative_error(whole, alone) < 1e-5

    edit.latent = wide
    without, with_area = server.latents(
        graph, edit.video(edit.model), edit.video(edit.model, combined(graph, edit.positive, area))
    )
    left, right = (slice(0, WIDTH // 8), slice(WIDTH // 8, None))
    change = (with_area - without).abs()
    assert torch.isfinite(with_area).all()
    assert change[..., right].mean() > 2 * change[..., left].mean()


def test_noise_mask(server, motion_file):
    """Outside the mask the clip stays as it is, whether the mask is set before or after the inversion."""
    edit = Edit(motion_file)
    graph = edit.graph
    mask = half_mask(graph)

    def with_mask(latent):
        return graph.add("SetLatentNoiseMask", samples=latent, mask=mask)[0]

    clip, latents = edit.latent, []
    for masked in (
        with_mask(invert(graph, edit.model, clip, edit.negative)),
        invert(graph, edit.model, with_mask(clip), edit.negative),
    ):
        edit.latent = masked
        latents.append(edit.video(edit.model))
    original, after, before = server.latents(graph, clip, *latents)
    half = WIDTH // 16
    assert torch.equal(after, before)
    assert relative_error(after[..., half:], original[..., half:]) < 1e-5
    assert_an_effect(after[..., :half], original[..., :half])


# --- files and flags ----------------------------------------------------------------------------------


def test_core_load_video(server, motion_file):
    """Frames of core's LoadVideo are those of ours."""
    graph = Graph()
    loaded = graph.add("LoadVideo", file=CLIP_FILE)
    parts = graph.add("GetVideoComponents", video=loaded[0])
    ours = graph.add(
        "TAV_LoadVideo", file=CLIP_FILE, start=0.0, start_unit="frames", frame_count=FRAMES, frame_step=1, width=WIDTH,
        height=HEIGHT, resize="crop to fill",
    )[0]  # fmt: skip
    few = graph.add("ImageFromBatch", image=parts[0], batch_index=0, length=FRAMES)[0]
    small = graph.add("ImageScale", image=few, upscale_method="area", width=WIDTH, height=HEIGHT, crop="center")[0]
    vae = graph.add("CheckpointLoaderSimple", ckpt_name="tiny-sd1.safetensors")[2]
    theirs, own = server.latents(
        graph, graph.add("VAEEncode", pixels=small, vae=vae)[0], graph.add("VAEEncode", pixels=ours, vae=vae)[0]
    )
    assert theirs.shape == own.shape
    assert relative_error(theirs, own) < 0.05


def test_disable_smart_memory(comfyui, server, motion_file):
    """Every load unloads everything else: tune, invert and sample in one graph all the same."""
    with tempfile.TemporaryDirectory(prefix="tune-a-video-memory-") as folder:
        base = Path(folder)
        (base / "models").symlink_to(server.base / "models")
        (base / "input").symlink_to(server.input_folder)
        packs = {PACK: Path(__file__).resolve().parents[2]}
        with HostServer(comfyui, base, packs, arguments=["--disable-smart-memory"]) as careful:
            edit = Edit(motion_file)
            graph = edit.graph
            source = text(graph, edit.loaded.clip, "a man is skiing")
            tuned = tune(graph, edit.model, edit.latent, source)[0]
            edit.latent = invert(graph, tuned, edit.latent, source)
            frames = graph.add("VAEDecode", samples=edit.video(tuned), vae=edit.loaded.vae)[0]
            graph.add("SaveImage", images=frames, filename_prefix="careful")
            careful.run(graph.nodes).raise_for_error()
            assert len(list(careful.output_folder.glob("careful*.png"))) == FRAMES
